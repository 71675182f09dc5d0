"""The gradient of the weight with runs of the input's rows as operand, as in ``single_runs``.

A row of the product stands for SPAN neighbouring output pixels, so that its columns hold every pair
of a pixel of the span and an element of the run; the pairs that belong to one tap are added at the
end, together with the splits. Pairs that belong to none are computed and dropped.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import matmul_step, widen, widen_all
from .single_forward import tile_origin
from .single_runs import filter_and_shift


@triton.jit
def single_wgrad_run_kernel(
    grad_ptr,
    x_ptr,
    partial_ptr,
    batch,
    in_size,
    out_size,
    x_strides,
    w_strides,
    y_strides,
    tiles_per_split,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
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
    LEAD: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPAN: tl.constexpr,
    PIXELS_FASTEST: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[split, tile, (j, m), k] = Σ over units of grad_y[unit, (j, m)] · x[unit, k]."""
    if WIDE:
        x_strides = widen_all(x_strides)
        y_strides = widen_all(y_strides)
    COLUMNS: tl.constexpr = SPAN * BLOCK_M
    UNITS_W: tl.constexpr = BLOCK_W // SPAN
    UNITS: tl.constexpr = BLOCK_H * UNITS_W
    TILES_M: tl.constexpr = (FILTERS + BLOCK_M - 1) // BLOCK_M
    tile_m = tl.program_id(0) % TILES_M
    k = (tl.program_id(0) // TILES_M) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    e = k % RUN
    run = k // RUN
    r = (run % KERNEL_H) * DILATION_H
    d = (run // KERNEL_H) % KERNEL_D * DILATION_D
    x_run = d * x_strides[2] + r * x_strides[3] + e
    if CHANNELS != INNER:  # a term that is always zero would hide the alignment
        x_run += (run // (KERNEL_D * KERNEL_H)) * x_strides[1]
    n = tl.arange(0, COLUMNS)
    m, j = filter_and_shift(n, SPAN, BLOCK_M, PIXELS_FASTEST)
    m += tile_m * BLOCK_M
    y_columns = j * y_strides[4] + m * y_strides[1]
    unit = tl.arange(0, UNITS)
    unit_row = unit // UNITS_W
    unit_column = (unit % UNITS_W) * SPAN
    tiles = batch * out_size[0] * tl.cdiv(out_size[1], BLOCK_H) * tl.cdiv(out_size[2], BLOCK_W)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    acc = tl.zeros((COLUMNS, BLOCK_K), tl.float32)
    for tile in range(first, last):
        image, plane, row, column = tile_origin(tile, out_size, BLOCK_H, BLOCK_W)
        mask_g = tl.full((UNITS, COLUMNS), 1, tl.int1)
        if OVERHANG:
            columns = column + unit_column[:, None] + j[None, :]
            mask_g = mask_g & (row + unit_row < out_size[1])[:, None] & (columns < out_size[2])
        if FILTERS % BLOCK_M != 0:
            mask_g = mask_g & (m < FILTERS)[None, :]
        y_units = (row + unit_row) * y_strides[3] + (column + unit_column) * y_strides[4]
        y_tile = grad_ptr + image * y_strides[0] + plane * y_strides[2]
        grad = tl.load(y_tile + (y_units[:, None] + y_columns[None, :]), mask=mask_g, other=0.0)

        first_plane = plane * STRIDE_D - PAD_D
        first_rows = (row + unit_row) * STRIDE_H - PAD_H
        first_elements = (column + unit_column) * (STRIDE_W * INNER) - (PAD_W * INNER + LEAD)
        elements = first_elements[:, None] + e[None, :]
        taken = (elements >= 0) & (elements < in_size[2] * INNER)
        if (RUNS * RUN) % BLOCK_K != 0:
            taken = taken & (run < RUNS)[None, :]
        if CHECK_D:
            in_plane = first_plane + d
            taken = taken & ((in_plane >= 0) & (in_plane < in_size[0]))[None, :]
        if CHECK_H:
            in_rows = first_rows[:, None] + r[None, :]
            taken = taken & (in_rows >= 0) & (in_rows < in_size[1])
        x_units = first_rows * x_strides[3] + first_elements
        x_tile = x_ptr + image * x_strides[0] + first_plane * x_strides[2]
        x = tl.load(x_tile + (x_units[:, None] + x_run[None, :]), mask=taken, other=0.0)
        acc = matmul_step(tl.trans(grad), x, acc, PRECISION, UPCAST)
    base = (widen(split) * TILES_M + tile_m) * (COLUMNS * DEPTH)
    offsets = base + n[:, None] * DEPTH + k[None, :]
    tl.store(partial_ptr + offsets, acc, mask=(k < DEPTH)[None, :])


@triton.jit
def single_reduce_run_kernel(
    partial_ptr,
    out_ptr,
    splits,
    w_strides,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    FILTERS: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_W: tl.constexpr,
    LEAD: tl.constexpr,
    RUN: tl.constexpr,
    DEPTH: tl.constexpr,
    SPAN: tl.constexpr,
    PIXELS_FASTEST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out[m, c, d, r, s] = Σ_split Σ_j partial[…, (j, m), (c, d, r, e)] at the tap's element e."""
    if WIDE:
        w_strides = widen_all(w_strides)
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    TILES_M: tl.constexpr = (FILTERS + BLOCK_M - 1) // BLOCK_M
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < FILTERS * CHANNELS * TAPS
    m = index // (CHANNELS * TAPS)
    c = (index // TAPS) % CHANNELS
    d = (index // (KERNEL_H * KERNEL_W)) % KERNEL_D
    r = (index // KERNEL_W) % KERNEL_H
    s = index % KERNEL_W
    run = ((c // INNER) * KERNEL_D + d) * KERNEL_H + r
    element = run * RUN + LEAD + INNER * (s * DILATION_W) + c % INNER
    split = tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for start in range(0, splits, BLOCK_S):
        row = start + split
        rows = row.to(tl.int64)[:, None] * (TILES_M * SPAN * BLOCK_M * DEPTH)
        taken = (row < splits)[:, None] & mask[None, :]
        for j in tl.static_range(SPAN):
            if PIXELS_FASTEST:
                n = (m % BLOCK_M) * SPAN + j
            else:
                n = m % BLOCK_M + j * BLOCK_M
            place = ((m // BLOCK_M) * (SPAN * BLOCK_M) + n) * DEPTH + element
            place += j * (INNER * STRIDE_W)
            total += tl.load(partial_ptr + rows + place[None, :], mask=taken, other=0.0)
    offsets = (
        m * w_strides[0] + c * w_strides[1] + d * w_strides[2] + r * w_strides[3] + s * w_strides[4]
    )
    tl.store(out_ptr + offsets, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=mask)
