"""The config space of packed phases: cells of a unit, tiles of units, steps."""

from __future__ import annotations

import functools
import math

from ...runtime.device import DeviceFacts
from ...runtime.space import Bool, Choice, ConfigSpace, Constraint, Int, PowerOfTwo
from ..problem import ConvProblem
from .packed_geometry import MOST_COLUMNS, PackedConfig, Product, product_of, runs_within
from .tiles import power_of_two

_MOST_RUNS = 4
_FLOPS = 5e14
"""Multiply-adds × 2 per second of a full H100 in tiles like these; orders of magnitude only."""
_LOADS = 7e12
"""Bytes per second from its caches to the multiprocessors, likewise."""
_STEP = 6e-10
"""Seconds that a step of a program costs beside, with 400 programs under way."""
_MULTIPROCESSORS = 132
_SHARED_BYTES = 220_000
Run = tuple[int, int, int]


def is_scalar(problem: ConvProblem) -> bool:
    """Whether products are formed on scalar units."""
    return problem.dtype.itemsize == 4 and problem.precision == "ieee"


@functools.lru_cache(maxsize=4096)
def blocks_k(problem: ConvProblem, run: Run) -> tuple[int, ...]:
    """Output channels of a step, widest first: rows of 128 bytes at most that pad little."""
    most = 16 if is_scalar(problem) else 128 // problem.dtype.itemsize
    if problem.y_strides[1] != 1:
        most = min(most, 32)  # addresses of channels that are far apart take registers
    blocks = [most >> e for e in range(3) if most >> e >= 16]
    padded = {block: product_of(problem, run, block).steps * block for block in blocks}
    least = min(padded.values())
    return tuple(block for block in blocks if 3 * padded[block] <= 4 * least)[:2]


def _seconds(problem: ConvProblem, flops: float, loads: float, steps: float) -> float:
    """From what is multiplied (padding included), elements loaded and steps of all programs."""
    size = problem.dtype.itemsize
    rate = _FLOPS * (0.06 if is_scalar(problem) else 2 / size)
    compute, transfer = flops / rate, loads * size / _LOADS
    return max(compute, transfer) + 0.3 * min(compute, transfer) + steps * _STEP


