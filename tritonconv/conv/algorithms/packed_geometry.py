"""Geometry of packed phases: units of a strided gradient and the windows that they read.

A *unit* is a box of neighbouring pixels of the input: ``run`` cells of one pixel per stride phase.
All of its pixels read one window of the output, whose pixels lie ``skip`` apart on every axis.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import triton

from ...runtime.operators import Config
from ..problem import ConvProblem
from .common import lifted

MOST_COLUMNS = 128
"""Elements of a unit: columns of the product."""


@dataclass(frozen=True)
class PackedConfig(Config):
    """Cells of a unit, tile of units, and how its product is executed.

    Attributes:
        run_d, run_h, run_w: cells of a unit, each of one pixel per phase of the stride.
        block_m: units of a tile.
        block_k: output channels of one step, of several neighbours where they are few.
        cached: whether windows pass the L1 cache, where those of neighbouring units overlap, in
            copies of 8 bytes; those of 16 bypass it.
    """

    run_d: int
    run_h: int
    run_w: int
    block_m: int
    block_k: int
    num_warps: int
    num_stages: int
    cached: int = 0

    @property
    def run(self) -> tuple[int, int, int]:
        """Cells of a unit per axis."""
        return self.run_d, self.run_h, self.run_w


@dataclass(frozen=True)
class Axis:
    """One axis of a unit and its window.

    Attributes:
        unit: pixels of the input.
        run: cells, and output pixels from one unit to the next.
        first: the window's first output pixel, from the unit's first cell.
        window: output pixels of the window.
        skip: from one of them to the next.
        units: of a map.
        checked: whether some window leaves the output.
    """

    unit: int
    run: int
    first: int
    window: int
    skip: int
    units: int
    checked: bool


@functools.lru_cache(maxsize=4096)
def _axis(size: int, out: int, taps: int, stride: int, pad: int, dilation: int, run: int) -> Axis:
    unit = stride * run
    shifts = {
        (pixel + pad - tap * dilation) // stride
        for pixel in range(unit)
        for tap in range(taps)
        if (pixel + pad - tap * dilation) % stride == 0
    }
    first, last = min(shifts), max(shifts)
    skip = max(1, math.gcd(*(shift - first for shift in shifts)))
    units = -(-size // unit)
    checked = first < 0 or (units - 1) * run + last >= out
    return Axis(unit, run, first, (last - first) // skip + 1, skip, units, checked)


@functools.lru_cache(maxsize=4096)
def axes_of(problem: ConvProblem, run: tuple[int, int, int]) -> tuple[Axis, Axis, Axis]:
    """Units of ``run`` cells and their windows on (depth, height, width)."""
    in_size, out_size = lifted(problem.in_size, 1), lifted(problem.out_size, 1)
    kernel, stride = lifted(problem.kernel, 1), lifted(problem.stride, 1)
    pad, dilation = lifted(problem.padding, 0), lifted(problem.dilation, 1)
    depth, height, width = (
        _axis(in_size[a], out_size[a], kernel[a], stride[a], pad[a], dilation[a], run[a])
        for a in range(3)
    )
    return depth, height, width


@dataclass(frozen=True)
class Product:
    """Sizes of the matrix product that a choice of units makes.

    Attributes:
        units: rows.
        columns: elements of a unit.
        block_n: the same, rounded up to what a matrix instruction multiplies.
        offsets: output pixels of a window.
        share: neighbours in a row of the window that one step takes, of few channels each.
        steps: of the loop over the reduction.
    """

    units: int
    columns: int
    block_n: int
    offsets: int
    share: int
    steps: int


@functools.lru_cache(maxsize=4096)
def product_of(problem: ConvProblem, run: tuple[int, int, int], block_k: int) -> Product:
    """The product of units of ``run`` cells in steps of ``block_k`` output channels."""
    axes = axes_of(problem, run)
    columns = problem.in_channels * math.prod(axis.unit for axis in axes)
    filters = problem.out_channels
    share = block_k // filters if block_k % filters == 0 else 1
    row = -(-axes[2].window // share) * -(-filters // block_k)
    return Product(
        problem.batch * math.prod(axis.units for axis in axes),
        columns,
        max(16, triton.next_power_of_2(columns)),
        math.prod(axis.window for axis in axes),
        share,
        axes[0].window * axes[1].window * row,
    )


@functools.lru_cache(maxsize=1024)
def runs_within(problem: ConvProblem, most: int) -> tuple[tuple[int, int, int], ...]:
    """Boxes of cells with at most ``most`` columns that leave less than a quarter of a tile empty.

    One cell is always among them.
    """
    cell = problem.in_channels * math.prod(problem.stride)
    cells = max(1, most // cell)
    reach = [
        range(1, 1 + min(cells, -(-size // hop), 8))
        for size, hop in zip(lifted(problem.in_size, 1), lifted(problem.stride, 1), strict=True)
    ]
    found = [
        (d, h, w)
        for d, h, w in itertools.product(*reach)
        if d * h * w <= cells
        and 4 * cell * d * h * w >= 3 * max(16, triton.next_power_of_2(cell * d * h * w))
    ]
    return tuple(dict.fromkeys(((1, 1, 1), *found)))
