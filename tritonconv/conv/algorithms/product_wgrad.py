"""The gradient of the weight: rows are output channels, columns (tap, channel).

The reduction over pixels is split, and partial sums are added in a fixed order by a second kernel:
no atomics.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...runtime.plan import KernelCall, LaunchPlan, Slot, Workspace
from ..problem import ConvProblem
from .common import (
    TileConfig,
    grouped_tile,
    inside,
    matmul_step,
    pixel_offset,
    pixels_of,
    position,
    product_constexprs,
    row_position,
    slot_dtypes,
    spatial_arguments,
    sum_partials_call,
    tap_offset,
    tap_position,
    widen,
    widen_all,
)
from .tiles import flat_rows, needs_bounds


@triton.jit
def conv_wgrad_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    batch,
    in_size,
    out_size,
    x_strides,
    w_strides,
    y_strides,
    pixels_per_split,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    GROUPS: tl.constexpr,
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
    FLAT_ROWS: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """grad_w[o, c, r] = Σ_{n,p} grad_y[n, o, p] · x[n, c, p·stride + r·dilation − pad].

    Columns are (t, r, s, c) with c fastest. With PARTIAL every split of the pixels writes its own
    float32 sum to ``out_ptr[split, o, column]``; otherwise the result goes to the weight layout.
    """
    if WIDE:
        batch = widen(batch)
        x_strides = widen_all(x_strides)
        w_strides = widen_all(w_strides)
        y_strides = widen_all(y_strides)
        pixels_per_split = widen(pixels_per_split)
    LINE: tl.constexpr = KERNEL_W * CHANNELS
    COLUMNS: tl.constexpr = KERNEL_D * KERNEL_H * LINE
    # A tile inside one tap needs one scalar tap instead of a division per column.
    ONE_TAP: tl.constexpr = CHANNELS % BLOCK_N == 0
    group = tl.program_id(1)
    split = tl.program_id(2)
    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(FILTERS, BLOCK_M), tl.cdiv(COLUMNS, BLOCK_N), GROUP_M
    )
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < FILTERS
    out_channel = group * FILTERS + m
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < COLUMNS
    if ONE_TAP:
        tap = (tile_n * BLOCK_N) // CHANNELS
        # The compiler does not see that a remainder keeps the tile's alignment.
        channel = tl.multiple_of((tile_n * BLOCK_N) % CHANNELS, BLOCK_N) + tl.arange(0, BLOCK_N)
    else:
        tap = n // CHANNELS
        channel = n % CHANNELS
    t, r, s = tap_position(tap, KERNEL_D, KERNEL_H, KERNEL_W)
    plane_shift = t * DILATION_D - PAD_D
    row_shift = r * DILATION_H - PAD_H
    column_shift = s * DILATION_W - PAD_W
    if FLAT_ROWS:
        # A row of the window is contiguous in memory: say so, for wide loads.
        line_t, line_r = row_position(n // LINE, KERNEL_D, KERNEL_H)
        x_columns = (n % LINE - PAD_W * CHANNELS) * x_strides[1]
        x_columns += tap_offset(
            x_strides, line_t * DILATION_D - PAD_D, line_r * DILATION_H - PAD_H, 0
        )
    else:
        x_columns = (group * CHANNELS + channel) * x_strides[1]
        x_columns += tap_offset(x_strides, plane_shift, row_shift, column_shift)
    y_columns = out_channel * y_strides[1]

    first = split * pixels_per_split
    last = tl.minimum(first + pixels_per_split, pixels_of(batch, out_size))
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        p = start + k
        mask_p = p < last
        image, plane, row, column = position(p, out_size)
        in_plane = plane * STRIDE_D
        in_row = row * STRIDE_H
        in_column = column * STRIDE_W
        y_rows = pixel_offset(y_strides, image, plane, row, column)
        a = tl.load(
            grad_ptr + y_rows[:, None] + y_columns[None, :],
            mask=mask_p[:, None] & mask_m[None, :],
            other=0.0,
        )
        x_rows = pixel_offset(x_strides, image, in_plane, in_row, in_column)
        if ONE_TAP:
            mask_x = mask_p
            if CHECK_BOUNDS:
                mask_x = inside(
                    mask_x,
                    in_plane + plane_shift,
                    in_row + row_shift,
                    in_column + column_shift,
                    in_size,
                )
            # No column mask here: the tile lies inside one tap, and a second mask would keep the
            # compiler from copying rows asynchronously.
            mask_x = mask_x[:, None]
        else:
            mask_x = mask_p[:, None]
            if COLUMNS % BLOCK_N != 0:
                mask_x = mask_x & mask_n[None, :]
            if CHECK_BOUNDS:
                mask_x = inside(
                    mask_x,
                    in_plane[:, None] + plane_shift[None, :],
                    in_row[:, None] + row_shift[None, :],
                    in_column[:, None] + column_shift[None, :],
                    in_size,
                )
        b = tl.load(x_ptr + (x_rows[:, None] + x_columns[None, :]), mask=mask_x, other=0.0)
        acc = matmul_step(tl.trans(a), b, acc, PRECISION, UPCAST)

    mask = mask_m[:, None] & mask_n[None, :]
    if PARTIAL:
        base = split.to(tl.int64) * (GROUPS * FILTERS * COLUMNS)
        if WIDE:
            out_channel = out_channel.to(tl.int64)
        offsets = base + out_channel[:, None] * COLUMNS + n[None, :]
        tl.store(out_ptr + offsets, acc, mask=mask)
    else:
        w_columns = channel * w_strides[1] + tap_offset(w_strides, t, r, s)
        offsets = (out_channel * w_strides[0])[:, None] + w_columns[None, :]
        tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


def reduction_call(problem: ConvProblem, splits: int) -> KernelCall:
    """Add the partial sums of a split weight gradient in a fixed order."""
    return sum_partials_call(problem, splits, math.prod(problem.w_shape))


def wgrad_plan(problem: ConvProblem, config: TileConfig) -> LaunchPlan:
    """Plan of the gradient of the weight: split over pixels, then a fixed-order sum."""
    columns = problem.taps * problem.channels_per_group
    tiles = triton.cdiv(problem.filters_per_group, config.block_m) * triton.cdiv(
        columns, config.block_n
    )
    blocks = triton.cdiv(problem.out_pixels, config.block_k)
    per_split = triton.cdiv(blocks, max(1, min(config.split_k, blocks))) * config.block_k
    splits = max(1, triton.cdiv(problem.out_pixels, per_split))
    partial = splits > 1
    call = KernelCall(
        conv_wgrad_kernel,
        (tiles, problem.groups, splits),
        (
            Slot("grad_output"),
            Slot("input"),
            Slot("partial" if partial else "grad_weight"),
            *spatial_arguments(problem),
            per_split,
        ),
        {
            **product_constexprs(problem, config),
            "GROUPS": problem.groups,
            "CHECK_BOUNDS": needs_bounds(problem),
            "FLAT_ROWS": flat_rows(problem) and problem.channels_per_group % config.block_n != 0,
            "PARTIAL": partial,
        },
        config.num_warps,
        config.num_stages,
    )
    if not partial:
        return LaunchPlan((call,), slot_dtypes(problem))
    space = Workspace("partial", (splits, problem.out_channels, columns), torch.float32)
    dtypes = {**slot_dtypes(problem), "partial": torch.float32}
    return LaunchPlan((call, reduction_call(problem, splits)), dtypes, (space,))