def tap_by_tap_seconds(problem: ConvProblem) -> float:
    """The same estimate for a product per phase, whose steps are its taps."""
    block_m, block_k = 128, min(64, power_of_two(problem.out_channels, 16, 64))
    cells = problem.in_pixels / math.prod(problem.stride)
    steps = cells / block_m * problem.taps * -(-problem.out_channels // block_k)
    block_n = power_of_two(problem.in_channels, 16, 128)
    flops = 2.0 * steps * block_m * block_k * max(block_n, 32)
    return _seconds(problem, flops, steps * (block_m + block_n) * block_k, steps)


def packed_seconds(problem: ConvProblem, run: Run) -> float:
    """An estimate of the product's time that puts units in order."""
    block_m, block_k = 128, blocks_k(problem, run)[0]
    product = product_of(problem, run, block_k)
    tiles = -(-product.units // block_m)
    # What a step is padded with is not loaded.
    loads = product.offsets * problem.out_channels * block_m
    loads += product.steps * block_k * product.block_n
    # Instructions of fewer columns wait for their rows in shared memory.
    flops = 2.0 * block_m * product.steps * block_k * max(product.block_n, 32)
    each = _seconds(problem, flops, loads, product.steps)
    # Programs under way at once, by their three stages in shared memory.
    stage = (block_m + product.block_n) * block_k * problem.dtype.itemsize
    at_once = _MULTIPROCESSORS * max(1, min(8, _SHARED_BYTES // (3 * stage)))
    # The last of them leave some multiprocessors idle.
    seconds = each * (tiles + at_once * -(-tiles // at_once)) / 2
    # Results that overhang the map's width are stored in narrower pieces.
    overhangs = problem.in_size[-1] % (run[-1] * problem.stride[-1]) != 0
    return 1.1 * seconds if overhangs else seconds


@functools.lru_cache(maxsize=1024)
def best_runs(problem: ConvProblem) -> tuple[Run, ...]:
    """The units worth trying, by their estimated time: the best of each width of a tile first.

    Of units that differ in their orientation only, one is tried, the widest.
    """
    found: dict[Product, Run] = {}
    for run in runs_within(problem, 32 if is_scalar(problem) else MOST_COLUMNS):
        product = product_of(problem, run, 16)
        kept = found.setdefault(product, run)
        if run[::-1] > kept[::-1]:
            found[product] = run
    ranked = sorted(found.values(), key=lambda run: (packed_seconds(problem, run), run))
    firsts: dict[int, Run] = {}
    for run in ranked:
        firsts.setdefault(product_of(problem, run, 16).block_n, run)
    chosen = dict.fromkeys((*firsts.values(), *ranked))
    return tuple(chosen)[:_MOST_RUNS]


def _default(problem: ConvProblem, device: DeviceFacts) -> PackedConfig:
    run = best_runs(problem)[0]
    block_k = blocks_k(problem, run)[0]
    product = product_of(problem, run, block_k)
    block_m = 64 if is_scalar(problem) else 128
    while block_m > 64 and -(-product.units // block_m) < device.sm_count:
        block_m //= 2
    warps = 8 if block_m * product.block_n >= 8192 and not is_scalar(problem) else 4
    roomy = device.arch in ("sm_80", "sm_90", "sm_100")
    return PackedConfig(*run, block_m, block_k, warps, 3 if roomy else 2)


def packed_space(problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[PackedConfig]:
    """Units that fill a tile's columns, tiles of 64 to 256 of them."""
    found = best_runs(problem)
    default = _default(problem, device)
    scalar = is_scalar(problem)
    half = problem.dtype.itemsize == 2
    most_stages = 4 if half else 3
    blocks = {run: blocks_k(problem, run) for run in found}

    def held(run_d: int, run_h: int, run_w: int, block_m: int) -> int:
        return block_m * product_of(problem, (run_d, run_h, run_w), 16).block_n

    def warps(run_d: int, run_h: int, run_w: int, block_m: int, num_warps: int) -> bool:
        accumulators = held(run_d, run_h, run_w, block_m)
        most = 2048 if scalar else 4096
        return accumulators <= most * num_warps and (num_warps == 4 or block_m >= 128)

    def steps(run_d: int, run_h: int, run_w: int, block_k: int, num_stages: int) -> bool:
        options = blocks.get((run_d, run_h, run_w), ())
        return block_k in options and (block_k == options[0] or num_stages == most_stages)

    return ConfigSpace(
        PackedConfig,
        (
            Choice("run_d", tuple(sorted({run[0] for run in found})), ordered=True),
            Choice("run_h", tuple(sorted({run[1] for run in found})), ordered=True),
            Choice("run_w", tuple(sorted({run[2] for run in found})), ordered=True),
            PowerOfTwo("block_m", 64, 128 if scalar else 256),
            Choice("block_k", tuple(sorted({k for v in blocks.values() for k in v})), ordered=True),
            PowerOfTwo("num_warps", 4, 8),
            Int("num_stages", 2, most_stages),
            Bool("cached") if half else Choice("cached", (0,)),
        ),
        (
            Constraint(
                "unit",
                "the unit's columns would leave much of a tile empty, or it reads too much",
                lambda run_d, run_h, run_w: (run_d, run_h, run_w) in found,
            ),
            Constraint(
                "steps",
                "shorter steps pay where many of them are under way; these would pad the window",
                steps,
            ),
            Constraint(
                "cached",
                "more stages leave the L1 cache too little to find a window in",
                lambda num_stages, cached: not cached or num_stages < 4,
            ),
            Constraint("warps", "too many accumulators for a thread, or too few rows", warps),
        ),
        default,
    )
