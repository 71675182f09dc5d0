"""Config spaces, defaults and footprints of the kernels for few input channels."""

from __future__ import annotations

import dataclasses
import functools
import math

import triton

from ...runtime.device import DeviceFacts
from ...runtime.space import (
    Choice,
    ConfigSpace,
    Constraint,
    Derived,
    Footprint,
    Parameter,
    PowerOfTwo,
)
from ..problem import ConvProblem, Direction
from .common import lifted
from .footprints import cdiv
from .single_geometry import (
    ALIGNED,
    FLAT,
    FMA,
    MMA,
    RUN_ENGINES,
    RUNS,
    SHARED_ELEMENTS,
    Runs,
    SingleConfig,
    counts_on,
    dgrad_blocks,
    dgrad_tile,
    is_scalar,
    least_waste,
    runs_of,
    split_tiles,
    tiles_of,
)
from .tiles import around, power_of_two

MOST_UNROLLED = 512
"""Taps × rows that a scalar kernel writes out, and elements of a window that any kernel takes."""
_MOST_SCALAR_TAPS = 128
_LARGE = 16 << 20
"""Bytes of output from which on an additional launch for the weights pays."""
_LARGE_ALIGNED = 8 << 20
"""The same where runs begin at whole vectors."""
_HOPPERS = 200 << 10
"""Shared memory of the GPUs that they were timed on."""
_WIDE_WINDOW = 64
"""Elements of a window from which on runs that begin at whole vectors were the fastest."""


def _space(
    parameters: tuple[Parameter, ...], constraints: tuple[Constraint, ...], default: SingleConfig
) -> ConfigSpace[SingleConfig]:
    """A space without the rules that a map of a few pixels, and so its default, cannot keep."""
    values = default.as_dict()
    kept = (
        rule for rule in constraints if rule.predicate(*(values[name] for name in rule.parameters))
    )
    return ConfigSpace(SingleConfig, parameters, tuple(kept), default)


def _aligns(problem: ConvProblem, span: int) -> bool:
    """Whether runs that begin at whole vectors differ from those that begin at even elements."""
    aligned = runs_of(problem, span, ALIGNED)
    return aligned is not None and aligned != runs_of(problem, span)


def _aligned_default(
    problem: ConvProblem, device: DeviceFacts, block_h: int, num_warps: int, most_depth: int
) -> SingleConfig | None:
    """Runs of wide windows at whole vectors, as measured for 7×7 stems (docs/benchmarks)."""
    _, height, width = lifted(problem.out_size, 1)
    bytes_out = math.prod(problem.y_shape) * problem.dtype.itemsize
    if is_scalar(problem) or bytes_out < _LARGE_ALIGNED or min(height, width) < 16:
        return None
    if device.shared_bytes < _HOPPERS:
        return None
    if problem.taps * problem.in_channels < _WIDE_WINDOW or not _aligns(problem, 2):
        return None
    runs = runs_of(problem, 2, ALIGNED)
    block_m = power_of_two(problem.out_channels, 16, 128)
    if runs is None or runs.depth > most_depth or block_m > 64:
        return None
    config = SingleConfig(ALIGNED, block_h, 16, block_m, num_warps, 3, span=2)
    return config if _has_room(problem, config, device) else None


def _runs(problem: ConvProblem, config: SingleConfig) -> Runs | None:
    if config.engine not in RUN_ENGINES:
        return None
    return runs_of(problem, config.span, config.engine)


def _powers(name: str, low: int, high: int, default: int) -> PowerOfTwo:
    return PowerOfTwo(name, min(low, default), max(high, default))


@functools.lru_cache(maxsize=4096)
def _wasteful(size: int, block: int) -> bool:
    """Whether blocks of this size cover a third more than the least that blocks can."""
    best = least_waste(size, 16, 256)
    return 3 * cdiv(size, block) * block > 4 * cdiv(size, best) * best


