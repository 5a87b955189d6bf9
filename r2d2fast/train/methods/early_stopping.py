"""Early stopping of stage 2: by the labelled samples, since nobody has test data to stop by."""

from typing import Any

from torch import Tensor, nn

SHARE = 0.3


class EarlyStopping:
    """Keeps the network of the last time that all was well, and says when it no longer is.

    Where stage 2 harms, the network unlearns its labelled samples first. How much of that is too much depends on how well stage 1
    has learned: it harms where the labelled error rises by more than :data:`SHARE` of the error that stage 1 expects of itself,
    one minus its mean confidence on the unlabelled samples, or by more than ``limit``; and by three samples, since fewer may be
    chance.

    With a linear classifier, after the first quarter of stage 2: on the digits' pixels with 200 labels it rose by 2.5 to 6.5
    points, of 3.8 to 4.9 expected, while the error on the unlabelled samples rose by 1.0 on average (seeds 10 to 37); with 50
    labels it rose by two samples at most, and that error fell by 2.1 points; with 20 it did not rise, and that error fell by 4.9
    (seeds 10 to 17). On embeddings of CIFAR-10 with 4000 labels it rose by 5.4 to 6.5, of 19 to 20 expected, while that error
    fell by 0.2, to rise again afterwards (seeds 10 to 12).

    Args:
        network: at the beginning of the stage.
        limit: points of labelled error above the first one, in percent, from which on it harms in any case.
        labelled: the number of labelled samples.

    Attributes:
        kept: the ``state_dict`` of the network that is kept. State of the run.
        first_error, expected_error: the labelled error at the beginning, and that which stage 1 expects of the unlabelled
            samples, both in percent. State of the run.
        stopped: whether the stage is over. State of the run.
    """

    def __init__(self, network: nn.Module, limit: float, labelled: int) -> None:
        self.limit = limit
        self.labelled = labelled
        self.kept: dict[str, Tensor] = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        self.first_error, self.expected_error = 0.0, 100.0
        self.stopped = False

    def stop(self, error: float, network: nn.Module) -> bool:
        """Keep ``network``; or, if its labelled error is too high, give it back the weights that were kept. Whether so."""
        rise = error - self.first_error
        if rise > min(self.limit, SHARE * self.expected_error) and round(rise * self.labelled / 100) >= 3:
            self.stopped = True
            network.load_state_dict(self.kept)
        elif not self.stopped:
            for name, tensor in network.state_dict().items():
                self.kept[name].copy_(tensor)
        return self.stopped

    def values(self) -> dict[str, Any]:
        """What a checkpoint has to hold beside ``kept``."""
        return {"first_error": self.first_error, "expected_error": self.expected_error, "stopped": self.stopped}

    def load_values(self, values: dict[str, Any]) -> None:
        """Take over what :meth:`values` gave."""
        self.first_error, self.expected_error = values["first_error"], values["expected_error"]
        self.stopped = values["stopped"]
