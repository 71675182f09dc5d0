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


_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_SMALL_TILES = ((64, 64), (64, 32), (32, 64), (32, 32))

# Of an H100, in microseconds and bytes per microsecond: orders of magnitude, as above.
_FIRST_LOAD_US = 0.7
_STEP_US = 0.12
_GATHER_US = 1.2  # a part stored, counted and read back
_CACHE_RATE = 5.5e6
_CACHE_RATE_OF_ONE = 6e4  # of one multiprocessor


def product_us(
    problem: ConvProblem, block_m: int, block_n: int, block_k: int, split: int, sm_count: int
) -> float:
    """Estimated time of a small product over pixels, without its launch.

    Steps of a program wait for the L2 cache, which all programs share; one program adds the parts.
    """
    rows, columns, _ = product_shape(problem)
    phases = math.prod(problem.stride) if problem.direction is Direction.DGRAD else 1
    programs = phases * _tiles(problem, rows, columns, block_m, block_n) * split
    steps = triton.cdiv(reduction_steps(problem, block_k), split)
    busy = min(programs, sm_count)
    rate = min(_CACHE_RATE_OF_ONE, _CACHE_RATE / busy)
    each = (block_m + block_n) * block_k * problem.dtype.itemsize / rate
    if problem.precision == "tf32x3":
        each += block_m * block_n * block_k / 2**17 * _STEP_US  # three products one by one
    # Two programs of a multiprocessor hide each other's waits, but not their traffic.
    waits = triton.cdiv(programs, 2 * sm_count) * (_FIRST_LOAD_US + steps * _STEP_US)
    moved = triton.cdiv(programs, sm_count) * steps * each
    gather = 0.0
    if split > 1:
        gather = _GATHER_US + 4 * split * block_m * block_n / _CACHE_RATE_OF_ONE
    return max(waits, moved) + 0.3 * min(waits, moved) + gather


def product_split(
    problem: ConvProblem, block_m: int, block_n: int, block_k: int, sm_count: int
) -> int:
    """Parts of the sum of a tile that take the least time, one where its tiles fill the GPU."""
    return min(
        _splits(problem, block_k),
        key=lambda split: (
            product_us(problem, block_m, block_n, block_k, split, sm_count),
            split,
        ),
    )


