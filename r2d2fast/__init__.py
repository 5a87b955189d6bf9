"""Semi-supervised deep learning by R2-D2 (Wang & Wu, AAAI 2020): a fused D2 loss over a bank of learned pseudo-labels."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r2d2fast._backends import BackendStatus, backends
    from r2d2fast.bank import PseudoLabelBank
    from r2d2fast.data.in_memory import dataset_from_arrays, dataset_from_torch
    from r2d2fast.data.sharded import ShardedBatchSampler, ShardedPseudoLabelBank
    from r2d2fast.errors import BackendError, BankError
    from r2d2fast.estimator import R2D2Classifier
    from r2d2fast.in_python import FinishedRun, train_run
    from r2d2fast.indexed import with_index
    from r2d2fast.loss import FusedD2Loss, d2_loss, d2_step
    from r2d2fast.predict import load_run
    from r2d2fast.train.recipes import recipe_for

__all__ = [
    "BackendError",
    "BackendStatus",
    "BankError",
    "FinishedRun",
    "FusedD2Loss",
    "PseudoLabelBank",
    "R2D2Classifier",
    "ShardedBatchSampler",
    "ShardedPseudoLabelBank",
    "backends",
    "d2_loss",
    "d2_step",
    "dataset_from_arrays",
    "dataset_from_torch",
    "load_run",
    "recipe_for",
    "train_run",
    "with_index",
]
__version__ = "0.1.0"

# Imported when they are asked for: PyTorch takes seconds, for which no --help needs to wait, and the loss alone needs neither
# torchvision nor scikit-learn, which take seconds more.
_MODULES = {
    "_backends": ("BackendStatus", "backends"),
    "bank": ("PseudoLabelBank",),
    "data.in_memory": ("dataset_from_arrays", "dataset_from_torch"),
    "data.sharded": ("ShardedBatchSampler", "ShardedPseudoLabelBank"),
    "errors": ("BackendError", "BankError"),
    "estimator": ("R2D2Classifier",),
    "in_python": ("FinishedRun", "train_run"),
    "indexed": ("with_index",),
    "loss": ("FusedD2Loss", "d2_loss", "d2_step"),
    "predict": ("load_run",),
    "reference": (),
    "train.recipes": ("recipe_for",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name == module or name in names:
            found = importlib.import_module(f"{__name__}.{module}")
            globals()[name] = value = found if name == module else getattr(found, name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
