"""GPU kernels in Triton, installed as ``r2d2fast.kernels``: none in this version (see ``r2d2fast.backends()``)."""
