"""Banded products over blocks of groups, by programs that keep their band and walk images.

A band is as large as the windows of half a tile of units, and a program of one tile loads it for
nothing else. Here a program loads the band of its block of groups once, keeps the positions of a
tile of units, and walks images: the windows of the next ones arrive while these are multiplied and
stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .banded_group_products import unit_elements, units_of
from .banded_windows import below_ends, window_step, within
from .common import matmul_step, pixel_offset, position, store_result, widen, widen_all


@triton.jit
def banded_groups_resident_kernel(
    source_ptr,
    band_ptr,
    out_ptr,
    acc_ptr,
    extra_ptrs,
    extra_strides,
    batch,
    source_size,
    unit_size,
    source_strides,
    unit_strides,
    steps,
    steps_per_split,
    BLOCKS: tl.constexpr,
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
    EVEN_UNITS: tl.constexpr,
    IMAGES: tl.constexpr,
    EVEN_IMAGES: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SAVE_ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[unit, (j, q)] = Σ over the window of source[unit, window] · band[block, window, (j, q)].

    A place of a tile is a unit of one of IMAGES neighbouring images; a step is so many images.
    """
    if WIDE:
        source_strides = widen_all(source_strides)
        unit_strides = widen_all(unit_strides)
    LINE: tl.constexpr = WINDOW_W * CHANNELS
    CHUNKS: tl.constexpr = (LINE + BLOCK_K - 1) // BLOCK_K
    PARTS: tl.constexpr = WINDOW_D * WINDOW_H * CHUNKS
    COLUMNS: tl.constexpr = RUN_D * RUN_H * RUN_W * FILTERS
    block = tl.program_id(0) % BLOCKS
    place = (tl.program_id(0) // BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    on_image, plane, row, column = position(place, units_of(unit_size, RUN_D, RUN_H, RUN_W))
    plane *= RUN_D
    row *= RUN_H
    column *= RUN_W
    valid = on_image < IMAGES
    k = tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    band = band_ptr + block * (PARTS * BLOCK_K * BLOCK_N) + (k[:, None] * BLOCK_N + n[None, :])
    bands = ()
    for part in tl.static_range(PARTS):
        bands = bands + (tl.load(band + part * (BLOCK_K * BLOCK_N)),)  # type: ignore[assignment]  # noqa: RUF005
    element, q, unit_plane, unit_row, unit_column = unit_elements(
        n, unit_strides, FILTERS, RUN_H, RUN_W
    )
    if WIDE:
        element += widen(block) * FILTERS
    else:
        element += block * FILTERS
    out_plane = plane[:, None] + unit_plane[None, :]
    out_row = row[:, None] + unit_row[None, :]
    out_column = column[:, None] + unit_column[None, :]
    out_offsets = pixel_offset(unit_strides, on_image, plane, row, column)[:, None]
    out_offsets = out_offsets + element[None, :]
    out_mask = tl.full((BLOCK_M, BLOCK_N), 1, tl.int1)
    if not EVEN_UNITS:
        out_mask = out_mask & valid[:, None]
    if COLUMNS != BLOCK_N:
        out_mask = out_mask & (n < COLUMNS)[None, :]
    out_mask = below_ends(
        out_mask, out_plane, out_row, out_column, unit_size, OVERHANG_D, OVERHANG_H, OVERHANG_W
    )
    first_planes = plane - LEAD_D
    first_rows = row - LEAD_H
    first_columns = column - LEAD_W
    units = pixel_offset(source_strides, on_image, first_planes, first_rows, first_columns)
    source = source_ptr + block * CHANNELS
    first = tl.program_id(1) * steps_per_split
    last = tl.minimum(first + steps_per_split, steps)
    for step in range(first, last):
        at_image = step * IMAGES
        if WIDE:
            at_image = at_image.to(tl.int64)
        present = valid
        if not EVEN_IMAGES:
            present = valid & (at_image + on_image < batch)
        from_image = source + at_image * source_strides[0]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for part in tl.static_range(PARTS):
            d, h, e = window_step(part, k, CHUNKS, BLOCK_K, WINDOW_D, WINDOW_H, HOP_D, HOP_H)
            # Pixels, not elements, so that the compiler sees whole vectors with one bound.
            pixel = e // CHANNELS
            window = pixel * source_strides[4] + e % CHANNELS
            shifted = from_image + (d * source_strides[2] + h * source_strides[3])
            offsets = units[:, None] + window[None, :]
            if CHECK_D or CHECK_H or CHECK_W or LINE % BLOCK_K != 0 or not EVEN_UNITS:
                taken = tl.full((BLOCK_M,), 1, tl.int1)
                if not EVEN_UNITS or not EVEN_IMAGES:
                    taken = present
                if CHECK_H:
                    taken = taken & within(first_rows + h, source_size[1])
                if CHECK_D:
                    taken = taken & within(first_planes + d, source_size[0])
                mask = tl.full((BLOCK_M, BLOCK_K), 1, tl.int1) & taken[:, None]
                if CHECK_W:
                    mask = mask & within(first_columns[:, None] + pixel[None, :], source_size[2])
                if LINE % BLOCK_K != 0:
                    mask = mask & (pixel < WINDOW_W)[None, :]
                a = tl.load(shifted + offsets, mask=mask, other=0.0)
            elif not EVEN_IMAGES:
                a = tl.load(shifted + offsets, mask=present[:, None], other=0.0)
            else:
                a = tl.load(shifted + offsets)
            acc = matmul_step(a, bands[part], acc, PRECISION, UPCAST)
        mask = out_mask
        if not EVEN_IMAGES:
            mask = mask & present[:, None]
        store_result(
            acc,
            out_ptr + at_image * unit_strides[0],
            acc_ptr + at_image * unit_strides[0],
            out_offsets,
            (at_image + on_image)[:, None],
            (block * FILTERS + q)[None, :],
            out_plane,
            out_row,
            out_column,
            mask,
            extra_ptrs,
            extra_strides,
            EPILOGUE,
            SAVE_ACC,
        )
