"""Forward with runs of the input's rows, by programs that keep the unrolled weights and walk tiles.

The unrolled weights are as large as the runs of a tile (57 KB for a 7×7 stem): read again for every
tile they are two thirds of what comes from the L2 cache. Here a program loads them once, and the
runs of the next tile arrive while this one's results are stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import matmul_step, store_result, widen_all
from .single_forward import tile_origin
from .single_runs import filter_and_shift


@triton.jit
def single_forward_walk_kernel(
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
    tiles,
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
    tile_m = tl.program_id(1)
    unit = tl.arange(0, UNITS)
    unit_row = unit // UNITS_W
    unit_column = (unit % UNITS_W) * SPAN
    n = tl.arange(0, COLUMNS)
    k = tl.arange(0, BLOCK_K)
    m, j = filter_and_shift(n, SPAN, BLOCK_M, PIXELS_FASTEST)
    m += tile_m * BLOCK_M
    y_columns = j * y_strides[4] + m * y_strides[1]
    unrolled = unrolled_ptr + tile_m * (DEPTH * COLUMNS) + (k[:, None] * COLUMNS + n[None, :])
    weights = ()
    for start in tl.static_range(0, DEPTH, BLOCK_K):
        weights = weights + (tl.load(unrolled + start * COLUMNS),)  # type: ignore[assignment]  # noqa: RUF005
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        image, plane, row, column = tile_origin(tile, out_size, BLOCK_H, BLOCK_W)
        first_plane = plane * STRIDE_D - PAD_D
        first_rows = (row + unit_row) * STRIDE_H - PAD_H
        # In elements of a row, of which every pixel has INNER; whole vectors by the choice of LEAD.
        first_elements = (column + unit_column) * (STRIDE_W * INNER) - (PAD_W * INNER + LEAD)
        x_tile = x_ptr + image * x_strides[0] + first_plane * x_strides[2]
        x_units = first_rows * x_strides[3] + first_elements
        acc = tl.zeros((UNITS, COLUMNS), tl.float32)
        for start in tl.static_range(0, DEPTH, BLOCK_K):
            e = (start + k) % RUN
            run = (start + k) // RUN
            r = (run % KERNEL_H) * DILATION_H
            d = (run // KERNEL_H) % KERNEL_D * DILATION_D
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
                x_run += (run // (KERNEL_D * KERNEL_H)) * x_strides[1]
            x = tl.load(x_tile + (x_units[:, None] + x_run[None, :]), mask=taken, other=0.0)
            acc = matmul_step(x, weights[start // BLOCK_K], acc, PRECISION, UPCAST)
        rows = (row + unit_row)[:, None]
        columns = column + unit_column[:, None] + j[None, :]
        mask = tl.full((UNITS, COLUMNS), 1, tl.int1)
        if OVERHANG:
            mask = mask & (rows < out_size[1]) & (columns < out_size[2])
        if FILTERS % BLOCK_M != 0:
            mask = mask & (m < FILTERS)[None, :]
        y_tile = image * y_strides[0] + plane * y_strides[2]
        y_rows = (row + unit_row) * y_strides[3] + (column + unit_column) * y_strides[4]
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
