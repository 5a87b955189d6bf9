"""The methods: what a run does with its unlabelled samples, in stages 2 and 3. A file each."""

from r2d2fast.train.methods.fixmatch import FixMatch
from r2d2fast.train.methods.mean_teacher import MeanTeacher
from r2d2fast.train.methods.method import LossFunction, Method
from r2d2fast.train.methods.pi_model import PiModel
from r2d2fast.train.methods.pseudo_label import PseudoLabel
from r2d2fast.train.methods.r2d2 import R2D2
from r2d2fast.train.methods.supervised import Supervised
from r2d2fast.train.methods.temporal_ensembling import TemporalEnsembling
from r2d2fast.train.methods.vat import VAT

METHODS: dict[str, type[Method]] = {
    "r2d2": R2D2,
    "supervised": Supervised,
    "pseudo-label": PseudoLabel,
    "pi-model": PiModel,
    "temporal-ensembling": TemporalEnsembling,
    "mean-teacher": MeanTeacher,
    "vat": VAT,
    "fixmatch": FixMatch,
}

__all__ = ["METHODS", "R2D2", "LossFunction", "Method", "Supervised"]
