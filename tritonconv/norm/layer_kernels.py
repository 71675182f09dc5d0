"""Kernels of layer normalisation: rows of a matrix, several of them to a program.

A tile is (chunks, rows, lanes), the columns of a row being the first and the last axis: where the
lanes are as many as one warp loads at once, every warp has rows of its own, and sums over a row
need no shared memory. It is loaded and stored as a matrix of (chunks · rows, lanes), along whose
height every release of Triton lays warps out; with three axes they differ in the order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import _load, _whole


@triton.jit
def _columns(columns, CHUNKS: tl.constexpr, LANES: tl.constexpr):
    """Columns of a tile, and which of them there are: (chunks, lanes)."""
    column = tl.arange(0, CHUNKS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    return column, column < columns


@triton.jit
def _place(top, rows, columns, CHUNKS: tl.constexpr, BLOCK_R: tl.constexpr, LANES: tl.constexpr):
    """Offsets and mask of a tile in memory: (chunks · rows, lanes)."""
    line = tl.arange(0, CHUNKS * BLOCK_R)
    row = top + line % BLOCK_R
    column = (line // BLOCK_R * LANES)[:, None] + tl.arange(0, LANES)[None, :]
    return row[:, None] * columns + column, (row < rows)[:, None] & (column < columns)


@triton.jit
def _store(ptr, offsets, tile, mask, MASKED: tl.constexpr):
    """Write a tile in the dtype of the memory."""
    tile = tl.reshape(tile, offsets.shape).to(ptr.dtype.element_ty)
    if MASKED:
        tl.store(ptr + offsets, tile, mask=mask)
    else:
        tl.store(ptr + offsets, tile)


@triton.jit
def _across(vector):
    """A number for every column against a tile."""
    return vector[:, None, :]


@triton.jit
def _row_sum(tile, SHARED: tl.constexpr):
    """Sum of every row: (rows,).

    Chunks of a row are first added in the registers of the one warp that has them. Where warps
    share a row, chunks are summed up first: what then goes from warp to warp is a number for each.
    """
    if SHARED:
        return tl.sum(tl.sum(tile, axis=2), axis=0)
    else:
        return tl.sum(tl.sum(tile, axis=0), axis=1)


@triton.jit
def _along(vector):
    """A number for every row against a tile."""
    return vector[None, :, None]


@triton.jit
def _parameter(ptr, column, inside, HAS: tl.constexpr, default):
    """A number for every column in float32."""
    if HAS:
        return tl.load(ptr + column, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.full(column.shape, default, tl.float32)


@triton.jit
def layer_norm_kernel(
    x_ptr,
    y_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    columns,
    share,
    eps,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    STATS: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LANES: tl.constexpr,
    SHARED: tl.constexpr,
    UNIT: tl.constexpr,
):
    """y = weight · (x − mean) · rstd + bias, where rstd = 1 / √(var + eps); mean and rstd too."""
    columns = _whole(columns, UNIT)
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    row = program * BLOCK_R + tl.arange(0, BLOCK_R)
    column, inside = _columns(columns, CHUNKS, LANES)
    offsets, mask = _place(program * BLOCK_R, rows, columns, CHUNKS, BLOCK_R, LANES)
    x = tl.reshape(_load(x_ptr, offsets, mask, MASKED), (CHUNKS, BLOCK_R, LANES))
    mean = _row_sum(x, SHARED) * share
    x -= _along(mean)
    if MASKED:
        x = tl.where(_across(inside), x, 0.0)
    rstd = tl.rsqrt(_row_sum(x * x, SHARED) * share + eps)
    y = x * _along(rstd) * _across(_parameter(weight_ptr, column, inside, WEIGHT, 1.0))
    y += _across(_parameter(bias_ptr, column, inside, BIAS, 0.0))
    _store(y_ptr, offsets, y, mask, MASKED)
    if STATS:
        tl.store(stats_ptr + row, mean, mask=row < rows)
        tl.store(stats_ptr + rows + row, rstd, mask=row < rows)


@triton.jit
def layer_norm_gradients_kernel(
    grad_ptr,
    x_ptr,
    stats_ptr,
    weight_ptr,
    grad_x_ptr,
    parts_ptr,
    rows,
    columns,
    steps,
    parts,
    share,
    WEIGHT: tl.constexpr,
    GRAD_X: tl.constexpr,
    GRAD_WEIGHT: tl.constexpr,
    GRAD_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LANES: tl.constexpr,
    SHARED: tl.constexpr,
    STAGES: tl.constexpr,
    UNIT: tl.constexpr,
):
    """dx = (w·g − mean(w·g) − x̂ · mean(w·g·x̂)) · rstd, and a part of Σ g·x̂ and Σ g over rows.

    A program has a run of rows; what it sums up for the parameters is one row of ``parts``.
    """
    columns = _whole(columns, UNIT)
    part = tl.program_id(0)
    first = (part.to(tl.int64) * steps // parts).to(tl.int32)
    last = ((part + 1).to(tl.int64) * steps // parts).to(tl.int32)
    column, inside = _columns(columns, CHUNKS, LANES)
    weight = _across(_parameter(weight_ptr, column, inside, WEIGHT, 1.0))
    sums = tl.zeros((CHUNKS, BLOCK_R, LANES), tl.float32)
    products = tl.zeros((CHUNKS, BLOCK_R, LANES), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        top = step
        if WIDE:
            top = tl.cast(step, tl.int64)
        row = top * BLOCK_R + tl.arange(0, BLOCK_R)
        there = row < rows
        offsets, mask = _place(top * BLOCK_R, rows, columns, CHUNKS, BLOCK_R, LANES)
        g = tl.reshape(_load(grad_ptr, offsets, mask, MASKED), (CHUNKS, BLOCK_R, LANES))
        x = tl.reshape(_load(x_ptr, offsets, mask, MASKED), (CHUNKS, BLOCK_R, LANES))
        mean = tl.load(stats_ptr + row, mask=there, other=0.0)
        rstd = tl.load(stats_ptr + rows + row, mask=there, other=0.0)
        # Outside of the matrix it is no zero, but g is.
        normal = (x - _along(mean)) * _along(rstd)
        if GRAD_BIAS:
            sums += g
        if GRAD_WEIGHT:
            products += g * normal
        if GRAD_X:
            g *= weight
            constant = _row_sum(g, SHARED) * share
            slope = _row_sum(g * normal, SHARED) * share
            out = (g - _along(constant) - normal * _along(slope)) * _along(rstd)
            _store(grad_x_ptr, offsets, out, mask, MASKED)
    if GRAD_WEIGHT:
        at = parts_ptr + part * columns + column
        tl.store(at, tl.sum(products, axis=1), mask=inside)
    if GRAD_BIAS:
        at = parts_ptr + (parts + part) * columns + column
        tl.store(at, tl.sum(sums, axis=1), mask=inside)


@triton.jit
def layer_norm_sums_kernel(
    parts_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    columns,
    parts,
    GRAD_WEIGHT: tl.constexpr,
    GRAD_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The parts' sums, in a fixed order: gradients of weight and bias."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < columns
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, parts, BLOCK_R):
        part = start + tl.arange(0, BLOCK_R)
        mask = (part < parts)[:, None] & inside[None, :]
        at = part[:, None] * columns + column[None, :]
        if GRAD_WEIGHT:
            products += tl.load(parts_ptr + at, mask=mask, other=0.0)
        if GRAD_BIAS:
            sums += tl.load(parts_ptr + parts * columns + at, mask=mask, other=0.0)
    if GRAD_WEIGHT:
        total = tl.sum(products, axis=0).to(grad_weight_ptr.dtype.element_ty)
        tl.store(grad_weight_ptr + column, total, mask=inside)
    if GRAD_BIAS:
        total = tl.sum(sums, axis=0).to(grad_bias_ptr.dtype.element_ty)
        tl.store(grad_bias_ptr + column, total, mask=inside)
