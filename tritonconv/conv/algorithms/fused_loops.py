"""The sums of fused forward products: over one input under a prologue, or over two at once.

Loops run over channel blocks (outer) and filter taps (inner), as those of the plain product do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import inside, matmul_step, tap_offset, tap_position


@triton.jit
def _window(
    tap,
    first,
    mask,
    in_size,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHECK_BOUNDS: tl.constexpr,
):
    """A tap's (t, r, s), the same in pixels, the positions it meets, and which are in the map."""
    t, r, s = tap_position(tap, KERNEL_D, KERNEL_H, KERNEL_W)
    step = (t * DILATION_D, r * DILATION_H, s * DILATION_W)
    at = (first[0] + step[0], first[1] + step[1], first[2] + step[2])
    if CHECK_BOUNDS:
        mask = inside(mask, at[0], at[1], at[2], in_size)
    return (t, r, s), step, at, mask


@triton.jit
def add_products(
    acc,
    x_ptr,
    w_ptr,
    x_rows,
    w_columns,
    image,
    first,
    mask_m,
    mask_n,
    in_size,
    x_strides,
    w_strides,
    first_channel,
    pro_ptrs,
    pro_strides,
    CHANNELS: tl.constexpr,
    OFFSET: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHECK_BOUNDS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + Σ_{c,r} g(x)[n, c, p·stride + r·dilation − pad] · w[o, OFFSET + c, r] of one input."""
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    k = tl.arange(0, BLOCK_K)
    for step in range(tl.cdiv(CHANNELS, BLOCK_K) * TAPS):
        tap, hop, at, mask_x = _window(
            step % TAPS,
            first,
            mask_m,
            in_size,
            KERNEL_D,
            KERNEL_H,
            KERNEL_W,
            DILATION_D,
            DILATION_H,
            DILATION_W,
            CHECK_BOUNDS,
        )
        if CHANNELS <= BLOCK_K:
            # One block: what the prologue reads per channel does not change in the loop.
            c = k
        else:
            c = (step // TAPS) * BLOCK_K + k
        x_tap = tap_offset(x_strides, hop[0], hop[1], hop[2])
        x_offsets = (x_rows + x_tap)[:, None] + (c * x_strides[1])[None, :]
        w_tap = tap_offset(w_strides, tap[0], tap[1], tap[2])
        w_offsets = ((OFFSET + c) * w_strides[1] + w_tap)[:, None] + w_columns[None, :]
        if CHANNELS % BLOCK_K == 0:
            valid = mask_x[:, None]
            channel_mask = tl.full((1, 1), True, tl.int1)
            b = tl.load(w_ptr + w_offsets, mask=mask_n[None, :], other=0.0)
        else:
            mask_c = c < CHANNELS
            valid = mask_x[:, None] & mask_c[None, :]
            channel_mask = mask_c[None, :]
            b = tl.load(w_ptr + w_offsets, mask=mask_c[:, None] & mask_n[None, :], other=0.0)
        a = tl.load(x_ptr + x_offsets, mask=valid, other=0.0)
        if PROLOGUE is not None:
            # A mask over rows would make every read of a vector one of a whole tile.
            if PER_CHANNEL:
                read = channel_mask
            else:
                read = valid
            value = PROLOGUE(
                a.to(tl.float32),
                image[:, None],
                (first_channel + c)[None, :],
                at[0][:, None],
                at[1][:, None],
                at[2][:, None],
                read,
                pro_ptrs,
                pro_strides,
            )
            # Padding is of what the prologue returns: zeros, not its value of zero.
            a = tl.where(valid, value, 0.0).to(a.dtype)
        acc = matmul_step(a, b, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def add_both(
    acc,
    x_ptr,
    second_ptr,
    w_ptr,
    x_rows,
    second_rows,
    w_columns,
    first,
    mask_m,
    mask_n,
    in_size,
    x_strides,
    second_strides,
    w_strides,
    CHANNELS: tl.constexpr,
    SECOND: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHECK_BOUNDS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sums over both inputs in one loop, where blocks of channels divide either's."""
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    k = tl.arange(0, BLOCK_K)
    for step in range((CHANNELS + SECOND) // BLOCK_K * TAPS):
        tap, hop, _, mask_x = _window(
            step % TAPS,
            first,
            mask_m,
            in_size,
            KERNEL_D,
            KERNEL_H,
            KERNEL_W,
            DILATION_D,
            DILATION_H,
            DILATION_W,
            CHECK_BOUNDS,
        )
        begin = (step // TAPS) * BLOCK_K
        other = begin >= CHANNELS
        c = tl.where(other, begin - CHANNELS, begin) + k
        x_tap = tap_offset(x_strides, hop[0], hop[1], hop[2])
        second_tap = tap_offset(second_strides, hop[0], hop[1], hop[2])
        rows = tl.where(other, second_rows + second_tap, x_rows + x_tap)
        # A constant stride of one must stay a constant, or nothing is loaded as a vector.
        channels = tl.where(other, c * second_strides[1], c * x_strides[1])
        from_ptr = tl.where(other, second_ptr, x_ptr)
        w_tap = tap_offset(w_strides, tap[0], tap[1], tap[2])
        w_offsets = ((begin + k) * w_strides[1] + w_tap)[:, None] + w_columns[None, :]
        offsets = rows[:, None] + channels[None, :]
        a = tl.load(from_ptr + offsets, mask=mask_x[:, None], other=0.0)
        b = tl.load(w_ptr + w_offsets, mask=mask_n[None, :], other=0.0)
        acc = matmul_step(a, b, acc, PRECISION, UPCAST)
    return acc
