"""What the report can tell its user instead of a traceback."""


class ReportError(Exception):
    """There is no report, or not of this run; the message names the cause and the way out."""
