"""The configs of products over boxes, and what they ask of a device."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import triton

from ...runtime.device import DeviceFacts
from ...runtime.space import (
    Choice,
    ConfigSpace,
    Constraint,
    Derived,
    Footprint,
    Int,
    Parameter,
    PowerOfTwo,
)
from ..problem import ConvProblem, Direction
from .boxed_products import box_count, product_splits, shape_of, wgrad_steps
from .boxed_views import Four, axes_of, box_shapes, in_tf32, run_shapes
from .common import TileConfig
from .tiles import around, power_of_two, product_split

_MOST_TAPS = 9
"""Taps whose accumulators one program may hold."""
_TENSOR_RATE = 5e14
_MEMORY_RATE = 3e12
"""Flops and bytes per second of a full GPU, to weigh a split's product against its partial sums."""


@dataclass(frozen=True)
class BoxedConfig(TileConfig):
    """Tile of a product over boxes.

    Attributes:
        box: which shape of a box of pixels, see :func:`box_shapes` and :func:`run_shapes`.
        taps: filter taps that one program of a weight gradient computes.
    """

    box: int = 0
    taps: int = 1


def has_copy_engine(device: DeviceFacts) -> bool:
    """Whether the GPU fetches boxes of a tensor by itself (sm_90 on)."""
    return device.arch.startswith("sm_") and int(device.arch[3:].rstrip("af")) >= 90


def pixel_map(problem: ConvProblem) -> Four:
    """The map that boxes tile."""
    axes = axes_of(problem)
    return axes.in_size if problem.direction is Direction.DGRAD else axes.out_size


