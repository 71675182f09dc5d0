"""The config space of banded products and what a config asks of a device."""

from __future__ import annotations

import functools
import itertools
import math

from ...runtime.device import DeviceFacts
from ...runtime.space import Bool, Choice, ConfigSpace, Constraint, Derived, Footprint, PowerOfTwo
from ..problem import ConvProblem, Direction
from .banded_geometry import (
    BandedConfig,
    boxes,
    grid_of,
    roles_of,
    split_tiles,
    tiles_of,
    window_of,
)
from .tiles import around

_MOST_BOXES = {Direction.FORWARD: 5, Direction.DGRAD: 5, Direction.WGRAD: 4}
_FLOPS = 5e14
"""Multiply-adds × 2 per second of a full H100 in tiles like these; orders of magnitude only."""
_LOADS = 8e12
"""Bytes per second from its caches to the multiprocessors, likewise."""
_STEP = 6e-10
"""Seconds that a step of a program costs beside, with 400 programs under way."""
Box = tuple[int, int, int]
_PAIR: Box = (1, 1, 2)


def _units_of(problem: ConvProblem, box: Box) -> tuple[int, int, int]:
    """Units of a map on the three axes."""
    depth, height, width = roles_of(problem).unit_size
    return -(-depth // box[0]), -(-height // box[1]), -(-width // box[2])


@functools.lru_cache(maxsize=4096)
def tile_shapes(problem: ConvProblem, box: Box, units: int) -> tuple[tuple[int, int], ...]:
    """The two shapes (rows × columns) of a tile of ``units`` that overhang least."""
    _, height, width = _units_of(problem, box)

    def cost(shape: tuple[int, int]) -> tuple[float, int]:
        h, w = shape
        covered = -(-height // h) * h * (-(-width // w) * w)
        # Halves of a tenth: a little overhang weighs less than a tile that is all edge.
        return round(20 * covered / (height * width)) / 20, abs(h * box[1] - w * box[2])

    shapes = [(1 << e, units >> e) for e in range(units.bit_length())]
    return tuple(sorted(shapes, key=cost)[:2])


def _depth_blocks(problem: ConvProblem, box: Box) -> tuple[int, ...]:
    """Steps of the reduction (tiles of a weight gradient's columns), widest first."""
    window = window_of(problem, box)
    if problem.direction is Direction.WGRAD:
        depth, most = window.lines * window.line, 256
    else:
        depth, most = window.line, 128
    blocks = tuple(most >> e for e in range(5) if most >> e >= 16)
    padded = {block: -(-depth // block) * block for block in blocks}
    least = min(padded.values())
    return tuple(block for block in blocks if padded[block] <= 1.15 * least)


def _seconds(problem: ConvProblem, box: Box) -> float:
    """An estimate of the product's time that puts boxes in order."""
    wgrad = problem.direction is Direction.WGRAD
    window = window_of(problem, box)
    block = _depth_blocks(problem, box)[0]
    depth = window.lines * window.line
    padded = -(-depth // block) * block if wgrad else window.lines * window.chunks(block) * block
    units = problem.batch * math.prod(_units_of(problem, box))
    flops = 2.0 * units * padded * window.block_n
    steps = units * (padded / block) / (64 if wgrad else 128)
    if wgrad:
        loads = 2 * units * (padded + padded // block * window.block_n)
        if window.block_n < 64:  # too few rows for the instructions of a warp group
            flops *= 4
    else:
        loads = 2 * units * padded * (128 + window.block_n) // 128
    compute, transfer = flops / _FLOPS, loads / _LOADS
    return max(compute, transfer) + 0.3 * min(compute, transfer) + steps * _STEP


@functools.lru_cache(maxsize=1024)
def best_boxes(problem: ConvProblem) -> tuple[Box, ...]:
    """The boxes worth trying, by their estimated time."""
    found = boxes(problem, 128)
    return tuple(
        sorted(found, key=lambda box: (_seconds(problem, box), box))[
            : _MOST_BOXES[problem.direction]
        ]
    )


def _parts(problem: ConvProblem, config: BandedConfig, device: DeviceFacts) -> int:
    """Splits of a weight gradient's sum: two programs for every multiprocessor."""
    window = window_of(problem, config.run)
    columns = -(-window.lines * window.line // config.block_k)
    return max(1, min(2 * device.sm_count // columns, tiles_of(problem, config)))


def _default(problem: ConvProblem, device: DeviceFacts) -> BandedConfig:
    wgrad = problem.direction is Direction.WGRAD
    box = best_boxes(problem)[0]
    # Two pixels of 32 filters fill an instruction: larger boxes only multiply more zeros.
    wide = wgrad and problem.in_channels >= 32 and problem.out_channels >= 32
    if wide and _PAIR in best_boxes(problem):
        box = _PAIR
    block_n = window_of(problem, box).block_n
    units = 64 if wgrad else 128
    units_h, units_w = tile_shapes(problem, box, units)[0]
    roomy = device.arch in ("sm_80", "sm_90", "sm_100")
    widest = (128 if wide else 256) if wgrad and roomy else 64
    blocks = _depth_blocks(problem, box)
    block_k = next((block for block in blocks if block <= widest), blocks[-1])
    accumulators = block_n * (block_k if wgrad else units)
    warps = 8 if accumulators > (16384 if wgrad else 8192) else 4
    stages = 2 if (wgrad and not wide) or not roomy else 3
    config = BandedConfig(*box, units_h, units_w, block_k, warps, stages)
    if not wgrad:
        return config
    return BandedConfig(**{**config.as_dict(), "split": _parts(problem, config, device)})


def banded_space(problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[BandedConfig]:
    """Boxes of pixels, tiles of units, steps of the sum."""
    wgrad = problem.direction is Direction.WGRAD
    found = best_boxes(problem)
    default = _default(problem, device)
    sizes = (32, 64) if wgrad else (64, 128, 256)
    shapes = {
        (box, units): tile_shapes(problem, box, units)
        for box, units in itertools.product(found, sizes)
    }
    heights = sorted({h for options in shapes.values() for h, _ in options})
    widths = sorted({w for options in shapes.values() for _, w in options})
    blocks = {box: _depth_blocks(problem, box)[:2] for box in found}
    blocks[default.run] = tuple(dict.fromkeys((*blocks[default.run], default.block_k)))

    def tile(run_d: int, run_h: int, run_w: int, units_h: int, units_w: int) -> bool:
        options = shapes.get(((run_d, run_h, run_w), units_h * units_w), ())
        return (units_h, units_w) in options

    def held(run_d: int, run_h: int, run_w: int, units_h: int, units_w: int, block_k: int) -> int:
        block_n = window_of(problem, (run_d, run_h, run_w)).block_n
        return block_n * (block_k if wgrad else units_h * units_w)

    def warps(
        run_d: int,
        run_h: int,
        run_w: int,
        units_h: int,
        units_w: int,
        block_k: int,
        num_warps: int,
    ) -> bool:
        accumulators = held(run_d, run_h, run_w, units_h, units_w, block_k)
        return accumulators <= 4096 * num_warps and (num_warps == 4 or accumulators >= 8192)

    @functools.cache
    def parts(
        run_d: int, run_h: int, run_w: int, units_h: int, units_w: int, block_k: int
    ) -> tuple[int, ...]:
        if not wgrad:
            return (1,)
        config = BandedConfig(run_d, run_h, run_w, units_h, units_w, block_k, 4, 2)
        return around(_parts(problem, config, device))

    return ConfigSpace(
        BandedConfig,
        (
            Choice("run_d", tuple(sorted({box[0] for box in found})), ordered=True),
            Choice("run_h", tuple(sorted({box[1] for box in found})), ordered=True),
            Choice("run_w", tuple(sorted({box[2] for box in found})), ordered=True),
            Choice("units_h", tuple(heights), ordered=True),
            Choice("units_w", tuple(widths), ordered=True),
            Choice("block_k", tuple(sorted({k for v in blocks.values() for k in v})), ordered=True),
            PowerOfTwo("num_warps", 4, 8),
            Choice("num_stages", (2, 3), ordered=True),
            Bool("cached"),
            Derived("split", parts),
        ),
        (
            Constraint(
                "box",
                "the unit's columns would leave much of a tile empty, or it reads too much",
                lambda run_d, run_h, run_w: (run_d, run_h, run_w) in found,
            ),
            Constraint("tile", "the tile would overhang the map more than others", tile),
            Constraint(
                "steps",
                "steps of this depth would pad the window",
                lambda run_d, run_h, run_w, block_k: (
                    block_k in blocks.get((run_d, run_h, run_w), ())
                ),
            ),
            Constraint("warps", "too many accumulators for a thread, or too few", warps),
        ),
        default,
    )


def banded_footprint(problem: ConvProblem, config: BandedConfig, device: DeviceFacts) -> Footprint:
    """Of the product; the kernel that spreads weights, or adds diagonals, is one more launch."""
    window = window_of(problem, config.run)
    units, k, n = config.units, config.block_k, window.block_n
    tiles = math.prod(grid_of(problem, config)) * problem.batch
    threads = config.num_warps * (64 if device.arch.startswith("gfx") else 32)
    grouped = device.arch in ("sm_90", "sm_100")
    size = problem.dtype.itemsize
    if problem.direction is Direction.WGRAD:
        columns = -(-window.lines * window.line // k)
        each, splits = split_tiles(problem, config)
        programs, steps, all_steps = columns * splits, each, columns * tiles
        stored = 8 * splits * n * columns * k
        step_bytes, held, scratch = units * (n + k) * size, n * k, n * k * 4 if grouped else 0
    else:
        steps = window.lines * window.chunks(k)
        programs, all_steps = tiles, tiles * steps
        stored = size * math.prod(problem.result_shape)
        step_bytes, held, scratch = k * (n + units) * size, n * units, n * units * size
    buffers = config.num_stages if grouped else config.num_stages - 1
    return Footprint(
        programs=programs,
        threads=threads,
        shared_bytes=max(step_bytes * buffers, scratch),
        accumulators=held // threads,
        bytes_loaded=all_steps * step_bytes,
        bytes_stored=stored,
        # Units of the input are fewer than the pixels of a padded output, which problems count.
        flops=max(2 * all_steps * units * k * n, problem.flops()),
        steps=steps,
        in_flight=config.num_stages - 1,
        launches=2,
    )
