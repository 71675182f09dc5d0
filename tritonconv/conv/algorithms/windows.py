"""Shared by the algorithms that flatten a whole window (taps and channels) into the reduction."""

from __future__ import annotations

import triton
import triton.language as tl

from ...runtime.device import DeviceFacts
from ...runtime.plan import KernelCall, LaunchPlan, Slot
from ...runtime.space import Choice, ConfigSpace, Int, PowerOfTwo
from ..problem import ConvProblem
from .common import (
    TileConfig,
    epilogue_arguments,
    geometry_constexprs,
    grouped_tile,
    matmul_step,
    pixel_arguments,
    precision_constexprs,
    slot_dtypes,
    store_result,
    widen,
    widen_strides,
)
from .tiles import flat_rows, needs_bounds, order_constraint, power_of_two, tile_constraints


@triton.jit
def _window_forward_kernel(
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
    CHANNELS_FASTEST: tl.constexpr,
    FLAT_ROWS: tl.constexpr,
    FLAT_FILTERS: tl.constexpr,
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
    """y[m, o] = Σ_k x[m, k] · w[o, k] with k the flattened window.

    The flattening follows the input's memory: (r, s, c) with channels fastest, or (c, r, s).
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
    DEPTH: tl.constexpr = KERNEL_H * KERNEL_W * CHANNELS
    pixels = batch * out_height * out_width
    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tl.cdiv(FILTERS, BLOCK_N), GROUP_M
    )
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < pixels
    column = m % out_width
    row = (m // out_width) % out_height
    image = m // (out_width * out_height)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < FILTERS
    if WIDE:
        image = image.to(tl.int64)
        row = row.to(tl.int64)
        column = column.to(tl.int64)
        n = n.to(tl.int64)
    first_row = row * STRIDE_H - PAD_H
    first_column = column * STRIDE_W - PAD_W
    x_rows = image * x_stride_n + first_row * x_stride_h + first_column * x_stride_w
    w_columns = n * w_stride_o

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if FLAT_ROWS:
            # A row of the window is contiguous in memory: say so, for wide loads.
            run = k % (CHANNELS * KERNEL_W)
            r = k // (CHANNELS * KERNEL_W)
            s = run // CHANNELS
            c = run % CHANNELS
        elif CHANNELS_FASTEST:
            c = k % CHANNELS
            s = (k // CHANNELS) % KERNEL_W
            r = k // (CHANNELS * KERNEL_W)
        else:
            s = k % KERNEL_W
            r = (k // KERNEL_W) % KERNEL_H
            c = k // (KERNEL_W * KERNEL_H)
        mask_k = k < DEPTH
        row_shift = r * DILATION_H
        column_shift = s * DILATION_W
        if FLAT_ROWS:
            x_window = run * x_stride_c + row_shift * x_stride_h
        else:
            x_window = c * x_stride_c + row_shift * x_stride_h + column_shift * x_stride_w
        if FLAT_FILTERS:
            w_window = k
        else:
            w_window = c * w_stride_i + r * w_stride_h + s * w_stride_w
        # Masks that cannot fail are left out: each one narrows what is loaded at once.
        mask_x = mask_m[:, None]
        mask_w = mask_n[None, :]
        if DEPTH % BLOCK_K != 0:
            mask_x = mask_x & mask_k[None, :]
            mask_w = mask_w & mask_k[:, None]
        if CHECK_BOUNDS:
            rows = first_row[:, None] + row_shift[None, :]
            columns = first_column[:, None] + column_shift[None, :]
            mask_x = mask_x & (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        a = tl.load(x_ptr + x_rows[:, None] + x_window[None, :], mask=mask_x, other=0.0)
        b = tl.load(
            w_ptr + w_window[:, None] + w_columns[None, :],
            mask=mask_w,
            other=0.0,
        )
        acc = matmul_step(a, b, acc, PRECISION, UPCAST)

    y_rows = image * y_stride_n + row * y_stride_h + column * y_stride_w
    store_result(
        acc,
        y_ptr,
        acc_ptr,
        y_rows[:, None] + (n * y_stride_c)[None, :],
        image[:, None],
        n[None, :],
        row[:, None],
        column[:, None],
        mask_m[:, None] & mask_n[None, :],
        extra_ptrs,
        extra_strides,
        EPILOGUE,
        SAVE_ACC,
    )


def flat_filters(problem: ConvProblem, channels_fastest: bool) -> bool:
    """Whether a filter is contiguous in the order in which windows are flattened."""
    _, channel, row, column = problem.w_strides
    kernel_w = problem.kernel[-1]
    if channels_fastest:
        return (channel, column, row) == (1, problem.in_channels, problem.in_channels * kernel_w)
    return (column, row, channel) == (1, kernel_w, kernel_w * problem.kernel[0])


def window_forward_plan(problem: ConvProblem, config: TileConfig) -> LaunchPlan:
    """Plan of the forward product over flattened windows."""
    epilogue = epilogue_arguments(problem)
    channels_fastest = problem.x_strides[1] <= problem.x_strides[-1]
    tiles = triton.cdiv(problem.out_pixels, config.block_m) * triton.cdiv(
        problem.out_channels, config.block_n
    )
    call = KernelCall(
        _window_forward_kernel,
        (tiles, 1, 1),
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
            "CHANNELS": problem.in_channels,
            "FILTERS": problem.out_channels,
            **geometry_constexprs(problem),
            "CHANNELS_FASTEST": channels_fastest,
            "FLAT_ROWS": flat_rows(problem),
            "FLAT_FILTERS": flat_filters(problem, channels_fastest),
            "CHECK_BOUNDS": needs_bounds(problem),
            "EPILOGUE": epilogue.function,
            "SAVE_ACC": epilogue.save_acc,
            **precision_constexprs(problem),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP_M": config.group_m,
        },
        config.num_warps,
        config.num_stages,
    )
    return LaunchPlan((call,), slot_dtypes(problem))


def window_space(problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[TileConfig]:
    """Tiles for a reduction over the flattened window."""
    depth = problem.taps * problem.in_channels
    half = problem.dtype.itemsize == 2
    block_k = 64 if depth % 64 == 0 and half else power_of_two(depth, 16, 32)
    block_n = power_of_two(problem.out_channels, 16, 128 if half else 64)
    small = problem.out_pixels < 64 * 132
    widest = triton.next_power_of_2(problem.out_channels)
    return ConfigSpace(
        TileConfig,
        (
            Int("num_stages", 2, 4),
            PowerOfTwo("num_warps", 2, 8),
            PowerOfTwo("block_m", 32, 256),
            PowerOfTwo("block_n", 16, power_of_two(2 * widest, 16, 128)),
            PowerOfTwo("block_k", 16, power_of_two(depth, 16, 64)),
            Choice("group_m", (8, 1)),
            Choice("split_k", (1,)),
        ),
        (
            *tile_constraints(),
            order_constraint(problem, device, problem.out_pixels, problem.out_channels),
        ),
        TileConfig(64 if small else 128, block_n, block_k, 4, 3),
    )
