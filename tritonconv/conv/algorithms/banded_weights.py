"""Banded products for the gradient of the weight: pairs of a unit's and a window's elements.

The sum over units gives one number for every element of the unit and every element of the window;
those of one tap lie along a diagonal and are added at the end, together with the splits. Pairs that
belong to no tap are computed and dropped.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .banded_products import unit_columns, unit_tile, widen_three
from .banded_windows import add_tap, in_half_vectors, place_between, within
from .common import matmul_step, widen, widen_all


@triton.jit
def banded_wgrad_kernel(
    source_ptr,
    units_ptr,
    partial_ptr,
    source_size,
    unit_size,
    source_strides,
    unit_strides,
    tiles,
    tiles_per_split,
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
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    UNITS_H: tl.constexpr,
    UNITS_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[split, (j, q), (d, h, e)] = Σ over units of units[unit, (j, q)] · source[unit, …]."""
    if WIDE:
        source_strides = widen_three(source_strides)
        unit_strides = widen_three(unit_strides)
    LINE: tl.constexpr = WINDOW_W * CHANNELS
    DEPTH: tl.constexpr = WINDOW_D * WINDOW_H * LINE
    TILES_K: tl.constexpr = (DEPTH + BLOCK_K - 1) // BLOCK_K
    COLUMNS: tl.constexpr = RUN_D * RUN_H * RUN_W * FILTERS
    # Planes and rows of the window are scalars, or bounds of units alone, where a tile has but one.
    ONE_LINE: tl.constexpr = LINE % BLOCK_K == 0
    ONE_PLANE: tl.constexpr = (LINE * WINDOW_H) % BLOCK_K == 0
    first_k = tl.program_id(0) * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    e = k % LINE
    # Not e // CHANNELS, of which the compiler does not see that it is the same along a vector.
    pixel = (k // CHANNELS) % WINDOW_W
    if ONE_LINE:
        h = ((first_k // LINE) % WINDOW_H) * HOP_H
    else:
        h = ((k // LINE) % WINDOW_H) * HOP_H
    if ONE_PLANE:
        d = first_k // (LINE * WINDOW_H) * HOP_D
    else:
        d = k // (LINE * WINDOW_H) * HOP_D
    window = (d * source_strides[1] + h * source_strides[2]) * SOURCE_ALIGN + e
    n = tl.arange(0, BLOCK_N)
    column_offset, _, unit_plane, unit_row, unit_column = unit_columns(
        n, unit_strides, FILTERS, RUN_H, RUN_W, UNIT_ALIGN
    )
    m = tl.arange(0, UNITS_H * UNITS_W)
    unit_rows = (m // UNITS_W) * RUN_H
    unit_first = (m % UNITS_W) * RUN_W
    split = tl.program_id(1)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for tile in range(first, last):
        image, plane, row, column = unit_tile(
            tile, unit_size, RUN_D, RUN_H, RUN_W, UNITS_H, UNITS_W
        )
        rows = row + unit_rows
        columns = column + unit_first
        base = (image * unit_strides[0] + plane * unit_strides[1]) * UNIT_ALIGN
        units = base + rows * unit_strides[2] * UNIT_ALIGN + columns * FILTERS
        offsets = units[:, None] + column_offset[None, :]
        if COLUMNS != BLOCK_N or OVERHANG_D or OVERHANG_H or OVERHANG_W:
            mask = tl.full((UNITS_H * UNITS_W, BLOCK_N), 1, tl.int1)
            if COLUMNS != BLOCK_N:
                mask = mask & (n < COLUMNS)[None, :]
            if OVERHANG_D:
                mask = mask & (plane + unit_plane < unit_size[0])[None, :]
            if OVERHANG_H:
                mask = mask & (rows[:, None] + unit_row[None, :] < unit_size[1])
            if OVERHANG_W:
                mask = mask & (columns[:, None] + unit_column[None, :] < unit_size[2])
            g = tl.load(units_ptr + offsets, mask=mask, other=0.0)
        else:
            g = tl.load(units_ptr + offsets)

        first_plane = plane - LEAD_D
        first_rows = rows - LEAD_H
        first_columns = columns - LEAD_W
        base = (image * source_strides[0] + first_plane * source_strides[1]) * SOURCE_ALIGN
        units = base + first_rows * source_strides[2] * SOURCE_ALIGN + first_columns * CHANNELS
        offsets = units[:, None] + window[None, :]
        if CHECK_D or CHECK_H or CHECK_W or DEPTH % BLOCK_K != 0 or CACHED:
            mask = tl.full((UNITS_H * UNITS_W, BLOCK_K), 1, tl.int1)
            if CACHED:
                mask = mask & in_half_vectors(k, BLOCK_K * TILES_K)[None, :]
            if CHECK_W:
                mask = mask & within(first_columns[:, None] + pixel[None, :], source_size[2])
            if DEPTH % BLOCK_K != 0:
                mask = mask & (k // CHANNELS < DEPTH // CHANNELS)[None, :]
            if CHECK_H:
                if ONE_LINE:
                    mask = mask & within(first_rows + h, source_size[1])[:, None]
                else:
                    mask = mask & within(first_rows[:, None] + h[None, :], source_size[1])
            if CHECK_D:
                if ONE_PLANE:
                    mask = mask & within(first_plane + d, source_size[0])
                else:
                    mask = mask & within(first_plane + d, source_size[0])[None, :]
            x = tl.load(source_ptr + offsets, mask=mask, other=0.0)
        else:
            x = tl.load(source_ptr + offsets)
        acc = matmul_step(tl.trans(g), x, acc, PRECISION, UPCAST)
    base = widen(split) * (BLOCK_N * TILES_K * BLOCK_K)
    tl.store(partial_ptr + base + (n[:, None] * (TILES_K * BLOCK_K) + k[None, :]), acc)


@triton.jit
def diagonal_sum_kernel(
    partial_ptr,
    out_ptr,
    splits,
    w_strides,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    RUN_D: tl.constexpr,
    RUN_H: tl.constexpr,
    RUN_W: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    HOP_D: tl.constexpr,
    HOP_H: tl.constexpr,
    DEPTH: tl.constexpr,
    FLIPPED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out[q, c, t, r, s] = Σ_split Σ_j partial[split, (j, q), window at j + tap · dilation]."""
    if WIDE:
        w_strides = widen_all(w_strides)
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    PIXELS: tl.constexpr = RUN_D * RUN_H * RUN_W
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wanted = index < FILTERS * CHANNELS * TAPS
    c = index % CHANNELS
    tap = (index // CHANNELS) % TAPS
    q = index // (CHANNELS * TAPS)
    t = tap // (KERNEL_W * KERNEL_H)
    r = (tap // KERNEL_W) % KERNEL_H
    s = tap % KERNEL_W
    total = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for start in range(0, splits * PIXELS, BLOCK_S):
        part = start + tl.arange(0, BLOCK_S)
        j = part % PIXELS
        place = place_between(
            j, t, r, s, DILATION_D, DILATION_H, DILATION_W,
            RUN_H, RUN_W, WINDOW_H, WINDOW_W, HOP_D, HOP_H,
        )  # fmt: skip
        n = (j * FILTERS)[:, None] + q[None, :]
        place = n * DEPTH + place * CHANNELS + c[None, :]
        base = (part // PIXELS).to(tl.int64) * (BLOCK_N * DEPTH)
        taken = (part < splits * PIXELS)[:, None] & wanted[None, :]
        total += tl.load(partial_ptr + base[:, None] + place, mask=taken, other=0.0)
    if FLIPPED:
        offsets = c * w_strides[0] + q * w_strides[1]
    else:
        offsets = q * w_strides[0] + c * w_strides[1]
    offsets = add_tap(offsets, w_strides, t, r, s, KERNEL_D, KERNEL_H, KERNEL_W, FLIPPED)
    result = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, result, mask=wanted)