def forward_space(problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[SingleConfig]:
    """Both matrix engines where products run on matrix instructions, scalars for small windows."""
    default = _forward_default(problem, device)
    _, height, width = lifted(problem.out_size, 1)
    depth = problem.taps * problem.in_channels
    most_m = triton.next_power_of_2(problem.out_channels)
    most_w = max(16, triton.next_power_of_2(width))
    most_h = triton.next_power_of_2(height)
    engines = [default.engine]
    spans = [1]
    if not is_scalar(problem):
        spans += [span for span in (2, 4, 8) if span <= width and runs_of(problem, span)]
        if len(spans) > 1 and depth > 4:
            engines.append(RUNS)
        engines.append(MMA)
    if depth <= _MOST_SCALAR_TAPS:
        engines.append(FMA)
        if counts_on(problem):
            engines.append(FLAT)
            most_w = max(most_w, min(128, triton.next_power_of_2(height * width)))
    if RUNS in engines and any(_aligns(problem, span) for span in spans if span > 1):
        engines.append(ALIGNED)

    @functools.cache
    def run_tile(engine: int, block_m: int, span: int) -> bool:
        runs = runs_of(problem, span, engine)
        if runs is None or runs.depth > 1024:
            return False
        if engine == ALIGNED and not _aligns(problem, span):
            return False
        # All filters in one tile: otherwise each tile copies the runs again.
        return span > 1 and 16 <= block_m * span <= 256 and block_m == min(most_m, 128)

    return _space(
        (
            Choice("engine", tuple(dict.fromkeys(engines))),
            Choice("num_warps", tuple(dict.fromkeys((default.num_warps, 4, 8, 2)))),
            _powers("block_m", min(8, most_m), min(128, most_m), default.block_m),
            _powers("block_w", 16, min(256, most_w), default.block_w),
            _powers("block_h", 1, min(16 if ALIGNED in engines else 8, most_h), default.block_h),
            Choice("span", tuple(sorted(spans)), ordered=True),
            Choice("num_stages", tuple(dict.fromkeys((default.num_stages, 3, 1)))),
            Choice("split", (1,)),
        ),
        (
            Constraint(
                "width",
                "tiles would cover a third more than the map",
                lambda engine, block_w: engine == FLAT or not _wasteful(width, block_w),
            ),
            Constraint(
                "consecutive pixels",
                "are one row of a tile",
                lambda engine, block_h, block_w: (
                    engine != FLAT or (block_h == 1 and block_w <= 128)
                ),
            ),
            Constraint(
                "lanes",
                "operands with an element for every thread are rearranged through shared memory",
                lambda engine, num_warps, block_m, block_w: (
                    engine not in (FMA, FLAT)
                    or (block_m < 32 * num_warps and block_w < 32 * num_warps)
                ),
            ),
            Constraint(
                "rows",
                "every tap is written out for every row of the tile, at most four",
                lambda engine, block_h: (
                    engine != FMA or (block_h <= 4 and block_h * depth <= MOST_UNROLLED)
                ),
            ),
            Constraint(
                "matrix tile",
                "a matrix instruction takes at least 16 filters; 64 to 256 pixels fill a program",
                lambda engine, num_warps, block_m, block_w, block_h: (
                    engine != MMA
                    or (
                        num_warps >= 4
                        and block_m >= min(16, most_m)
                        and 64 <= block_h * block_w <= 256
                    )
                ),
            ),
            Constraint(
                "spans",
                "only runs have a span",
                lambda engine, span: engine in RUN_ENGINES or span == 1,
            ),
            Constraint(
                "high tiles",
                "sixteen rows pay where copies are whole vectors",
                lambda engine, block_h: engine == ALIGNED or block_h <= max(8, default.block_h),
            ),
            Constraint(
                "runs",
                "runs have a span, a tile of all filters, and 32 to 128 rows",
                lambda engine, num_warps, block_m, block_w, block_h, span: (
                    engine not in RUN_ENGINES
                    or (
                        num_warps >= 4
                        and run_tile(engine, block_m, span)
                        and 32 <= block_h * block_w // span <= 128
                    )
                ),
            ),
            Constraint(
                "stages",
                "only runs are loaded in a loop",
                lambda engine, num_stages: (num_stages > 1) == (engine in RUN_ENGINES),
            ),
            Constraint(
                "registers",
                "more than 128 elements of the tile in a thread, or fewer than 4",
                lambda num_warps, block_m, block_w, block_h: (
                    128 * num_warps <= block_m * block_w * block_h <= 4096 * num_warps
                ),
            ),
        ),
        default,
    )


def _forward_default(problem: ConvProblem, device: DeviceFacts) -> SingleConfig:
    """Divide the map first; where it is too small for the device, the filters."""
    depth, height, width = lifted(problem.out_size, 1)
    window = problem.taps * problem.in_channels
    most_m = triton.next_power_of_2(problem.out_channels)
    most_h = triton.next_power_of_2(height)
    large = math.prod(problem.y_shape) * problem.dtype.itemsize >= _LARGE
    aligned = _aligned_default(problem, device, 16, 4, 1024)
    if aligned is not None:
        return aligned
    if not is_scalar(problem) and window > 16 and large and 16 <= most_m <= 128:
        span = max(2, min(8, 128 // most_m, 1 << (width.bit_length() - 1)))
        runs = runs_of(problem, span)
        if runs is not None and runs.depth <= 1024:
            block_w = least_waste(width, 16, 128)
            block_h = min(most_h, max(1, 64 * span // block_w))
            while block_h * block_w // span < 32:
                block_h *= 2
            default = SingleConfig(RUNS, block_h, block_w, most_m, 4, 3, span=span)
            if _has_room(problem, default, device):
                return default
    engine = FMA if is_scalar(problem) else MMA
    if not is_scalar(problem) and problem.out_channels < 16 and window <= _MOST_SCALAR_TAPS:
        engine = FMA
    if engine == MMA:
        block_m = power_of_two(problem.out_channels, 16, 64)
        block_w = least_waste(width, 16, 128)
        block_h = max(1, min(128 // block_w, most_h))
    else:
        block_m = power_of_two(problem.out_channels, 1, 32)
        block_w = least_waste(width, 16, 64)
        # Rows share what they load, but many taps of many rows would not fit in registers.
        block_h = min(4 if window <= 9 else 2, most_h)

    def programs() -> int:
        pixels = problem.batch * depth * cdiv(height, block_h) * cdiv(width, block_w)
        return pixels * cdiv(problem.out_channels, block_m)

    while block_h > 1 and block_h * block_w > 32 and programs() < 2 * device.sm_count:
        block_h //= 2
    least_m = 16 if engine == MMA else 4
    while block_m > least_m and programs() < 2 * device.sm_count:
        block_m //= 2
    while engine == MMA and block_h * block_w < 32:
        block_h *= 2
    rows_fit = width % 16 == 0 or width < 16 or width > 128
    small = window <= 9 and problem.out_channels >= 8 and height >= 16
    if engine == FMA and small and not rows_fit:
        # Few filters and more rows make up for the lanes that a tile of columns wastes.
        block_m = 8
        block_h = min(4 if block_w <= 32 else 2, most_h)
    tile = block_m * block_w * block_h
    return SingleConfig(engine, block_h, block_w, block_m, 4 if tile >= 512 else 2, 1)


def wgrad_space(problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[SingleConfig]:
    """Windows or runs as columns, and splits of the pixels."""
    default = _wgrad_default(problem, device)
    _, height, width = lifted(problem.out_size, 1)
    depth = problem.taps * problem.in_channels
    most_m = power_of_two(problem.out_channels, 16, 128)
    most_w = max(16, triton.next_power_of_2(width))
    most_h = triton.next_power_of_2(height)
    most_pixels = 128 if is_scalar(problem) else 256
    spans = [1]
    engines = [default.engine, MMA]
    if not is_scalar(problem) and depth > 4:
        found = [span for span in (1, 2, 4, 8) if span <= width and runs_of(problem, span)]
        if found:
            engines.append(RUNS)
            spans += found
            if any(_aligns(problem, span) for span in found):
                engines.append(ALIGNED)

    @functools.cache
    def splits(engine: int, block_h: int, block_w: int, block_m: int, span: int) -> tuple[int, ...]:
        tried = SingleConfig(engine, block_h, block_w, block_m, 4, span=span)
        return around(_wgrad_split(problem, tried, device))

    @functools.cache
    def columns(engine: int, span: int) -> int:
        """Of the accumulator; none where there are no such runs."""
        if engine == MMA:
            return power_of_two(depth, 16, 64) if span == 1 else 0
        if engine == ALIGNED and not _aligns(problem, span):
            return 0
        runs = runs_of(problem, span, engine)
        return power_of_two(runs.depth, 16, 256) if runs and runs.depth <= 1024 else 0

    return _space(
        (
            Choice("engine", tuple(dict.fromkeys(engines))),
            Choice("num_warps", tuple(dict.fromkeys((default.num_warps, 4, 8)))),
            _powers("block_m", max(16, most_m // 2), most_m, default.block_m),
            Choice("span", tuple(sorted(set(spans))), ordered=True),
            _powers("block_w", 16, min(256, most_w), default.block_w),
            _powers("block_h", 1, min(8, max(2, most_h)), default.block_h),
            Choice("num_stages", (3, 2)),
            Derived("split", splits),
        ),
        (
            Constraint(
                "runs", "no runs of this span", lambda engine, span: columns(engine, span) > 0
            ),
            Constraint(
                "width",
                "tiles would cover a third more than the map",
                lambda block_w: not _wasteful(width, block_w),
            ),
            Constraint(
                "accumulator",
                "more than 128 registers",
                lambda engine, num_warps, block_m, span: (
                    block_m * span * columns(engine, span) <= 4096 * num_warps
                ),
            ),
            Constraint(
                "rows",
                "runs have all filters in one tile, at most 128 rows with the span",
                lambda engine, block_m, span: (
                    engine == MMA or (block_m == min(most_m, 64) and block_m * span <= 128)
                ),
            ),
            Constraint(
                "pixels",
                "a step reads too few pixels to cover its latency, or more than it can hold",
                lambda block_h, block_w, span: (
                    64 <= block_h * block_w <= most_pixels and block_h * block_w // span >= 16
                ),
            ),
            Constraint(
                "window",
                "more than 64 elements of the window's tile in a thread",
                lambda engine, num_warps, block_h, block_w, span: (
                    block_h * block_w // span * columns(engine, span) <= 64 * 32 * num_warps
                ),
            ),
            Constraint(
                "splits",
                "a split of the pixels would be less than one tile",
                lambda block_h, block_w, block_m, split: (
                    split
                    <= max(4, tiles_of(problem, SingleConfig(MMA, block_h, block_w, block_m, 4)))
                ),
            ),
        ),
        default,
    )


_ROOMY = 96 * 1024
"""Shared memory of a program, in bytes, that all defaults fit into."""


def _has_room(problem: ConvProblem, config: SingleConfig, device: DeviceFacts) -> bool:
    """Whether a default fits into shared memory, with a quarter to spare as it is estimated."""
    return 4 * single_footprint(problem, config, device).shared_bytes <= 3 * device.shared_bytes


def _wgrad_default(problem: ConvProblem, device: DeviceFacts) -> SingleConfig:
    """Runs where windows are large and the map is; otherwise windows."""
    _, height, width = lifted(problem.out_size, 1)
    most_m = power_of_two(problem.out_channels, 16, 64)
    most_h = triton.next_power_of_2(height)
    window = problem.taps * problem.in_channels
    large = math.prod(problem.y_shape) * problem.dtype.itemsize >= _LARGE
    span = max(1, min(4, 128 // most_m))
    runs = runs_of(problem, span) if span <= width else None
    aligned = _aligned_default(problem, device, 8, 8, 256)
    if aligned is not None:
        return dataclasses.replace(aligned, split=_wgrad_split(problem, aligned, device))
    if not is_scalar(problem) and window > 16 and large and runs is not None and runs.depth <= 256:
        block_w = least_waste(width, 16, 64)
        block_h = max(1, min(32 * span // block_w, most_h))
        while block_h * block_w // span < 16:
            block_h *= 2
        warps = 8 if span * most_m * power_of_two(runs.depth, 16, 256) > 4 * 4096 else 4
        default = SingleConfig(RUNS, block_h, block_w, most_m, warps, 3, span=span)
        by_runs = device.shared_bytes >= _ROOMY
    else:
        by_runs = False
    if not by_runs:
        pixels = 64 if is_scalar(problem) else 128
        block_w = least_waste(width, 16, pixels)
        block_h = min(pixels // block_w, most_h)
        while block_h * block_w < 32:
            block_h *= 2
        # Elements of windows are gathered one by one: leave each thread few of them.
        warps = 8 if pixels * power_of_two(window, 16, 64) >= 4096 else 4
        default = SingleConfig(MMA, block_h, block_w, most_m, warps, 3)
        while device.shared_bytes < _ROOMY and default.block_h > 1:
            if _has_room(problem, default, device):
                break
            default = dataclasses.replace(default, block_h=default.block_h // 2)
    return dataclasses.replace(default, split=_wgrad_split(problem, default, device))


def _wgrad_split(problem: ConvProblem, config: SingleConfig, device: DeviceFacts) -> int:
    """Four programs to a multiprocessor, fewer where each writes large partial sums."""
    depth = problem.taps * problem.in_channels
    grids = cdiv(problem.out_channels, config.block_m)
    programs = 4 * device.sm_count
    runs = _runs(problem, config)
    if runs is not None:
        grids *= cdiv(runs.depth, 256)
        if config.span * config.block_m * runs.depth > 16384:
            programs = device.sm_count
        elif config.span * config.block_m * runs.depth > 4096:
            programs = 2 * device.sm_count
    else:
        grids *= cdiv(depth, power_of_two(depth, 16, 64))
    return max(1, min(programs // grids, tiles_of(problem, config)))


def dgrad_space(problem: ConvProblem) -> ConfigSpace[SingleConfig]:
    """Regions of output pixels, larger than the halo."""
    blocks = dgrad_blocks(problem)
    _, stride_h, stride_w = lifted(problem.stride, 1)
    most_m = power_of_two(problem.out_channels, 16, 64)

    def waste(block: tuple[int, int]) -> float:
        """Output pixels read for each that a program is for, small regions counted as worse."""
        tile_h, tile_w = dgrad_tile(problem, *block)
        _, in_h, in_w = lifted(problem.in_size, 1)
        tiles = cdiv(in_h, tile_h * stride_h) * cdiv(in_w, tile_w * stride_w)
        return tiles * (block[0] * block[1] + 64)

    _, kernel_h, kernel_w = lifted(problem.kernel, 1)
    taps = power_of_two(kernel_h * kernel_w, 16, 1024)
    # Where filters are far apart, addresses take the registers of half the products.
    most = SHARED_ELEMENTS if problem.y_strides[1] == 1 else SHARED_ELEMENTS // 2
    smaller = [(h, w) for h, w in blocks if h * w <= min(256, most // taps)] or blocks
    block_h, block_w = min(smaller, key=lambda block: (waste(block), block))
    warps = 8 if taps * block_h * block_w >= SHARED_ELEMENTS // 2 else 4
    fitting = set(blocks)
    heights = tuple(sorted({block[0] for block in blocks}))
    widths = tuple(sorted({block[1] for block in blocks}))
    return _space(
        (
            Choice("engine", (MMA,)),
            Choice("span", (1,)),
            PowerOfTwo("num_warps", 2, 8),
            PowerOfTwo("block_m", 16, most_m),
            Choice("block_w", widths, ordered=True),
            Choice("block_h", heights, ordered=True),
            Choice("num_stages", (2, 3)),
            Choice("split", (1,)),
        ),
        (
            Constraint(
                "region",
                "smaller than the halo, larger than the map or than shared memory",
                lambda block_h, block_w: (block_h, block_w) in fitting,
            ),
            Constraint(
                "threads",
                "too few pixels for so many threads, or too many",
                lambda num_warps, block_h, block_w: (
                    num_warps == 4 or 16 * num_warps <= block_h * block_w <= 128 * num_warps
                ),
            ),
        ),
        SingleConfig(MMA, block_h, block_w, most_m, warps, 2),
    )


def single_footprint(problem: ConvProblem, config: SingleConfig, device: DeviceFacts) -> Footprint:
    """Of the kernel that reads or writes the large tensor."""
    size = problem.dtype.itemsize
    threads = config.num_warps * (64 if device.arch.startswith("gfx") else 32)
    matrix = config.engine not in (FMA, FLAT) and not is_scalar(problem)
    depth = problem.taps * problem.in_channels
    pixels = config.block_h * config.block_w
    x_bytes = math.prod(problem.x_shape) * size
    y_bytes = math.prod(problem.y_shape) * size
    tiles = tiles_of(problem, config)
    m_tiles = cdiv(problem.out_channels, config.block_m)
    runs = _runs(problem, config)
    if runs is not None and problem.direction is Direction.FORWARD:
        columns = config.span * config.block_m
        units = pixels // config.span
        # Matrix instructions of warp groups read shared memory themselves: a buffer for each stage.
        grouped = device.arch == "sm_90" and matrix and units >= 64 and config.num_warps >= 4
        buffers = config.num_stages if grouped else max(1, config.num_stages - 1)
        return Footprint(
            programs=tiles * m_tiles,
            threads=threads,
            shared_bytes=max(
                buffers * (units + columns) * runs.block_k * size, units * columns * size
            ),
            accumulators=max(1, units * columns // threads),
            bytes_loaded=tiles * m_tiles * (units + columns) * runs.depth * size,
            bytes_stored=y_bytes,
            flops=2 * tiles * m_tiles * units * columns * runs.depth,
            steps=runs.depth // runs.block_k,
            in_flight=max(1, config.num_stages - 1),
            launches=2,
            matrix=matrix,
        )
    if problem.direction is Direction.FORWARD:
        padded = cdiv(depth, 16) * 16 if config.engine == MMA else depth
        block_k = power_of_two(depth, 16, 32)
        shared = (pixels + config.block_m) * block_k * size if config.engine == MMA else 0
        return Footprint(
            programs=tiles * m_tiles,
            threads=threads,
            shared_bytes=max(shared, pixels * config.block_m * size if shared else 0),
            accumulators=max(1, pixels * config.block_m // threads),
            bytes_loaded=tiles * m_tiles * (pixels + config.block_m) * depth * size,
            bytes_stored=y_bytes,
            flops=2 * tiles * m_tiles * pixels * config.block_m * padded,
            matrix=matrix,
        )
    if problem.direction is Direction.DGRAD:
        _, kernel_h, kernel_w = lifted(problem.kernel, 1)
        taps = power_of_two(kernel_h * kernel_w, 16, 1024)
        programs = _dgrad_programs(problem, config)
        planes = lifted(problem.kernel, 1)[0] * problem.in_channels
        operands = (pixels + taps) * config.block_m * size
        return Footprint(
            programs=programs,
            threads=threads,
            shared_bytes=max(taps * pixels * 4, operands * config.num_stages),
            accumulators=max(1, taps * pixels // threads),
            bytes_loaded=programs * planes * pixels * problem.out_channels * size,
            bytes_stored=x_bytes,
            flops=2 * programs * planes * pixels * taps * problem.out_channels,
            steps=planes * cdiv(problem.out_channels, config.block_m),
            matrix=matrix,
        )
    rows = config.block_m * config.span
    block_k = power_of_two(depth, 16, 64)
    if runs is not None:
        depth = runs.depth
        block_k = power_of_two(depth, 16, 256)
    k_tiles = cdiv(depth, block_k)
    units = pixels // config.span
    per_split, splits = split_tiles(problem, config)
    steps = tiles * m_tiles * k_tiles
    streamed = rows + block_k if runs is not None else rows
    return Footprint(
        programs=m_tiles * k_tiles * splits,
        threads=threads,
        shared_bytes=units * (streamed * config.num_stages + rows + block_k - streamed) * size,
        accumulators=max(1, rows * block_k // threads),
        bytes_loaded=k_tiles * y_bytes + steps * units * block_k * size,
        bytes_stored=m_tiles * rows * depth * (8 * splits if splits > 1 or runs else size),
        flops=2 * steps * units * rows * block_k,
        steps=per_split,
        in_flight=max(1, config.num_stages - 1),
        launches=2 if splits > 1 or runs is not None else 1,
        matrix=matrix,
    )


def _dgrad_programs(problem: ConvProblem, config: SingleConfig) -> int:
    tile_h, tile_w = dgrad_tile(problem, config.block_h, config.block_w)
    _, stride_h, stride_w = lifted(problem.stride, 1)
    depth, in_h, in_w = lifted(problem.in_size, 1)
    return problem.batch * depth * cdiv(in_h, tile_h * stride_h) * cdiv(in_w, tile_w * stride_w)
