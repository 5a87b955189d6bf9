"""What a run can tell its user instead of a traceback."""


class TrainingError(Exception):
    """The run cannot go on; the message names the cause and the way out."""

    status = 1
    """The exit status of the command."""


class ConfigError(TrainingError):
    """The configuration asks for what cannot be; the message names the value and the accepted ones."""

    status = 2


class DivergenceError(TrainingError):
    """The loss or the logits are not finite; the message names the place."""


class LostRankError(TrainingError):
    """Another process of the run is gone."""


class PreemptedError(TrainingError):
    """The machine is taken away; a checkpoint has been written."""

    status = 143  # 128 + SIGTERM, as a shell says it


DIVERGED = "the network has diverged: lower the learning rate of the stage and start in another --run-dir."
"""What a DivergenceError ends with."""
