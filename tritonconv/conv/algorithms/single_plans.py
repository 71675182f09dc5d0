"""Launch plans of the kernels for few input channels."""

from __future__ import annotations

from typing import Any

import torch
import triton

from ...runtime.plan import KernelCall, LaunchPlan, Slot, Workspace
from ..problem import ConvProblem
from . import single_flat, single_forward, single_gradients, single_run_gradients, single_runs
from .common import (
    epilogue_arguments,
    lifted,
    precision_constexprs,
    slot_dtypes,
    spatial_arguments,
    spatial_constexprs,
)
from .footprints import cdiv
from .single_geometry import (
    FLAT,
    FMA,
    MMA,
    RUN_ENGINES,
    Runs,
    SingleConfig,
    dgrad_tile,
    reaches_of,
    runs_of,
    split_tiles,
    tiles_of,
)
from .tiles import power_of_two


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


def forward_plan(problem: ConvProblem, config: SingleConfig) -> LaunchPlan:
    """One launch; two for runs."""
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
    if config.engine in RUN_ENGINES:
        return _run_plan(problem, config, constexprs)
    if config.engine == FLAT:
        constexprs = _flat_constexprs(problem, constexprs)
    kernel = single_flat.single_forward_flat_kernel
    if config.engine == FMA:
        kernel = single_forward.single_forward_fma_kernel
    if config.engine == MMA:
        kernel = single_forward.single_forward_mma_kernel
        constexprs.update(precision_constexprs(problem))
        constexprs["BLOCK_K"] = power_of_two(problem.taps * problem.in_channels, 16, 32)
    call = KernelCall(
        kernel,
        (tiles_of(problem, config) * cdiv(problem.out_channels, config.block_m), 1, 1),
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


def _flat_constexprs(problem: ConvProblem, constexprs: dict[str, Any]) -> dict[str, Any]:
    """Without depth and overhang, with the size of the map, so that bounds are constants."""
    _, height, width = lifted(problem.out_size, 1)
    dropped = ("BLOCK_H", "OVERHANG")
    kept = {k: v for k, v in constexprs.items() if not k.endswith("_D") and k not in dropped}
    checks = _checks(problem, 1, 1)
    kept.update(CHECK_H=checks["CHECK_H"], CHECK_W=checks["CHECK_W"])
    return {**kept, "WIDTH": width, "PIXELS": height * width}


def _run_constexprs(problem: ConvProblem, config: SingleConfig, runs: Runs) -> dict[str, Any]:
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
    runs = runs_of(problem, config.span, config.engine)
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
        (tiles_of(problem, config) * tiles_m, 1, 1),
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


def wgrad_plan(problem: ConvProblem, config: SingleConfig) -> LaunchPlan:
    """One launch; two where the pixels are split."""
    if config.engine in RUN_ENGINES:
        return _wgrad_run_plan(problem, config)
    depth = problem.taps * problem.in_channels
    block_k = power_of_two(depth, 16, 64)
    per_split, splits = split_tiles(problem, config)
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


def _wgrad_run_plan(problem: ConvProblem, config: SingleConfig) -> LaunchPlan:
    """Two launches: the products of all pairs, then the sums over splits and spans."""
    runs = runs_of(problem, config.span, config.engine)
    assert runs is not None, "the space has no runs for this problem"
    per_split, splits = split_tiles(problem, config)
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


def dgrad_plan(problem: ConvProblem, config: SingleConfig) -> LaunchPlan:
    """One launch."""
    height, width = reaches_of(problem)
    tile_h, tile_w = dgrad_tile(problem, config.block_h, config.block_w)
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
