"""The config space of implicit matrix products: tiles, warps, stages, splits of the reduction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import triton

from ...runtime.device import DeviceFacts
from ..problem import ConvProblem, Direction
from .common import TileConfig


def needs_bounds(problem: ConvProblem) -> bool:
    """Whether some window reaches outside the input."""
    return any(
        pad > 0 or (out - 1) * hop + step * (taps - 1) - pad >= size
        for pad, out, hop, step, taps, size in zip(
            problem.padding,
            problem.out_size,
            problem.stride,
            problem.dilation,
            problem.kernel,
            problem.in_size,
            strict=True,
        )
    )


def flat_rows(problem: ConvProblem) -> bool:
    """Whether the (tap, channel) pairs of one window row are contiguous in the input's memory."""
    return (
        problem.groups == 1
        and problem.dilation[-1] == 1
        and problem.x_strides[1] == 1
        and problem.x_strides[-1] == problem.in_channels
    )


def power_of_two(value: int, low: int, high: int) -> int:
    """The smallest power of two that covers ``value``, inside [low, high]."""
    return max(low, min(high, triton.next_power_of_2(value)))


_TENSOR_RATE = 4e14
"""Multiply-adds × 2 per second of a full GPU, for weighing compute against the partial sums."""
_MEMORY_RATE = 3e12
"""Bytes per second, likewise: both orders of magnitude only, of an H100."""


def wgrad_split(problem: ConvProblem, block_m: int, block_n: int, sm_count: int) -> int:
    """Splits of the pixels: fill the GPU, but every split writes and reads the weight once more."""
    columns = problem.taps * problem.channels_per_group
    tiles = problem.groups * triton.cdiv(problem.filters_per_group, block_m)
    tiles *= triton.cdiv(columns, block_n)
    # Gathered columns are latency-bound and want more programs in flight than whole rows.
    gathered = problem.channels_per_group % 16 != 0
    slots = (8 if gathered else 2) * sm_count
    most = max(1, min(problem.out_pixels // 256, 1024, triton.cdiv(slots, tiles) + 8))
    weight_bytes = 4 * problem.out_channels * columns
    compute = problem.flops() / _TENSOR_RATE

    def seconds(split: int) -> float:
        programs = tiles * split
        used = programs / (triton.cdiv(programs, slots) * slots)
        partials = 2 * split * weight_bytes / _MEMORY_RATE if split > 1 else 0.0
        return compute / used + partials

    return min(range(1, most + 1), key=lambda split: (seconds(split), split))


def tile_configs(problem: ConvProblem, device: DeviceFacts) -> Sequence[TileConfig]:
    """Config space of an implicit matrix product; the first entry is the heuristic default."""
    rows, columns, depth = product_shape(problem)
    wide_type = problem.dtype is torch.float32
    n_max = 64 if wide_type else 128
    if problem.direction is Direction.WGRAD and problem.channels_per_group % 16 == 0:
        # A column tile inside one tap is loaded in whole rows under a mask of one axis.
        n_max = math.gcd(problem.channels_per_group, n_max)
    block_n = power_of_two(columns, 16, n_max)
    depth_max = 32 if wide_type else 64
    block_k = power_of_two(depth, 16, depth_max)
    block_m = power_of_two(rows, 16, 128)
    if problem.direction is Direction.WGRAD:
        # Splitting the reduction fills the GPU; small tiles would only re-read the operands.
        block_m = min(block_m, 64 if wide_type else 128)
        if problem.channels_per_group % 16 and (needs_bounds(problem) or not flat_rows(problem)):
            # Columns gathered one by one cost registers: keep the tile small.
            block_n = min(block_n, 64)
    else:
        floor = device.sm_count
        while block_m > 32 and _tiles(problem, rows, columns, block_m, block_n) < floor:
            block_m //= 2
        while block_n > 32 and _tiles(problem, rows, columns, block_m, block_n) < floor // 2:
            block_n //= 2
    warps = 8 if block_m * block_n >= 128 * 128 else 4
    if problem.direction is Direction.WGRAD:
        warps = 4
    default = _config(problem, device, block_m, block_n, block_k, warps, 3)
    space = [default]
    if problem.precision == "ieee" and wide_type:
        tiles = [
            (64, 64, 16, 4),
            (128, 64, 16, 8),
            (64, 32, 32, 4),
            (32, 64, 16, 4),
            (32, 32, 32, 4),
        ]
    else:
        tiles = [
            (128, 128, 64, 8),
            (128, 128, 64, 4),
            (128, 128, 32, 4),
            (256, 64, 64, 8),
            (256, 128, 64, 8),
            (128, 256, 64, 8),
            (128, 64, 64, 4),
            (64, 128, 64, 4),
            (64, 64, 64, 4),
            (64, 32, 64, 4),
            (32, 64, 64, 4),
            (32, 32, 64, 2),
            (128, 32, 32, 4),
            (128, 16, 32, 4),
        ]
    for tile_m, tile_n, tile_k, tile_warps in tiles:
        if tile_n >= 2 * triton.next_power_of_2(max(columns, 16)):
            continue
        if problem.direction is Direction.WGRAD and n_max < tile_n and not flat_rows(problem):
            continue
        if tile_m >= 2 * triton.next_power_of_2(max(rows, 16)):
            continue
        bounded_k = min(tile_k, power_of_two(depth, 16, 128))
        for stages in (2, 3, 4):
            config = _config(problem, device, tile_m, tile_n, bounded_k, tile_warps, stages)
            if config not in space and _fits(problem, config, device):
                space.append(config)
    if problem.direction is Direction.WGRAD:
        for base in tuple(space[:4]):
            for split in (base.split_k // 2, base.split_k * 2):
                config = replace(base, split_k=max(1, split))
                if config not in space:
                    space.append(config)
    return space


def product_shape(problem: ConvProblem) -> tuple[int, int, int]:
    """Rows, columns and depth of one group's matrix product."""
    channels, filters = problem.channels_per_group, problem.filters_per_group
    if problem.direction is Direction.FORWARD:
        return problem.out_pixels, filters, channels
    if problem.direction is Direction.DGRAD:
        phases = math.prod(problem.stride)
        return max(1, problem.in_pixels // phases), channels, filters
    return filters, problem.taps * channels, problem.out_pixels


def _tiles(problem: ConvProblem, rows: int, columns: int, block_m: int, block_n: int) -> int:
    return problem.groups * triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n)


def _config(
    problem: ConvProblem,
    device: DeviceFacts,
    block_m: int,
    block_n: int,
    block_k: int,
    num_warps: int,
    num_stages: int,
) -> TileConfig:
    split = 1
    if problem.direction is Direction.WGRAD:
        split = wgrad_split(problem, block_m, block_n, device.sm_count)
    return TileConfig(block_m, block_n, block_k, num_warps, num_stages, split_k=split)


def _fits(problem: ConvProblem, config: TileConfig, device: DeviceFacts) -> bool:
    """Whether the pipelined operand tiles can fit in shared memory at all."""
    tile = (config.block_m + config.block_n) * config.block_k * problem.dtype.itemsize
    return tile * max(1, config.num_stages - 1) <= device.shared_bytes
