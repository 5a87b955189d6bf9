"""``python -m r2d2fast.doctor``: what is installed, whether each backend is right on this machine, and how fast it is."""
