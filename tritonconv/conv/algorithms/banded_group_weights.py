"""Banded products over blocks of narrow groups for the gradient of the weight.

A program sums the pairs of a unit's and a window's elements of one block of groups. It keeps a
tile of units and walks the images, so that positions, offsets and bounds are made once and a step
moves two pointers. Of the pairs those are stored that belong to one group and to some tap; a second
kernel adds them along the diagonals, with the splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .banded_group_products import unit_elements, units_of
from .banded_windows import below_ends, in_half_vectors, place_between, within
from .common import matmul_step, pixel_offset, position, tap_offset, widen, widen_all


@triton.jit
def banded_groups_wgrad_kernel(
    source_ptr,
    units_ptr,
    partial_ptr,
    batch,
    source_size,
    unit_size,
    source_strides,
    unit_strides,
    tiles,
    steps,
    tiles_per_split,
    steps_per_split,
    step_splits,
    BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUP_FILTERS: tl.constexpr,
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
    CACHED: tl.constexpr,
    IMAGES: tl.constexpr,
    EVEN_IMAGES: tl.constexpr,
    SPAN_W: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[split, block, (j, q), (d, h, e)] = Σ over units of unit (j, q) · window (d, h, e).

    A place of a tile is a unit of one of IMAGES neighbouring images; a step is so many images.
    """
    if WIDE:
        source_strides = widen_all(source_strides)
        unit_strides = widen_all(unit_strides)
    LINE: tl.constexpr = WINDOW_W * CHANNELS
    DEPTH: tl.constexpr = WINDOW_D * WINDOW_H * LINE
    TILES_K: tl.constexpr = (DEPTH + BLOCK_K - 1) // BLOCK_K
    COLUMNS: tl.constexpr = RUN_D * RUN_H * RUN_W * FILTERS
    block = tl.program_id(0) % BLOCKS
    first_k = (tl.program_id(0) // BLOCKS) * BLOCK_K
    split = tl.program_id(1)
    k = first_k + tl.arange(0, BLOCK_K)
    c = k % CHANNELS
    pixel = (k // CHANNELS) % WINDOW_W
    h = ((k // LINE) % WINDOW_H) * HOP_H
    d = (k // (LINE * WINDOW_H)) * HOP_D
    window = d * source_strides[2] + h * source_strides[3] + pixel * source_strides[4] + c
    n = tl.arange(0, BLOCK_N)
    element, q, unit_plane, unit_row, unit_column = unit_elements(
        n, unit_strides, FILTERS, RUN_H, RUN_W
    )
    source = source_ptr + block * CHANNELS
    units = units_ptr + block * FILTERS
    map_units = units_of(unit_size, RUN_D, RUN_H, RUN_W)
    first_tile = (split // step_splits) * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tiles)
    first_step = (split % step_splits) * steps_per_split
    last_step = tl.minimum(first_step + steps_per_split, steps)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for tile in range(first_tile, last_tile):
        place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        on_image, plane, row, column = position(place, map_units)
        plane *= RUN_D
        row *= RUN_H
        column *= RUN_W
        valid = on_image < IMAGES
        g_offsets = pixel_offset(unit_strides, on_image, plane, row, column)[:, None]
        g_offsets = g_offsets + element[None, :]
        # Masks that cannot fail are left out: each one narrows what is loaded at once.
        g_mask = tl.full((BLOCK_M, BLOCK_N), 1, tl.int1)
        x_mask = tl.full((BLOCK_M, BLOCK_K), 1, tl.int1)
        if not EVEN_UNITS:
            g_mask = g_mask & valid[:, None]
            x_mask = x_mask & valid[:, None]
        if COLUMNS != BLOCK_N:
            g_mask = g_mask & (n < COLUMNS)[None, :]
        g_mask = below_ends(
            g_mask,
            plane[:, None] + unit_plane[None, :],
            row[:, None] + unit_row[None, :],
            column[:, None] + unit_column[None, :],
            unit_size,
            OVERHANG_D,
            OVERHANG_H,
            OVERHANG_W,
        )
        plane -= LEAD_D
        row -= LEAD_H
        column -= LEAD_W
        x_offsets = pixel_offset(source_strides, on_image, plane, row, column)[:, None]
        x_offsets = x_offsets + window[None, :]
        if CACHED:
            x_mask = x_mask & in_half_vectors(k, BLOCK_K * TILES_K)[None, :]
        if CHECK_W:
            x_mask = x_mask & within(column[:, None] + pixel[None, :], source_size[2])
        if CHECK_H:
            x_mask = x_mask & within(row[:, None] + h[None, :], source_size[1])
        if CHECK_D:
            x_mask = x_mask & within(plane[:, None] + d[None, :], source_size[0])
        if DEPTH % BLOCK_K != 0:
            x_mask = x_mask & (k // CHANNELS < DEPTH // CHANNELS)[None, :]
        G_BOUNDS: tl.constexpr = (
            COLUMNS != BLOCK_N or OVERHANG_D or OVERHANG_H or OVERHANG_W or not EVEN_UNITS
        )
        X_BOUNDS: tl.constexpr = (
            CHECK_D or CHECK_H or CHECK_W or DEPTH % BLOCK_K != 0 or CACHED or not EVEN_UNITS
        )
        for step in range(first_step, last_step):
            at_image = step * IMAGES
            if WIDE:
                at_image = at_image.to(tl.int64)
            g_step = units + at_image * unit_strides[0]
            x_step = source + at_image * source_strides[0]
            if EVEN_IMAGES:
                if G_BOUNDS:
                    g = tl.load(g_step + g_offsets, mask=g_mask, other=0.0)
                else:
                    g = tl.load(g_step + g_offsets)
                if X_BOUNDS:
                    x = tl.load(x_step + x_offsets, mask=x_mask, other=0.0)
                else:
                    x = tl.load(x_step + x_offsets)
            else:
                present = (at_image + on_image < batch)[:, None]
                g = tl.load(g_step + g_offsets, mask=g_mask & present, other=0.0)
                x = tl.load(x_step + x_offsets, mask=x_mask & present, other=0.0)
            acc = matmul_step(tl.trans(g), x, acc, PRECISION, UPCAST)

    distance = pixel[None, :] - unit_column[:, None]
    # Not c // GROUP_CHANNELS: the compiler would not see that it is the same along a vector.
    group = (k // GROUP_CHANNELS) % (CHANNELS // GROUP_CHANNELS)
    wanted = (q // GROUP_FILTERS)[:, None] == group[None, :]
    wanted = wanted & (distance >= 0) & (distance <= SPAN_W)
    base = (widen(split) * BLOCKS + block) * (BLOCK_N * TILES_K * BLOCK_K)
    offsets = n[:, None] * (TILES_K * BLOCK_K) + k[None, :]
    tl.store(partial_ptr + base + offsets, acc, mask=wanted)


@triton.jit
def group_diagonals_kernel(
    partial_ptr,
    out_ptr,
    splits,
    w_strides,
    BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUP_FILTERS: tl.constexpr,
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
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out[o, i, t, r, s] = Σ_split Σ_j partial[split, block, (j, q), window at j + tap · dilation].

    The order of the sum is fixed. A group's channels are neighbours among the partial sums.
    """
    if WIDE:
        w_strides = widen_all(w_strides)
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    PIXELS: tl.constexpr = RUN_D * RUN_H * RUN_W
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = index % GROUP_CHANNELS
    tap = (index // GROUP_CHANNELS) % TAPS
    o = index // (GROUP_CHANNELS * TAPS)
    block = o // FILTERS
    q = o % FILTERS
    wanted = block < BLOCKS
    c = (q // GROUP_FILTERS) * GROUP_CHANNELS + i
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
        base = (part // PIXELS).to(tl.int64)[:, None] * BLOCKS + block[None, :]
        taken = (part < splits * PIXELS)[:, None] & wanted[None, :]
        offsets = base * (BLOCK_N * DEPTH) + place
        total += tl.load(partial_ptr + offsets, mask=taken, other=0.0)
    offsets = o * w_strides[0] + i * w_strides[1]
    offsets += tap_offset(w_strides, t, r, s)
    result = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, result, mask=wanted)
