"""Banded products over blocks of narrow groups: forward, and the gradient of the input.

A block of groups is a small dense convolution whose weight is zero between its groups. A row of its
product is a unit, a box of neighbouring result pixels with the filters of the block; its reduction
is the window of the source that they read, loaded once for the unit. The weights are spread to
matrices [block, window, unit] first. Units are counted through the whole batch, so that small maps
leave no tile half empty.

A zero weight meets source pixels of the unit's other pixels, and channels of the block's other
groups: an infinite or NaN source makes NaN of all the block's filters of the units whose window
holds it.
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
from .common import matmul_step, pixel_offset, position, store_result, widen, widen_all


@triton.jit
def units_of(size, RUN_D: tl.constexpr, RUN_H: tl.constexpr, RUN_W: tl.constexpr):
    """Units of a map on the three axes."""
    return tl.cdiv(size[0], RUN_D), tl.cdiv(size[1], RUN_H), tl.cdiv(size[2], RUN_W)


@triton.jit
def unit_elements(
    n,
    strides,
    FILTERS: tl.constexpr,
    RUN_H: tl.constexpr,
    RUN_W: tl.constexpr,
):
    """(offset, filter, plane, row, column) of the elements of a unit."""
    pixel = n // FILTERS
    plane = pixel // (RUN_W * RUN_H)
    row = (pixel // RUN_W) % RUN_H
    column = pixel % RUN_W
    offset = plane * strides[2] + row * strides[3] + column * strides[4] + n % FILTERS
    return offset, n % FILTERS, plane, row, column


@triton.jit
def band_group_weight_kernel(
    w_ptr,
    band_ptr,
    elements,
    w_strides,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    GROUP_FILTERS: tl.constexpr,
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
    LINES: tl.constexpr,
    HOP_D: tl.constexpr,
    HOP_H: tl.constexpr,
    DEPTH: tl.constexpr,
    FLIPPED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """band[block, (d, h, e), (j, q)]: the weight of filter q, channel e % C and the tap between.

    Zero where there is no such tap or the filter and the channel are of two groups. A row of the
    window takes DEPTH elements: whole steps of the product.
    """
    if WIDE:
        w_strides = widen_all(w_strides)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = index % BLOCK_N
    e = (index // BLOCK_N) % DEPTH
    line = (index // (BLOCK_N * DEPTH)) % LINES
    block = index // (BLOCK_N * DEPTH * LINES)
    j = n // FILTERS
    q = n % FILTERS
    c = e % CHANNELS
    d, h, w = distances(j, line, e, CHANNELS, RUN_H, RUN_W, WINDOW_H, HOP_D, HOP_H)
    t = d // DILATION_D
    r = h // DILATION_H
    s = w // DILATION_W
    taken = (n < COLUMNS) & (index < elements) & (q // GROUP_FILTERS == c // GROUP_CHANNELS)
    taken = on_taps(
        taken, (d, h, w), (t, r, s),
        KERNEL_D, KERNEL_H, KERNEL_W, DILATION_D, DILATION_H, DILATION_W,
    )  # fmt: skip
    if FLIPPED:
        offsets = (block * CHANNELS + c) * w_strides[0] + (q % GROUP_FILTERS) * w_strides[1]
    else:
        offsets = (block * FILTERS + q) * w_strides[0] + (c % GROUP_CHANNELS) * w_strides[1]
    offsets = add_tap(offsets, w_strides, t, r, s, KERNEL_D, KERNEL_H, KERNEL_W, FLIPPED)
    weight = tl.load(w_ptr + offsets, mask=taken, other=0.0)
    tl.store(band_ptr + index, weight, mask=index < elements)


@triton.jit
def banded_groups_kernel(
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
    CACHED: tl.constexpr,
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

    Programs of one tile of units and all blocks of groups are neighbours: they share the sectors
    and pages of memory on which their channels lie.
    """
    if WIDE:
        source_strides = widen_all(source_strides)
        unit_strides = widen_all(unit_strides)
    LINE: tl.constexpr = WINDOW_W * CHANNELS
    CHUNKS: tl.constexpr = (LINE + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = WINDOW_D * WINDOW_H * CHUNKS
    COLUMNS: tl.constexpr = RUN_D * RUN_H * RUN_W * FILTERS
    program = tl.program_id(0)
    block = program % BLOCKS
    m = (program // BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    image, plane, row, column = position(m, units_of(unit_size, RUN_D, RUN_H, RUN_W))
    plane *= RUN_D
    row *= RUN_H
    column *= RUN_W
    first_planes = plane - LEAD_D
    first_rows = row - LEAD_H
    first_columns = column - LEAD_W
    held = image < batch
    units = pixel_offset(source_strides, image, first_planes, first_rows, first_columns)
    k = tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    source = source_ptr + block * CHANNELS
    band = band_ptr + block * (STEPS * BLOCK_K * BLOCK_N) + (k[:, None] * BLOCK_N + n[None, :])
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(STEPS):
        d, h, e = window_step(step, k, CHUNKS, BLOCK_K, WINDOW_D, WINDOW_H, HOP_D, HOP_H)
        # Pixels, not elements, so that the compiler sees whole vectors with one bound.
        pixel = e // CHANNELS
        window = pixel * source_strides[4] + e % CHANNELS
        shifted = source + (d * source_strides[2] + h * source_strides[3])
        offsets = units[:, None] + window[None, :]
        if CHECK_D or CHECK_H or CHECK_W or LINE % BLOCK_K != 0 or CACHED or not EVEN_UNITS:
            taken = tl.full((BLOCK_M,), 1, tl.int1)
            if not EVEN_UNITS:
                taken = held
            if CHECK_H:
                taken = taken & within(first_rows + h, source_size[1])
            if CHECK_D:
                taken = taken & within(first_planes + d, source_size[0])
            mask = tl.full((BLOCK_M, BLOCK_K), 1, tl.int1) & taken[:, None]
            if CACHED:
                mask = mask & in_half_vectors(e, CHUNKS * BLOCK_K)[None, :]
            if CHECK_W:
                mask = mask & within(first_columns[:, None] + pixel[None, :], source_size[2])
            if LINE % BLOCK_K != 0:
                mask = mask & (pixel < WINDOW_W)[None, :]
            a = tl.load(shifted + offsets, mask=mask, other=0.0)
        else:
            a = tl.load(shifted + offsets)
        b = tl.load(band)
        band += BLOCK_K * BLOCK_N
        acc = matmul_step(a, b, acc, PRECISION, UPCAST)

    element, q, unit_plane, unit_row, unit_column = unit_elements(
        n, unit_strides, FILTERS, RUN_H, RUN_W
    )
    out_plane = plane[:, None] + unit_plane[None, :]
    out_row = row[:, None] + unit_row[None, :]
    out_column = column[:, None] + unit_column[None, :]
    mask = tl.full((BLOCK_M, BLOCK_N), 1, tl.int1)
    if not EVEN_UNITS:
        mask = mask & held[:, None]
    if COLUMNS != BLOCK_N:
        mask = mask & (n < COLUMNS)[None, :]
    mask = below_ends(
        mask, out_plane, out_row, out_column, unit_size, OVERHANG_D, OVERHANG_H, OVERHANG_W
    )
    out = pixel_offset(unit_strides, image, plane, row, column)
    if WIDE:
        element += widen(block) * FILTERS
    else:
        element += block * FILTERS
    store_result(
        acc,
        out_ptr,
        acc_ptr,
        out[:, None] + element[None, :],
        image[:, None],
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
