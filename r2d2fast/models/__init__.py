"""Networks."""

from r2d2fast.models.small import small_convnet

__all__ = ["small_convnet"]
