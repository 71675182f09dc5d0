"""One input channel, or up to four: direct kernels whose time is that of the large tensor.

The product has so few multiply-adds per byte that the output (or its gradient), which is up to
hundreds of times the input, sets the time. Small maps of many filters are divided by filters, large
maps by pixels: both are the shape of the tile.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton

from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm, Config
from ...runtime.plan import KernelCall, LaunchPlan, Slot, Workspace
from ...runtime.space import Choice, ConfigSpace, Constraint, Derived, Footprint, PowerOfTwo
from ..problem import ConvProblem, Direction
from . import single_forward, single_gradients, single_run_gradients, single_runs
from .common import (
    epilogue_arguments,
    lifted,
    precision_constexprs,
    slot_dtypes,
    spatial_arguments,
    spatial_constexprs,
    unsupported_dtype,
)
from .footprints import cdiv
from .tiles import around, power_of_two

MAX_CHANNELS = 4
FMA, MMA, RUNS = 0, 1, 2
"""Engines: multiply-adds of scalars; matrix instructions over the flattened window, or over runs of
the input's rows (forward)."""

_MOST_UNROLLED = 512
_MOST_SCALAR_TAPS = 128
_SHARED_ELEMENTS = 16384


@dataclass(frozen=True)
class SingleConfig(Config):
    """Rows × columns × filters of a tile, and how its products are formed.

    Attributes:
        engine: :data:`FMA`, :data:`MMA` or :data:`RUNS`.
        block_h, block_w: pixels of the tile; for the gradient of the input, of the output region
            that a program multiplies, halo included.
        block_m: filters of the tile; for the gradient of the input, of one step of the reduction.
        split: parts of the pixels, for the gradient of the weight.
        span: neighbouring output pixels that share a run, for runs.
    """

    engine: int
    block_h: int
    block_w: int
    block_m: int
    num_warps: int
    num_stages: int = 3
    split: int = 1
    span: int = 1


@dataclass(frozen=True)
class _Runs:
    """How the input's rows are cut into runs of elements.

    Attributes:
        inner: input channels that alternate inside a run; others have runs of their own.
        lead: elements before the first window, so that a run starts at an even one.
        length: elements of a run.
        count: runs that a window needs.
        block_k: elements of one step of the reduction.
        depth: elements of the reduction, whole steps.
    """

    inner: int
    lead: int
    length: int
    count: int
    block_k: int
    depth: int


@functools.lru_cache(maxsize=1024)
def _runs(problem: ConvProblem, span: int) -> _Runs | None:
    """The runs of ``span`` pixels; None where the input's rows are not contiguous."""
    if problem.x_strides[-1] == 1:
        inner = 1
    elif problem.x_strides[1] == 1 and problem.x_strides[-1] == problem.in_channels:
        inner = problem.in_channels
    else:
        return None
    hop, lead = problem.stride[-1], inner * problem.padding[-1] % 2
    if inner * hop * span % 2:
        return None
    pixels = hop * (span - 1) + problem.dilation[-1] * (problem.kernel[-1] - 1) + 1
    length = power_of_two(lead + inner * pixels, 8, 1 << 20)
    count = problem.in_channels // inner * problem.taps // problem.kernel[-1]
    padded = {block: cdiv(length * count, block) * block for block in (64, 32, 16)}
    least = min(padded.values())
    block_k = next(block for block, depth in padded.items() if depth <= 1.15 * least)
    return _Runs(inner, lead, length, count, block_k, padded[block_k])


@dataclass(frozen=True)
class _Reach:
    """One axis of the gradient of the input: which output pixels a tile of the input needs.

    Attributes:
        first: offset of the first output pixel from the first input pixel divided by the stride.
        halo: output pixels needed beyond one per stride of input pixels.
    """

    first: int
    halo: int


@functools.lru_cache(maxsize=1024)
def _reach(taps: int, stride: int, pad: int, dilation: int) -> _Reach:
    shifts = [
        (phase + pad - tap * dilation) // stride
        for phase in range(stride)
        for tap in range(taps)
        if (phase + pad - tap * dilation) % stride == 0
    ]
    return _Reach(min(shifts), max(shifts) - min(shifts))


