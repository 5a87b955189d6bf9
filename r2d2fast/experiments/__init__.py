"""The tables and figures of the paper: ``python -m r2d2fast.experiments``."""
