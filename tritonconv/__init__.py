"""GPU kernels for PyTorch, generated from the mathematics you write and tuned for your GPU."""

from . import codegen, nn
from .conv.api import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from .runtime.backend import backend
from .runtime.errors import TritonConvError
from .runtime.explain import explain, tuning
from .runtime.settings import settings

__all__ = [
    "TritonConvError",
    "backend",
    "codegen",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "explain",
    "nn",
    "settings",
    "tuning",
]
