"""``torch.nn`` modules over the library's functions, and conversion of existing models."""

from .conv import Conv2d
from .convert import ConversionReport, Converted, Kept, convert, revert

__all__ = ["Conv2d", "ConversionReport", "Converted", "Kept", "convert", "revert"]
