"""Semi-supervised deep learning by R2-D2 (Wang & Wu, AAAI 2020): a fused D2 loss over a bank of learned pseudo-labels."""

from r2d2fast._backends import BackendStatus, backends
from r2d2fast.bank import PseudoLabelBank
from r2d2fast.errors import BackendError, BankError
from r2d2fast.indexed import with_index
from r2d2fast.loss import FusedD2Loss, d2_loss, d2_step

__all__ = [
    "BackendError",
    "BackendStatus",
    "BankError",
    "FusedD2Loss",
    "PseudoLabelBank",
    "backends",
    "d2_loss",
    "d2_step",
    "with_index",
]
__version__ = "0.1.0"
