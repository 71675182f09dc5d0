"""Geometry of the kernels for few input channels: tiles, runs and regions, without Triton."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton

from ...runtime.operators import Config
from ..problem import ConvProblem
from .common import lifted
from .footprints import cdiv
from .tiles import power_of_two

FMA, MMA, RUNS, FLAT, ALIGNED = 0, 1, 2, 3, 4
"""Engines: multiply-adds of scalars; matrix instructions over the flattened window, or over runs of
the input's rows (forward and weight); multiply-adds for consecutive pixels of a map (forward); runs
that begin at whole vectors of memory (forward and weight)."""

RUN_ENGINES = (RUNS, ALIGNED)

SHARED_ELEMENTS = 16384
"""Products of output pixels with taps that a program of the input's gradient holds."""


@dataclass(frozen=True)
class SingleConfig(Config):
    """Rows × columns × filters of a tile, and how its products are formed.

    Attributes:
        engine: :data:`FMA`, :data:`MMA`, :data:`RUNS`, :data:`FLAT` or :data:`ALIGNED`.
        block_h, block_w: pixels of the tile, in one row for consecutive ones; for the gradient of
            the input, of the output region that a program multiplies, halo included.
        block_m: filters of the tile; for the gradient of the input, of one step of the reduction.
        split: parts of the pixels, for the gradient of the weight.
        span: neighbouring output pixels that share a run, for runs.
    """

    engine: int
    block_h: int
    block_w: int
    block_m: int
    num_warps: int
    num_stages: int = 3
    split: int = 1
    span: int = 1


@dataclass(frozen=True)
class Runs:
    """How the input's rows are cut into runs of elements.

    Attributes:
        inner: input channels that alternate inside a run; others have runs of their own.
        lead: elements before the first window, so that a run starts at an even one, or a vector.
        length: elements of a run.
        count: runs that a window needs.
        block_k: elements of one step of the reduction.
        depth: elements of the reduction, whole steps.
    """

    inner: int
    lead: int
    length: int
    count: int
    block_k: int
    depth: int


