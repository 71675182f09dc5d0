"""What the kernels see of a batch normalisation: a dense map as images, channels and pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..runtime.device import DeviceFacts

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of inputs that the kernels serve; PyTorch computes the others."""


@dataclass(frozen=True)
class NormView:
    """A dense map of any number of axes.

    Attributes:
        images, channels, pixels: its sizes, all spatial axes being one.
        last: whether channels are innermost, so that it is a matrix of (pixels, channels);
            otherwise it is (images, channels, pixels).
    """

    images: int
    channels: int
    pixels: int
    last: bool

    @property
    def rows(self) -> int:
        """Values of every channel."""
        return self.images * self.pixels

    @property
    def matrix(self) -> tuple[int, int]:
        """Height and width of the matrix that an elementwise kernel walks."""
        if self.last:
            return self.rows, self.channels
        return self.images * self.channels, self.pixels

    @property
    def unit(self) -> int:
        """What the innermost extent is a multiple of, where Triton does not see it by itself."""
        unit = math.gcd(self.matrix[1], 16)
        return unit if unit < 16 else 1

    @property
    def wide(self) -> bool:
        """Whether offsets pass 32 bits, tiles that overhang the end included."""
        return 2 * self.images * self.channels * self.pixels >= 2**31


def channels_innermost(shape: Sequence[int], strides: Sequence[int]) -> bool | None:
    """Whether channels are innermost in a dense tensor; None where it is dense in neither order.

    Where both orders are the same, the answer is the one that the kernels do better with.
    """
    axes = list(range(len(shape)))
    if _dense(shape, strides, [0, *axes[2:], 1]):
        return math.prod(shape[2:]) == 1 or not _dense(shape, strides, axes)
    return False if _dense(shape, strides, axes) else None


def _dense(shape: Sequence[int], strides: Sequence[int], order: Sequence[int]) -> bool:
    expected = 1
    for axis in reversed(order):
        if shape[axis] != 1:
            if strides[axis] != expected:
                return False
            expected *= shape[axis]
    return True


def view_of(shape: Sequence[int], last: bool) -> NormView:
    """The view of a dense tensor whose channels are innermost or not."""
    return NormView(shape[0], shape[1], math.prod(shape[2:]), last)


@dataclass(frozen=True)
class Reduction:
    """How a sum over images and pixels is shared out.

    Attributes:
        block_r, block_c: a tile: pixels by channels, or images by pixels of one channel.
        parts: programs that share the sum of a block of channels.
        merge: parts that are added at a time by the program that finishes last.
        num_warps: of a program.
        stages: tiles that are under way at a time, plus one; one: copies do not run ahead.
    """

    block_r: int
    block_c: int
    parts: int
    merge: int
    num_warps: int
    stages: int


@dataclass(frozen=True)
class Elementwise:
    """A tile of an elementwise kernel, in rows and columns of the matrix."""

    block_r: int
    block_c: int
    num_warps: int


def power_of_two(value: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(value - 1, 0).bit_length()


def reduction_width(view: NormView, config: Reduction) -> int:
    """Channels of one program."""
    return config.block_c if view.last else 1


def reduction_steps(view: NormView, config: Reduction) -> int:
    """Tiles of one block of channels."""
    if view.last:
        return -(-view.rows // config.block_r)
    return -(-view.images // config.block_r) * -(-view.pixels // config.block_c)


def reduction_config(
    view: NormView,
    device: DeviceFacts,
    value_bytes: int,
    elements: int = 4096,
    per_unit: int = 2,
    stages: int = 4,
) -> Reduction:
    """Two programs for every multiprocessor, each with three tiles of 4096 elements under way.

    That is 48 KiB of a map in half precision for a multiprocessor, more than it takes to keep the
    memory busy. More programs would leave more parts to the one that adds them.

    Args:
        view: the map.
        device: where.
        value_bytes: bytes that are read for a value, in all maps together.
        elements: of a tile.
        per_unit: programs for every multiprocessor.
        stages: see :class:`Reduction`; no more than 48 KiB are under way in a program.
    """
    if view.last:
        block_c = _channels(view.channels)
        block_r = min(elements // block_c, max(8, power_of_two(view.rows)))
        tiles = -(-view.channels // block_c)
    else:
        block_c = _columns(view.pixels)
        block_r = min(max(1, elements // block_c), power_of_two(view.images))
        tiles = view.channels
    num_warps = max(4, min(16, block_r * block_c // 512))
    stages = max(2, min(stages, 1 + 48 * 1024 // (block_r * block_c * value_bytes)))
    draft = Reduction(block_r, block_c, 1, 1, num_warps, stages)
    parts = max(1, min(per_unit * device.sm_count // tiles, reduction_steps(view, draft)))
    width = reduction_width(view, draft)
    merge = min(power_of_two(parts), max(1, num_warps * 512 // width), 256)
    return replace(draft, parts=parts, merge=merge)


def elementwise_config(view: NormView) -> Elementwise:
    """Tiles of 4096 elements, whole 128-byte lines where the map has them."""
    height, width = view.matrix
    block_c = _channels(width) if view.last else _columns(width)
    block_r = min(max(1, 4096 // block_c), power_of_two(height))
    # Rows that begin anywhere are loaded element by element, which takes registers.
    return Elementwise(block_r, block_c, 4 if width % 8 == 0 else 8)


def _channels(channels: int) -> int:
    """Channels of a tile: few beyond the last one, but not short lines either."""
    if channels <= 16:
        return power_of_two(channels)
    return min((64, 32, 16), key=lambda block: -(-channels // block) * (block + 8))


def _columns(pixels: int) -> int:
    """Pixels of a tile: as many as waste little at the end of a map."""
    if pixels <= 256:
        return power_of_two(pixels)
    return min((1024, 512, 256), key=lambda block: (-(-pixels // block) * block, -block))


__all__ = [
    "DTYPES",
    "Elementwise",
    "NormView",
    "Reduction",
    "channels_innermost",
    "elementwise_config",
    "reduction_config",
    "reduction_steps",
    "reduction_width",
    "view_of",
]
