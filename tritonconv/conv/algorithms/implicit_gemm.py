"""Implicit matrix products for the three convolution directions, and the plans built on them.

Forward: rows are output pixels, columns output channels, the reduction runs over filter taps and
input channels, channel blocks outer and taps inner so that neighbouring taps re-read pixels from
cache. Gradient of the input: rows are input pixels of one stride phase, so that only taps which
meet the phase are visited (no zero work). Gradient of the weight: rows are output channels,
columns (tap, channel), the reduction over pixels is split, and partial sums are added in a fixed
order by a second kernel: no atomics.

Technique: implicit GEMM as CUTLASS describes it (https://github.com/NVIDIA/cutlass).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ...runtime.plan import KernelCall, LaunchPlan, Slot, Workspace
from ..problem import ConvProblem, Direction
from .common import (
    TileConfig,
    epilogue_arguments,
    geometry_constexprs,
    grouped_tile,
    matmul_step,
    pixel_arguments,
    precision_constexprs,
    reduce_partials_kernel,
    slot_dtypes,
    store_result,
    widen,
    widen_strides,
)
from .tiles import flat_rows, needs_bounds


@triton.jit
def conv_forward_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    acc_ptr,
    extra_ptrs,
    extra_strides,
    batch,
    height,
    width,
    out_height,
    out_width,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    w_stride_o,
    w_stride_i,
    w_stride_h,
    w_stride_w,
    y_stride_n,
    y_stride_c,
    y_stride_h,
    y_stride_w,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHECK_BOUNDS: tl.constexpr,
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
    """y[n, o, p, q] = Σ_{c,r,s} x[n, c, p·stride + r·dilation − pad, …] · w[o, c, r, s]."""
    if WIDE:
        batch = widen(batch)
        x_stride_n, x_stride_c, x_stride_h, x_stride_w = widen_strides(
            x_stride_n, x_stride_c, x_stride_h, x_stride_w
        )
        w_stride_o, w_stride_i, w_stride_h, w_stride_w = widen_strides(
            w_stride_o, w_stride_i, w_stride_h, w_stride_w
        )
        y_stride_n, y_stride_c, y_stride_h, y_stride_w = widen_strides(
            y_stride_n, y_stride_c, y_stride_h, y_stride_w
        )
    group = tl.program_id(1)
    pixels = batch * out_height * out_width
    tiles_n = tl.cdiv(FILTERS, BLOCK_N)
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tiles_n, GROUP_M)

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < pixels
    column = m % out_width
    row = (m // out_width) % out_height
    image = m // (out_width * out_height)
    first_row = row * STRIDE_H - PAD_H
    first_column = column * STRIDE_W - PAD_W
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < FILTERS
    out_channel = group * FILTERS + n
    in_channel = group * CHANNELS
    if WIDE:
        image = image.to(tl.int64)
        out_channel = out_channel.to(tl.int64)
        in_channel = in_channel.to(tl.int64)
        x_rows = image * x_stride_n + first_row.to(tl.int64) * x_stride_h
        x_rows += first_column.to(tl.int64) * x_stride_w
    else:
        x_rows = image * x_stride_n + first_row * x_stride_h + first_column * x_stride_w
    x_rows += in_channel * x_stride_c
    w_columns = out_channel * w_stride_o

    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(CHANNELS, BLOCK_K) * TAPS):
        tap = step % TAPS
        r = tap // KERNEL_W
        s = tap % KERNEL_W
        c = (step // TAPS) * BLOCK_K + k
        x_tap = r * DILATION_H * x_stride_h + s * DILATION_W * x_stride_w
        if WIDE:
            c = c.to(tl.int64)
        mask_x = mask_m
        if CHECK_BOUNDS:
            in_row = first_row + r * DILATION_H
            in_column = first_column + s * DILATION_W
            mask_x = mask_x & (in_row >= 0) & (in_row < height)
            mask_x = mask_x & (in_column >= 0) & (in_column < width)
        x_offsets = (x_rows + x_tap)[:, None] + (c * x_stride_c)[None, :]
        w_tap = r * w_stride_h + s * w_stride_w
        w_offsets = (c * w_stride_i + w_tap)[:, None] + w_columns[None, :]
        if CHANNELS % BLOCK_K == 0:
            a = tl.load(x_ptr + x_offsets, mask=mask_x[:, None], other=0.0)
            b = tl.load(w_ptr + w_offsets, mask=mask_n[None, :], other=0.0)
        else:
            mask_c = c < CHANNELS
            a = tl.load(x_ptr + x_offsets, mask=mask_x[:, None] & mask_c[None, :], other=0.0)
            b = tl.load(w_ptr + w_offsets, mask=mask_c[:, None] & mask_n[None, :], other=0.0)
        acc = matmul_step(a, b, acc, PRECISION, UPCAST)

    if WIDE:
        y_rows = image * y_stride_n + row.to(tl.int64) * y_stride_h
        y_rows += column.to(tl.int64) * y_stride_w
    else:
        y_rows = image * y_stride_n + row * y_stride_h + column * y_stride_w
    store_result(
        acc,
        y_ptr,
        acc_ptr,
        y_rows[:, None] + (out_channel * y_stride_c)[None, :],
        image[:, None],
        out_channel[None, :],
        row[:, None],
        column[:, None],
        mask_m[:, None] & mask_n[None, :],
        extra_ptrs,
        extra_strides,
        EPILOGUE,
        SAVE_ACC,
    )


@triton.jit
def conv_dgrad_kernel(
    grad_ptr,
    w_ptr,
    x_ptr,
    batch,
    height,
    width,
    out_height,
    out_width,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    w_stride_o,
    w_stride_i,
    w_stride_h,
    w_stride_w,
    y_stride_n,
    y_stride_c,
    y_stride_h,
    y_stride_w,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """grad_x[n, c, h, w] = Σ_{o,r,s} grad_y[n, o, p, q] · w[o, c, r, s].

    (p, q) = (h + pad − r·dilation, …) / stride where that is exact and in range.

    Programs of one phase serve input pixels with equal residue modulo the stride; the taps that
    meet them are first, first + STEP, … with STEP = stride / gcd(stride, dilation).
    """
    if WIDE:
        batch = widen(batch)
        x_stride_n, x_stride_c, x_stride_h, x_stride_w = widen_strides(
            x_stride_n, x_stride_c, x_stride_h, x_stride_w
        )
        w_stride_o, w_stride_i, w_stride_h, w_stride_w = widen_strides(
            w_stride_o, w_stride_i, w_stride_h, w_stride_w
        )
        y_stride_n, y_stride_c, y_stride_h, y_stride_w = widen_strides(
            y_stride_n, y_stride_c, y_stride_h, y_stride_w
        )
    group = tl.program_id(1)
    phase_h = tl.program_id(2) // STRIDE_W
    phase_w = tl.program_id(2) % STRIDE_W
    rows = tl.cdiv(height, STRIDE_H)
    columns = tl.cdiv(width, STRIDE_W)
    pixels = batch * rows * columns
    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tl.cdiv(CHANNELS, BLOCK_N), GROUP_M
    )

    # The first tap of the phase; KERNEL (no tap at all) where the dilation skips the phase.
    if STRIDE_H == 1:
        first_r = 0
    else:
        first_r = phase_h * 0 + KERNEL_H
        for i in tl.static_range(STEP_H):
            first_r = tl.where((phase_h + PAD_H - i * DILATION_H) % STRIDE_H == 0, i, first_r)
    if STRIDE_W == 1:
        first_s = 0
    else:
        first_s = phase_w * 0 + KERNEL_W
        for j in tl.static_range(STEP_W):
            first_s = tl.where((phase_w + PAD_W - j * DILATION_W) % STRIDE_W == 0, j, first_s)
    taps_h = tl.maximum((KERNEL_H - first_r + STEP_H - 1) // STEP_H, 0)
    taps_w = tl.maximum((KERNEL_W - first_s + STEP_W - 1) // STEP_W, 0)
    taps = taps_h * taps_w

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_column = (m % columns) * STRIDE_W + phase_w
    in_row = ((m // columns) % rows) * STRIDE_H + phase_h
    image = m // (columns * rows)
    mask_m = (m < pixels) & (in_row < height) & (in_column < width)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < CHANNELS
    first_filter = group * FILTERS
    if WIDE:
        image = image.to(tl.int64)
        n = n.to(tl.int64)
        first_filter = first_filter.to(tl.int64)

    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(FILTERS, BLOCK_K) * taps):
        tap = step % taps
        r = first_r + (tap // taps_w) * STEP_H
        s = first_s + (tap % taps_w) * STEP_W
        o = (step // taps) * BLOCK_K + k
        # The phase makes these divisions exact wherever the result is in range.
        row = in_row + (PAD_H - r * DILATION_H)
        column = in_column + (PAD_W - s * DILATION_W)
        mask_y = mask_m & (row >= 0) & (column >= 0)
        row = row // STRIDE_H
        column = column // STRIDE_W
        mask_y = mask_y & (row < out_height) & (column < out_width)
        if WIDE:
            o = o.to(tl.int64)
            row = row.to(tl.int64)
            column = column.to(tl.int64)
        y_rows = image * y_stride_n + row * y_stride_h + column * y_stride_w
        out_channel = first_filter + o
        y_offsets = y_rows[:, None] + (out_channel * y_stride_c)[None, :]
        w_tap = r * w_stride_h + s * w_stride_w
        w_offsets = (out_channel * w_stride_o + w_tap)[:, None] + (n * w_stride_i)[None, :]
        if FILTERS % BLOCK_K == 0:
            a = tl.load(grad_ptr + y_offsets, mask=mask_y[:, None], other=0.0)
            b = tl.load(w_ptr + w_offsets, mask=mask_n[None, :], other=0.0)
        else:
            mask_o = o < FILTERS
            a = tl.load(grad_ptr + y_offsets, mask=mask_y[:, None] & mask_o[None, :], other=0.0)
            b = tl.load(w_ptr + w_offsets, mask=mask_o[:, None] & mask_n[None, :], other=0.0)
        acc = matmul_step(a, b, acc, PRECISION, UPCAST)

    in_channel = group * CHANNELS + n
    if WIDE:
        in_row = in_row.to(tl.int64)
        in_column = in_column.to(tl.int64)
    x_rows = image * x_stride_n + in_row * x_stride_h + in_column * x_stride_w
    x_offsets = x_rows[:, None] + (in_channel * x_stride_c)[None, :]
    tl.store(
        x_ptr + x_offsets,
        acc.to(x_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_n[None, :],
    )


@triton.jit
def conv_wgrad_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    batch,
    height,
    width,
    out_height,
    out_width,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    w_stride_o,
    w_stride_i,
    w_stride_h,
    w_stride_w,
    y_stride_n,
    y_stride_c,
    y_stride_h,
    y_stride_w,
    pixels_per_split,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    GROUPS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
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
    """grad_w[o, c, r, s] = Σ_{n,p,q} grad_y[n, o, p, q] · x[n, c, p·stride + r·dilation − pad, …].

    Columns are (r, s, c) with c fastest. With PARTIAL every split of the pixels writes its own
    float32 sum to ``out_ptr[split, o, column]``; otherwise the result goes to the weight layout.
    """
    if WIDE:
        batch = widen(batch)
        x_stride_n, x_stride_c, x_stride_h, x_stride_w = widen_strides(
            x_stride_n, x_stride_c, x_stride_h, x_stride_w
        )
        w_stride_o, w_stride_i, w_stride_h, w_stride_w = widen_strides(
            w_stride_o, w_stride_i, w_stride_h, w_stride_w
        )
        y_stride_n, y_stride_c, y_stride_h, y_stride_w = widen_strides(
            y_stride_n, y_stride_c, y_stride_h, y_stride_w
        )
        pixels_per_split = widen(pixels_per_split)
    COLUMNS: tl.constexpr = KERNEL_H * KERNEL_W * CHANNELS
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
    row_shift = (tap // KERNEL_W) * DILATION_H - PAD_H
    column_shift = (tap % KERNEL_W) * DILATION_W - PAD_W
    in_channel = group * CHANNELS + channel
    if WIDE:
        out_channel = out_channel.to(tl.int64)
        in_channel = in_channel.to(tl.int64)
        row_shift = row_shift.to(tl.int64)
        column_shift = column_shift.to(tl.int64)
    if FLAT_ROWS:
        # A row of the window is contiguous in memory: say so, for wide loads.
        run = n % (KERNEL_W * CHANNELS) - PAD_W * CHANNELS
        window_row = (n // (KERNEL_W * CHANNELS)) * DILATION_H - PAD_H
        x_columns = run * x_stride_c + window_row * x_stride_h
    else:
        x_columns = in_channel * x_stride_c + row_shift * x_stride_h + column_shift * x_stride_w
    y_columns = out_channel * y_stride_c

    pixels = batch * out_height * out_width
    first = split * pixels_per_split
    last = tl.minimum(first + pixels_per_split, pixels)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        p = start + k
        mask_p = p < last
        column = p % out_width
        row = (p // out_width) % out_height
        image = p // (out_width * out_height)
        in_row = row * STRIDE_H
        in_column = column * STRIDE_W
        if WIDE:
            image = image.to(tl.int64)
            row = row.to(tl.int64)
            column = column.to(tl.int64)
            in_row = in_row.to(tl.int64)
            in_column = in_column.to(tl.int64)
        y_rows = image * y_stride_n + row * y_stride_h + column * y_stride_w
        a = tl.load(
            grad_ptr + y_rows[:, None] + y_columns[None, :],
            mask=mask_p[:, None] & mask_m[None, :],
            other=0.0,
        )
        x_rows = image * x_stride_n + in_row * x_stride_h + in_column * x_stride_w
        if ONE_TAP:
            mask_x = mask_p
            if CHECK_BOUNDS:
                mask_x = mask_x & (in_row + row_shift >= 0) & (in_row + row_shift < height)
                mask_x = mask_x & (in_column + column_shift >= 0)
                mask_x = mask_x & (in_column + column_shift < width)
            # No column mask here: the tile lies inside one tap, and a second mask would keep the
            # compiler from copying rows asynchronously.
            mask_x = mask_x[:, None]
        else:
            mask_x = mask_p[:, None]
            if COLUMNS % BLOCK_N != 0:
                mask_x = mask_x & mask_n[None, :]
            if CHECK_BOUNDS:
                rows = in_row[:, None] + row_shift[None, :]
                columns = in_column[:, None] + column_shift[None, :]
                mask_x = mask_x & (rows >= 0) & (rows < height)
                mask_x = mask_x & (columns >= 0) & (columns < width)
        b = tl.load(x_ptr + (x_rows[:, None] + x_columns[None, :]), mask=mask_x, other=0.0)
        acc = matmul_step(tl.trans(a), b, acc, PRECISION, UPCAST)

    mask = mask_m[:, None] & mask_n[None, :]
    if PARTIAL:
        base = split.to(tl.int64) * (GROUPS * FILTERS * COLUMNS)
        offsets = base + (group * FILTERS + m)[:, None] * COLUMNS + n[None, :]
        tl.store(out_ptr + offsets, acc, mask=mask)
    else:
        w_tap = (tap // KERNEL_W) * w_stride_h + (tap % KERNEL_W) * w_stride_w
        w_columns = channel * w_stride_i + w_tap
        offsets = (out_channel * w_stride_o)[:, None] + w_columns[None, :]
        tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _tile_constexprs(problem: ConvProblem, config: TileConfig) -> dict[str, Any]:
    return {
        "CHANNELS": problem.channels_per_group,
        "FILTERS": problem.filters_per_group,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        **geometry_constexprs(problem),
        **precision_constexprs(problem),
    }


def forward_plan(problem: ConvProblem, config: TileConfig) -> LaunchPlan:
    """Plan of the forward product."""
    epilogue = epilogue_arguments(problem)
    tiles = triton.cdiv(problem.out_pixels, config.block_m) * triton.cdiv(
        problem.filters_per_group, config.block_n
    )
    call = KernelCall(
        conv_forward_kernel,
        (tiles, problem.groups, 1),
        (
            Slot("input"),
            Slot("weight"),
            Slot("output"),
            Slot("acc" if epilogue.save_acc else "output"),
            epilogue.pointers,
            epilogue.strides,
            *pixel_arguments(problem),
        ),
        {
            **_tile_constexprs(problem, config),
            "CHECK_BOUNDS": needs_bounds(problem),
            "EPILOGUE": epilogue.function,
            "SAVE_ACC": epilogue.save_acc,
        },
        config.num_warps,
        config.num_stages,
    )
    return LaunchPlan((call,), slot_dtypes(problem))


def dgrad_plan(problem: ConvProblem, config: TileConfig) -> LaunchPlan:
    """Plan of the gradient of the input: one launch over all stride phases."""
    stride_h, stride_w = problem.stride
    phase_pixels = problem.batch * math.prod(
        triton.cdiv(size, hop) for size, hop in zip(problem.in_size, problem.stride, strict=True)
    )
    tiles = triton.cdiv(phase_pixels, config.block_m) * triton.cdiv(
        problem.channels_per_group, config.block_n
    )
    call = KernelCall(
        conv_dgrad_kernel,
        (tiles, problem.groups, stride_h * stride_w),
        (Slot("grad_output"), Slot("weight"), Slot("grad_input"), *pixel_arguments(problem)),
        {
            **_tile_constexprs(problem, config),
            "STEP_H": stride_h // math.gcd(stride_h, problem.dilation[0]),
            "STEP_W": stride_w // math.gcd(stride_w, problem.dilation[1]),
        },
        config.num_warps,
        config.num_stages,
    )
    return LaunchPlan((call,), slot_dtypes(problem))


def reduction_call(problem: ConvProblem, splits: int) -> KernelCall:
    """Add the partial sums of a split weight gradient in a fixed order."""
    columns = problem.taps * problem.channels_per_group
    elements = problem.out_channels * columns
    block = 256
    return KernelCall(
        reduce_partials_kernel,
        (triton.cdiv(elements, block), 1, 1),
        (Slot("partial"), Slot("grad_weight"), elements, splits, *problem.w_strides),
        {
            "COLUMNS": columns,
            "CHANNELS": problem.channels_per_group,
            "KERNEL_W": problem.kernel[1],
            "BLOCK": block,
        },
        num_warps=4,
    )


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
            *pixel_arguments(problem),
            per_split,
        ),
        {
            **_tile_constexprs(problem, config),
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


def plan_of(problem: ConvProblem, config: TileConfig) -> LaunchPlan:
    """Plan of whichever direction the problem asks for."""
    if problem.direction is Direction.FORWARD:
        return forward_plan(problem, config)
    if problem.direction is Direction.DGRAD:
        return dgrad_plan(problem, config)
    return wgrad_plan(problem, config)
