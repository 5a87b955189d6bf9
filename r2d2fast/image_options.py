"""What a user may choose of how image files are read; apart, because help texts that name it come before PyTorch is imported."""

from typing import Literal

OnBadImage = Literal["error", "skip"]
Decoder = Literal["cpu", "dali"]
TEST_FRACTION = 0.2
"""Of the labelled images of each class, the share that a folder without a part for tests keeps for them."""
