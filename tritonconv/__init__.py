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
from .conv.scaled import (
    quantize_per_channel,
    quantize_per_tensor,
    scaled_conv1d,
    scaled_conv2d,
    scaled_conv3d,
)
from .conv.statistics import conv1d_with_stats, conv2d_with_stats, conv3d_with_stats
from .norm.layer_api import layer_norm
from .runtime.backend import backend
from .runtime.errors import TritonConvError
from .runtime.explain import explain, tuning
from .runtime.settings import settings

__all__ = [
    "TritonConvError",
    "backend",
    "codegen",
    "conv1d",
    "conv1d_with_stats",
    "conv2d",
    "conv2d_with_stats",
    "conv3d",
    "conv3d_with_stats",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "explain",
    "layer_norm",
    "nn",
    "quantize_per_channel",
    "quantize_per_tensor",
    "scaled_conv1d",
    "scaled_conv2d",
    "scaled_conv3d",
    "settings",
    "tuning",
]
