"""Forward kernels for a handful of input channels: what they write is what they cost.

A program owns a few rows × columns of one output plane and a block of filters. Row and column of
a tile are scalars, so a tap costs one addition and one comparison instead of divisions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import matmul_step, store_result, widen_all


@triton.jit
def tile_origin(tile, size, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """(image, plane, first row, first column) of a tile of maps of ``size`` (d, h, w)."""
    tiles_w = tl.cdiv(size[2], BLOCK_W)
    tiles_h = tl.cdiv(size[1], BLOCK_H)
    column = (tile % tiles_w) * BLOCK_W
    row = ((tile // tiles_w) % tiles_h) * BLOCK_H
    plane = (tile // (tiles_w * tiles_h)) % size[0]
    image = tile // (tiles_w * tiles_h * size[0])
    return image, plane, row, column


@triton.jit
def single_forward_fma_kernel(
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
    CHECK_D: tl.constexpr,
    CHECK_H: tl.constexpr,
    CHECK_W: tl.constexpr,
    OVERHANG: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SAVE_ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """y[n, m, p, q] = Σ_taps x[n, c, p + tap] · w[m, c, tap] as multiply-adds of scalars.

    The rows of a tile are separate accumulators: a row of the input that several of them read is
    loaded once, as the compiler merges equal loads.
    """
    if WIDE:
        x_strides = widen_all(x_strides)
        w_strides = widen_all(w_strides)
        y_strides = widen_all(y_strides)
    TILES_M: tl.constexpr = (FILTERS + BLOCK_M - 1) // BLOCK_M
    m = (tl.program_id(0) % TILES_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    image, plane, row, column = tile_origin(tl.program_id(0) // TILES_M, out_size, BLOCK_H, BLOCK_W)
    columns = column + tl.arange(0, BLOCK_W)
    mask_m = m < FILTERS
    accs = ()
    for _ in tl.static_range(BLOCK_H):
        accs = accs + (tl.zeros((BLOCK_W, BLOCK_M), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for c in tl.static_range(CHANNELS):
        for d in tl.static_range(KERNEL_D):
            in_plane = plane * STRIDE_D - PAD_D + d * DILATION_D
            inside_d = (in_plane >= 0) & (in_plane < in_size[0])
            x_plane = x_ptr + image * x_strides[0] + c * x_strides[1] + in_plane * x_strides[2]
            w_plane = w_ptr + c * w_strides[1] + d * w_strides[2]
            for s in tl.static_range(KERNEL_W):
                in_columns = columns * STRIDE_W - PAD_W + s * DILATION_W
                inside_w = (in_columns >= 0) & (in_columns < in_size[2])
                for r in tl.static_range(KERNEL_H):
                    w_tap = w_plane + r * w_strides[3] + s * w_strides[4]
                    if FILTERS % BLOCK_M == 0:
                        w = tl.load(w_tap + m * w_strides[0])
                    else:
                        w = tl.load(w_tap + m * w_strides[0], mask=mask_m, other=0.0)
                    w = w.to(tl.float32)
                    updated = ()
                    for i in tl.static_range(BLOCK_H):
                        in_row = row * STRIDE_H + (i * STRIDE_H - PAD_H + r * DILATION_H)
                        pointers = x_plane + in_row * x_strides[3] + in_columns * x_strides[4]
                        if CHECK_D or CHECK_H or CHECK_W:
                            inside = inside_d & (in_row >= 0) & (in_row < in_size[1])
                            if CHECK_W:
                                inside = inside & inside_w
                            x = tl.load(pointers, mask=inside, other=0.0)
                        else:
                            x = tl.load(pointers)
                        acc = accs[i]  # type: ignore[var-annotated]
                        acc += x.to(tl.float32)[:, None] * w[None, :]
                        updated = updated + (acc,)  # type: ignore[assignment]  # noqa: RUF005
                    accs = updated
    y_plane = image * y_strides[0] + plane * y_strides[2]
    y_tile = (columns * y_strides[4])[:, None] + (m * y_strides[1])[None, :]
    for i in tl.static_range(BLOCK_H):
        inside = row + i < out_size[1]
        mask = tl.full((BLOCK_W, BLOCK_M), 1, tl.int1) & inside
        if OVERHANG:
            mask = mask & (columns < out_size[2])[:, None]
        if FILTERS % BLOCK_M != 0:
            mask = mask & mask_m[None, :]
        store_result(
            accs[i],
            y_ptr,
            acc_ptr,
            y_plane + (row + i) * y_strides[3] + y_tile,
            image,
            m[None, :],
            plane,
            row + i,
            columns[:, None],
            mask,
            extra_ptrs,
            extra_strides,
            EPILOGUE,
            SAVE_ACC,
        )


@triton.jit
def single_forward_mma_kernel(
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
    CHECK_D: tl.constexpr,
    CHECK_H: tl.constexpr,
    CHECK_W: tl.constexpr,
    OVERHANG: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SAVE_ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same on matrix instructions: the flattened window (c, d, r, s) is the reduction."""
    if WIDE:
        x_strides = widen_all(x_strides)
        w_strides = widen_all(w_strides)
        y_strides = widen_all(y_strides)
    TILES_M: tl.constexpr = (FILTERS + BLOCK_M - 1) // BLOCK_M
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    m = (tl.program_id(0) % TILES_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    image, plane, row, column = tile_origin(tl.program_id(0) // TILES_M, out_size, BLOCK_H, BLOCK_W)
    p = tl.arange(0, BLOCK_H * BLOCK_W)
    rows = row + p // BLOCK_W
    columns = column + p % BLOCK_W
    mask_m = m < FILTERS
    first_plane = plane * STRIDE_D - PAD_D
    x_image = x_ptr + image * x_strides[0] + first_plane * x_strides[2]
    first_rows = rows * STRIDE_H - PAD_H
    first_columns = columns * STRIDE_W - PAD_W
    x_rows = first_rows * x_strides[3] + first_columns * x_strides[4]
    w_filters = m * w_strides[0]
    # Scalars tell whether every window of the tile lies inside the map: then no tap is masked.
    top = row * STRIDE_H - PAD_H
    left = column * STRIDE_W - PAD_W
    interior = (first_plane >= 0) & (first_plane + (KERNEL_D - 1) * DILATION_D < in_size[0])
    interior = interior & (top >= 0) & (left >= 0)
    interior = interior & (
        top + (BLOCK_H - 1) * STRIDE_H + (KERNEL_H - 1) * DILATION_H < in_size[1]
    )
    interior = interior & (
        left + (BLOCK_W - 1) * STRIDE_W + (KERNEL_W - 1) * DILATION_W < in_size[2]
    )
    acc = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_M), tl.float32)
    for start in tl.static_range(0, CHANNELS * TAPS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        c = k // TAPS
        d = (k // (KERNEL_H * KERNEL_W)) % KERNEL_D * DILATION_D
        r = (k // KERNEL_W) % KERNEL_H
        s = k % KERNEL_W
        x_window = (
            c * x_strides[1]
            + d * x_strides[2]
            + r * DILATION_H * x_strides[3]
            + s * DILATION_W * x_strides[4]
        )
        w_window = (
            c * w_strides[1]
            + (k // (KERNEL_H * KERNEL_W)) % KERNEL_D * w_strides[2]
            + r * w_strides[3]
            + s * w_strides[4]
        )
        mask_k = k < CHANNELS * TAPS
        pointers = x_image + (x_rows[:, None] + x_window[None, :])
        taken = tl.full((BLOCK_H * BLOCK_W, BLOCK_K), 1, tl.int1) & mask_k[None, :]
        if CHECK_D or CHECK_H or CHECK_W:
            if interior:
                x = tl.load(pointers, mask=taken, other=0.0)
            else:
                in_plane = first_plane + d
                inside = mask_k & (in_plane >= 0) & (in_plane < in_size[0])
                in_rows = first_rows[:, None] + (r * DILATION_H)[None, :]
                in_columns = first_columns[:, None] + (s * DILATION_W)[None, :]
                taken = inside[None, :] & (in_rows >= 0) & (in_rows < in_size[1])
                taken = taken & (in_columns >= 0) & (in_columns < in_size[2])
                x = tl.load(pointers, mask=taken, other=0.0)
        else:
            x = tl.load(pointers, mask=taken, other=0.0)
        w = tl.load(
            w_ptr + w_window[:, None] + w_filters[None, :],
            mask=mask_k[:, None] & mask_m[None, :],
            other=0.0,
        )
        acc = matmul_step(x, w, acc, PRECISION, UPCAST)
    mask = tl.full((BLOCK_H * BLOCK_W, BLOCK_M), 1, tl.int1)
    if OVERHANG:
        mask = mask & ((rows < out_size[1]) & (columns < out_size[2]))[:, None]
    if FILTERS % BLOCK_M != 0:
        mask = mask & mask_m[None, :]
    y_rows = rows * y_strides[3] + columns * y_strides[4]
    store_result(
        acc,
        y_ptr,
        acc_ptr,
        image * y_strides[0] + plane * y_strides[2] + y_rows[:, None] + (m * y_strides[1])[None, :],
        image,
        m[None, :],
        plane,
        rows[:, None],
        columns[:, None],
        mask,
        extra_ptrs,
        extra_strides,
        EPILOGUE,
        SAVE_ACC,
    )