def _splits(problem: ConvProblem, block_k: int) -> list[int]:
    """Numbers of parts, each of two steps at least, that are worth a thought."""
    steps = reduction_steps(problem, block_k)
    plain = problem.x_layout != "strided" and problem.y_layout != "strided"
    # A whole sum over points is the pointwise algorithm's.
    least = min(2, steps) if problem.pointwise and plain else 1
    return [split for split in _SPLITS if least <= split <= max(least, steps // 2)]


def small_product(problem: ConvProblem, sm_count: int) -> bool:
    """Whether a product over pixels has too few tiles of 64 x 64 for the multiprocessors."""
    if problem.direction is Direction.WGRAD:
        return False
    rows, columns, _ = product_shape(problem)
    phases = math.prod(problem.stride) if problem.direction is Direction.DGRAD else 1
    return phases * _tiles(problem, rows, columns, 64, 64) <= sm_count


def _small_default(problem: ConvProblem, block_k: int, device: DeviceFacts) -> TileConfig:
    """Small tiles and a split sum: what the estimate likes best."""
    rows, columns, depth = product_shape(problem)
    sms = device.sm_count
    matrix = problem.dtype.itemsize <= 2 or problem.precision == "tf32"
    deepest = power_of_two(depth, _least_depth(problem), 2 * block_k if matrix else block_k)
    options = [
        (power_of_two(rows, 16, m), power_of_two(columns, 16, n), k)
        for m, n in _SMALL_TILES
        for k in dict.fromkeys((block_k, deepest))
    ]
    size = 3 * problem.dtype.itemsize  # of three stages
    fitting = [(m, n, k) for m, n, k in options if (m + n) * k * size <= device.shared_bytes]
    options = fitting or options[-2:]
    splits = {(m, n, k): product_split(problem, m, n, k, sms) for m, n, k in options}

    def microseconds(option: tuple[int, int, int]) -> float:
        block_m, block_n, step = option
        return product_us(problem, block_m, block_n, step, splits[option], sms)

    m, n, k = min(options, key=microseconds)
    split = splits[m, n, k]
    bytes_each = (m + n) * k * problem.dtype.itemsize
    stages = 5 if 5 * bytes_each <= device.shared_bytes * 0.9 else 3
    return TileConfig(m, n, k, 4, stages, split_k=split, one_launch=int(split > 1))


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
    depth_max = 128 // problem.dtype.itemsize
    block_k = power_of_two(depth, _least_depth(problem), depth_max)
    block_m = power_of_two(rows, 16, 128)
    if problem.direction is Direction.WGRAD:
        # Splitting the reduction fills the GPU; small tiles would only re-read the operands.
        block_m = min(block_m, 64 if wide_type else 128)
        if problem.channels_per_group % 16 and (needs_bounds(problem) or not flat_rows(problem)):
            # Columns gathered one by one cost registers: keep the tile small.
            block_n = min(block_n, 64)
    else:
        floor = device.sm_count
        if split_sum and small_product(problem, device.sm_count):
            return _small_default(problem, block_k, device)
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
    half = problem.dtype.itemsize <= 2
    wgrad = problem.direction is Direction.WGRAD
    k_max = 32 if scalar else 128 if half and not wgrad else 64
    k_most = power_of_two(depth, _least_depth(problem), k_max)
    small = small_product(problem, device.sm_count)
    k_least = (64 if half else 16 if scalar else 32) if small else 32 if half else 16
    parameters: list[Parameter] = [
        # Few programs of a few steps each: what they wait for had better be under way at once.
        Int("num_stages", 3, 5, 2) if small else Int("num_stages", 2, 4),
        PowerOfTwo("num_warps", 4 if small else 2, 8),
        PowerOfTwo("block_m", min(32, most_rows), min(256, most_rows)),
        PowerOfTwo("block_n", 16, min(256, most_columns)),
        PowerOfTwo("block_k", min(k_least, k_most), k_most),
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
    if small:
        constraints.append(
            Constraint(
                "small product",
                "tiles are too few for larger ones, and their warps follow from their size",
                lambda num_warps, block_m, block_n: (
                    block_m * block_n <= 128 * 64
                    and max(block_m, block_n) <= 128
                    and (num_warps == 8) == (block_m * block_n == 128 * 64)
                ),
            )
        )
    if not wgrad:

        def parts(block_m: int, block_n: int, block_k: int) -> tuple[int, ...]:
            if not split_sum or not small:
                return (1,)
            best = product_split(problem, block_m, block_n, block_k, device.sm_count)
            allowed = _splits(problem, block_k)
            around = (allowed[0], best, 2 * best, max(1, best // 2))
            found = dict.fromkeys(around)
            most = min(2 * allowed[-1], reduction_steps(problem, block_k))
            return tuple(split for split in found if allowed[0] <= split <= most)

        parameters.append(Derived("split_k", parts))
        parameters.append(Derived("one_launch", lambda split_k: (1, 0) if split_k > 1 else (0,)))
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
    parameters.append(Choice("one_launch", (0,)))
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


def _least_depth(problem: ConvProblem) -> int:
    """What a step of a matrix instruction multiplies at least."""
    return 32 if problem.dtype.itemsize == 1 else 16


def _most_columns(problem: ConvProblem) -> int:
    """Widest tile of columns that the default and, for gathered columns, the space consider."""
    widest = 64 if problem.dtype is torch.float32 else 128
    if problem.direction is Direction.WGRAD and problem.channels_per_group % 16 == 0:
        # A column tile inside one tap is loaded in whole rows under a mask of one axis.
        widest = math.gcd(problem.channels_per_group, widest)
    return widest
