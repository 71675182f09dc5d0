"""The kernel of fused forward products, and its launch."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...codegen.program import ScalarFunction
from ...codegen.registry import program_of
from ...runtime.compat import TRITON_VERSION, interpreting
from ...runtime.plan import KernelCall, Slot
from ..epilogue import COORDINATES
from ..fused_problem import FusedProblem
from ..prologue import per_channel
from .common import (
    TileConfig,
    epilogue_arguments,
    grouped_tile,
    pixel_offset,
    pixels_of,
    position,
    product_constexprs,
    spatial_arguments,
    spatial_strides,
    widen,
    widen_all,
)
from .fused_loops import add_both, add_products
from .tiles import needs_bounds


@triton.jit
def fused_forward_kernel(
    x_ptr,
    second_ptr,
    w_ptr,
    y_ptr,
    acc_ptr,
    mean_ptr,
    square_ptr,
    extra_ptrs,
    extra_strides,
    pro_ptrs,
    pro_strides,
    batch,
    in_size,
    out_size,
    x_strides,
    w_strides,
    y_strides,
    second_strides,
    CHANNELS: tl.constexpr,
    SECOND: tl.constexpr,
    FILTERS: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHECK_BOUNDS: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    PROLOGUE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    STATS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SAVE_ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = f(conv(g(x), w)) or f(conv([x, second], w)); CHANNELS are those of x in one group.

    With STATS the mean of every tile's column and the sum of squared distances from it go to
    (tile, channel).
    """
    if WIDE:
        batch = widen(batch)
        x_strides = widen_all(x_strides)
        w_strides = widen_all(w_strides)
        y_strides = widen_all(y_strides)
        second_strides = widen_all(second_strides)
    group = tl.program_id(1)
    pixels = pixels_of(batch, out_size)
    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tl.cdiv(FILTERS, BLOCK_N), GROUP_M
    )

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < pixels
    image, plane, row, column = position(m, out_size)
    first = (plane * STRIDE_D - PAD_D, row * STRIDE_H - PAD_H, column * STRIDE_W - PAD_W)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < FILTERS
    out_channel = group * FILTERS + n
    x_rows = pixel_offset(x_strides, image, first[0], first[1], first[2])
    x_rows += group * CHANNELS * x_strides[1]
    w_columns = out_channel * w_strides[0]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SECOND > 0:
        second_rows = pixel_offset(second_strides, image, first[0], first[1], first[2])
    if ONE_LOOP:
        acc = add_both(
            acc,
            x_ptr,
            second_ptr,
            w_ptr,
            x_rows,
            second_rows,
            w_columns,
            first,
            mask_m,
            mask_n,
            in_size,
            x_strides,
            second_strides,
            w_strides,
            CHANNELS,
            SECOND,
            KERNEL_D,
            KERNEL_H,
            KERNEL_W,
            DILATION_D,
            DILATION_H,
            DILATION_W,
            CHECK_BOUNDS,
            PRECISION,
            UPCAST,
            BLOCK_K,
        )
    else:
        acc = add_products(
            acc,
            x_ptr,
            w_ptr,
            x_rows,
            w_columns,
            image,
            first,
            mask_m,
            mask_n,
            in_size,
            x_strides,
            w_strides,
            group * CHANNELS,
            pro_ptrs,
            pro_strides,
            CHANNELS,
            0,
            KERNEL_D,
            KERNEL_H,
            KERNEL_W,
            DILATION_D,
            DILATION_H,
            DILATION_W,
            CHECK_BOUNDS,
            PROLOGUE,
            PER_CHANNEL,
            PRECISION,
            UPCAST,
            BLOCK_K,
        )
        if SECOND > 0:
            acc = add_products(
                acc,
                second_ptr,
                w_ptr,
                second_rows,
                w_columns,
                image,
                first,
                mask_m,
                mask_n,
                in_size,
                second_strides,
                w_strides,
                0,
                pro_ptrs,
                pro_strides,
                SECOND,
                CHANNELS,
                KERNEL_D,
                KERNEL_H,
                KERNEL_W,
                DILATION_D,
                DILATION_H,
                DILATION_W,
                CHECK_BOUNDS,
                None,
                PER_CHANNEL,
                PRECISION,
                UPCAST,
                BLOCK_K,
            )

    mask = mask_m[:, None] & mask_n[None, :]
    y_rows = pixel_offset(y_strides, image, plane, row, column)
    offsets = y_rows[:, None] + (out_channel * y_strides[1])[None, :]
    if EPILOGUE is None:
        result = acc
    else:
        if SAVE_ACC:
            tl.store(acc_ptr + offsets, acc.to(acc_ptr.dtype.element_ty), mask=mask)
        result = EPILOGUE(
            acc,
            image[:, None],
            out_channel[None, :],
            plane[:, None],
            row[:, None],
            column[:, None],
            mask,
            extra_ptrs,
            extra_strides,
        )
    stored = result.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, stored, mask=mask)
    if STATS:
        count = tl.minimum(pixels - tile_m * BLOCK_M, BLOCK_M).to(tl.float32)
        value = tl.where(mask_m[:, None], stored.to(tl.float32), 0.0)
        mean = tl.sum(value, axis=0) / count
        distance = tl.where(mask_m[:, None], value - mean[None, :], 0.0)
        at = tile_m * (FILTERS * tl.num_programs(1)) + out_channel
        tl.store(mean_ptr + at, mean, mask=mask_n)
        tl.store(square_ptr + at, tl.sum(distance * distance, axis=0), mask=mask_n)


