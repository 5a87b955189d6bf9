"""Numbers of classes either side of where kernels change their way of working; where there is a GPU, its kernels' too."""

import pytest
import torch

ON_A_GPU = torch.cuda.is_available()

# The C++ kernel: a lane short of 4, 8 and 16, either side of where rows stop being lanes (64), of a block of sums (32 vectors),
# primes, and wide rows. The CUDA and Triton kernels: several rows a warp, a warp a row, a block a row and two passes.
CLASSES = (2, 3, 7, 8, 10, 16, 17, 31, 64, 65, 100, 127, 128, 129, 256, 257, 512, 1000, 2053, 5000)
if ON_A_GPU:
    CLASSES += (32, 33, 63, 1001, 1023, 1024, 1025, 4096, 8191, 8193, 16_384, 21_841, 50_257)

NARROW_AND_WIDE = pytest.mark.parametrize("classes", [10, 100, *((1001, 5000) if ON_A_GPU else ())])
