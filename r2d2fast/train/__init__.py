"""The trainer: ``python -m r2d2fast.train``."""
