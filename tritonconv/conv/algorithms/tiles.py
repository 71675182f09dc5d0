"""The config space of implicit matrix products: tiles, warps, stages, splits of the reduction."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton

from ...runtime.device import DeviceFacts
from ...runtime.space import Choice, ConfigSpace, Constraint, Derived, Int, Parameter, PowerOfTwo
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


def flat_map(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the spatial axes of (batch, channels, *spatial) strides collapse into one."""
    expected = strides[-1]
    for size, stride in zip(reversed(sizes), reversed(strides[2:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


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


def reduction_steps(problem: ConvProblem, block_k: int) -> int:
    """Steps of the loop over the reduction of a product over pixels, in the longest phase."""
    taps = problem.taps
    depth = problem.channels_per_group
    if problem.direction is Direction.DGRAD:
        depth = problem.filters_per_group
        taps = math.prod(
            triton.cdiv(count, hop // math.gcd(hop, step))
            for count, hop, step in zip(
                problem.kernel, problem.stride, problem.dilation, strict=True
            )
        )
    return triton.cdiv(depth, block_k) * taps


_MOST_SPLITS = 16


def product_split(
    problem: ConvProblem, block_m: int, block_n: int, block_k: int, sm_count: int
) -> int:
    """Parts of the sum that fill the GPU, one where its tiles nearly do so."""
    rows, columns, _ = product_shape(problem)
    phases = math.prod(problem.stride) if problem.direction is Direction.DGRAD else 1
    tiles = phases * _tiles(problem, rows, columns, block_m, block_n)
    steps = reduction_steps(problem, block_k)
    most = min(sm_count // tiles, steps // 4, _MOST_SPLITS)
    split = 1 << max(0, most.bit_length() - 1)
    # A second kernel costs about as much as a dozen steps of one program.
    return split if steps - steps // split >= 12 else 1


def tile_default(problem: ConvProblem, device: DeviceFacts, split_sum: bool = False) -> TileConfig:
    """The heuristic default of an implicit matrix product: what an untuned call runs.

    Args:
        problem: the product.
        device: where it runs.
        split_sum: whether the sums of a product over pixels can be split.
    """
    rows, columns, depth = product_shape(problem)
    wide_type = problem.dtype is torch.float32
    block_n = power_of_two(columns, 16, _most_columns(problem))
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
        if split_sum:
            m, n = min(block_m, 64), min(block_n, 64)
            split = product_split(problem, m, n, block_k, device.sm_count)
            if split > 1:
                return TileConfig(m, n, block_k, 4, 3, split_k=split)
        while block_m > 32 and _tiles(problem, rows, columns, block_m, block_n) < floor:
            block_m //= 2
        while block_n > 32 and _tiles(problem, rows, columns, block_m, block_n) < floor // 2:
            block_n //= 2
    warps = 8 if block_m * block_n >= 128 * 128 else 4
    split = 1
    if problem.direction is Direction.WGRAD:
        warps = 4
        split = wgrad_split(problem, block_m, block_n, device.sm_count)
    return TileConfig(block_m, block_n, block_k, warps, 3, split_k=split)


def tile_space(
    problem: ConvProblem, device: DeviceFacts, split_sum: bool = False
) -> ConfigSpace[TileConfig]:
    """Config space of an implicit matrix product; its default is :func:`tile_default`.

    Args:
        problem: the product.
        device: where it runs.
        split_sum: whether the sums of a product over pixels can be split.
    """
    rows, columns, depth = product_shape(problem)
    scalar = problem.dtype is torch.float32 and problem.precision == "ieee"
    most_rows = triton.next_power_of_2(max(rows, 16))
    most_columns = triton.next_power_of_2(max(columns, 16))
    half = problem.dtype.itemsize == 2
    wgrad = problem.direction is Direction.WGRAD
    k_max = 32 if scalar else 128 if half and not wgrad else 64
    k_most = power_of_two(depth, 16, k_max)
    parameters: list[Parameter] = [
        Int("num_stages", 2, 4),
        PowerOfTwo("num_warps", 2, 8),
        PowerOfTwo("block_m", min(32, most_rows), min(256, most_rows)),
        PowerOfTwo("block_n", 16, min(256, most_columns)),
        PowerOfTwo("block_k", min(32, k_most) if half else 16, k_most),
        # A split reduction has few tiles, whose order matters little.
        Choice("group_m", (8,) if wgrad else (8, 1)),
    ]
    constraints = [
        *tile_constraints(),
        order_constraint(problem, device, rows, columns),
        Constraint(
            "aspect",
            "a tile that long and narrow reads more than it multiplies",
            # Unless it is as narrow as the whole product.
            lambda block_m, block_n: (
                (block_m <= 8 * block_n or block_n >= most_columns)
                and (block_n <= 4 * block_m or block_m >= most_rows)
            ),
        ),
    ]
    if scalar:
        constraints.append(
            Constraint(
                "scalar products",
                "IEEE products run on scalar units, for which a large tile only spills",
                lambda block_m, block_n: block_m * block_n <= 128 * 64,
            )
        )
    if not wgrad:

        def parts(block_m: int, block_n: int, block_k: int) -> tuple[int, ...]:
            best = product_split(problem, block_m, block_n, block_k, device.sm_count)
            return (1, best, 2 * best) if split_sum and best > 1 else (1,)

        parameters.append(Derived("split_k", parts))
        return ConfigSpace(
            TileConfig,
            tuple(parameters),
            tuple(constraints),
            tile_default(problem, device, split_sum),
        )
    if not flat_rows(problem):
        widest = _most_columns(problem)
        constraints.append(
            Constraint(
                "one tap",
                "a tile of columns that spans filter taps gathers them one by one",
                lambda block_n: block_n <= widest,
            )
        )

    @functools.cache
    def splits(block_m: int, block_n: int) -> tuple[int, ...]:
        return around(wgrad_split(problem, block_m, block_n, device.sm_count))

    parameters.append(Derived("split_k", splits))
    constraints.append(
        Constraint(
            "splits",
            "a split of the pixels would be less than one block of them",
            lambda block_k, split_k: split_k <= max(2, triton.cdiv(depth, block_k)),
        )
    )
    return ConfigSpace(
        TileConfig, tuple(parameters), tuple(constraints), tile_default(problem, device)
    )


def tile_constraints() -> tuple[Constraint, ...]:
    """Constraints on tiles and warps that hold for every product on matrix instructions."""
    return (
        Constraint(
            "accumulator",
            "the accumulator would take more than half of a thread's registers",
            lambda num_warps, block_m, block_n: (
                block_m * block_n <= (4096 if num_warps < 4 else 4096 * num_warps)
            ),
        ),
        Constraint(
            "threads",
            "too few elements of the tile for so many threads",
            # Four warps are one unit of the matrix instructions, whatever the tile.
            lambda num_warps, block_m, block_n: (
                num_warps == 4 or block_m * block_n >= (8192 if num_warps > 4 else 1024)
            ),
        ),
    )


def order_constraint(
    problem: ConvProblem, device: DeviceFacts, rows: int, columns: int
) -> Constraint:
    """Where the order in which tiles are computed can make a difference."""
    large = 2 * problem.bytes_moved() > device.l2_bytes
    return Constraint(
        "order",
        "the tensors stay in the L2 cache, or there is one row or column of tiles: "
        "their order makes no difference",
        lambda group_m, block_m, block_n: (
            group_m == 8 or (large and columns > block_n and rows > block_m)
        ),
    )


def around(estimate: int) -> tuple[int, int, int]:
    """An estimate, half of it and twice of it (or twice and four times one), all distinct."""
    return (1, 2, 4) if estimate <= 1 else (estimate, estimate // 2, 2 * estimate)


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


def _most_columns(problem: ConvProblem) -> int:
    """Widest tile of columns that the default and, for gathered columns, the space consider."""
    widest = 64 if problem.dtype is torch.float32 else 128
    if problem.direction is Direction.WGRAD and problem.channels_per_group % 16 == 0:
        # A column tile inside one tap is loaded in whole rows under a mask of one axis.
        widest = math.gcd(problem.channels_per_group, widest)
    return widest