def _reaches(problem: ConvProblem) -> tuple[_Reach, _Reach]:
    """Of the last two axes, which a tile covers."""
    kernel, stride = lifted(problem.kernel, 1), lifted(problem.stride, 1)
    pad, dilation = lifted(problem.padding, 0), lifted(problem.dilation, 1)
    height, width = (_reach(kernel[a], stride[a], pad[a], dilation[a]) for a in (1, 2))
    return height, width


class SingleChannel(Algorithm):
    """All three products of an ungrouped convolution with at most four input channels."""

    name: ClassVar[str] = "single_channel"
    config_type = SingleConfig
    sources = (
        "common",
        "single_forward",
        "single_gradients",
        "single_run_gradients",
        "single_runs",
        "tiles",
    )

    def supports(self, problem: ConvProblem) -> str | None:
        """Ungrouped and few input channels; windows that a program can hold."""
        if problem.groups != 1:
            return "groups != 1"
        if problem.direction is Direction.DGRAD and problem.epilogue is not None:
            return "the gradient of the input takes no epilogue here"
        if problem.in_channels > MAX_CHANNELS:
            return f"more than {MAX_CHANNELS} input channels"
        if problem.taps * problem.in_channels > _MOST_UNROLLED:
            return f"a window of more than {_MOST_UNROLLED} elements"
        if problem.direction is Direction.DGRAD:
            pairs = zip(problem.stride, problem.dilation, strict=True)
            if any(hop > 1 and step > 1 for hop, step in pairs):
                return "stride and dilation on one axis"
            if not _dgrad_blocks(problem):
                return "a window too large for the shared memory of a program"
        return unsupported_dtype(problem)

    def space(self, problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[SingleConfig]:
        """Shapes of the tile, both engines where both make sense."""
        if problem.direction is Direction.FORWARD:
            return _forward_space(problem, device)
        if problem.direction is Direction.DGRAD:
            return _dgrad_space(problem)
        return _wgrad_space(problem, device)

    def footprint(
        self, problem: ConvProblem, config: SingleConfig, device: DeviceFacts
    ) -> Footprint:
        """Of the kernel that reads or writes the large tensor."""
        return _footprint(problem, config, device)

    def plan(self, problem: ConvProblem, config: SingleConfig) -> LaunchPlan:
        """One launch; two where the gradient of the weight is split."""
        if problem.direction is Direction.FORWARD:
            return _forward_plan(problem, config)
        if problem.direction is Direction.DGRAD:
            return _dgrad_plan(problem, config)
        return _wgrad_plan(problem, config)


def _checks(problem: ConvProblem, block_h: int, block_w: int) -> dict[str, bool]:
    """For each axis whether some tile reads outside the input; whether tiles pass the output."""
    checks: dict[str, bool] = {}
    overhang = False
    for axis, block, size, out, taps, hop, pad, step in zip(
        "DHW",
        (1, block_h, block_w),
        lifted(problem.in_size, 1),
        lifted(problem.out_size, 1),
        lifted(problem.kernel, 1),
        lifted(problem.stride, 1),
        lifted(problem.padding, 0),
        lifted(problem.dilation, 1),
        strict=True,
    ):
        covered = cdiv(out, block) * block
        last = (covered - 1) * hop + step * (taps - 1) - pad
        checks[f"CHECK_{axis}"] = pad > 0 or last >= size
        overhang = overhang or covered != out
    return {**checks, "OVERHANG": overhang}


def _forward_plan(problem: ConvProblem, config: SingleConfig) -> LaunchPlan:
    epilogue = epilogue_arguments(problem)
    constexprs: dict[str, Any] = {
        "CHANNELS": problem.in_channels,
        "FILTERS": problem.out_channels,
        **spatial_constexprs(problem),
        **_checks(problem, config.block_h, config.block_w),
        "EPILOGUE": epilogue.function,
        "SAVE_ACC": epilogue.save_acc,
        "WIDE": problem.wide,
        "BLOCK_H": config.block_h,
        "BLOCK_W": config.block_w,
        "BLOCK_M": config.block_m,
    }
    if config.engine == RUNS:
        return _run_plan(problem, config, constexprs)
    kernel = single_forward.single_forward_fma_kernel
    if config.engine == MMA:
        kernel = single_forward.single_forward_mma_kernel
        constexprs.update(precision_constexprs(problem))
        constexprs["BLOCK_K"] = power_of_two(problem.taps * problem.in_channels, 16, 32)
    call = KernelCall(
        kernel,
        (_tiles(problem, config) * cdiv(problem.out_channels, config.block_m), 1, 1),
        (
            Slot("input"),
            Slot("weight"),
            Slot("output"),
            Slot("acc" if epilogue.save_acc else "output"),
            epilogue.pointers,
            epilogue.strides,
            *spatial_arguments(problem),
        ),
        constexprs,
        config.num_warps,
        config.num_stages,
    )
    return LaunchPlan((call,), slot_dtypes(problem))


def _run_constexprs(problem: ConvProblem, config: SingleConfig, runs: _Runs) -> dict[str, Any]:
    return {
        "INNER": runs.inner,
        "LEAD": runs.lead,
        "RUN": runs.length,
        "RUNS": runs.count,
        "DEPTH": runs.depth,
        "SPAN": config.span,
        "PIXELS_FASTEST": problem.y_strides[-1] < problem.y_strides[1],
    }


def _run_plan(problem: ConvProblem, config: SingleConfig, constexprs: dict[str, Any]) -> LaunchPlan:
    """Two launches: the weights unrolled along the span, then the product."""
    runs = _runs(problem, config.span)
    assert runs is not None, "the space has no runs for this problem"
    epilogue = epilogue_arguments(problem)
    tiles_m = cdiv(problem.out_channels, config.block_m)
    columns = config.span * config.block_m
    block = 512
    shared = _run_constexprs(problem, config, runs)
    unroll = KernelCall(
        single_runs.single_unroll_kernel,
        (cdiv(tiles_m * runs.depth * columns, block), 1, 1),
        (Slot("weight"), Slot("unrolled"), spatial_arguments(problem)[4]),
        {
            "FILTERS": problem.out_channels,
            **{f"KERNEL_{a}": n for a, n in zip("DHW", lifted(problem.kernel, 1), strict=True)},
            "STRIDE_W": problem.stride[-1],
            "DILATION_W": problem.dilation[-1],
            **shared,
            "WIDE": problem.wide,
            "BLOCK_M": config.block_m,
            "BLOCK": block,
        },
        num_warps=4,
    )
    product = KernelCall(
        single_runs.single_forward_run_kernel,
        (_tiles(problem, config) * tiles_m, 1, 1),
        (
            Slot("input"),
            Slot("unrolled"),
            Slot("output"),
            Slot("acc" if epilogue.save_acc else "output"),
            epilogue.pointers,
            epilogue.strides,
            *spatial_arguments(problem),
        ),
        {
            **constexprs,
            **shared,
            **precision_constexprs(problem),
            "BLOCK_K": runs.block_k,
        },
        config.num_warps,
        config.num_stages,
    )
    space = Workspace("unrolled", (tiles_m, runs.depth, columns), problem.dtype)
    dtypes = {**slot_dtypes(problem), "unrolled": problem.dtype}
    return LaunchPlan((unroll, product), dtypes, (space,))


def _wgrad_plan(problem: ConvProblem, config: SingleConfig) -> LaunchPlan:
    if config.engine == RUNS:
        return _wgrad_run_plan(problem, config)
    depth = problem.taps * problem.in_channels
    block_k = power_of_two(depth, 16, 64)
    per_split, splits = _split_tiles(problem, config)
    partial = splits > 1
    call = KernelCall(
        single_gradients.single_wgrad_kernel,
        (cdiv(problem.out_channels, config.block_m) * cdiv(depth, block_k), splits, 1),
        (
            Slot("grad_output"),
            Slot("input"),
            Slot("partial" if partial else "grad_weight"),
            *spatial_arguments(problem),
            per_split,
        ),
        {
            "CHANNELS": problem.in_channels,
            "FILTERS": problem.out_channels,
            **spatial_constexprs(problem),
            **_checks(problem, config.block_h, config.block_w),
            "PARTIAL": partial,
            **precision_constexprs(problem),
            "BLOCK_H": config.block_h,
            "BLOCK_W": config.block_w,
            "BLOCK_M": config.block_m,
            "BLOCK_K": block_k,
        },
        config.num_warps,
        config.num_stages,
    )
    if not partial:
        return LaunchPlan((call,), slot_dtypes(problem))
    space = Workspace("partial", (splits, problem.out_channels, depth), torch.float32)
    dtypes = {**slot_dtypes(problem), "partial": torch.float32}
    elements = problem.out_channels * depth
    block = 32 if elements <= 32 * 1024 else 128
    reduction = KernelCall(
        single_gradients.single_reduce_kernel,
        (cdiv(elements, block), 1, 1),
        (Slot("partial"), Slot("grad_weight"), splits, spatial_arguments(problem)[4]),
        {
            "CHANNELS": problem.in_channels,
            "FILTERS": problem.out_channels,
            **{f"KERNEL_{a}": n for a, n in zip("DHW", lifted(problem.kernel, 1), strict=True)},
            "WIDE": problem.wide,
            "BLOCK": block,
            "BLOCK_S": min(64, triton.next_power_of_2(splits)),
        },
        num_warps=4,
    )
    return LaunchPlan((call, reduction), dtypes, (space,))


def _split_tiles(problem: ConvProblem, config: SingleConfig) -> tuple[int, int]:
    """Tiles of one split, and splits none of which is empty."""
    tiles = _tiles(problem, config)
    per_split = cdiv(tiles, max(1, min(config.split, tiles)))
    return per_split, max(1, cdiv(tiles, per_split))


def _wgrad_run_plan(problem: ConvProblem, config: SingleConfig) -> LaunchPlan:
    """Two launches: the products of all pairs, then the sums over splits and spans."""
    runs = _runs(problem, config.span)
    assert runs is not None, "the space has no runs for this problem"
    per_split, splits = _split_tiles(problem, config)
    tiles_m = cdiv(problem.out_channels, config.block_m)
    columns = config.span * config.block_m
    block_k = power_of_two(runs.depth, 16, 256)
    shared = _run_constexprs(problem, config, runs)
    product = KernelCall(
        single_run_gradients.single_wgrad_run_kernel,
        (tiles_m * cdiv(runs.depth, block_k), splits, 1),
        (
            Slot("grad_output"),
            Slot("input"),
            Slot("partial"),
            *spatial_arguments(problem),
            per_split,
        ),
        {
            "CHANNELS": problem.in_channels,
            "FILTERS": problem.out_channels,
            **spatial_constexprs(problem),
            **_checks(problem, config.block_h, config.block_w),
            **shared,
            **precision_constexprs(problem),
            "BLOCK_H": config.block_h,
            "BLOCK_W": config.block_w,
            "BLOCK_M": config.block_m,
            "BLOCK_K": block_k,
        },
        config.num_warps,
        config.num_stages,
    )
    del shared["RUNS"]
    reduction = KernelCall(
        single_run_gradients.single_reduce_run_kernel,
        (cdiv(problem.out_channels * problem.taps * problem.in_channels, 32), 1, 1),
        (Slot("partial"), Slot("grad_weight"), splits, spatial_arguments(problem)[4]),
        {
            "CHANNELS": problem.in_channels,
            "FILTERS": problem.out_channels,
            **{f"KERNEL_{a}": n for a, n in zip("DHW", lifted(problem.kernel, 1), strict=True)},
            "STRIDE_W": problem.stride[-1],
            "DILATION_W": problem.dilation[-1],
            **shared,
            "WIDE": problem.wide,
            "BLOCK_M": config.block_m,
            "BLOCK": 32,
            "BLOCK_S": min(64, triton.next_power_of_2(splits)),
        },
        num_warps=4,
    )
    space = Workspace("partial", (splits, tiles_m, columns, runs.depth), torch.float32)
    dtypes = {**slot_dtypes(problem), "partial": torch.float32}
    return LaunchPlan((product, reduction), dtypes, (space,))


def _dgrad_tile(problem: ConvProblem, block_h: int, block_w: int) -> tuple[int, int]:
    """Input pixels (over the stride) that need no output pixel outside the region."""
    height, width = _reaches(problem)
    return block_h - height.halo, block_w - width.halo


def _dgrad_plan(problem: ConvProblem, config: SingleConfig) -> LaunchPlan:
    height, width = _reaches(problem)
    tile_h, tile_w = _dgrad_tile(problem, config.block_h, config.block_w)
    _, kernel_h, kernel_w = lifted(problem.kernel, 1)
    _, stride_h, stride_w = lifted(problem.stride, 1)
    depth, in_h, in_w = lifted(problem.in_size, 1)
    tiles = cdiv(in_h, tile_h * stride_h) * cdiv(in_w, tile_w * stride_w)
    call = KernelCall(
        single_gradients.single_dgrad_kernel,
        (problem.batch * depth * tiles, 1, 1),
        (
            Slot("grad_output"),
            Slot("weight"),
            Slot("grad_input"),
            *spatial_arguments(problem),
        ),
        {
            "CHANNELS": problem.in_channels,
            "FILTERS": problem.out_channels,
            **spatial_constexprs(problem),
            "FIRST_H": height.first,
            "FIRST_W": width.first,
            "TILE_H": tile_h,
            "TILE_W": tile_w,
            "OUT_H": triton.next_power_of_2(tile_h * stride_h),
            "OUT_W": triton.next_power_of_2(tile_w * stride_w),
            **precision_constexprs(problem),
            "BLOCK_H": config.block_h,
            "BLOCK_W": config.block_w,
            "BLOCK_M": config.block_m,
            "BLOCK_T": power_of_two(kernel_h * kernel_w, 16, 1024),
            "BLOCK_V": triton.next_power_of_2(cdiv(kernel_h, stride_h) * cdiv(kernel_w, stride_w)),
        },
        config.num_warps,
        config.num_stages,
    )
    return LaunchPlan((call,), slot_dtypes(problem))


def _tiles(problem: ConvProblem, config: SingleConfig) -> int:
    """Tiles of the output's pixels; none of them spans two planes."""
    depth, height, width = lifted(problem.out_size, 1)
    return problem.batch * depth * cdiv(height, config.block_h) * cdiv(width, config.block_w)


def _scalar(problem: ConvProblem) -> bool:
    return problem.dtype is torch.float32 and problem.precision == "ieee"


def _forward_space(problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[SingleConfig]:
    _, height, width = lifted(problem.out_size, 1)
    depth = problem.taps * problem.in_channels
    most_m = triton.next_power_of_2(problem.out_channels)
    most_w = max(16, triton.next_power_of_2(width))
    most_h = triton.next_power_of_2(height)
    engines = [] if _scalar(problem) else [MMA]
    spans = [1]
    if not _scalar(problem):
        spans += [span for span in (2, 4, 8) if span <= width and _runs(problem, span)]
        if len(spans) > 1 and depth > 4:
            engines.insert(0, RUNS)
    if depth <= _MOST_SCALAR_TAPS or not engines:
        engines.append(FMA)

    @functools.cache
    def run_tile(block_m: int, span: int) -> bool:
        runs = _runs(problem, span)
        return runs is not None and 16 <= block_m * span <= 256 and runs.depth <= 1024

    return ConfigSpace(
        SingleConfig,
        (
            Choice("engine", tuple(engines)),
            Choice("num_warps", (4, 8, 2), ordered=False),
            PowerOfTwo("block_m", min(4, most_m), min(128, most_m)),
            PowerOfTwo("block_w", min(16, most_w), min(512, most_w)),
            PowerOfTwo("block_h", 1, min(8, most_h)),
            Choice("span", tuple(sorted(spans)), ordered=True),
            Choice("num_stages", (1, 3, 2, 4), ordered=False),
            Choice("split", (1,)),
        ),
        (
            Constraint(
                "lanes",
                "operands with an element for every thread are rearranged through shared memory",
                lambda engine, num_warps, block_m, block_w: (
                    engine != FMA or (block_m < 32 * num_warps and block_w < 32 * num_warps)
                ),
            ),
            Constraint(
                "rows",
                "every tap is written out for every row of the tile",
                lambda engine, block_h: engine != FMA or block_h * depth <= _MOST_UNROLLED,
            ),
            Constraint(
                "matrix tile",
                "a matrix instruction takes at least 16 filters, 32 pixels",
                lambda engine, block_m, block_w, block_h: (
                    engine != MMA or (block_m >= 16 and 32 <= block_h * block_w <= 512)
                ),
            ),
            Constraint(
                "runs",
                "runs have a span, a matrix tile of at most 256 columns and at least 32 rows",
                lambda engine, block_m, block_w, block_h, span: (
                    span == 1
                    if engine != RUNS
                    else run_tile(block_m, span)
                    and block_m * min(most_m, 16) >= most_m
                    and 32 <= block_h * block_w // span <= 256
                ),
            ),
            Constraint(
                "stages",
                "only runs are loaded in a loop",
                lambda engine, num_stages: (num_stages > 1) == (engine == RUNS),
            ),
            Constraint(
                "registers",
                "more than 128 elements of the tile in a thread, or fewer than 4",
                lambda num_warps, block_m, block_w, block_h: (
                    128 * num_warps <= block_m * block_w * block_h <= 4096 * num_warps
                ),
            ),
        ),
        _forward_default(problem, device),
    )


_LARGE = 16 << 20
"""Bytes of output from which on an additional launch for the weights pays."""


def _forward_default(problem: ConvProblem, device: DeviceFacts) -> SingleConfig:
    """Divide the map first; where it is too small for the device, the filters."""
    depth, height, width = lifted(problem.out_size, 1)
    window = problem.taps * problem.in_channels
    most_m = triton.next_power_of_2(problem.out_channels)
    most_h = triton.next_power_of_2(height)
    large = math.prod(problem.y_shape) * problem.dtype.itemsize >= _LARGE
    if not _scalar(problem) and window > 16 and large and 16 <= most_m <= 128:
        span = max(2, min(8, 128 // most_m, 1 << (width.bit_length() - 1)))
        runs = _runs(problem, span)
        if runs is not None and runs.depth <= 1024:
            block_w = _least_waste(width, 16, 128)
            block_h = min(most_h, max(1, 64 * span // block_w))
            while block_h * block_w // span < 32:
                block_h *= 2
            return SingleConfig(RUNS, block_h, block_w, most_m, 4, 3, span=span)
    engine = FMA if _scalar(problem) else MMA
    if not _scalar(problem) and problem.out_channels < 16 and window <= _MOST_SCALAR_TAPS:
        engine = FMA
    if engine == MMA:
        block_m = power_of_two(problem.out_channels, 16, 64)
        block_w = _least_waste(width, 16, 128)
        block_h = max(1, min(128 // block_w, most_h))
    else:
        block_m = power_of_two(problem.out_channels, 1, 32)
        block_w = _least_waste(width, 16, 64)
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
    tile = block_m * block_w * block_h
    return SingleConfig(engine, block_h, block_w, block_m, 4 if tile >= 512 else 2, 1)


def _least_waste(size: int, low: int, high: int) -> int:
    """The largest power of two in [low, high] that covers a size with the least beyond it."""
    blocks = [1 << e for e in range(low.bit_length() - 1, high.bit_length())]
    return min(reversed(blocks), key=lambda block: cdiv(size, block) * block)


def _wgrad_space(problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[SingleConfig]:
    _, height, width = lifted(problem.out_size, 1)
    depth = problem.taps * problem.in_channels
    most_m = power_of_two(problem.out_channels, 16, 128)
    most_w = max(16, triton.next_power_of_2(width))
    most_h = triton.next_power_of_2(height)
    most_pixels = 64 if _scalar(problem) else 128
    spans = [1]
    engines = [MMA]
    if not _scalar(problem) and depth > 4:
        spans = [span for span in (1, 2, 4, 8) if span <= width and _runs(problem, span)] or [1]
        if _runs(problem, spans[-1]):
            engines.append(RUNS)

    @functools.cache
    def splits(engine: int, block_h: int, block_w: int, block_m: int, span: int) -> tuple[int, ...]:
        tried = SingleConfig(engine, block_h, block_w, block_m, 4, span=span)
        return around(_wgrad_split(problem, tried, device))

    @functools.cache
    def columns(engine: int, block_m: int, span: int) -> tuple[int, int]:
        """Rows and columns of the accumulator; no columns where there are no runs."""
        if engine == MMA:
            return block_m, power_of_two(depth, 16, 64) if span == 1 else 0
        runs = _runs(problem, span)
        if runs is None or runs.depth > 1024:
            return 0, 0
        return block_m * span, power_of_two(runs.depth, 16, 256)

    return ConfigSpace(
        SingleConfig,
        (
            Choice("engine", tuple(engines)),
            Choice("num_warps", (4, 8, 2), ordered=False),
            PowerOfTwo("block_m", 16, most_m),
            Choice("span", tuple(sorted({1, *spans})), ordered=True),
            PowerOfTwo("block_w", 16, min(256, most_w)),
            PowerOfTwo("block_h", 1, min(16, max(2, most_h))),
            Choice("num_stages", (3, 2, 4), ordered=False),
            Derived("split", splits),
        ),
        (
            Constraint(
                "columns",
                "no runs of this span, or an accumulator of more than 128 or less than 4 registers",
                lambda engine, num_warps, block_m, span: (
                    128 * num_warps <= math.prod(columns(engine, block_m, span)) <= 4096 * num_warps
                ),
            ),
            Constraint(
                "pixels",
                "a step reads too few pixels to cover its latency, or more than it can hold",
                lambda block_h, block_w, span: (
                    32 <= block_h * block_w <= 4 * most_pixels and block_h * block_w // span >= 16
                ),
            ),
            Constraint(
                "registers",
                "more than 64 elements of the window's tile in a thread",
                lambda engine, num_warps, block_h, block_w, block_m, span: (
                    block_h * block_w // span * columns(engine, block_m, span)[1]
                    <= 64 * 32 * num_warps
                ),
            ),
            Constraint(
                "splits",
                "a split of the pixels would be less than one tile",
                lambda block_h, block_w, block_m, split: (
                    split <= _tiles(problem, SingleConfig(MMA, block_h, block_w, block_m, 4))
                ),
            ),
        ),
        _wgrad_default(problem, device),
    )


def _wgrad_default(problem: ConvProblem, device: DeviceFacts) -> SingleConfig:
    """Runs where windows are large and the map is; otherwise windows."""
    _, height, width = lifted(problem.out_size, 1)
    most_m = power_of_two(problem.out_channels, 16, 64)
    most_h = triton.next_power_of_2(height)
    window = problem.taps * problem.in_channels
    large = math.prod(problem.y_shape) * problem.dtype.itemsize >= _LARGE
    span = max(1, min(4, 128 // most_m))
    runs = _runs(problem, span) if span <= width else None
    if not _scalar(problem) and window > 16 and large and runs is not None and runs.depth <= 256:
        block_w = _least_waste(width, 16, 64)
        block_h = max(1, min(32 * span // block_w, most_h))
        while block_h * block_w // span < 16:
            block_h *= 2
        warps = 8 if span * most_m * power_of_two(runs.depth, 16, 256) > 4 * 4096 else 4
        default = SingleConfig(RUNS, block_h, block_w, most_m, warps, 3, span=span)
    else:
        pixels = 64 if _scalar(problem) else 128
        block_w = _least_waste(width, 16, pixels)
        block_h = min(pixels // block_w, most_h)
        while block_h * block_w < 32:
            block_h *= 2
        # Elements of windows are gathered one by one: leave each thread few of them.
        warps = 8 if pixels * power_of_two(window, 16, 64) >= 4096 else 4
        default = SingleConfig(MMA, block_h, block_w, most_m, warps, 3)
    return dataclasses.replace(default, split=_wgrad_split(problem, default, device))


def _wgrad_split(problem: ConvProblem, config: SingleConfig, device: DeviceFacts) -> int:
    """Four programs to a multiprocessor, fewer where each writes large partial sums."""
    depth = problem.taps * problem.in_channels
    grids = cdiv(problem.out_channels, config.block_m)
    programs = 4 * device.sm_count
    runs = _runs(problem, config.span) if config.engine == RUNS else None
    if runs is not None:
        grids *= cdiv(runs.depth, 256)
        if config.span * config.block_m * runs.depth > 16384:
            programs = device.sm_count
        elif config.span * config.block_m * runs.depth > 4096:
            programs = 2 * device.sm_count
    else:
        grids *= cdiv(depth, power_of_two(depth, 16, 64))
    return max(1, min(programs // grids, _tiles(problem, config)))


def _dgrad_blocks(problem: ConvProblem) -> list[tuple[int, int]]:
    """Regions (block_h, block_w) larger than the halo whose products fit in shared memory."""
    height, width = _reaches(problem)
    _, kernel_h, kernel_w = lifted(problem.kernel, 1)
    _, stride_h, stride_w = lifted(problem.stride, 1)
    _, in_h, in_w = lifted(problem.in_size, 1)
    taps = power_of_two(kernel_h * kernel_w, 16, 1024)
    met = triton.next_power_of_2(cdiv(kernel_h, stride_h) * cdiv(kernel_w, stride_w))
    most_h = triton.next_power_of_2(cdiv(in_h, stride_h) + height.halo)
    most_w = triton.next_power_of_2(cdiv(in_w, stride_w) + width.halo)
    found = []
    for block_h in (1, 2, 4, 8, 16, 32):
        for block_w in (4, 8, 16, 32, 64, 128, 256):
            tile_h, tile_w = _dgrad_tile(problem, block_h, block_w)
            if tile_h < 1 or tile_w < 1 or not 16 <= block_h * block_w <= 1024:
                continue
            if (block_h > most_h or block_w > most_w) and block_h * block_w > 16:
                continue
            out = math.prod(
                triton.next_power_of_2(n) for n in (tile_h * stride_h, tile_w * stride_w)
            )
            if max(taps * block_h * block_w, met * out) <= _SHARED_ELEMENTS:
                found.append((block_h, block_w))
    return found


def _dgrad_space(problem: ConvProblem) -> ConfigSpace[SingleConfig]:
    blocks = _dgrad_blocks(problem)
    _, stride_h, stride_w = lifted(problem.stride, 1)
    most_m = power_of_two(problem.out_channels, 16, 64)

    def waste(block: tuple[int, int]) -> float:
        """Output pixels read for each that a program is for, small regions counted as worse."""
        tile_h, tile_w = _dgrad_tile(problem, *block)
        _, in_h, in_w = lifted(problem.in_size, 1)
        tiles = cdiv(in_h, tile_h * stride_h) * cdiv(in_w, tile_w * stride_w)
        return tiles * (block[0] * block[1] + 64)

    _, kernel_h, kernel_w = lifted(problem.kernel, 1)
    taps = power_of_two(kernel_h * kernel_w, 16, 1024)
    # Where filters are far apart, addresses take the registers of half the products.
    most = _SHARED_ELEMENTS if problem.y_strides[1] == 1 else _SHARED_ELEMENTS // 2
    smaller = [(h, w) for h, w in blocks if h * w <= min(256, most // taps)] or blocks
    block_h, block_w = min(smaller, key=lambda block: (waste(block), block))
    warps = 8 if taps * block_h * block_w >= _SHARED_ELEMENTS // 2 else 4
    fitting = set(blocks)
    heights = tuple(sorted({block[0] for block in blocks}))
    widths = tuple(sorted({block[1] for block in blocks}))
    return ConfigSpace(
        SingleConfig,
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


def _footprint(problem: ConvProblem, config: SingleConfig, device: DeviceFacts) -> Footprint:
    size = problem.dtype.itemsize
    threads = config.num_warps * (64 if device.arch.startswith("gfx") else 32)
    matrix = config.engine != FMA and not _scalar(problem)
    depth = problem.taps * problem.in_channels
    pixels = config.block_h * config.block_w
    x_bytes = math.prod(problem.x_shape) * size
    y_bytes = math.prod(problem.y_shape) * size
    tiles = _tiles(problem, config)
    m_tiles = cdiv(problem.out_channels, config.block_m)
    runs = _runs(problem, config.span) if config.engine == RUNS else None
    if runs is not None:
        columns = config.span * config.block_m
        units = pixels // config.span
        return Footprint(
            programs=tiles * m_tiles,
            threads=threads,
            shared_bytes=max(
                config.num_stages * (units + columns) * runs.block_k * size, units * columns * size
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
        programs = _dgrad_plan(problem, config).calls[0].grid[0]
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
    per_split, splits = _split_tiles(problem, config)
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
