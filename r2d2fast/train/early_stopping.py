"""Early stopping of stage 2: by the labelled samples, since nobody has test data to stop by."""

from typing import Any

from torch import Tensor, nn


class EarlyStopping:
    """Keeps the network of the last time that all was well, and says when it no longer is.

    Where stage 2 harms, the network unlearns its labelled samples first: with 200 labelled digits and a linear classifier, which
    cannot do with so many, their error rose from 0 to 7.5 % before the test error had risen from 7.4 to 10.2 %.

    Args:
        network: at the beginning of the stage.
        limit: points of labelled error above the first one, in percent, from which on it harms.

    Attributes:
        kept: the ``state_dict`` of the network that is kept. State of the run.
        first_error: the labelled error at the beginning, in percent. State of the run.
        stopped: whether the stage is over. State of the run.
    """

    def __init__(self, network: nn.Module, limit: float) -> None:
        self.limit = limit
        self.kept: dict[str, Tensor] = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        self.first_error = 0.0
        self.stopped = False

    def stop(self, error: float, network: nn.Module) -> bool:
        """Keep ``network``; or, if its labelled error is too high, give it back the weights that were kept. Whether so."""
        if error > self.first_error + self.limit:
            self.stopped = True
            network.load_state_dict(self.kept)
        elif not self.stopped:
            for name, tensor in network.state_dict().items():
                self.kept[name].copy_(tensor)
        return self.stopped

    def values(self) -> dict[str, Any]:
        """What a checkpoint has to hold beside ``kept``."""
        return {"first_error": self.first_error, "stopped": self.stopped}

    def load_values(self, values: dict[str, Any]) -> None:
        """Take over what :meth:`values` gave."""
        self.first_error, self.stopped = values["first_error"], values["stopped"]
