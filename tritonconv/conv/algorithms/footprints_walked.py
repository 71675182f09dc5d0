"""What a walked weight gradient asks of the device, in closed form, and how long it may take."""

from __future__ import annotations

import math

from ...runtime.device import DeviceFacts
from ...runtime.space import Footprint
from ..problem import ConvProblem
from .footprints import rows_of
from .walked_wgrad import WalkedConfig, walk_of


def cdiv(value: int, divisor: int) -> int:
    """Division rounded up."""
    return -(-value // divisor)


def scratch_elements(config: WalkedConfig, threads: int, *, grouped: bool) -> int:
    """Elements of the accumulator that are rearranged at once before they are stored.

    Warp groups exchange one row of matrix instructions. Other warps exchange 16 elements a thread,
    twice as many where a thread holds 128 or where eight warps are stacked on narrow columns: so
    the compiler chooses, as compiled kernels show.
    """
    m, n = config.block_m, config.block_n
    if grouped:
        return min(m, 16 * config.num_warps) * n
    narrow = config.num_warps == 8 and n <= 64 < m
    share = 32 if narrow or m * n >= 128 * threads else 16
    return min(m * n, share * threads)


def walked_footprint(problem: ConvProblem, config: WalkedConfig, device: DeviceFacts) -> Footprint:
    """Of the product; the sum of partial results is a second launch."""
    walk = walk_of(problem, config)
    m, k = config.block_m, config.block_k
    columns = config.taps * config.block_n
    size = problem.dtype.itemsize
    tiles = problem.groups * cdiv(problem.filters_per_group, m)
    tiles *= problem.taps // config.taps * cdiv(problem.channels_per_group, config.block_n)
    amd = device.arch.startswith("gfx")
    threads = config.num_warps * (64 if amd else 32)
    matrix = size == 2 or problem.precision != "ieee"
    grouped = device.arch == "sm_90" and matrix and m >= 64 and config.num_warps >= 4
    buffers = max(1, config.num_stages - (not grouped))
    # Loads of fewer than four bytes pass through registers, and taps then share one buffer.
    rows_stream = rows_of(problem, problem.y_strides, problem.filters_per_group)
    x_streams = rows_of(problem, problem.x_strides, problem.channels_per_group)
    pipeline = (buffers if rows_stream else 1) * m * k * size
    pipeline += buffers * columns * k * size if x_streams else config.block_n * k * size
    partial = walk.splits > 1
    scratch = scratch_elements(config, threads, grouped=grouped) * (4 if partial else size)
    pixels = problem.out_pixels * size
    loads = pixels * tiles // problem.groups * problem.groups
    steps = walk.steps_per_split * walk.blocks_per_split
    weights = math.prod(problem.w_shape)
    return Footprint(
        programs=tiles * walk.splits,
        threads=threads,
        shared_bytes=max(pipeline, scratch),
        accumulators=m * columns // threads,
        bytes_loaded=loads * (min(m, problem.filters_per_group) + columns),
        bytes_stored=weights * (8 * walk.splits + size if partial else size),
        flops=2 * tiles * walk.steps * walk.blocks * m * columns * k,
        steps=steps,
        in_flight=max(1, config.num_stages - 1) if problem.x_strides[1] == 1 else 1,
        launches=2 if partial else 1,
        matrix=matrix,
    )
