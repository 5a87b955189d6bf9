"""The methods: what a run does with its unlabelled samples, in stages 2 and 3. A file each."""

from r2d2fast.train.methods.method import LossFunction, Method
from r2d2fast.train.methods.r2d2 import R2D2
from r2d2fast.train.methods.supervised import Supervised

__all__ = ["R2D2", "LossFunction", "Method", "Supervised"]
