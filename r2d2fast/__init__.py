"""Semi-supervised deep learning by R2-D2 (Wang & Wu, AAAI 2020): a fused D2 loss over a bank of learned pseudo-labels."""

import importlib
from typing import TYPE_CHECKING, Any

from r2d2fast._backends import BackendStatus, backends
from r2d2fast.bank import PseudoLabelBank
from r2d2fast.errors import BackendError, BankError
from r2d2fast.indexed import with_index
from r2d2fast.loss import FusedD2Loss, d2_loss, d2_step

if TYPE_CHECKING:
    from r2d2fast.data.sharded import ShardedBatchSampler, ShardedPseudoLabelBank
    from r2d2fast.estimator import R2D2Classifier
    from r2d2fast.predict import load_run

__all__ = [
    "BackendError",
    "BackendStatus",
    "BankError",
    "FusedD2Loss",
    "PseudoLabelBank",
    "R2D2Classifier",
    "ShardedBatchSampler",
    "ShardedPseudoLabelBank",
    "backends",
    "d2_loss",
    "d2_step",
    "load_run",
    "with_index",
]
__version__ = "0.1.0"

# Imported when they are asked for: the loss alone needs neither torchvision nor scikit-learn, which take seconds to import.
_LAZY = {
    "R2D2Classifier": "r2d2fast.estimator",
    "ShardedBatchSampler": "r2d2fast.data.sharded",
    "ShardedPseudoLabelBank": "r2d2fast.data.sharded",
    "load_run": "r2d2fast.predict",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