@functools.lru_cache(maxsize=1024)
def runs_of(problem: ConvProblem, span: int, engine: int = RUNS) -> Runs | None:
    """The runs of ``span`` pixels; None where the input's rows are not contiguous.

    Aligned ones start where all spans start alike, at multiples of up to 16 bytes.
    """
    if problem.x_strides[-1] == 1:
        inner = 1
    elif problem.x_strides[1] == 1 and problem.x_strides[-1] == problem.in_channels:
        inner = problem.in_channels
    else:
        return None
    hop, lead = problem.stride[-1], inner * problem.padding[-1] % 2
    if inner * hop * span % 2:
        return None
    if engine == ALIGNED:
        whole = math.gcd(inner * hop * span, max(1, 16 // problem.dtype.itemsize))
        lead = -inner * problem.padding[-1] % whole
    pixels = hop * (span - 1) + problem.dilation[-1] * (problem.kernel[-1] - 1) + 1
    length = power_of_two(lead + inner * pixels, 8, 1 << 20)
    count = problem.in_channels // inner * problem.taps // problem.kernel[-1]
    padded = {block: cdiv(length * count, block) * block for block in (64, 32, 16)}
    least = min(padded.values())
    block_k = next(block for block, depth in padded.items() if depth <= 1.15 * least)
    return Runs(inner, lead, length, count, block_k, padded[block_k])


@dataclass(frozen=True)
class Reach:
    """One axis of the gradient of the input: which output pixels a tile of the input needs.

    Attributes:
        first: offset of the first output pixel from the first input pixel divided by the stride.
        halo: output pixels needed beyond one per stride of input pixels.
    """

    first: int
    halo: int


@functools.lru_cache(maxsize=1024)
def _reach(taps: int, stride: int, pad: int, dilation: int) -> Reach:
    shifts = [
        (phase + pad - tap * dilation) // stride
        for phase in range(stride)
        for tap in range(taps)
        if (phase + pad - tap * dilation) % stride == 0
    ]
    return Reach(min(shifts), max(shifts) - min(shifts))


def reaches_of(problem: ConvProblem) -> tuple[Reach, Reach]:
    """Of the last two axes, which a tile covers."""
    kernel, stride = lifted(problem.kernel, 1), lifted(problem.stride, 1)
    pad, dilation = lifted(problem.padding, 0), lifted(problem.dilation, 1)
    height, width = (_reach(kernel[a], stride[a], pad[a], dilation[a]) for a in (1, 2))
    return height, width


def tiles_of(problem: ConvProblem, config: SingleConfig) -> int:
    """Tiles of the output's pixels; none of them spans two planes."""
    depth, height, width = lifted(problem.out_size, 1)
    if config.engine == FLAT:
        return problem.batch * cdiv(height * width, config.block_w)
    return problem.batch * depth * cdiv(height, config.block_h) * cdiv(width, config.block_w)


def counts_on(problem: ConvProblem) -> bool:
    """Whether the output's pixels of one plane lie one after the other, and there is one plane."""
    depth, height, width = lifted(problem.out_size, 1)
    if depth > 1 or height == 1 or lifted(problem.kernel, 1)[0] > 1:
        return False
    return problem.y_strides[-2] == width * problem.y_strides[-1] and problem.x_strides[-1] > 0


def split_tiles(problem: ConvProblem, config: SingleConfig) -> tuple[int, int]:
    """Tiles of one split, and splits none of which is empty."""
    tiles = tiles_of(problem, config)
    per_split = cdiv(tiles, max(1, min(config.split, tiles)))
    return per_split, max(1, cdiv(tiles, per_split))


def is_scalar(problem: ConvProblem) -> bool:
    """Whether products must run on scalar units: IEEE single precision."""
    return problem.dtype is torch.float32 and problem.precision == "ieee"


def least_waste(size: int, low: int, high: int) -> int:
    """The largest power of two in [low, high] that covers a size with the least beyond it."""
    blocks = [1 << e for e in range(low.bit_length() - 1, high.bit_length())]
    return min(reversed(blocks), key=lambda block: cdiv(size, block) * block)


def dgrad_tile(problem: ConvProblem, block_h: int, block_w: int) -> tuple[int, int]:
    """Input pixels (over the stride) that need no output pixel outside the region."""
    height, width = reaches_of(problem)
    return block_h - height.halo, block_w - width.halo


def dgrad_blocks(problem: ConvProblem) -> list[tuple[int, int]]:
    """Regions (block_h, block_w) larger than the halo whose products fit in shared memory."""
    height, width = reaches_of(problem)
    _, kernel_h, kernel_w = lifted(problem.kernel, 1)
    _, stride_h, stride_w = lifted(problem.stride, 1)
    _, in_h, in_w = lifted(problem.in_size, 1)
    taps = power_of_two(kernel_h * kernel_w, 16, 1024)
    met = triton.next_power_of_2(cdiv(kernel_h, stride_h) * cdiv(kernel_w, stride_w))
    most_h = triton.next_power_of_2(cdiv(in_h, stride_h) + height.halo)
    most_w = triton.next_power_of_2(cdiv(in_w, stride_w) + width.halo)
    found = []
    for block_h in (1, 2, 4, 8, 16, 32):
        for block_w in (4, 8, 16, 32, 64, 128, 256):
            tile_h, tile_w = dgrad_tile(problem, block_h, block_w)
            if tile_h < 1 or tile_w < 1 or not 16 <= block_h * block_w <= 1024:
                continue
            if (block_h > most_h or block_w > most_w) and block_h * block_w > 16:
                continue
            out = math.prod(
                triton.next_power_of_2(n) for n in (tile_h * stride_h, tile_w * stride_w)
            )
            if max(taps * block_h * block_w, met * out) <= SHARED_ELEMENTS:
                found.append((block_h, block_w))
    return found
