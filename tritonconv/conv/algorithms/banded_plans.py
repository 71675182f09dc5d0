"""Launch plans of banded products: the small kernel beside the product, and the product."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton

from ...runtime.plan import KernelCall, LaunchPlan, Slot, Workspace
from ..problem import ConvProblem
from . import banded_products, banded_weights
from .banded_geometry import (
    VECTOR,
    BandedConfig,
    Roles,
    checks_of,
    roles_of,
    split_tiles,
    tiles_of,
    window_of,
)
from .common import (
    epilogue_arguments,
    lifted,
    precision_constexprs,
    slot_dtypes,
    spatial_strides,
)


def product_plan(problem: ConvProblem, config: BandedConfig) -> LaunchPlan:
    """Two launches: the weights spread to a band, then the product with them."""
    roles = roles_of(problem)
    window = window_of(problem, config.run)
    depth = window.chunks(config.block_k) * config.block_k
    elements = window.lines * depth * window.block_n
    spread = KernelCall(
        banded_products.band_weight_kernel,
        (triton.cdiv(elements, 1024), 1, 1),
        (Slot("weight"), Slot("band"), elements, spatial_strides(problem.w_strides)),
        {**_weight_constexprs(problem, config), "DEPTH": depth, "BLOCK": 1024},
    )
    epilogue = epilogue_arguments(problem)
    product = KernelCall(
        banded_products.banded_product_kernel,
        (tiles_of(problem, config), 1, 1),
        (
            Slot(roles.source),
            Slot("band"),
            Slot(roles.units),
            Slot("acc" if epilogue.save_acc else roles.units),
            epilogue.pointers,
            epilogue.strides,
            *_map_arguments(roles),
        ),
        {
            **_product_constexprs(problem, config),
            "EPILOGUE": epilogue.function,
            "SAVE_ACC": epilogue.save_acc,
        },
        config.num_warps,
        config.num_stages,
    )
    return LaunchPlan(
        (spread, product),
        {**slot_dtypes(problem), "band": problem.dtype},
        (Workspace("band", (window.lines, depth, window.block_n), problem.dtype),),
    )


def wgrad_plan(problem: ConvProblem, config: BandedConfig) -> LaunchPlan:
    """Two launches: all pairs of every split in single precision, then the sum along diagonals."""
    roles = roles_of(problem)
    window = window_of(problem, config.run)
    tiles_k = triton.cdiv(window.lines * window.line, config.block_k)
    depth = tiles_k * config.block_k
    each, splits = split_tiles(problem, config)
    product = KernelCall(
        banded_weights.banded_wgrad_kernel,
        (tiles_k, splits, 1),
        (
            Slot(roles.source),
            Slot(roles.units),
            Slot("partial"),
            *_map_arguments(roles),
            tiles_of(problem, config),
            each,
        ),
        _product_constexprs(problem, config),
        config.num_warps,
        config.num_stages,
    )
    block = 16
    constexprs = _weight_constexprs(problem, config)
    del constexprs["COLUMNS"]
    total = KernelCall(
        banded_weights.diagonal_sum_kernel,
        (triton.cdiv(math.prod(problem.w_shape), block), 1, 1),
        (Slot("partial"), Slot("grad_weight"), splits, spatial_strides(problem.w_strides)),
        {
            **constexprs,
            "RUN_D": config.run_d,
            "WINDOW_W": window.count[2],
            "DEPTH": depth,
            "BLOCK": block,
            "BLOCK_S": min(512, triton.next_power_of_2(splits * math.prod(config.run))),
        },
    )
    return LaunchPlan(
        (product, total),
        {**slot_dtypes(problem), "partial": torch.float32},
        (Workspace("partial", (splits, window.block_n, depth), torch.float32),),
    )


def _map_arguments(roles: Roles) -> tuple[tuple[int, int, int], ...]:
    """Sizes of both maps; strides of (image, plane, row) over the alignment of their channels."""

    def strides(channels: int, size: tuple[int, int, int]) -> tuple[int, int, int]:
        row = size[2] * channels // math.gcd(channels, VECTOR)
        return row * size[1] * size[0], row * size[1], row

    return (
        roles.source_size,
        roles.unit_size,
        strides(roles.channels, roles.source_size),
        strides(roles.filters, roles.unit_size),
    )


def _product_constexprs(problem: ConvProblem, config: BandedConfig) -> dict[str, Any]:
    roles = roles_of(problem)
    window = window_of(problem, config.run)
    return {
        "CHANNELS": roles.channels,
        "FILTERS": roles.filters,
        **{f"LEAD_{axis}": lead for axis, lead in zip("DHW", roles.lead, strict=True)},
        **{f"RUN_{axis}": run for axis, run in zip("DHW", config.run, strict=True)},
        **{f"WINDOW_{axis}": count for axis, count in zip("DHW", window.count, strict=True)},
        "HOP_D": window.hop[0],
        "HOP_H": window.hop[1],
        **checks_of(problem, config),
        "SOURCE_ALIGN": math.gcd(roles.channels, VECTOR),
        "UNIT_ALIGN": math.gcd(roles.filters, VECTOR),
        "CACHED": bool(config.cached),
        **precision_constexprs(problem),
        "UNITS_H": config.units_h,
        "UNITS_W": config.units_w,
        "BLOCK_N": window.block_n,
        "BLOCK_K": config.block_k,
    }


def _weight_constexprs(problem: ConvProblem, config: BandedConfig) -> dict[str, Any]:
    roles = roles_of(problem)
    window = window_of(problem, config.run)
    kernel, dilation = lifted(problem.kernel, 1), lifted(problem.dilation, 1)
    return {
        "CHANNELS": roles.channels,
        "FILTERS": roles.filters,
        "COLUMNS": window.columns,
        **{f"KERNEL_{axis}": taps for axis, taps in zip("DHW", kernel, strict=True)},
        **{f"DILATION_{axis}": step for axis, step in zip("DHW", dilation, strict=True)},
        "RUN_H": config.run_h,
        "RUN_W": config.run_w,
        "WINDOW_H": window.count[1],
        "HOP_D": window.hop[0],
        "HOP_H": window.hop[1],
        "FLIPPED": roles.flipped,
        "WIDE": problem.wide,
        "BLOCK_N": window.block_n,
    }
