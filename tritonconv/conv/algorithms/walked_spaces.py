"""Tiles, taps, walks and splits of a walked weight gradient, and an estimate of their time."""

from __future__ import annotations

import functools
import math

import torch
import triton

from ...runtime.device import DeviceFacts
from ...runtime.space import Bool, Choice, ConfigSpace, Constraint, Derived, Int, PowerOfTwo
from ..problem import ConvProblem
from .tiles import around, power_of_two
from .walked_wgrad import WalkedConfig, is_flat, walk_of

# Rates of an H100, which weigh tiles and splits against each other.
_CLOCK = 1.7e9
_PRODUCTS = 2048
"""Multiply-adds of a multiprocessor per clock, half precision."""
_SHARED = 128
"""Bytes of shared memory per clock and multiprocessor."""
_CACHE = 48
"""Bytes from the L2 cache, likewise."""
_LATENCY = 900
"""Clocks until a tile has come from the L2 cache."""
_PARTIALS = 3.5e12
"""Bytes of partial sums per second."""
_LAUNCH = 2e-6


def seconds(problem: ConvProblem, config: WalkedConfig, device: DeviceFacts) -> float:
    """Estimated time: what limits a step, times the steps of the busiest multiprocessor."""
    walk = walk_of(problem, config)
    m, n, k, taps = config.block_m, config.block_n, config.block_k, config.taps
    size = problem.dtype.itemsize
    tiles = problem.groups * triton.cdiv(problem.filters_per_group, m)
    tiles *= problem.taps // taps * triton.cdiv(problem.channels_per_group, n)
    grouped = m >= 64 and config.num_warps >= 4
    product = m * n * taps * k * size / 2 / (_PRODUCTS if grouped else _PRODUCTS / 2)
    written = (m + taps * n) * k * size
    reads = taps * max(1, m // 64) * (k // 16) * (min(m, 64) + n) * 16 * size
    loaded = written * problem.out_pixels / (walk.steps * walk.blocks * k)
    step = max(product, (reads + written) / _SHARED, loaded / _CACHE)
    rounds = triton.cdiv(tiles * walk.splits, device.sm_count)
    # Programs of one multiprocessor hide each other's waits: two at least fit.
    step = max(step, _LATENCY / max(1, config.num_stages - 1) / min(rounds, 2))
    count = (walk.steps_per_split + 3) * walk.blocks_per_split
    time = rounds * count * step / _CLOCK
    if walk.splits > 1:
        weights = math.prod(problem.w_shape)
        time += _LAUNCH + 8 * weights * walk.splits / _PARTIALS
    return time


def tap_counts(problem: ConvProblem) -> tuple[int, ...]:
    """Numbers of neighbouring taps that a program may compute: whole rows and planes."""
    counts, found = 1, [1]
    for extent in reversed(problem.kernel):
        counts *= extent
        if counts <= 9:
            found.append(counts)
    return tuple(dict.fromkeys(found))


def _padded(problem: ConvProblem, config: WalkedConfig) -> float:
    walk = walk_of(problem, config)
    return walk.steps * walk.blocks * config.block_k / max(1, problem.out_pixels)


@functools.lru_cache(maxsize=256)
def _costs(problem: ConvProblem, block_k: int) -> tuple[tuple[float, int, int], ...]:
    """(cost, walk, images) by cost: pixels that pad blocks, and short loops over steps."""
    if is_flat(problem):
        return ((1.0, 0, 1),)
    found: list[tuple[float, int, int]] = []
    for walk in range(len(problem.out_size)):
        level = walk + 3 - len(problem.out_size) if walk else 0
        for images in (1, 2, 4, 5) if level == 0 else (1,):
            if images > 1 and (math.prod(problem.out_size) >= 512 or problem.batch < 4 * images):
                continue
            config = WalkedConfig(16, 16, block_k, 4, 3, walk=level, images=images)
            shares = walk_of(problem, config)
            # Another block of pixels costs some steps, and images that remain another mask.
            begun = 6 if problem.batch % images == 0 else 12
            cost = _padded(problem, config) * (1 + begun / max(1, shares.steps))
            found.append((cost, level, images))
    return tuple(sorted(found))


def ways(problem: ConvProblem, block_k: int) -> tuple[tuple[int, int], ...]:
    """(walk, images) that pad little and leave long loops, the best first."""
    costs = _costs(problem, block_k)
    return tuple((walk, images) for cost, walk, images in costs if cost < 1.35 * costs[0][0])[:2]


def wasteful(problem: ConvProblem) -> bool:
    """Whether every walk multiplies mostly padding, or takes few steps: a few small images."""
    return _costs(problem, _block_ks(problem)[-1])[0][0] > 3


_SPLITS = (*range(1, 17), 20, 24, 32, 48, 64, 96, 128, 192, 256)


def warps_of(block_m: int, block_n: int, taps: int, device: DeviceFacts) -> int:
    """So many that the sums of a program take at most half of the registers, or nearly."""
    elements = block_m * block_n * taps
    if block_m <= 32 and elements <= 16 * 16 * 9:
        return 1
    if block_m <= 32 and elements <= 32 * 32 * 4:
        return 2
    # Elsewhere operands pass through registers as well.
    grouped = device.arch in ("sm_90", "sm_100")
    return 4 if elements <= (128 * 128 if grouped else 64 * 128) else 8


def _best_split(
    problem: ConvProblem,
    device: DeviceFacts,
    block_m: int,
    block_n: int,
    block_k: int,
    taps: int,
    walk: int,
    images: int,
) -> tuple[float, int]:
    """Estimated time and number of splits that is best for a tile."""
    most = max(1, problem.out_pixels // (4 * block_k))
    warps = warps_of(block_m, block_n, taps, device)
    if warps < 4:
        # Small programs wait most of the time: about ten warps a multiprocessor hide it.
        tiles = problem.groups * triton.cdiv(problem.filters_per_group, block_m)
        tiles *= problem.taps // taps * triton.cdiv(problem.channels_per_group, block_n)
        split = min(most, max(1, triton.cdiv(10 * device.sm_count, tiles * warps)))
        config = WalkedConfig(block_m, block_n, block_k, warps, 3, 8, split, taps, walk, images)
        return seconds(problem, config, device), split
    return min(
        (
            seconds(
                problem,
                WalkedConfig(block_m, block_n, block_k, warps, 3, 8, split, taps, walk, images),
                device,
            ),
            split,
        )
        for split in _SPLITS
        if split <= most
    )


def _tiles(problem: ConvProblem) -> list[tuple[int, int, int]]:
    """(rows, columns, taps) of tiles that the default is chosen from, as the problem's sizes cut.

    Single precision and gathered channels keep to small ones, which fit in registers.
    """
    rows = power_of_two(problem.filters_per_group, 16, 256)
    columns = power_of_two(problem.channels_per_group, 16, 256)
    if problem.dtype.itemsize > 2 or problem.x_strides[1] != 1:
        return [(min(64, rows), min(64, columns), 1)]
    found = [(128, 256, 1), (256, 128, 1), (128, 128, 1), (64, 128, 1), (64, 64, 1)]
    if 3 in tap_counts(problem):
        found += [(128, 64, 3), (64, 64, 3)]
    if rows < 64 or columns < 64:
        return [(min(64, rows), min(64, columns), taps) for taps in (1, 3)[: 1 + (len(found) > 5)]]
    return [tile for tile in found if tile[0] <= rows and tile[1] <= columns]


def walked_default(problem: ConvProblem, device: DeviceFacts) -> WalkedConfig:
    """The best of a few tiles by the estimate."""
    block_k = _block_ks(problem)[-1]
    walk, images = ways(problem, block_k)[0]
    found = [
        (*_best_split(problem, device, m, n, block_k, taps, walk, images), m, n, taps)
        for m, n, taps in _tiles(problem)
    ]
    _, split, m, n, taps = min(found, key=lambda row: row[0])
    warps = warps_of(m, n, taps, device)
    return WalkedConfig(m, n, block_k, warps, 3, 8, split, taps, walk, images)


def _block_ks(problem: ConvProblem) -> tuple[int, ...]:
    """Pixels of a step: as many as two depths of a matrix instruction or more, where there are."""
    most = power_of_two(problem.out_pixels, 16, 64 if problem.dtype.itemsize == 2 else 32)
    return (most // 2, most) if most > 16 else (most,)


def walked_space(problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[WalkedConfig]:
    """Tiles, taps, walks and splits."""
    scalar = problem.dtype is torch.float32 and problem.precision == "ieee"
    rows = power_of_two(problem.filters_per_group, 16, 256)
    columns = power_of_two(problem.channels_per_group, 16, 256)
    block_ks = _block_ks(problem)

    @functools.cache
    def walks(block_k: int) -> tuple[int, ...]:
        return tuple(dict.fromkeys(walk for walk, _ in ways(problem, block_k)))

    @functools.cache
    def images(block_k: int, walk: int) -> tuple[int, ...]:
        return tuple(count for way, count in ways(problem, block_k) if way == walk)

    @functools.cache
    def splits(block_m: int, block_n: int, block_k: int, taps: int) -> tuple[int, ...]:
        way = ways(problem, block_k)[0]
        return around(_best_split(problem, device, block_m, block_n, block_k, taps, *way)[1])

    constraints = [
        Constraint(
            "registers",
            "the sums of a program would take more registers than a thread has, or too few",
            lambda num_warps, block_m, block_n, taps: (
                taps * block_m * block_n <= (192 if num_warps > 1 else 96) * 32 * num_warps
                and (num_warps <= 4 or taps * block_m * block_n >= 64 * 192)
                and (num_warps != 2 or taps * block_m * block_n >= 1024)
            ),
        ),
        Constraint(
            "warps",
            "fewer than four warps do not make a group for the larger matrix instructions",
            lambda num_warps, block_m: num_warps >= 4 or block_m < 64,
        ),
        Constraint(
            "pipeline",
            "short steps need several under way, and long ones would fill the shared memory",
            lambda num_stages, block_k: (
                num_stages * block_k <= 192 and (num_stages == 4 or block_k == block_ks[-1])
            ),
        ),
        Constraint(
            "aspect",
            "a tile that long and narrow reads more than it multiplies",
            lambda block_m, block_n, taps: (
                (block_m <= 4 * block_n * taps or block_n == columns)
                and (taps * block_n <= 8 * block_m or block_m == rows)
            ),
        ),
        Constraint(
            "cached",
            "only taps of one program share rows of the input in the L1 cache",
            lambda taps, cached: taps > 1 or not cached,
        ),
    ]
    if scalar:
        constraints.append(
            Constraint(
                "scalar products",
                "IEEE products run on scalar units, for which a large tile only spills",
                lambda block_m, block_n, taps: taps * block_m * block_n <= 128 * 64,
            )
        )
    return ConfigSpace(
        WalkedConfig,
        (
            Int("num_stages", 2, 4),
            PowerOfTwo("num_warps", 1 if rows <= 32 else 4, 4 if rows <= 32 else 8),
            PowerOfTwo("block_m", min(64, rows), rows),
            PowerOfTwo("block_n", min(64, columns), columns),
            Choice("block_k", block_ks, ordered=True),
            Choice("group_m", (8,)),
            Choice("taps", tap_counts(problem), ordered=True),
            Derived("walk", walks),
            Derived("images", images),
            Bool("cached"),
            Derived("split_k", splits),
        ),
        tuple(constraints),
        walked_default(problem, device),
    )
