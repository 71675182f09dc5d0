"""The config space of banded products over blocks of groups, and what a config asks of a device."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from ...runtime.device import DeviceFacts
from ...runtime.space import ConfigSpace, Footprint
from ..problem import ConvProblem, Direction
from .banded_geometry import VECTOR, boxes, roles_of, window_of
from .banded_group_plans import BandedGroupsConfig, block_problem, map_units, walk_of

WIDEST = 64
"""Channels and filters of a block: wider ones are mostly zeros, or fill a tile per tap."""
_SECTOR = 32
"""Bytes that memory moves at least."""
_FLOPS = 4.2e14
"""Multiply-adds × 2 per second of a full H100 in tiles like these; orders of magnitude only."""
_LOADS = 6.5e12
"""Bytes per second from its caches to the multiprocessors, likewise."""
_STEP = 6e-10
"""Seconds that a step of a program costs beside, with 400 programs under way."""
_MOST_KINDS = 10
Box = tuple[int, int, int]


@functools.lru_cache(maxsize=1024)
def block_counts(problem: ConvProblem) -> tuple[int, ...]:
    """Numbers of groups whose channels make a block of whole vectors, the smallest first."""
    per_group = (problem.channels_per_group, problem.filters_per_group)
    if min(per_group) < 2:
        return ()
    return tuple(
        n
        for n in range(1, WIDEST // max(per_group) + 1)
        if problem.groups % n == 0 and all(n * width % VECTOR == 0 for width in per_group)
    )


def _block_ks(problem: ConvProblem, box: Box) -> tuple[int, ...]:
    """Steps of the reduction (tiles of a weight gradient's columns), which pad little."""
    window = window_of(problem, box)
    blocks: tuple[int, ...] = (64, 128, 32, 16)
    depth = window.line
    if problem.direction is Direction.WGRAD:
        depth, blocks = window.lines * window.line, (256, 128, 64, 32, 16)
    padded = {block: -(-depth // block) * block for block in blocks}
    least = min(padded.values())
    return tuple(block for block in blocks if padded[block] <= 1.15 * least)[:2]


def _seconds(problem: ConvProblem, bundle: int, box: Box) -> float:
    """An estimate of the product's time that puts kinds of products in order."""
    wgrad = problem.direction is Direction.WGRAD
    inner = block_problem(problem, bundle)
    roles = roles_of(inner)
    window = window_of(inner, box)
    block_k = _block_ks(inner, box)[0]
    depth = window.lines * window.line
    padded = (
        -(-depth // block_k) * block_k if wgrad else window.lines * window.chunks(block_k) * block_k
    )
    units = problem.batch * map_units(inner, box) * (problem.groups // bundle)
    flops = 2.0 * units * padded * window.block_n
    # Parts of a sector are moved with the rest of it.
    sector = max(1.0, _SECTOR / (roles.channels * problem.dtype.itemsize))
    if wgrad:
        loads = 2 * units * (depth * sector + padded // block_k * window.columns)
        steps = units * padded / block_k / 64
        if window.block_n < 64:  # too few rows for the instructions of a warp group
            flops *= 4
    else:
        loads = 2 * units * (depth * sector + window.columns + padded * window.block_n / 128)
        steps = units * padded / block_k / 128
    compute, transfer = flops / _FLOPS, loads / _LOADS
    return max(compute, transfer) + 0.3 * min(compute, transfer) + steps * _STEP


@functools.lru_cache(maxsize=1024)
def best_kinds(problem: ConvProblem) -> tuple[tuple[int, Box], ...]:
    """(groups of a block, box of a unit) worth trying, by the estimated time."""
    found = [
        (bundle, box)
        for bundle in block_counts(problem)
        for box in boxes(block_problem(problem, bundle), 128)
    ]
    return tuple(sorted(found, key=lambda kind: (_seconds(problem, *kind), kind))[:_MOST_KINDS])


def _warps(problem: ConvProblem, block_n: int, units: int, block_k: int) -> int:
    wgrad = problem.direction is Direction.WGRAD
    held = block_n * (block_k if wgrad else units)
    return 8 if held > (16384 if wgrad else 8192) else 4


def _images(
    problem: ConvProblem, config: BandedGroupsConfig, slots: int, columns: int
) -> tuple[int, ...]:
    """Images over which tiles of units may reach, by the steps of the longest programs."""

    def steps(images: int) -> tuple[float, int]:
        walk = walk_of(problem, dataclasses.replace(config, images=images))
        rounds = -(-columns * walk.splits // slots)
        # Another tile begins the pipeline anew; images that remain are another mask.
        count = rounds * walk.tiles_per_split * (walk.steps_per_split + 2)
        return count * (1.0 if problem.batch % images == 0 else 1.08), images

    choices = [n for n in range(1, 9) if n == 1 or 4 * n <= problem.batch]
    return tuple(sorted(choices, key=steps)[:2])


# Units of a tile, stages, whether through the L1 cache, warps over the fewest that hold it. In the
# order of an H100, where that cache cost a third to a half more, and twice the warps, which halve
# the registers of a thread, took 39.7 and 39.8 µs for 41.9 and 41.4 (44.0 for 43.8 on 14² maps).
_PRODUCT_TILES = (
    (128, 3, 0, 2),
    (128, 3, 0, 1),
    (128, 4, 0, 1),
    (256, 3, 0, 1),
    (128, 2, 0, 1),
    (128, 4, 0, 2),
    (64, 4, 0, 1),
    (128, 3, 1, 1),
)
# Units of a tile, stages, whether through the L1 cache, in the order of the same measurements.
_WEIGHT_TILES = ((32, 3, 0), (64, 2, 0), (64, 3, 0), (64, 2, 1), (32, 3, 1), (64, 3, 1))
_SMALL_TILES = ((64, 2, 0), (32, 2, 0), (64, 3, 0), (32, 3, 0))


def _products(
    problem: ConvProblem, bundle: int, box: Box, roomy: bool
) -> Iterator[BandedGroupsConfig]:
    """Tiles of one kind of product over pixels, the best guess first."""
    inner = block_problem(problem, bundle)
    block_n = window_of(inner, box).block_n
    tiles = _PRODUCT_TILES if roomy else tuple((*tile, 1) for tile in _SMALL_TILES)
    # Steps of the second depth take turns: they leave room for one program more.
    turns = [
        (number + 1.5 * place, block_k, *tile)
        for place, block_k in enumerate(_block_ks(inner, box))
        for number, tile in enumerate(tiles)
    ]
    for _, block_k, units, stages, cached, more in sorted(turns):
        if block_n * units <= 128 * 256 and block_k * stages <= 256:
            warps = min(8, more * _warps(problem, block_n, units, block_k))
            yield BandedGroupsConfig(*box, bundle, units, block_k, warps, stages, cached=cached)


def _weights(
    problem: ConvProblem, bundle: int, box: Box, device: DeviceFacts, roomy: bool
) -> Iterator[BandedGroupsConfig]:
    """Tiles and splits of one kind of weight gradient, the best guess first."""
    inner = block_problem(problem, bundle)
    window = window_of(inner, box)
    kinds = list(itertools.product(_block_ks(inner, box), _WEIGHT_TILES if roomy else _SMALL_TILES))
    for share, choice in ((1.0, 0), (0.5, 0), (1.0, 1), (2.0, 0)):
        for block_k, (units, stages, cached) in kinds:
            if not roomy and block_k * units > 128 * 64:
                continue
            warps = _warps(problem, window.block_n, units, block_k)
            programs = problem.groups // bundle * -(-window.lines * window.line // block_k)
            slots = (2 if warps == 4 else 1) * device.sm_count
            split = max(1, int(share * slots / programs))
            config = BandedGroupsConfig(
                *box, bundle, units, block_k, warps, stages, split, cached=cached
            )
            images = _images(inner, config, slots, programs)
            yield dataclasses.replace(config, images=images[min(choice, len(images) - 1)])


@functools.lru_cache(maxsize=1024)
def _listed(problem: ConvProblem, device: DeviceFacts) -> tuple[BandedGroupsConfig, ...]:
    roomy = device.arch in ("sm_80", "sm_90", "sm_100")
    ranked: list[tuple[float, BandedGroupsConfig]] = []
    for place, (bundle, box) in enumerate(best_kinds(problem)):
        if problem.direction is Direction.WGRAD:
            found = _weights(problem, bundle, box, device, roomy)
        else:
            found = _products(problem, bundle, box, roomy)
        # Other tiles of the best kinds take turns with other kinds.
        ranked += [(number + 1.5 * place, config) for number, config in enumerate(found)]
    ranked.sort(key=lambda row: row[0])
    return tuple(dict.fromkeys(config for _, config in ranked))


def banded_groups_space(
    problem: ConvProblem, device: DeviceFacts
) -> ConfigSpace[BandedGroupsConfig]:
    """Blocks of groups, boxes of pixels, tiles of units, splits: the best guesses first."""
    return ConfigSpace.listed(_listed(problem, device))


def banded_groups_footprint(
    problem: ConvProblem, config: BandedGroupsConfig, device: DeviceFacts
) -> Footprint:
    """Of the product; the kernel that spreads weights, or adds diagonals, is one more launch."""
    inner = block_problem(problem, config.bundle)
    window = window_of(inner, config.run)
    blocks = problem.groups // config.bundle
    units, k, n = config.units, config.block_k, window.block_n
    threads = config.num_warps * (64 if device.arch.startswith("gfx") else 32)
    grouped = device.arch in ("sm_90", "sm_100")
    size = problem.dtype.itemsize
    if problem.direction is Direction.WGRAD:
        walk = walk_of(inner, config)
        columns = blocks * -(-window.lines * window.line // k)
        programs = columns * walk.splits
        steps = walk.tiles_per_split * walk.steps_per_split
        all_steps = columns * walk.tiles * walk.steps
        stored = 8 * walk.splits * n * columns * k
        step_bytes, held, scratch = units * (n + k) * size, n * k, n * k * 4 if grouped else 0
    else:
        steps = window.lines * window.chunks(k)
        programs = blocks * -(-problem.batch * map_units(inner, config.run) // units)
        all_steps = programs * steps
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
