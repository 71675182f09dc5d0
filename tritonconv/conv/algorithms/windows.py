"""Shared by the algorithms that flatten a whole window (taps and channels) into the reduction."""

from __future__ import annotations

import triton
import triton.language as tl

from ...runtime.device import DeviceFacts
from ...runtime.plan import KernelCall, LaunchPlan, Slot
from ...runtime.space import Choice, ConfigSpace, Int, PowerOfTwo
from ..problem import ConvProblem, dense_strides
from .common import (
    TileConfig,
    epilogue_arguments,
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
    store_result,
    tap_offset,
    widen,
    widen_all,
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
    in_size,
    out_size,
    x_strides,
    w_strides,
    y_strides,
    CHANNELS: tl.constexpr,
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

    The flattening follows the input's memory: (t, r, s, c) with channels fastest, or (c, t, r, s).
    """
    if WIDE:
        batch = widen(batch)
        x_strides = widen_all(x_strides)
        w_strides = widen_all(w_strides)
        y_strides = widen_all(y_strides)
    DEPTH: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W * CHANNELS
    pixels = pixels_of(batch, out_size)
    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tl.cdiv(FILTERS, BLOCK_N), GROUP_M
    )
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < pixels
    image, plane, row, column = position(m, out_size)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < FILTERS
    first_plane = plane * STRIDE_D - PAD_D
    first_row = row * STRIDE_H - PAD_H
    first_column = column * STRIDE_W - PAD_W
    x_rows = pixel_offset(x_strides, image, first_plane, first_row, first_column)
    w_columns = n * w_strides[0]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        c, t, r, s = window_position(k, CHANNELS, KERNEL_D, KERNEL_H, KERNEL_W, CHANNELS_FASTEST)
        mask_k = k < DEPTH
        plane_shift = t * DILATION_D
        row_shift = r * DILATION_H
        column_shift = s * DILATION_W
        if FLAT_ROWS:
            # A row of the window is contiguous in memory: say so, for wide loads.
            x_window = (k % (CHANNELS * KERNEL_W)) * x_strides[1]
            x_window += tap_offset(x_strides, plane_shift, row_shift, 0)
        else:
            x_window = c * x_strides[1]
            x_window += tap_offset(x_strides, plane_shift, row_shift, column_shift)
        if FLAT_FILTERS:
            w_window = k
        else:
            w_window = c * w_strides[1] + tap_offset(w_strides, t, r, s)
        # Masks that cannot fail are left out: each one narrows what is loaded at once.
        mask_x = mask_m[:, None]
        mask_w = mask_n[None, :]
        if DEPTH % BLOCK_K != 0:
            mask_x = mask_x & mask_k[None, :]
            mask_w = mask_w & mask_k[:, None]
        if CHECK_BOUNDS:
            mask_x = inside(
                mask_x,
                first_plane[:, None] + plane_shift[None, :],
                first_row[:, None] + row_shift[None, :],
                first_column[:, None] + column_shift[None, :],
                in_size,
            )
        a = tl.load(x_ptr + x_rows[:, None] + x_window[None, :], mask=mask_x, other=0.0)
        b = tl.load(
            w_ptr + w_window[:, None] + w_columns[None, :],
            mask=mask_w,
            other=0.0,
        )
        acc = matmul_step(a, b, acc, PRECISION, UPCAST)

    y_rows = pixel_offset(y_strides, image, plane, row, column)
    store_result(
        acc,
        y_ptr,
        acc_ptr,
        y_rows[:, None] + (n * y_strides[1])[None, :],
        image[:, None],
        n[None, :],
        plane[:, None],
        row[:, None],
        column[:, None],
        mask_m[:, None] & mask_n[None, :],
        extra_ptrs,
        extra_strides,
        EPILOGUE,
        SAVE_ACC,
    )


@triton.jit
def window_position(
    k,
    CHANNELS: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    CHANNELS_FASTEST: tl.constexpr,
):
    """(c, t, r, s) of an element of a flattened window."""
    if CHANNELS_FASTEST:
        # One division by a product: the compiler sees how many neighbours share a row.
        t, r = row_position(k // (CHANNELS * KERNEL_W), KERNEL_D, KERNEL_H)
        s = (k % (CHANNELS * KERNEL_W)) // CHANNELS
        c = k % CHANNELS
    else:
        s = k % KERNEL_W
        r = (k // KERNEL_W) % KERNEL_H
        t = (k // (KERNEL_W * KERNEL_H)) % KERNEL_D
        c = k // (KERNEL_W * KERNEL_H * KERNEL_D)
    return c, t, r, s


def flat_filters(problem: ConvProblem, channels_fastest: bool) -> bool:
    """Whether a filter is contiguous in the order in which windows are flattened."""
    return problem.w_strides[1:] == dense_strides(problem.w_shape, channels_fastest)[1:]


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
            *spatial_arguments(problem),
        ),
        {
            **product_constexprs(problem, config),
            "CHANNELS_FASTEST": channels_fastest,
            "FLAT_ROWS": flat_rows(problem),
            "FLAT_FILTERS": flat_filters(problem, channels_fastest),
            "CHECK_BOUNDS": needs_bounds(problem),
            "EPILOGUE": epilogue.function,
            "SAVE_ACC": epilogue.save_acc,
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
    # Wide tiles read a window less often: patches of many filters, not stems.
    most_n = 256 if half and problem.out_channels > 128 else 128
    return ConfigSpace(
        TileConfig,
        (
            Int("num_stages", 2, 4),
            PowerOfTwo("num_warps", 2, 8),
            PowerOfTwo("block_m", 32, 256),
            PowerOfTwo("block_n", 16, power_of_two(2 * widest, 16, most_n)),
            PowerOfTwo("block_k", 16, power_of_two(depth, 16, 64)),
            Choice("group_m", (8, 1)),
            Choice("split_k", (1,)),
            Choice("one_launch", (0,)),
        ),
        (
            *tile_constraints(),
            order_constraint(problem, device, problem.out_pixels, problem.out_channels),
        ),
        TileConfig(64 if small else 128, block_n, block_k, 4, 3),
    )
