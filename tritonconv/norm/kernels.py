"""Kernels of batch normalisation: two sums over every channel, two elementwise passes.

A sum is shared by several programs. Each keeps the sums of its tiles in registers and writes one
number a channel; the program that arrives last adds these in a fixed order, so that one launch is
enough and a repeated call gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..runtime.last_arrival import last_to_arrive


@triton.jit
def _whole(extent, UNIT: tl.constexpr):
    """An extent, so written that the compiler sees it is a multiple of ``UNIT``."""
    if UNIT == 1:
        return extent
    else:
        return extent // UNIT * UNIT


@triton.jit
def _load(ptr, offsets, mask, MASKED: tl.constexpr):
    """A tile in float32."""
    if MASKED:
        return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.load(ptr + offsets).to(tl.float32)


@triton.jit
def _keep(value, mask, MASKED: tl.constexpr):
    """The value, zero outside the map."""
    if MASKED:
        return tl.where(mask, value, 0.0)
    else:
        return value


@triton.jit
def _vector(ptr, channel, mask, HAS: tl.constexpr, default):
    """A number for every channel in float32."""
    if HAS:
        return tl.load(ptr + channel, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.full(channel.shape, default, tl.float32)


@triton.jit
def _spread(vector, LAST: tl.constexpr):
    """A vector over channels against a tile."""
    if LAST:
        return vector[None, :]
    else:
        return vector[:, None]


@triton.jit
def _add_up(tile, LAST: tl.constexpr):
    """Sum of a tile for every channel of the program."""
    if LAST:
        return tl.sum(tile, axis=0)
    else:
        return tl.sum(tl.reshape(tile, (tile.shape[0] * tile.shape[1], 1)), axis=0)


@triton.jit
def _tile(
    step,
    channel,
    images,
    channels,
    pixels,
    LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Offsets and mask of a tile of a sum, and how many values of a channel it has."""
    if WIDE:
        step = tl.cast(step, tl.int64)
        images = tl.cast(images, tl.int64)
    if LAST:
        rows = images * pixels
        row = step * BLOCK_R + tl.arange(0, BLOCK_R)
        offsets = row[:, None] * channels + channel[None, :]
        mask = (row < rows)[:, None] & (channel < channels)[None, :]
        count = tl.minimum(rows - step * BLOCK_R, BLOCK_R)
    else:
        pixels = _whole(pixels, UNIT)
        across = tl.cdiv(pixels, BLOCK_C)
        top = step // across * BLOCK_R
        left = step % across * BLOCK_C
        image = top + tl.arange(0, BLOCK_R)
        pixel = left + tl.arange(0, BLOCK_C)
        offsets = (image * channels + channel)[:, None] * pixels + pixel[None, :]
        mask = (image < images)[:, None] & (pixel < pixels)[None, :]
        count = tl.minimum(images - top, BLOCK_R) * tl.minimum(pixels - left, BLOCK_C)
    return offsets, mask, count.to(tl.float32)


