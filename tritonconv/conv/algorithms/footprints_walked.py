"""What a walked weight gradient asks of the device, in closed form, and how long it may take."""

from __future__ import annotations

import math

from ...runtime.device import DeviceFacts
from ...runtime.space import Footprint
from ..problem import ConvProblem
from .walked_wgrad import WalkedConfig, walk_of


def cdiv(value: int, divisor: int) -> int:
    """Division rounded up."""
    return -(-value // divisor)


def walked_footprint(problem: ConvProblem, config: WalkedConfig, device: DeviceFacts) -> Footprint:
    """Of the product; the sum of partial results is a second launch."""
    walk = walk_of(problem, config)
    m, k = config.block_m, config.block_k
    columns = config.taps * config.block_n
    size = problem.dtype.itemsize
    tiles = problem.groups * cdiv(problem.filters_per_group, m)
    tiles *= problem.taps // config.taps * cdiv(problem.channels_per_group, config.block_n)
    amd = device.arch.startswith("gfx")
    grouped = device.arch == "sm_90" and m >= 64 and config.num_warps >= 4
    looped = config.num_stages > 1
    buffers = (config.num_stages - (not grouped)) if looped else 1
    rows_stream = problem.y_strides[1] == 1 and (grouped or size > 2)
    pipeline = buffers * columns * k * size + (buffers if rows_stream else 1) * m * k * size
    partial = walk.splits > 1
    scratch = m * config.block_n * (4 if partial else size)
    threads = config.num_warps * (64 if amd else 32)
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
        matrix=size == 2 or problem.precision != "ieee",
    )
