"""The error that a user of the report sees instead of a traceback."""


class ReportError(Exception):
    """The report, or a run in it, cannot be made; the message names the cause and the way out."""
