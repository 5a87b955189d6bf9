"""What a run can tell its user instead of a traceback."""


class TrainingError(Exception):
    """The run cannot go on; the message names the cause and the way out."""


class ConfigError(TrainingError):
    """The configuration asks for what cannot be; the message names the value and the accepted ones."""


class DivergenceError(TrainingError):
    """The loss or the logits are not finite; the message names the place."""
