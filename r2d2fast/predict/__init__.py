"""A trained network at work: the classes of images that no run has seen."""

from r2d2fast.predict.trained_run import Predictions, RunError, TrainedRun, load_run

__all__ = ["Predictions", "RunError", "TrainedRun", "load_run"]
