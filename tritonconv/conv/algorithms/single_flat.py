"""Forward for a handful of input channels on small maps: tiles of consecutive pixels.

Rows of such maps are no multiple of a tile's columns: tiles of rows waste lanes, and their stores
are single elements, as a mask over columns tells the compiler nothing. The pixels of a whole map,
counted on, are nearly always a multiple of 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import store_result, widen_all


@triton.jit
def single_forward_flat_kernel(
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
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHECK_H: tl.constexpr,
    CHECK_W: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SAVE_ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """y[n, m, p] = Σ_taps x[n, c, p + tap] · w[m, c, tap] as multiply-adds of scalars."""
    if WIDE:
        x_strides = widen_all(x_strides)
        w_strides = widen_all(w_strides)
        y_strides = widen_all(y_strides)
    TILES_M: tl.constexpr = (FILTERS + BLOCK_M - 1) // BLOCK_M
    TILES: tl.constexpr = (PIXELS + BLOCK_W - 1) // BLOCK_W
    tile = tl.program_id(0) // TILES_M
    image = tile // TILES
    m = (tl.program_id(0) % TILES_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    p = (tile % TILES) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask_m = m < FILTERS
    mask_p = p < PIXELS
    row = p // WIDTH
    column = p % WIDTH
    first_row = row * STRIDE_H - PAD_H
    first_column = column * STRIDE_W - PAD_W
    x_pixel = x_ptr + image * x_strides[0]
    x_pixel += first_row * x_strides[3] + first_column * x_strides[4]
    acc = tl.zeros((BLOCK_W, BLOCK_M), tl.float32)
    for c in tl.static_range(CHANNELS):
        for r in tl.static_range(KERNEL_H):
            in_row = first_row + r * DILATION_H
            inside_h = mask_p & (in_row >= 0) & (in_row < in_size[1])
            for s in tl.static_range(KERNEL_W):
                in_column = first_column + s * DILATION_W
                inside = inside_h if CHECK_H else mask_p
                if CHECK_W:
                    inside = inside & (in_column >= 0) & (in_column < in_size[2])
                x_tap = c * x_strides[1] + r * DILATION_H * x_strides[3]
                x_tap += s * DILATION_W * x_strides[4]
                w_tap = w_ptr + c * w_strides[1] + r * w_strides[3] + s * w_strides[4]
                if FILTERS % BLOCK_M == 0:
                    w = tl.load(w_tap + m * w_strides[0])
                else:
                    w = tl.load(w_tap + m * w_strides[0], mask=mask_m, other=0.0)
                x = tl.load(x_pixel + x_tap, mask=inside, other=0.0)
                acc += x.to(tl.float32)[:, None] * w.to(tl.float32)[None, :]
    mask = mask_p[:, None]
    if FILTERS % BLOCK_M != 0:
        mask = mask & mask_m[None, :]
    else:
        mask = mask & (m >= 0)[None, :]
    y_tile = image * y_strides[0] + (p * y_strides[4])[:, None] + (m * y_strides[1])[None, :]
    store_result(
        acc,
        y_ptr,
        acc_ptr,
        y_tile,
        image,
        m[None, :],
        0,
        row[:, None],
        column[:, None],
        mask,
        extra_ptrs,
        extra_strides,
        EPILOGUE,
        SAVE_ACC,
    )
