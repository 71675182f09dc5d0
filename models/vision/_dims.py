"""What a network needs from the library in each number of spatial dimensions: one table.

Networks in this package are written once, over this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonconv.runtime.errors import bad_value


@dataclass(frozen=True)
class Dimension:
    """The operators of one number of spatial dimensions.

    Attributes:
        count: number of spatial dimensions.
        Conv: module class with the constructor of ``torch.nn.Conv2d`` plus ``epilogue``.
        conv: function with the arguments of ``tritonconv.conv2d``.
        BatchNorm: module class.
        max_pool: function ``(input, kernel_size)``.
        mode: the linear interpolation mode of ``torch.nn.functional.interpolate``.
    """

    count: int
    Conv: Callable[..., Any]
    conv: Callable[..., Tensor]
    BatchNorm: Callable[..., Any]
    max_pool: Callable[..., Tensor]
    mode: str

    def resize(self, x: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
        """Resize linearly to ``size``, always with ``align_corners=False``."""
        if x.shape[2:] == torch.Size(size):
            return x
        return F.interpolate(x, size=tuple(size), mode=self.mode, align_corners=False)

    def per_channel(self, x: Tensor) -> Tensor:
        """View a vector ``(C,)`` so that it broadcasts over ``(N, C, *spatial)``."""
        return x.view(1, -1, *(1,) * self.count)


def dimension(dim: int) -> Dimension:
    """Return the row of the table for ``dim`` spatial dimensions.

    Raises:
        ValueError: ``dim`` is neither 2 nor 3.
    """
    import tritonconv as tc

    if dim == 2:
        return Dimension(2, tc.nn.Conv2d, tc.conv2d, nn.BatchNorm2d, F.max_pool2d, "bilinear")
    if dim == 3:
        return Dimension(3, tc.nn.Conv3d, tc.conv3d, nn.BatchNorm3d, F.max_pool3d, "trilinear")
    raise bad_value("dim", "2 or 3", dim)