def boxed_space(problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[BoxedConfig]:
    """Config space of a product over boxes."""
    wgrad = problem.direction is Direction.WGRAD
    size = pixel_map(problem)
    default = _wgrad_default(problem, device) if wgrad else _product_default(problem, device)
    while boxed_footprint(problem, default, device).shared_bytes > device.shared_bytes - 1024:
        if default.num_stages > 2:
            default = dataclasses.replace(default, num_stages=default.num_stages - 1)
        elif default.block_k > 16:
            default = dataclasses.replace(default, block_k=default.block_k // 2)
        else:
            break
    if not has_copy_engine(device):  # boxes are read element by element: nothing to search for
        return ConfigSpace.listed([default])
    constraints = [
        Constraint(
            "accumulator",
            "the accumulators would take most of a thread's registers",
            lambda num_warps, block_m, block_n, taps: (
                block_m * block_n * taps <= (5120 if taps > 1 else 4096) * num_warps
            ),
        ),
        Constraint(
            "threads",
            "too few elements of the tile for so many threads",
            lambda num_warps, block_m, block_n, taps: (
                num_warps == 4 or block_m * block_n * taps > 8192
            ),
        ),
    ]
    if wgrad:
        return _wgrad_space(problem, device, size, default, constraints)
    forward = problem.direction is Direction.FORWARD
    columns = problem.out_channels if forward else problem.in_channels
    depth = problem.in_channels if forward else problem.out_channels
    kernel = axes_of(problem).kernel
    rows = power_of_two(math.prod(size), 64, 256)
    constraints += [
        Constraint(
            "aspect",
            "a tile that narrow reads more than it multiplies",
            lambda block_m, block_n: block_m <= 4 * block_n or block_n >= columns,
        ),
    ]

    @functools.cache
    def splits(block_m: int, block_n: int, block_k: int) -> tuple[int, ...]:
        slots = device.sm_count * (2 if block_m * block_n <= 128 * 128 else 1)
        best = product_split(problem, block_m, block_n, block_k, slots)
        if in_tf32(problem):  # the model is of half precision
            return tuple(sorted({1, 3, *around(best), *around(min(8, 2 * best))}))
        return (1, best) if best > 1 else (1,)

    deepest = power_of_two(depth, 16, 32 if in_tf32(problem) else 128)

    parameters: tuple[Parameter, ...] = (
        Int("num_stages", 3, 4),
        PowerOfTwo("num_warps", 4, 8),
        PowerOfTwo("block_m", 64, rows),
        PowerOfTwo("block_n", 64, power_of_two(columns, 64, 256)),
        PowerOfTwo("block_k", min(32, deepest), deepest),
        Choice("group_m", (8,)),
        Choice("one_launch", (0,)),
        Derived("split_k", splits),
        Derived("box", lambda block_m: tuple(range(len(box_shapes(size, kernel, block_m))))),
        Choice("taps", (1,)),
    )
    return ConfigSpace(BoxedConfig, parameters, tuple(constraints), default)


def _product_default(problem: ConvProblem, device: DeviceFacts) -> BoxedConfig:
    forward = problem.direction is Direction.FORWARD
    columns = problem.out_channels if forward else problem.in_channels
    depth = problem.in_channels if forward else problem.out_channels
    size = pixel_map(problem)
    block_n = power_of_two(columns, 64, 128)
    block_m = power_of_two(math.prod(size), 64, 128 if block_n >= 128 else 256)
    block_k = power_of_two(depth, 16, 32 if in_tf32(problem) else 64)

    def tiles(block_m: int, block_n: int) -> int:
        return box_count(size, shape_of(problem, block_m, 0)) * triton.cdiv(columns, block_n)

    while block_m > 64 and tiles(block_m, block_n) < device.sm_count:
        block_m //= 2
    while block_n > 64 and tiles(block_m, block_n) < device.sm_count // 2:
        block_n //= 2
    warps = 8 if block_m * block_n > 128 * 128 else 4
    return BoxedConfig(block_m, block_n, block_k, warps, 3)


def _wgrad_space(
    problem: ConvProblem,
    device: DeviceFacts,
    size: Four,
    default: BoxedConfig,
    constraints: list[Constraint],
) -> ConfigSpace[BoxedConfig]:
    @functools.cache
    def splits(block_m: int, block_n: int, block_k: int, taps: int) -> tuple[int, ...]:
        return around(wgrad_split(problem, device, block_m, block_n, block_k, taps))

    pixels = power_of_two(math.prod(size), 32, 128)
    # Steps of several runs multiply them one after the other: shorter steps may be faster there.
    shortest = 16 if max(run_shapes(size, 64)[0]) < 64 else 32
    parameters: tuple[Parameter, ...] = (
        Int("num_stages", 3, 4),
        PowerOfTwo("num_warps", 4, 8),
        PowerOfTwo("block_m", 64, power_of_two(problem.out_channels, 64, 256)),
        PowerOfTwo("block_n", 32, power_of_two(problem.in_channels, 32, 256)),
        PowerOfTwo("block_k", shortest, pixels),
        Choice("group_m", (8,)),
        Choice("one_launch", (0,)),
        Derived("box", lambda block_k: tuple(range(len(run_shapes(size, block_k))))),
        Choice("taps", _tap_groups(problem), ordered=True),
        Derived("split_k", splits),
    )
    size_of = problem.dtype.itemsize
    constraints += [
        Constraint(
            "wide tiles",
            "several taps fill a program with tiles of at most 128 columns",
            lambda block_m, block_n, taps: taps == 1 or (block_n <= 128 and block_m <= 128),
        ),
        Constraint(
            "pipeline",
            "the pipeline would take more shared memory than a block may use",
            lambda num_stages, block_m, block_n, block_k, taps: (
                num_stages * (block_m + taps * block_n) * block_k * size_of < device.shared_bytes
            ),
        ),
        Constraint(
            "short steps",
            "so few pixels a step pay where several taps share them, or two where runs are short",
            lambda block_k, taps: (
                block_k >= min(64, pixels) or taps > 3 or (shortest < 32 and taps > 1)
            ),
        ),
        Constraint(
            "splits",
            "a split of the pixels would be less than one box of them",
            lambda block_k, split_k: split_k <= max(4, triton.cdiv(math.prod(size), block_k)),
        ),
    ]
    return ConfigSpace(BoxedConfig, parameters, tuple(constraints), default)


def _tap_groups(problem: ConvProblem) -> tuple[int, ...]:
    """Numbers of taps that one program may compute: one, a row of the filter, all of it."""
    found = {1, problem.kernel[-1], problem.taps}
    return tuple(sorted(count for count in found if count <= _MOST_TAPS))


def _wgrad_default(problem: ConvProblem, device: DeviceFacts) -> BoxedConfig:
    block_m = power_of_two(problem.out_channels, 64, 128)
    block_n = power_of_two(problem.in_channels, 32, 128)
    block_k = power_of_two(math.prod(pixel_map(problem)), 32, 64)
    taps = 1
    if block_m * block_n <= 64 * 64:
        # A narrow tile reads more than it multiplies: a row of taps shares the gradient's half.
        groups = [g for g in _tap_groups(problem) if g * block_m * block_n <= 64 * 64 * 4]
        taps = groups[-1]
    split = wgrad_split(problem, device, block_m, block_n, block_k, taps)
    return BoxedConfig(block_m, block_n, block_k, 4, 3, split_k=split, taps=taps)


def wgrad_split(
    problem: ConvProblem, device: DeviceFacts, block_m: int, block_n: int, block_k: int, taps: int
) -> int:
    """Splits of the boxes: fill the GPU, but every split writes and reads the weight once more."""
    tiles = triton.cdiv(problem.out_channels, block_m) * (problem.taps // taps)
    tiles *= triton.cdiv(problem.in_channels, block_n)
    boxes = triton.cdiv(problem.out_pixels, block_k)
    # Two programs of a multiprocessor where their accumulators leave room for both.
    slots = device.sm_count * (2 if block_m * block_n * taps <= 128 * 128 else 1)
    most = max(1, min(boxes // 4, 1024, triton.cdiv(2 * slots, tiles)))
    weight_bytes = 4 * problem.out_channels * problem.in_channels * problem.taps
    compute = problem.flops() / _TENSOR_RATE

    def seconds(split: int) -> float:
        programs = tiles * split
        used = programs / (triton.cdiv(programs, slots) * slots)
        partials = 2 * split * weight_bytes / _MEMORY_RATE if split > 1 else 0.0
        return compute / used + partials

    return min(range(1, most + 1), key=lambda split: (seconds(split), split))


def boxed_footprint(problem: ConvProblem, config: BoxedConfig, device: DeviceFacts) -> Footprint:
    """What a config asks of a device."""
    size = problem.dtype.itemsize
    threads = config.num_warps * (64 if device.arch.startswith("gfx") else 32)
    m, n, k = config.block_m, config.block_n, config.block_k
    stages = config.num_stages
    if problem.direction is Direction.WGRAD:
        count, steps, splits = wgrad_steps(problem, config, config.box)
        tiles = triton.cdiv(problem.out_channels, m) * triton.cdiv(problem.in_channels, n)
        tiles *= problem.taps // config.taps
        partial = splits > 1
        columns = config.taps * n
        shared = max((m + columns) * k * size * stages, m * n * 4)
        all_steps = tiles * count
        weight = math.prod(problem.w_shape)
        stored = weight * (8 * splits + size if partial else size)
        programs, launches = tiles * splits, 2 if partial else 1
        rows = (m * size, n * size)
    else:
        forward = problem.direction is Direction.FORWARD
        width = problem.out_channels if forward else problem.in_channels
        depth = problem.in_channels if forward else problem.out_channels
        area = pixel_map(problem)
        programs = box_count(area, shape_of(problem, m, config.box)) * triton.cdiv(width, n)
        steps = problem.taps * triton.cdiv(depth, k)
        splits = product_splits(problem, config)
        partial = splits > 1
        shared = (m + n) * k * size * (stages if steps > 1 else 1)
        shared = max(shared, m * n * (4 if partial else size))
        columns, all_steps, launches = n, programs * steps, 2 if partial else 1
        programs, steps = programs * splits, triton.cdiv(steps, splits)
        stored = math.prod(problem.result_shape) * (8 * splits + size if partial else size)
        rows = (k * size, (k if forward else n) * size)
    return Footprint(
        programs=programs,
        threads=threads,
        shared_bytes=shared,
        accumulators=m * columns // threads,
        bytes_loaded=all_steps * (m + columns) * k * size,
        bytes_stored=stored,
        flops=2 * all_steps * m * columns * k,
        steps=steps,
        in_flight=stages - 1,
        launches=launches,
        copied_rows=rows,
    )
