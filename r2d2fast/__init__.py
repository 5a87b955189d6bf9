"""Semi-supervised deep learning by R2-D2 (Wang & Wu, AAAI 2020): a fused D2 loss over a bank of learned pseudo-labels."""

from typing import TYPE_CHECKING, Any

from r2d2fast._backends import BackendStatus, backends
from r2d2fast.bank import PseudoLabelBank
from r2d2fast.errors import BackendError, BankError
from r2d2fast.loss import FusedD2Loss, d2_step

if TYPE_CHECKING:
    from r2d2fast.estimator import R2D2Classifier

__all__ = [
    "BackendError",
    "BackendStatus",
    "BankError",
    "FusedD2Loss",
    "PseudoLabelBank",
    "R2D2Classifier",
    "backends",
    "d2_step",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # When it is asked for: with scikit-learn and the trainer it takes seconds to import.
    if name == "R2D2Classifier":
        from r2d2fast.estimator import R2D2Classifier

        return R2D2Classifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