@triton.jit
def _share(steps, parts, tiles):
    """A program's block of channels, which part of it, first and last (exclusive) step."""
    program = tl.program_id(0)
    tile = program % tiles
    part = program // tiles
    first = (part.to(tl.int64) * steps // parts).to(tl.int32)
    last = ((part + 1).to(tl.int64) * steps // parts).to(tl.int32)
    return tile, part, first, last


@triton.jit
def statistics_kernel(
    x_ptr,
    mean_ptr,
    var_ptr,
    running_mean_ptr,
    running_var_ptr,
    tracked_ptr,
    parts_ptr,
    arrivals_ptr,
    images,
    channels,
    pixels,
    steps,
    parts,
    tiles,
    share,
    unbias,
    momentum,
    LAST: tl.constexpr,
    TRACK: tl.constexpr,
    COUNT: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    SINGLE: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
    MERGE: tl.constexpr,
    STAGES: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Mean and biased variance of every channel; the running ones move.

    Every program sums distances, and their squares, from the mean of its first tile; parts are
    merged by Chan's formula. Nothing large is subtracted from anything large.
    """
    if LAST:
        channels = _whole(channels, UNIT)
    tile, part, first, last = _share(steps, parts, tiles)
    channel = tile * WIDTH + tl.arange(0, WIDTH)
    inside = channel < channels
    offsets, mask, count = _tile(
        first, channel, images, channels, pixels, LAST, BLOCK_R, BLOCK_C, WIDE, UNIT
    )
    x = _load(x_ptr, offsets, mask, MASKED)
    shift = _add_up(x, LAST) / count
    origin = _spread(shift, LAST)
    distance = _keep(x - origin, mask, MASKED)
    sums = distance
    squares = distance * distance
    for step in tl.range(first + 1, last, num_stages=STAGES):
        offsets, mask, more = _tile(
            step, channel, images, channels, pixels, LAST, BLOCK_R, BLOCK_C, WIDE, UNIT
        )
        x = _load(x_ptr, offsets, mask, MASKED)
        distance = _keep(x - origin, mask, MASKED)
        sums += distance
        squares += distance * distance
        count += more
    total = _add_up(sums, LAST)
    mean = shift + total / count
    scatter = _add_up(squares, LAST) - total * total / count
    complete = True
    if not SINGLE:
        means_ptr = parts_ptr
        scatters_ptr = parts_ptr + parts * channels
        counts_ptr = parts_ptr + 2 * parts * channels + tile * parts
        tl.store(means_ptr + part * channels + channel, mean, mask=inside)
        tl.store(scatters_ptr + part * channels + channel, scatter, mask=inside)
        tl.store(counts_ptr + part, count)
        complete = last_to_arrive(arrivals_ptr + tile, parts)
        if complete:
            shift = tl.load(means_ptr + channel, mask=inside, other=0.0, cache_modifier=".cg")
            moved = tl.zeros((MERGE, WIDTH), tl.float32)
            scattered = tl.zeros((MERGE, WIDTH), tl.float32)
            for start in range(0, parts, MERGE):
                which = start + tl.arange(0, MERGE)
                there = (which < parts)[:, None] & inside[None, :]
                at = which[:, None] * channels + channel[None, :]
                weight = tl.load(
                    counts_ptr + which, mask=which < parts, other=0.0, cache_modifier=".cg"
                )[:, None]
                means = tl.load(means_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
                own = tl.load(scatters_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
                away = means - shift[None, :]
                moved += weight * away
                scattered += own + weight * away * away
            total = tl.sum(moved, axis=0)
            mean = shift + total * share
            scatter = tl.sum(scattered, axis=0) - total * total * share
    if complete:
        # tl.maximum would make a number of a NaN.
        variance = tl.where(scatter < 0, 0.0, scatter) * share
        tl.store(mean_ptr + channel, mean, mask=inside)
        tl.store(var_ptr + channel, variance, mask=inside)
        if TRACK:
            factor = momentum
            if CUMULATIVE:
                factor = 1.0 / tl.load(tracked_ptr).to(tl.float32)
            old = tl.load(running_mean_ptr + channel, mask=inside).to(tl.float32)
            new = old * (1.0 - factor) + mean * factor
            tl.store(
                running_mean_ptr + channel, new.to(running_mean_ptr.dtype.element_ty), mask=inside
            )
            old = tl.load(running_var_ptr + channel, mask=inside).to(tl.float32)
            new = old * (1.0 - factor) + variance * unbias * factor
            tl.store(
                running_var_ptr + channel, new.to(running_var_ptr.dtype.element_ty), mask=inside
            )
        if COUNT:
            if tile == 0:
                tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)


@triton.jit
def _normalised(x, mean, scale, shift, residual_ptr, offsets, mask, RESIDUAL, MASKED, LAST):
    """What the activation is applied to."""
    z = (x - _spread(mean, LAST)) * _spread(scale, LAST) + _spread(shift, LAST)
    if RESIDUAL:
        z += _load(residual_ptr, offsets, mask, MASKED)
    return z


@triton.jit
def gradient_sums_kernel(
    grad_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    sums_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    parts_ptr,
    arrivals_ptr,
    images,
    channels,
    pixels,
    steps,
    parts,
    tiles,
    eps,
    DERIVATIVE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GRAD_WEIGHT: tl.constexpr,
    GRAD_BIAS: tl.constexpr,
    LAST: tl.constexpr,
    SINGLE: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
    MERGE: tl.constexpr,
    STAGES: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Σ g and Σ g·x̂ of every channel, g being the gradient in front of the activation."""
    if LAST:
        channels = _whole(channels, UNIT)
    tile, part, first, last = _share(steps, parts, tiles)
    channel = tile * WIDTH + tl.arange(0, WIDTH)
    inside = channel < channels
    mean = _vector(mean_ptr, channel, inside, True, 0.0)
    rstd = tl.rsqrt(_vector(var_ptr, channel, inside, True, 0.0) + eps)
    scale = rstd * _vector(weight_ptr, channel, inside, WEIGHT, 1.0)
    shift = _vector(bias_ptr, channel, inside, BIAS, 0.0)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        offsets, mask, _ = _tile(
            step, channel, images, channels, pixels, LAST, BLOCK_R, BLOCK_C, WIDE, UNIT
        )
        g = _load(grad_ptr, offsets, mask, MASKED)
        x = _load(x_ptr, offsets, mask, MASKED)
        if DERIVATIVE is not None:
            z = _normalised(
                x, mean, scale, shift, residual_ptr, offsets, mask, RESIDUAL, MASKED, LAST
            )
            # What is computed of zeros outside the map may be infinite.
            g = _keep(DERIVATIVE(z, g, None, None, None), mask, MASKED)
        sums += g
        products += _keep(g * (x - _spread(mean, LAST)), mask, MASKED)
    total = _add_up(sums, LAST)
    product = _add_up(products, LAST)
    complete = True
    if not SINGLE:
        products_ptr = parts_ptr + parts * channels
        tl.store(parts_ptr + part * channels + channel, total, mask=inside)
        tl.store(products_ptr + part * channels + channel, product, mask=inside)
        complete = last_to_arrive(arrivals_ptr + tile, parts)
        if complete:
            all_sums = tl.zeros((MERGE, WIDTH), tl.float32)
            all_products = tl.zeros((MERGE, WIDTH), tl.float32)
            for start in range(0, parts, MERGE):
                which = start + tl.arange(0, MERGE)
                there = (which < parts)[:, None] & inside[None, :]
                at = which[:, None] * channels + channel[None, :]
                all_sums += tl.load(parts_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
                all_products += tl.load(
                    products_ptr + at, mask=there, other=0.0, cache_modifier=".cg"
                )
            total = tl.sum(all_sums, axis=0)
            product = tl.sum(all_products, axis=0)
    if complete:
        product *= rstd
        tl.store(sums_ptr + channel, total, mask=inside)
        tl.store(sums_ptr + channels + channel, product, mask=inside)
        if GRAD_WEIGHT:
            tl.store(
                grad_weight_ptr + channel,
                product.to(grad_weight_ptr.dtype.element_ty),
                mask=inside,
            )
        if GRAD_BIAS:
            tl.store(grad_bias_ptr + channel, total.to(grad_bias_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _place(
    height,
    width,
    channels,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Offsets, mask and channels of a tile of the matrix that an elementwise kernel walks."""
    width = _whole(width, UNIT)
    across = tl.cdiv(width, BLOCK_C)
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    row = program // across * BLOCK_R + tl.arange(0, BLOCK_R)
    column = program % across * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets = row[:, None] * width + column[None, :]
    mask = (row < height)[:, None] & (column < width)[None, :]
    if LAST:
        channel = column
        inside = column < width
    else:
        channel = row % channels
        inside = row < height
    return offsets, mask, channel, inside


@triton.jit
def apply_kernel(
    x_ptr,
    y_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    height,
    width,
    channels,
    eps,
    FUNCTION: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    LAST: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNIT: tl.constexpr,
):
    """y = f(weight · (x − mean) / √(var + eps) + bias + residual)."""
    offsets, mask, channel, inside = _place(
        height, width, channels, LAST, WIDE, BLOCK_R, BLOCK_C, UNIT
    )
    x = _load(x_ptr, offsets, mask, MASKED)
    mean = _vector(mean_ptr, channel, inside, True, 0.0)
    scale = tl.rsqrt(_vector(var_ptr, channel, inside, True, 0.0) + eps)
    scale *= _vector(weight_ptr, channel, inside, WEIGHT, 1.0)
    shift = _vector(bias_ptr, channel, inside, BIAS, 0.0)
    z = _normalised(x, mean, scale, shift, residual_ptr, offsets, mask, RESIDUAL, MASKED, LAST)
    if FUNCTION is not None:
        z = FUNCTION(z, None, None, None)
    if MASKED:
        tl.store(y_ptr + offsets, z.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(y_ptr + offsets, z.to(y_ptr.dtype.element_ty))


@triton.jit
def gradients_kernel(
    grad_ptr,
    x_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    sums_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    height,
    width,
    channels,
    eps,
    share,
    DERIVATIVE: tl.constexpr,
    BATCH: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GRAD_X: tl.constexpr,
    GRAD_RESIDUAL: tl.constexpr,
    LAST: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNIT: tl.constexpr,
):
    """dx = weight / √(var + eps) · (g − (Σ g + x̂ · Σ g·x̂) / R), and g for the residual.

    Statistics that are not those of the batch are constants: without the sums, then.
    """
    offsets, mask, channel, inside = _place(
        height, width, channels, LAST, WIDE, BLOCK_R, BLOCK_C, UNIT
    )
    g = _load(grad_ptr, offsets, mask, MASKED)
    x = _load(x_ptr, offsets, mask, MASKED)
    mean = _vector(mean_ptr, channel, inside, True, 0.0)
    rstd = tl.rsqrt(_vector(var_ptr, channel, inside, True, 0.0) + eps)
    scale = rstd * _vector(weight_ptr, channel, inside, WEIGHT, 1.0)
    if DERIVATIVE is not None:
        shift = _vector(bias_ptr, channel, inside, BIAS, 0.0)
        z = _normalised(x, mean, scale, shift, residual_ptr, offsets, mask, RESIDUAL, MASKED, LAST)
        g = DERIVATIVE(z, g, None, None, None)
    if GRAD_RESIDUAL:
        out = g.to(grad_residual_ptr.dtype.element_ty)
        if MASKED:
            tl.store(grad_residual_ptr + offsets, out, mask=mask)
        else:
            tl.store(grad_residual_ptr + offsets, out)
    if GRAD_X:
        if BATCH:
            constant = _vector(sums_ptr, channel, inside, True, 0.0) * share
            slope = _vector(sums_ptr + channels, channel, inside, True, 0.0) * share * rstd
            g -= _spread(constant, LAST) + (x - _spread(mean, LAST)) * _spread(slope, LAST)
        out = (g * _spread(scale, LAST)).to(grad_x_ptr.dtype.element_ty)
        if MASKED:
            tl.store(grad_x_ptr + offsets, out, mask=mask)
        else:
            tl.store(grad_x_ptr + offsets, out)
