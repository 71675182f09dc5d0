"""Banded products over pixels: forward, and the gradient of the input of a stride of one.

A row of the product is a unit, a box of neighbouring result pixels with all their channels; its
reduction is the window of the source that they read, row of the window by row: contiguous memory in
channels_last, loaded once for the whole unit. The weights are spread to a matrix [window, unit]
first, zero where a pixel of the window is no tap of a pixel of the unit.

A zero weight meets source pixels of the unit's other pixels: an infinite or NaN source makes NaN of
all pixels of the units whose window holds it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .banded_windows import (
    add_tap,
    below_ends,
    distances,
    in_half_vectors,
    on_taps,
    window_step,
    within,
)
from .common import matmul_step, store_result, widen, widen_all


@triton.jit
def widen_three(strides):
    """Strides of (image, plane, row) as int64, so that every product with them is."""
    return widen(strides[0]), widen(strides[1]), widen(strides[2])


@triton.jit
def unit_tile(
    tile,
    size,
    RUN_D: tl.constexpr,
    RUN_H: tl.constexpr,
    RUN_W: tl.constexpr,
    UNITS_H: tl.constexpr,
    UNITS_W: tl.constexpr,
):
    """(image, first plane, first row, first column) of a tile of units, in pixels."""
    tiles_w = tl.cdiv(size[2], RUN_W * UNITS_W)
    tiles_h = tl.cdiv(size[1], RUN_H * UNITS_H)
    planes = tl.cdiv(size[0], RUN_D)
    column = (tile % tiles_w) * (RUN_W * UNITS_W)
    row = ((tile // tiles_w) % tiles_h) * (RUN_H * UNITS_H)
    plane = ((tile // (tiles_w * tiles_h)) % planes) * RUN_D
    image = tile // (tiles_w * tiles_h * planes)
    return image, plane, row, column


@triton.jit
def unit_columns(
    n,
    strides,
    FILTERS: tl.constexpr,
    RUN_H: tl.constexpr,
    RUN_W: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """(offset, filter, plane, row, column) of the elements of a unit.

    A row of a unit is contiguous; written as a remainder the compiler sees it.
    """
    LINE: tl.constexpr = RUN_W * FILTERS
    line = n // LINE
    offset = (line // RUN_H) * strides[1] + (line % RUN_H) * strides[2]
    column = (n % LINE) // FILTERS
    return offset * ALIGN + n % LINE, n % FILTERS, line // RUN_H, line % RUN_H, column


@triton.jit
def band_weight_kernel(
    w_ptr,
    band_ptr,
    elements,
    w_strides,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    RUN_H: tl.constexpr,
    RUN_W: tl.constexpr,
    WINDOW_H: tl.constexpr,
    HOP_D: tl.constexpr,
    HOP_H: tl.constexpr,
    DEPTH: tl.constexpr,
    FLIPPED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """band[(d, h, e), (j, q)] = w of filter q, channel e % C and the tap between the two pixels.

    A row of the window takes DEPTH elements: whole steps of the product.
    """
    if WIDE:
        w_strides = widen_all(w_strides)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = index % BLOCK_N
    e = (index // BLOCK_N) % DEPTH
    line = index // (BLOCK_N * DEPTH)
    j = n // FILTERS
    d, h, w = distances(j, line, e, CHANNELS, RUN_H, RUN_W, WINDOW_H, HOP_D, HOP_H)
    t = d // DILATION_D
    r = h // DILATION_H
    s = w // DILATION_W
    taken = (n < COLUMNS) & (index < elements)
    taken = on_taps(
        taken, (d, h, w), (t, r, s),
        KERNEL_D, KERNEL_H, KERNEL_W, DILATION_D, DILATION_H, DILATION_W,
    )  # fmt: skip
    if FLIPPED:
        offsets = (e % CHANNELS) * w_strides[0] + (n % FILTERS) * w_strides[1]
    else:
        offsets = (n % FILTERS) * w_strides[0] + (e % CHANNELS) * w_strides[1]
    offsets = add_tap(offsets, w_strides, t, r, s, KERNEL_D, KERNEL_H, KERNEL_W, FLIPPED)
    weight = tl.load(w_ptr + offsets, mask=taken, other=0.0)
    tl.store(band_ptr + index, weight, mask=index < elements)


@triton.jit
def banded_product_kernel(
    source_ptr,
    band_ptr,
    out_ptr,
    acc_ptr,
    extra_ptrs,
    extra_strides,
    source_size,
    unit_size,
    source_strides,
    unit_strides,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    LEAD_D: tl.constexpr,
    LEAD_H: tl.constexpr,
    LEAD_W: tl.constexpr,
    RUN_D: tl.constexpr,
    RUN_H: tl.constexpr,
    RUN_W: tl.constexpr,
    WINDOW_D: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    HOP_D: tl.constexpr,
    HOP_H: tl.constexpr,
    CHECK_D: tl.constexpr,
    CHECK_H: tl.constexpr,
    CHECK_W: tl.constexpr,
    OVERHANG_D: tl.constexpr,
    OVERHANG_H: tl.constexpr,
    OVERHANG_W: tl.constexpr,
    SOURCE_ALIGN: tl.constexpr,
    UNIT_ALIGN: tl.constexpr,
    CACHED: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SAVE_ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    UNITS_H: tl.constexpr,
    UNITS_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[unit, (j, q)] = Σ over the window of source[unit, window] · band[window, (j, q)].

    Strides are of (image, plane, row), in units of the ALIGN elements that divide them: the
    compiler must know that rows begin at whole vectors.
    """
    if WIDE:
        source_strides = widen_three(source_strides)
        unit_strides = widen_three(unit_strides)
    LINE: tl.constexpr = WINDOW_W * CHANNELS
    CHUNKS: tl.constexpr = (LINE + BLOCK_K - 1) // BLOCK_K
    COLUMNS: tl.constexpr = RUN_D * RUN_H * RUN_W * FILTERS
    image, plane, row, column = unit_tile(
        tl.program_id(0), unit_size, RUN_D, RUN_H, RUN_W, UNITS_H, UNITS_W
    )
    m = tl.arange(0, UNITS_H * UNITS_W)
    rows = row + (m // UNITS_W) * RUN_H
    columns = column + (m % UNITS_W) * RUN_W
    first_plane = plane - LEAD_D
    first_rows = rows - LEAD_H
    first_columns = columns - LEAD_W
    base = (image * source_strides[0] + first_plane * source_strides[1]) * SOURCE_ALIGN
    units = first_rows * source_strides[2] * SOURCE_ALIGN + first_columns * CHANNELS
    k = tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    band = band_ptr + (k[:, None] * BLOCK_N + n[None, :])
    acc = tl.zeros((UNITS_H * UNITS_W, BLOCK_N), tl.float32)
    for step in range(WINDOW_D * WINDOW_H * CHUNKS):
        d, h, e = window_step(step, k, CHUNKS, BLOCK_K, WINDOW_D, WINDOW_H, HOP_D, HOP_H)
        shift = base + (d * source_strides[1] + h * source_strides[2]) * SOURCE_ALIGN
        offsets = (shift + units)[:, None] + e[None, :]
        if CHECK_D or CHECK_H or CHECK_W or LINE % BLOCK_K != 0 or CACHED:
            # Pixels, not elements, so that the compiler sees whole vectors with one bound.
            pixel = e // CHANNELS
            mask = tl.full((UNITS_H * UNITS_W, BLOCK_K), 1, tl.int1)
            if CACHED:
                mask = mask & in_half_vectors(e, CHUNKS * BLOCK_K)[None, :]
            if CHECK_W:
                mask = mask & within(first_columns[:, None] + pixel[None, :], source_size[2])
            if LINE % BLOCK_K != 0:
                mask = mask & (pixel < WINDOW_W)[None, :]
            if CHECK_H or CHECK_D:
                taken = tl.full((UNITS_H * UNITS_W,), 1, tl.int1)
                if CHECK_H:
                    taken = taken & within(first_rows + h, source_size[1])
                if CHECK_D:
                    taken = taken & within(first_plane + d, source_size[0])
                mask = mask & taken[:, None]
            a = tl.load(source_ptr + offsets, mask=mask, other=0.0)
        else:
            a = tl.load(source_ptr + offsets)
        b = tl.load(band)
        band += BLOCK_K * BLOCK_N
        acc = matmul_step(a, b, acc, PRECISION, UPCAST)

    column_offset, channel, unit_plane, unit_row, unit_column = unit_columns(
        n, unit_strides, FILTERS, RUN_H, RUN_W, UNIT_ALIGN
    )
    out_plane = (plane + unit_plane)[None, :]
    out_row = rows[:, None] + unit_row[None, :]
    out_column = columns[:, None] + unit_column[None, :]
    mask = tl.full((UNITS_H * UNITS_W, BLOCK_N), 1, tl.int1)
    if COLUMNS != BLOCK_N:
        mask = mask & (n < COLUMNS)[None, :]
    mask = below_ends(
        mask, out_plane, out_row, out_column, unit_size, OVERHANG_D, OVERHANG_H, OVERHANG_W
    )
    out_base = (image * unit_strides[0] + plane * unit_strides[1]) * UNIT_ALIGN
    out_rows = rows * unit_strides[2] * UNIT_ALIGN + columns * FILTERS
    store_result(
        acc,
        out_ptr,
        acc_ptr,
        out_base + (out_rows[:, None] + column_offset[None, :]),
        image,
        channel[None, :],
        out_plane,
        out_row,
        out_column,
        mask,
        extra_ptrs,
        extra_strides,
        EPILOGUE,
        SAVE_ACC,
    )
