"""The description of a forward convolution fused with what surrounds it: input side and statistics.

A kind of problem of its own, with operators of its own (``conv2d.fused``): the problems of the
three plain products, and the entries tuned for them, know nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..runtime.operators import Field
from .problem import _WIDE_SPAN, ConvProblem, EpilogueSpec, _layout, _span


@dataclass(frozen=True)
class FusedProblem(ConvProblem):
    """A forward product of one input under a prologue, or of two inputs side by side.

    ``in_channels`` counts the channels of all inputs; ``x_shape`` and ``x_strides`` are those of
    the first one.

    Attributes:
        prologue: the function applied to the input where it lies inside its map, and what it reads:
            ``capture_*`` of the spec, no elements.
        second_channels: channels of the second input; 0 without one.
        second_strides: strides of the second input.
        stats: also compute mean and biased variance of every channel of the output.
    """

    prologue: EpilogueSpec | None = None
    second_channels: int = 0
    second_strides: tuple[int, ...] = ()
    stats: bool = False

    @property
    def operator(self) -> str:
        """``conv2d.fused`` and its like."""
        return f"conv{len(self.in_size)}d.fused"

    @property
    def first_channels(self) -> int:
        """Channels of the first input."""
        return self.in_channels - self.second_channels

    @property
    def x_shape(self) -> tuple[int, ...]:
        """(batch, channels, *spatial) of the first input."""
        return (self.batch, self.first_channels, *self.in_size)

    @property
    def second_shape(self) -> tuple[int, ...]:
        """(batch, channels, *spatial) of the second input."""
        return (self.batch, self.second_channels, *self.in_size)

    @property
    def second_layout(self) -> str:
        """Memory format of the second input; that of the first without one."""
        if not self.second_channels:
            return self.x_layout
        return _layout(self.second_shape, self.second_strides)

    @property
    def wide(self) -> bool:
        """Whether an element offset of some tensor, or the number of pixels, can pass 2^31."""
        if super().wide:
            return True
        tensors = []
        if self.second_channels:
            tensors.append((self.second_shape, self.second_strides))
        if self.prologue is not None:
            tensors += zip(self.prologue.capture_shapes, self.prologue.capture_strides, strict=True)
        return any(_span(shape, hops) >= _WIDE_SPAN for shape, hops in tensors if 0 not in shape)

    def fields(self) -> Mapping[str, Field]:
        """Of the convolution, and what is fused with it."""
        return {
            **super().fields(),
            "prologue": "none" if self.prologue is None else "fused",
            "second_channels": self.second_channels,
            "second_layout": self.second_layout,
            "stats": self.stats,
        }

    def bytes_moved(self) -> int:
        """Every element that is touched once."""
        total = super().bytes_moved()
        if self.prologue is not None:
            total += sum(
                dtype.itemsize * math.prod(shape)
                for dtype, shape in zip(
                    self.prologue.capture_dtypes, self.prologue.capture_shapes, strict=True
                )
            )
        if self.stats:
            total += 2 * self.out_channels * torch.float32.itemsize
        return total

    def __str__(self) -> str:
        text = super().__str__()
        if self.second_channels:
            text += f" inputs {self.first_channels}+{self.second_channels}"
        if self.prologue is not None:
            text += " prologue"
        return f"{text} stats" if self.stats else text
