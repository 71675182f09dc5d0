"""``torch.nn`` modules over the library's functions, and conversion of existing models."""

from .conv import Conv2d

__all__ = ["Conv2d"]