# Triton 3.9 loads single elements through a pointer that was chosen from two; 3.6 whole rows.
_ONE_LOOP = interpreting() or TRITON_VERSION < (3, 7)


def fused_call(problem: FusedProblem, config: TileConfig, source: str = "input") -> KernelCall:
    """The launch of a fused product.

    Args:
        problem: the product.
        config: its tile.
        source: the slot of the first input.
    """
    tiles = triton.cdiv(problem.out_pixels, config.block_m)
    tiles *= triton.cdiv(problem.filters_per_group, config.block_n)
    fused = epilogue_arguments(problem)
    two = problem.second_channels > 0
    first = problem.first_channels // problem.groups
    divides = first % config.block_k == problem.second_channels % config.block_k == 0
    alike = (problem.x_strides[1] == 1) == (problem.second_strides[1:2] == (1,))
    return KernelCall(
        fused_forward_kernel,
        (tiles, problem.groups, 1),
        (
            Slot(source),
            Slot("second" if two else source),
            Slot("weight"),
            Slot("output"),
            Slot("acc" if fused.save_acc else "output"),
            Slot("tile_mean" if problem.stats else "output"),
            Slot("tile_square" if problem.stats else "output"),
            fused.pointers,
            fused.strides,
            *prologue_arguments(problem),
            *spatial_arguments(problem),
            spatial_strides(problem.second_strides if two else problem.x_strides),
        ),
        {
            **product_constexprs(problem, config),
            "CHANNELS": first,
            "SECOND": problem.second_channels,
            "CHECK_BOUNDS": needs_bounds(problem),
            "ONE_LOOP": two and divides and alike and _ONE_LOOP,
            **prologue_constexprs(problem),
            "STATS": problem.stats,
            "EPILOGUE": fused.function,
            "SAVE_ACC": fused.save_acc,
        },
        config.num_warps,
        config.num_stages,
    )


def prologue_arguments(problem: FusedProblem) -> tuple[tuple[Slot, ...], tuple[int, ...]]:
    """Pointers and strides of what the prologue reads."""
    spec = problem.prologue
    if spec is None:
        return (), ()
    pointers = tuple(Slot(f"prologue{index}") for index in range(len(spec.capture_dtypes)))
    return pointers, tuple(hop for strides in spec.capture_strides for hop in strides)


def prologue_constexprs(problem: FusedProblem) -> dict[str, Any]:
    """The prologue's generated function, and whether it reads vectors over channels only."""
    if problem.prologue is None:
        return {"PROLOGUE": None, "PER_CHANNEL": False}
    program = program_of(problem.prologue.function)
    function = ScalarFunction(program, ()).with_wide(problem.wide).with_frame(COORDINATES[3])
    return {"PROLOGUE": function.program.jit, "PER_CHANNEL": per_channel(program)}
