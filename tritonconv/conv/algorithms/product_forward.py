"""The forward product: rows are output pixels, columns output channels.

The reduction runs over input channels and filter taps, channel blocks outer and taps inner, so that
neighbouring taps re-read pixels from cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...runtime.last_arrival import last_to_arrive
from ...runtime.plan import KernelCall, LaunchPlan, Slot
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
    spatial_arguments,
    store_result,
    tap_offset,
    tap_position,
    widen,
    widen_all,
)
from .split import (
    SplitSum,
    add_parts,
    finished,
    split_range,
    store_part,
    store_partial,
)
from .tiles import needs_bounds


@triton.jit
def conv_forward_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    acc_ptr,
    parts_ptr,
    arrivals_ptr,
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
    CHECK_BOUNDS: tl.constexpr,
    SPLITS: tl.constexpr,
    ONE_LAUNCH: tl.constexpr,
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
    """y[n, o, p] = Σ_{c,r} x[n, c, p·stride + r·dilation − pad] · w[o, c, r], p and r per axis.

    With SPLITS every part of the sum goes to ``parts_ptr`` in float32: with ONE_LAUNCH the last
    program of a tile adds them, otherwise another kernel does.
    """
    if WIDE:
        batch = widen(batch)
        x_strides = widen_all(x_strides)
        w_strides = widen_all(w_strides)
        y_strides = widen_all(y_strides)
    group = tl.program_id(1)
    pixels = pixels_of(batch, out_size)
    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tl.cdiv(FILTERS, BLOCK_N), GROUP_M
    )

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < pixels
    image, plane, row, column = position(m, out_size)
    first_plane = plane * STRIDE_D - PAD_D
    first_row = row * STRIDE_H - PAD_H
    first_column = column * STRIDE_W - PAD_W
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < FILTERS
    out_channel = group * FILTERS + n
    x_rows = pixel_offset(x_strides, image, first_plane, first_row, first_column)
    x_rows += group * CHANNELS * x_strides[1]
    w_columns = out_channel * w_strides[0]

    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    split = tl.program_id(2)
    first, last = split_range(tl.cdiv(CHANNELS, BLOCK_K) * TAPS, split, SPLITS)
    for step in range(first, last):
        t, r, s = tap_position(step % TAPS, KERNEL_D, KERNEL_H, KERNEL_W)
        c = (step // TAPS) * BLOCK_K + k
        x_tap = tap_offset(x_strides, t * DILATION_D, r * DILATION_H, s * DILATION_W)
        mask_x = mask_m
        if CHECK_BOUNDS:
            mask_x = inside(
                mask_x,
                first_plane + t * DILATION_D,
                first_row + r * DILATION_H,
                first_column + s * DILATION_W,
                in_size,
            )
        x_offsets = (x_rows + x_tap)[:, None] + (c * x_strides[1])[None, :]
        w_tap = tap_offset(w_strides, t, r, s)
        w_offsets = (c * w_strides[1] + w_tap)[:, None] + w_columns[None, :]
        if CHANNELS % BLOCK_K == 0:
            a = tl.load(x_ptr + x_offsets, mask=mask_x[:, None], other=0.0)
            b = tl.load(w_ptr + w_offsets, mask=mask_n[None, :], other=0.0)
        else:
            mask_c = c < CHANNELS
            a = tl.load(x_ptr + x_offsets, mask=mask_x[:, None] & mask_c[None, :], other=0.0)
            b = tl.load(w_ptr + w_offsets, mask=mask_c[:, None] & mask_n[None, :], other=0.0)
        acc = matmul_step(a, b, acc, PRECISION, UPCAST)

    mask = mask_m[:, None] & mask_n[None, :]
    if SPLITS > 1 and not ONE_LAUNCH:
        filters = tl.num_programs(1) * FILTERS
        store_partial(acc, parts_ptr, split, m, pixels, out_channel, filters, mask)
        return
    whole = True
    if SPLITS > 1:
        tile = group * tl.num_programs(0) + tl.program_id(0)
        store_part(acc, parts_ptr, tile, split, SPLITS)
        whole = last_to_arrive(arrivals_ptr + tile, SPLITS)
    if whole:
        if SPLITS > 1:
            total = add_parts(parts_ptr, tile, SPLITS, BLOCK_M, BLOCK_N)
        else:
            total = acc
        y_rows = pixel_offset(y_strides, image, plane, row, column)
        store_result(
            total,
            y_ptr,
            acc_ptr,
            y_rows[:, None] + (out_channel * y_strides[1])[None, :],
            image[:, None],
            out_channel[None, :],
            plane[:, None],
            row[:, None],
            column[:, None],
            mask,
            extra_ptrs,
            extra_strides,
            EPILOGUE,
            SAVE_ACC,
        )


def forward_plan(problem: ConvProblem, config: TileConfig) -> LaunchPlan:
    """Plan of the forward product."""
    tiles = triton.cdiv(problem.out_pixels, config.block_m) * triton.cdiv(
        problem.filters_per_group, config.block_n
    )
    split = SplitSum.of(problem, config)
    call = KernelCall(
        conv_forward_kernel,
        (tiles, problem.groups, split.parts),
        (
            Slot("input"),
            Slot("weight"),
            *split.arguments(problem),
            *spatial_arguments(problem),
        ),
        {
            **product_constexprs(problem, config),
            "CHECK_BOUNDS": needs_bounds(problem),
            **split.constexprs(),
        },
        config.num_warps,
        config.num_stages,
    )
    return finished(problem, config, call, split)
