"""Geometry of banded products: boxes of result pixels, windows of the source, without Triton.

A *unit* is a box of ``run`` neighbouring pixels; what all of them read of the *source* is a window
of ``run + (taps − 1)·dilation`` pixels on every axis, whose rows are contiguous in channels_last.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import triton

from ...runtime.operators import Config
from ..problem import ConvProblem, Direction, dense_strides
from .common import lifted

VECTOR = 8
"""Channels of 16 bits that one load of 16 bytes takes."""


@dataclass(frozen=True)
class BandedConfig(Config):
    """Box of a unit, tile of units, and how its product is executed.

    Attributes:
        run_d, run_h, run_w: pixels of a unit.
        units_h, units_w: units of a tile, or of one step of a weight gradient's sum.
        block_k: elements of a window in one step; of a tile of columns for the weight's gradient.
        cached: whether windows pass the L1 cache, where those of neighbouring rows overlap, in
            copies of 8 bytes; those of 16 bypass it.
        split: parts of the sum over units, for the gradient of the weight.
    """

    run_d: int
    run_h: int
    run_w: int
    units_h: int
    units_w: int
    block_k: int
    num_warps: int
    num_stages: int
    cached: int = 0
    split: int = 1

    @property
    def run(self) -> tuple[int, int, int]:
        """Pixels of a unit per axis."""
        return self.run_d, self.run_h, self.run_w

    @property
    def units(self) -> int:
        """Units of a tile."""
        return self.units_h * self.units_w


@dataclass(frozen=True)
class Roles:
    """Which tensor is read in windows (source) and which in units.

    Attributes:
        source, units: slots of the two tensors of pixels.
        source_size, unit_size: their maps on three axes.
        channels: of the source.
        filters: of the tensor in units.
        lead: pixels by which a window begins before its unit; negative where it begins behind.
        flipped: whether the source is the output of the convolution, which meets taps backwards.
    """

    source: str
    units: str
    source_size: tuple[int, int, int]
    unit_size: tuple[int, int, int]
    channels: int
    filters: int
    lead: tuple[int, int, int]
    flipped: bool


@functools.lru_cache(maxsize=1024)
def roles_of(problem: ConvProblem) -> Roles:
    """Windows of the input, or of the output's gradient where that has the better channels."""
    in_size, out_size = lifted(problem.in_size, 1), lifted(problem.out_size, 1)
    pad = lifted(problem.padding, 0)
    wgrad = problem.direction is Direction.WGRAD
    if problem.direction is Direction.DGRAD or (wgrad and problem.in_channels % VECTOR):
        reach = [
            step * (taps - 1)
            for step, taps in zip(
                lifted(problem.dilation, 1), lifted(problem.kernel, 1), strict=True
            )
        ]
        lead = (reach[0] - pad[0], reach[1] - pad[1], reach[2] - pad[2])
        units = "input" if wgrad else "grad_input"
        channels, filters = problem.out_channels, problem.in_channels
        return Roles("grad_output", units, out_size, in_size, channels, filters, lead, True)
    units = "grad_output" if wgrad else "output"
    channels, filters = problem.in_channels, problem.out_channels
    return Roles("input", units, in_size, out_size, channels, filters, pad, False)


@dataclass(frozen=True)
class Window:
    """What one unit reads, and the matrices that follow from it.

    Attributes:
        count: planes, rows and pixels of the window.
        hop: from one to the next; a unit of one pixel skips what a dilation skips.
        line: elements of a row of the window.
        lines: rows of the window.
        columns: elements of a unit.
        block_n: columns of the product, a power of two.
    """

    count: tuple[int, int, int]
    hop: tuple[int, int, int]
    line: int
    lines: int
    columns: int
    block_n: int

    def chunks(self, block_k: int) -> int:
        """Steps that one row of the window takes."""
        return -(-self.line // block_k)


@functools.lru_cache(maxsize=4096)
def window_of(problem: ConvProblem, run: tuple[int, int, int]) -> Window:
    """The window of units of ``run`` pixels."""
    roles = roles_of(problem)
    kernel, dilation = lifted(problem.kernel, 1), lifted(problem.dilation, 1)
    counts, hops = [], []
    for axis in range(3):
        if run[axis] == 1 and axis < 2:
            counts.append(kernel[axis])
            hops.append(dilation[axis])
        else:  # pixels of a row of the window are neighbours whatever the dilation
            counts.append(run[axis] + (kernel[axis] - 1) * dilation[axis])
            hops.append(1)
    columns = math.prod(run) * roles.filters
    return Window(
        (counts[0], counts[1], counts[2]),
        (hops[0], hops[1], hops[2]),
        counts[2] * roles.channels,
        counts[0] * counts[1],
        columns,
        max(16, triton.next_power_of_2(columns)),
    )


def grid_of(problem: ConvProblem, config: BandedConfig) -> tuple[int, int, int]:
    """Tiles of units on the three axes of a map."""
    depth, height, width = roles_of(problem).unit_size
    return (
        -(-depth // config.run_d),
        -(-height // (config.run_h * config.units_h)),
        -(-width // (config.run_w * config.units_w)),
    )


def tiles_of(problem: ConvProblem, config: BandedConfig) -> int:
    """Tiles of units of the whole batch."""
    return problem.batch * math.prod(grid_of(problem, config))


def split_tiles(problem: ConvProblem, config: BandedConfig) -> tuple[int, int]:
    """Tiles of one split of a weight gradient, and splits none of which is empty."""
    tiles = tiles_of(problem, config)
    each = -(-tiles // max(1, min(config.split, tiles)))
    return each, -(-tiles // each)


def checks_of(problem: ConvProblem, config: BandedConfig) -> dict[str, bool]:
    """Where a window can leave the source, and where a tile overhangs the tensor in units."""
    roles = roles_of(problem)
    grid = grid_of(problem, config)
    tile = (config.run_d, config.run_h * config.units_h, config.run_w * config.units_w)
    window = window_of(problem, config.run)
    found = {}
    for axis, label in enumerate("DHW"):
        covered = grid[axis] * tile[axis]
        reach = window.hop[axis] * (window.count[axis] - 1) - (config.run[axis] - 1)
        last = covered - 1 - roles.lead[axis] + reach
        found[f"CHECK_{label}"] = roles.lead[axis] > 0 or last >= roles.source_size[axis]
        found[f"OVERHANG_{label}"] = covered != roles.unit_size[axis]
    return found


def is_dense_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor is laid out channels first to pixels last to channels, without gaps.

    Example:
        >>> is_dense_channels_last((2, 1, 4, 4), (16, 16, 4, 1))
        True
    """
    dense = dense_strides(shape, True)
    return all(
        size == 1 or have == want for size, have, want in zip(shape, strides, dense, strict=True)
    )


@functools.lru_cache(maxsize=1024)
def boxes(problem: ConvProblem, most_columns: int) -> tuple[tuple[int, int, int], ...]:
    """Units whose columns nearly fill a tile of 16 up to ``most_columns``."""
    depth, height, width = roles_of(problem).unit_size
    kernel = lifted(problem.kernel, 1)
    # A box gains nothing on an axis on which the filter has one tap.
    choices = itertools.product(
        (1, 2) if kernel[0] > 1 and depth > 1 else (1,),
        (1, 2, 4) if kernel[1] > 1 and height > 1 else (1,),
        (1, 2, 3, 4, 5, 6, 8) if width > 1 else (1,),
    )
    found = []
    for run in choices:
        window = window_of(problem, run)
        if window.block_n <= most_columns and window.columns * 4 >= window.block_n * 3:
            found.append(run)
    return tuple(found) or ((1, 1, 1),)
