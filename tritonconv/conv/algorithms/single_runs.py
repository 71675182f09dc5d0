"""Forward on matrix instructions with runs of the input's rows as operand: no element by element.

Windows of neighbouring pixels overlap, so a product over windows loads every element once per tap,
two bytes at a time. Here one row of the product stands for SPAN neighbouring output pixels and for
the run of the input that all of them read: runs start at even elements and are copied
asynchronously. The weights repeat along SPAN, each time shifted by the stride; the zeros between
them cost arithmetic, of which there is plenty.

A zero weight meets inputs of the neighbours' windows and those that fill up the run: an infinite or
NaN input makes NaN of the pixels of every span whose run holds it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import matmul_step, store_result, widen_all
from .single_forward import tile_origin


@triton.jit
def filter_and_shift(
    column, SPAN: tl.constexpr, BLOCK_M: tl.constexpr, PIXELS_FASTEST: tl.constexpr
):
    """Filter of the tile and pixel of the span of a column, in the order of the output's memory."""
    if PIXELS_FASTEST:
        return column // SPAN, column % SPAN
    else:
        return column % BLOCK_M, column // BLOCK_M


@triton.jit
def single_unroll_kernel(
    w_ptr,
    out_ptr,
    w_strides,
    INNER: tl.constexpr,
    FILTERS: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_W: tl.constexpr,
    LEAD: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPAN: tl.constexpr,
    PIXELS_FASTEST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[tile, (c, d, r, e), (j, m)] = w[m, c, d, r, s], e = LEAD + INNER·(j·stride + s) + c.

    INNER channels alternate inside a run; others are runs of their own.
    """
    if WIDE:
        w_strides = widen_all(w_strides)
    COLUMNS: tl.constexpr = SPAN * BLOCK_M
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = index % COLUMNS
    k = (index // COLUMNS) % DEPTH
    m, j = filter_and_shift(column, SPAN, BLOCK_M, PIXELS_FASTEST)
    m += (index // (COLUMNS * DEPTH)) * BLOCK_M
    run = k // RUN
    element = k % RUN - LEAD
    # Exact where it is not negative, and negative values are masked.
    position = tl.maximum(element, 0) // INNER - j * STRIDE_W
    s = tl.maximum(position, 0) // DILATION_W
    outer = run // (KERNEL_D * KERNEL_H)
    c = outer * INNER + tl.maximum(element, 0) % INNER
    taken = (run < RUNS) & (element >= 0) & (position >= 0)
    taken = taken & (position % DILATION_W == 0) & (s < KERNEL_W)
    w = tl.load(
        w_ptr
        + m * w_strides[0]
        + c * w_strides[1]
        + (run // KERNEL_H) % KERNEL_D * w_strides[2]
        + run % KERNEL_H * w_strides[3]
        + s * w_strides[4],
        mask=taken & (m < FILTERS),
        other=0.0,
    )
    TILES_M: tl.constexpr = (FILTERS + BLOCK_M - 1) // BLOCK_M
    tl.store(out_ptr + index, w, mask=index < TILES_M * DEPTH * COLUMNS)


@triton.jit
def single_forward_run_kernel(
    x_ptr,
    unrolled_ptr,
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
    """y[unit, (j, m)] = Σ_k x[unit, k] · unrolled[k, (j, m)] with k the elements of the runs."""
    if WIDE:
        x_strides = widen_all(x_strides)
        y_strides = widen_all(y_strides)
    COLUMNS: tl.constexpr = SPAN * BLOCK_M
    UNITS_W: tl.constexpr = BLOCK_W // SPAN
    UNITS: tl.constexpr = BLOCK_H * UNITS_W
    TILES_M: tl.constexpr = (FILTERS + BLOCK_M - 1) // BLOCK_M
    tile_m = tl.program_id(0) % TILES_M
    image, plane, row, column = tile_origin(tl.program_id(0) // TILES_M, out_size, BLOCK_H, BLOCK_W)
    unit = tl.arange(0, UNITS)
    unit_row = unit // UNITS_W
    unit_column = (unit % UNITS_W) * SPAN
    n = tl.arange(0, COLUMNS)
    first_plane = plane * STRIDE_D - PAD_D
    first_rows = (row + unit_row) * STRIDE_H - PAD_H
    # In elements of a row, of which every pixel has INNER; even by the choice of LEAD.
    first_elements = (column + unit_column) * (STRIDE_W * INNER) - (PAD_W * INNER + LEAD)
    x_tile = x_ptr + image * x_strides[0] + first_plane * x_strides[2]
    x_units = first_rows * x_strides[3] + first_elements
    unrolled = unrolled_ptr + tile_m * (DEPTH * COLUMNS)
    acc = tl.zeros((UNITS, COLUMNS), tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        e = k % RUN
        run = k // RUN
        r = (run % KERNEL_H) * DILATION_H
        d = (run // KERNEL_H) % KERNEL_D * DILATION_D
        outer = run // (KERNEL_D * KERNEL_H)
        elements = first_elements[:, None] + e[None, :]
        taken = (elements >= 0) & (elements < in_size[2] * INNER)
        if DEPTH != RUNS * RUN:
            taken = taken & (run < RUNS)[None, :]
        if CHECK_D:
            in_plane = first_plane + d
            taken = taken & ((in_plane >= 0) & (in_plane < in_size[0]))[None, :]
        if CHECK_H:
            in_rows = first_rows[:, None] + r[None, :]
            taken = taken & (in_rows >= 0) & (in_rows < in_size[1])
        x_run = d * x_strides[2] + r * x_strides[3] + e
        if CHANNELS != INNER:  # a term that is always zero would hide the alignment
            x_run += outer * x_strides[1]
        x = tl.load(x_tile + (x_units[:, None] + x_run[None, :]), mask=taken, other=0.0)
        w = tl.load(unrolled + k[:, None] * COLUMNS + n[None, :])
        acc = matmul_step(x, w, acc, PRECISION, UPCAST)
    m, j = filter_and_shift(n, SPAN, BLOCK_M, PIXELS_FASTEST)
    m += tile_m * BLOCK_M
    rows = (row + unit_row)[:, None]
    columns = column + unit_column[:, None] + j[None, :]
    mask = tl.full((UNITS, COLUMNS), 1, tl.int1)
    if OVERHANG:
        mask = mask & (rows < out_size[1]) & (columns < out_size[2])
    if FILTERS % BLOCK_M != 0:
        mask = mask & (m < FILTERS)[None, :]
    y_tile = image * y_strides[0] + plane * y_strides[2]
    y_rows = (row + unit_row) * y_strides[3] + (column + unit_column) * y_strides[4]
    y_columns = j * y_strides[4] + m * y_strides[1]
    store_result(
        acc,
        y_ptr,
        acc_ptr,
        y_tile + (y_rows[:, None] + y_columns[None, :]),
        image,
        m[None, :],
        plane,
        rows,
        columns,
        mask,
        extra_ptrs,
        extra_strides,
        EPILOGUE,
        SAVE_ACC,
    )
