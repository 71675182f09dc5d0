"""GPU kernels for PyTorch, generated from the mathematics you write and tuned for your GPU."""

from . import codegen, nn
from .conv.api import conv2d
from .runtime.backend import backend
from .runtime.errors import TritonConvError
from .runtime.explain import explain, tuning
from .runtime.settings import settings

__all__ = [
    "TritonConvError",
    "backend",
    "codegen",
    "conv2d",
    "explain",
    "nn",
    "settings",
    "tuning",
]
