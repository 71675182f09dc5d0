"""Gradients for a handful of input channels: the gradient of the output is read once.

With few input channels the weight's gradient is a product with as many columns as the window has
taps. The input's gradient first multiplies every output pixel with all taps, on matrix
instructions, and then adds the shifted products out of shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import matmul_step, widen, widen_all
from .single_forward import tile_origin


@triton.jit
def single_wgrad_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    batch,
    in_size,
    out_size,
    x_strides,
    w_strides,
    y_strides,
    tiles_per_split,
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
    CHECK_D: tl.constexpr,
    CHECK_H: tl.constexpr,
    CHECK_W: tl.constexpr,
    OVERHANG: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[split, m, (c, d, r, s)] = Σ over a split's tiles of grad_y[m, p] · x[c, p + tap]."""
    if WIDE:
        x_strides = widen_all(x_strides)
        w_strides = widen_all(w_strides)
        y_strides = widen_all(y_strides)
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    DEPTH: tl.constexpr = CHANNELS * TAPS
    TILES_M: tl.constexpr = (FILTERS + BLOCK_M - 1) // BLOCK_M
    m = (tl.program_id(0) % TILES_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = (tl.program_id(0) // TILES_M) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    mask_m = m < FILTERS
    mask_k = k < DEPTH
    c = k // TAPS
    d = (k // (KERNEL_H * KERNEL_W)) % KERNEL_D
    r = (k // KERNEL_W) % KERNEL_H
    s = k % KERNEL_W
    shift_d = d * DILATION_D - PAD_D
    shift_h = r * DILATION_H - PAD_H
    shift_w = s * DILATION_W - PAD_W
    x_window = (
        c * x_strides[1] + shift_d * x_strides[2] + shift_h * x_strides[3] + shift_w * x_strides[4]
    )
    y_filters = m * y_strides[1]
    p = tl.arange(0, BLOCK_H * BLOCK_W)
    p_row = p // BLOCK_W
    p_column = p % BLOCK_W
    tiles = batch * out_size[0] * tl.cdiv(out_size[1], BLOCK_H) * tl.cdiv(out_size[2], BLOCK_W)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for tile in range(first, last):
        image, plane, row, column = tile_origin(tile, out_size, BLOCK_H, BLOCK_W)
        rows = row + p_row
        columns = column + p_column
        mask_g = tl.full((BLOCK_H * BLOCK_W, BLOCK_M), 1, tl.int1)
        mask_x = tl.full((BLOCK_H * BLOCK_W, BLOCK_K), 1, tl.int1)
        if OVERHANG:
            inside = (rows < out_size[1]) & (columns < out_size[2])
            mask_g = mask_g & inside[:, None]
            mask_x = mask_x & inside[:, None]
        if FILTERS % BLOCK_M != 0:
            mask_g = mask_g & mask_m[None, :]
        y_rows = rows * y_strides[3] + columns * y_strides[4]
        y_tile = grad_ptr + image * y_strides[0] + plane * y_strides[2]
        grad = tl.load(y_tile + (y_rows[:, None] + y_filters[None, :]), mask=mask_g, other=0.0)
        if DEPTH % BLOCK_K != 0:
            mask_x = mask_x & mask_k[None, :]
        if CHECK_D:
            in_plane = plane * STRIDE_D + shift_d
            mask_x = mask_x & ((in_plane >= 0) & (in_plane < in_size[0]))[None, :]
        if CHECK_H:
            in_rows = (rows * STRIDE_H)[:, None] + shift_h[None, :]
            mask_x = mask_x & (in_rows >= 0) & (in_rows < in_size[1])
        if CHECK_W:
            in_columns = (columns * STRIDE_W)[:, None] + shift_w[None, :]
            mask_x = mask_x & (in_columns >= 0) & (in_columns < in_size[2])
        x_rows = rows * STRIDE_H * x_strides[3] + columns * STRIDE_W * x_strides[4]
        x_tile = x_ptr + image * x_strides[0] + plane * STRIDE_D * x_strides[2]
        x = tl.load(x_tile + (x_rows[:, None] + x_window[None, :]), mask=mask_x, other=0.0)
        acc = matmul_step(tl.trans(grad), x, acc, PRECISION, UPCAST)
    mask = mask_m[:, None] & mask_k[None, :]
    if PARTIAL:
        offsets = widen(split) * (FILTERS * DEPTH) + m[:, None] * DEPTH + k[None, :]
        tl.store(out_ptr + offsets, acc, mask=mask)
    else:
        w_window = c * w_strides[1] + d * w_strides[2] + r * w_strides[3] + s * w_strides[4]
        offsets = (m * w_strides[0])[:, None] + w_window[None, :]
        tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def single_reduce_kernel(
    partial_ptr,
    out_ptr,
    splits,
    w_strides,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out[m, c, d, r, s] = Σ_split partial[split, m, (c, d, r, s)], many splits at a time.

    The weight is tiny and the splits are many: one after the other they would only wait.
    """
    if WIDE:
        w_strides = widen_all(w_strides)
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    ELEMENTS: tl.constexpr = FILTERS * CHANNELS * TAPS
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, BLOCK_S)
    mask = index < ELEMENTS
    total = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for first in range(0, splits, BLOCK_S):
        row = first + split
        total += tl.load(
            partial_ptr + row.to(tl.int64)[:, None] * ELEMENTS + index[None, :],
            mask=(row < splits)[:, None] & mask[None, :],
            other=0.0,
        )
    result = tl.sum(total, axis=0)
    offsets = (
        (index // (CHANNELS * TAPS)) * w_strides[0]
        + (index // TAPS) % CHANNELS * w_strides[1]
        + (index // (KERNEL_H * KERNEL_W)) % KERNEL_D * w_strides[2]
        + (index // KERNEL_W) % KERNEL_H * w_strides[3]
        + index % KERNEL_W * w_strides[4]
    )
    tl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def single_dgrad_kernel(
    grad_ptr,
    w_ptr,
    x_ptr,
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
    FIRST_H: tl.constexpr,
    FIRST_W: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """grad_x[n, c, h, w] = Σ_{taps, m} grad_y[n, m, (h + pad − tap) / stride] · w[m, c, tap].

    t[tap, q] = Σ_m w[m, tap] · grad_y[m, q] for a region of BLOCK_H × BLOCK_W output pixels; every
    input pixel of the TILE_H × TILE_W pixels (times the strides) that need no others then gathers
    its taps from t. FIRST is the offset of the first output pixel that the first input pixel needs.
    Of ceil(kernel / stride) taps per axis each meets the phase of one input pixel.
    """
    if WIDE:
        x_strides = widen_all(x_strides)
        w_strides = widen_all(w_strides)
        y_strides = widen_all(y_strides)
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    PIXELS: tl.constexpr = BLOCK_H * BLOCK_W
    MET_H: tl.constexpr = (KERNEL_H + STRIDE_H - 1) // STRIDE_H
    MET_W: tl.constexpr = (KERNEL_W + STRIDE_W - 1) // STRIDE_W
    image, plane, row, column = tile_origin(
        tl.program_id(0), in_size, TILE_H * STRIDE_H, TILE_W * STRIDE_W
    )
    # The region of output pixels.
    q = tl.arange(0, PIXELS)
    q_rows = row // STRIDE_H + FIRST_H + q // BLOCK_W
    q_columns = column // STRIDE_W + FIRST_W + q % BLOCK_W
    mask_q = (q_rows >= 0) & (q_rows < out_size[1]) & (q_columns >= 0) & (q_columns < out_size[2])
    y_pixels = q_rows * y_strides[3] + q_columns * y_strides[4]
    tap = tl.arange(0, BLOCK_T)
    w_taps = (tap // KERNEL_W) * w_strides[3] + (tap % KERNEL_W) * w_strides[4]
    mask_t = tap < TAPS
    # Where the taps of an input pixel lie in t; pixels past the tile repeat its last.
    index = tl.arange(0, BLOCK_V * OUT_H * OUT_W)
    pixel = index % (OUT_H * OUT_W)
    met = index // (OUT_H * OUT_W)
    h = tl.minimum(pixel // OUT_W, TILE_H * STRIDE_H - 1)
    w = tl.minimum(pixel % OUT_W, TILE_W * STRIDE_W - 1)
    r = (h + PAD_H) % STRIDE_H + (met // MET_W) * STRIDE_H
    s = (w + PAD_W) % STRIDE_W + (met % MET_W) * STRIDE_W
    valid = (met < MET_H * MET_W) & (r < KERNEL_H) & (s < KERNEL_W)
    source_row = (h + PAD_H - r * DILATION_H - FIRST_H * STRIDE_H) // STRIDE_H
    source_column = (w + PAD_W - s * DILATION_W - FIRST_W * STRIDE_W) // STRIDE_W
    source = (r * KERNEL_W + s) * PIXELS + source_row * BLOCK_W + source_column
    source = tl.where(valid, source, 0)

    # The input pixels.
    o = tl.arange(0, OUT_H * OUT_W)
    o_row = o // OUT_W
    o_column = o % OUT_W
    x_rows = row + o_row
    x_columns = column + o_column
    mask_o = (o_row < TILE_H * STRIDE_H) & (o_column < TILE_W * STRIDE_W)
    mask_o = mask_o & (x_rows < in_size[1]) & (x_columns < in_size[2])
    x_pixels = x_rows * x_strides[3] + x_columns * x_strides[4]
    x_tile = x_ptr + image * x_strides[0] + plane * x_strides[2]
    for c in tl.static_range(CHANNELS):
        total = tl.zeros((OUT_H * OUT_W,), tl.float32)
        for d in tl.static_range(KERNEL_D):
            scaled = plane + PAD_D - d * DILATION_D
            q_plane = scaled // STRIDE_D
            inside = (scaled >= 0) & (scaled % STRIDE_D == 0) & (q_plane < out_size[0])
            y_tile = grad_ptr + image * y_strides[0] + q_plane * y_strides[2]
            t = tl.zeros((BLOCK_T, PIXELS), tl.float32)
            for start in range(0, FILTERS, BLOCK_M):
                m = start + tl.arange(0, BLOCK_M)
                mask_y = mask_q[None, :] & inside
                mask_w = mask_t[None, :]
                if FILTERS % BLOCK_M != 0:
                    mask_y = mask_y & (m < FILTERS)[:, None]
                    mask_w = mask_w & (m < FILTERS)[:, None]
                grad = tl.load(
                    y_tile + ((m * y_strides[1])[:, None] + y_pixels[None, :]),
                    mask=mask_y,
                    other=0.0,
                )
                weight = tl.load(
                    w_ptr
                    + (c * w_strides[1] + d * w_strides[2])
                    + ((m * w_strides[0])[:, None] + w_taps[None, :]),
                    mask=mask_w,
                    other=0.0,
                )
                t = matmul_step(tl.trans(weight), grad, t, PRECISION, UPCAST)
            # A gather of a flat array goes through shared memory, lanes along pixels.
            found = tl.gather(tl.reshape(t, (BLOCK_T * PIXELS,)), source, 0)
            found = tl.where(valid, found, 0.0)
            total += tl.sum(tl.reshape(found, (BLOCK_V, OUT_H * OUT_W)), axis=0)
        tl.store(
            x_tile + c * x_strides[1] + x_pixels, total.to(x_ptr.dtype.element_ty), mask=mask_o
        )
