"""GPU kernels in Triton, installed as ``r2d2fast.kernels``; imported at their first use, since a machine may lack Triton."""
