"""How the boxed products see their tensors: merged axes, box shapes, tensor descriptors."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...runtime.plan import Boxes
from ..problem import ConvProblem, Direction
from .common import lifted

Four = tuple[int, int, int, int]

_ROW_BYTES = 16
"""The copy engine's strides and rows are multiples of this."""
_LONGEST = 256
"""Elements of a box along one axis."""
_SHORTEST = 16
"""Pixels of a run: the depth of one matrix instruction."""


@dataclass(frozen=True)
class Axes:
    """The four axes of pixels, (image, plane, row, column), some of them merged into the last.

    Attributes:
        in_size, out_size: of the maps of the forward convolution.
        kernel, padding, dilation: of the filter; one, nothing and one along the images.
        x_strides, y_strides: of pixels, without the channel.
        merged: whether an axis here is not the axis of the problem.
    """

    in_size: Four
    out_size: Four
    kernel: Four
    padding: Four
    dilation: Four
    x_strides: Four
    y_strides: Four
    merged: bool


@functools.lru_cache(maxsize=1024)
def axes_of(problem: ConvProblem) -> Axes:
    """The pixel axes of a problem.

    Neighbouring axes along which the filter does nothing are one where memory allows: all pixels of
    a 1×1 product are one row, which boxes tile without a rest.
    """
    in_size = [problem.batch, *lifted(problem.in_size, 1)]
    out_size = [problem.batch, *lifted(problem.out_size, 1)]
    kernel = [1, *lifted(problem.kernel, 1)]
    padding = [0, *lifted(problem.padding, 0)]
    dilation = [1, *lifted(problem.dilation, 1)]
    x = _steps(problem.x_strides, in_size, problem.in_channels)
    y = _steps(problem.y_strides, out_size, problem.out_channels)
    merged = False
    for inner in (3, 2, 1):
        for outer in range(inner - 1, -1, -1):
            idle = all(
                kernel[axis] == 1 and padding[axis] == 0 and in_size[axis] == out_size[axis]
                for axis in (inner, outer)
            )
            joins = all(
                strides[outer] == size[inner] * strides[inner] or size[outer] == 1
                for strides, size in ((x, in_size), (y, out_size))
            )
            if not idle or not joins or out_size[inner] == 1:
                break
            if out_size[outer] > 1:
                merged = True
            for size, strides in ((in_size, x), (out_size, y)):
                size[inner] *= size[outer]
                size[outer] = 1
                strides[outer] = strides[inner] * size[inner]
    return Axes(
        _four(in_size),
        _four(out_size),
        _four(kernel),
        _four(padding),
        _four(dilation),
        _four(x),
        _four(y),
        merged,
    )


def _four(values: Sequence[int]) -> Four:
    first, second, third, fourth = values
    return first, second, third, fourth


def _steps(strides: Sequence[int], size: Sequence[int], channels: int) -> list[int]:
    """Strides of pixels; an axis of one element gets that of a dense tensor, which is aligned."""
    found = [strides[0], *lifted(strides[2:], 0)]
    dense = channels
    for axis in (3, 2, 1, 0):
        if size[axis] == 1:
            found[axis] = dense
        dense = found[axis] * size[axis]
    return found


def in_tf32(problem: ConvProblem) -> bool:
    """Whether it is a forward product of float32 that is multiplied as TF32.

    Matrix instructions read TF32 from shared memory with the channels that are summed over fastest
    only, as the input and the weight of a forward product have them.
    """
    forward = problem.direction is Direction.FORWARD
    return forward and problem.dtype is torch.float32 and problem.precision == "tf32"


def unsuited(problem: ConvProblem, *, tf32: bool = False) -> str | None:
    """Why the copy engine cannot read the operands in boxes, or None."""
    if problem.groups != 1:
        return "groups != 1"
    if problem.dtype not in (torch.bfloat16, torch.float16) and not (tf32 and in_tf32(problem)):
        return f"dtype {problem.dtype} (boxes of bfloat16 and float16 are multiplied)"
    if any(hop != 1 for hop in problem.stride):
        return "stride != 1"
    if 0 in problem.x_shape or 0 in problem.y_shape:
        return "no elements"
    row = _ROW_BYTES // problem.dtype.itemsize
    if problem.in_channels % row or problem.out_channels % row:
        return f"channels that are no multiple of {row}"
    for name, strides in (("input", problem.x_strides), ("output", problem.y_strides)):
        if strides[1] != 1:
            return f"{name} channels that are not contiguous"
    axes = axes_of(problem)
    for name, strides, size in (
        ("input", axes.x_strides, axes.in_size),
        ("output", axes.y_strides, axes.out_size),
    ):
        if any(hop % row or hop <= 0 for hop in strides):
            return f"{name} strides that are no multiple of {row}"
        if any(extent * hop >= 2**39 for extent, hop in zip(size, strides, strict=True)):
            return f"{name} too large"
        if math.prod(size) >= 2**31:  # boxes are counted, and placed along an axis, in 32 bits
            return f"{name} with 2^31 pixels or more"
    return None


def weight_rows(problem: ConvProblem) -> bool:
    """Whether the weight is a dense matrix of filters by (tap, channel)."""
    expected = problem.in_channels
    shape, strides = problem.w_shape, problem.w_strides
    for axis in range(len(shape) - 1, 1, -1):
        if shape[axis] > 1 and strides[axis] != expected:
            return False
        expected *= shape[axis]
    return strides[1] == 1 and (shape[0] == 1 or strides[0] == expected)


def covered(size: Four, shape: Four) -> int:
    """Pixels of the boxes that cover a map."""
    return math.prod(-(-extent // step) * step for extent, step in zip(size, shape, strict=True))


@functools.lru_cache(maxsize=4096)
def box_shapes(size: Four, kernel: Four, pixels: int) -> tuple[Four, ...]:
    """The best shapes of a box of so many pixels, at most three, the one with least waste first.

    Args:
        size: of the map, (image, plane, row, column).
        kernel: taps along them.
        pixels: a power of two.
    """
    powers = [1 << e for e in range(pixels.bit_length())]
    found: list[tuple[tuple[int, ...], Four]] = []
    for n, d, h in itertools.product(powers, repeat=3):
        if n * d * h > pixels:
            continue
        shape = (n, d, h, pixels // (n * d * h))
        if max(shape) > _LONGEST:
            continue
        # Compact boxes share most of what neighbouring taps read; longer rows come first.
        read = math.prod(step + taps - 1 for step, taps in zip(shape, kernel, strict=True))
        found.append(((covered(size, shape), read, -shape[3], -shape[2], -shape[1]), shape))
    found.sort()
    least = found[0][0][0]
    best = [found[0][1]]
    for score, shape in found[1:]:
        # An alternative is spread over another number of images.
        if len(best) < 3 and score[0] <= 1.25 * least and all(shape[0] != b[0] for b in best):
            best.append(shape)
    return tuple(best)


@functools.lru_cache(maxsize=4096)
def run_shapes(size: Four, pixels: int) -> tuple[Four, ...]:
    """The best runs along one axis, at most two on different axes, the least waste first.

    Args:
        size: of the map, (image, plane, row, column).
        pixels: of a step: a power of two, which one run or several make up.
    """
    found: list[tuple[tuple[float, ...], int, Four]] = []
    for axis in range(4):
        length = min(pixels, _LONGEST)
        while length >= min(_SHORTEST, pixels):
            shape = _four([length if other == axis else 1 for other in range(4)])
            waste = covered(size, shape)
            # Every load costs a little, as an eighth more pixels would in runs of half the length.
            found.append(((waste * (1 + 2 / length), -axis), axis, shape))
            length //= 2
    found.sort()
    best: dict[int, Four] = {}
    for _, axis, shape in found:
        best.setdefault(axis, shape)
    least = found[0][0][0]
    kept = [
        best[axis]
        for score, axis, shape in found
        if best[axis] == shape and score[0] <= 1.25 * least
    ]
    return tuple(kept[:2])


def last_axis(boxes: Boxes, axis: int) -> Boxes:
    """The same boxes with one pixel axis behind the others: leading axes of one fold away."""
    order = (*(a for a in range(4) if a != axis), axis, 4)
    return Boxes(
        boxes.name,
        tuple(boxes.shape[a] for a in order),
        tuple(boxes.strides[a] for a in order),
        tuple(boxes.block[a] for a in order),
    )


def pixel_boxes(
    slot: str, size: Four, strides: Four, channels: int, box: Four, block: int
) -> Boxes:
    """A map's descriptor: boxes of pixels by ``block`` channels."""
    return Boxes(slot, (*size, channels), (*strides, 1), (*box, block))


def weight_boxes(problem: ConvProblem, filters: int, channels: int) -> Boxes:
    """The weight's descriptor as (tap, filter, channel): one tap at a time."""
    depth = problem.in_channels
    shape = (problem.taps, problem.out_channels, depth)
    return Boxes("weight", shape, (depth, problem.taps * depth, 1), (1, filters, channels))
