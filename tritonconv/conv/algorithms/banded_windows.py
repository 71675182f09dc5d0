"""What kernels of banded products share: windows, the taps between their pixels and a unit's.

A unit is a box of result pixels, numbered j row by row, and its window the source pixels that they
read. Distances between the two are exact multiples of the dilation where a tap is.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def within(index, size):
    """0 <= index < size, in one comparison."""
    return index.to(tl.uint32) < size * tl.full((), 1, tl.uint32)


@triton.jit
def in_half_vectors(index, END: tl.constexpr):
    """A mask that never fails and differs every 8 bytes as far as the compiler knows.

    It copies 16 bytes past the L1 cache and 8 bytes through it.
    """
    return index // 4 < END // 4


@triton.jit
def window_step(
    step,
    k,
    CHUNKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WINDOW_D: tl.constexpr,
    WINDOW_H: tl.constexpr,
    HOP_D: tl.constexpr,
    HOP_H: tl.constexpr,
):
    """(plane, row) of the window's pixels, and elements of their row, that a step of the sum reads.

    A row takes CHUNKS steps; ``k`` are the elements of one.
    """
    if CHUNKS == 1:
        line = step
        e = k
    else:
        line = step // CHUNKS
        e = (step % CHUNKS) * BLOCK_K + k
    if WINDOW_D == 1:
        d = 0
        h = line * HOP_H
    else:
        d = (line // WINDOW_H) * HOP_D
        h = (line % WINDOW_H) * HOP_H
    return d, h, e


@triton.jit
def below_ends(
    mask,
    plane,
    row,
    column,
    size,
    OVERHANG_D: tl.constexpr,
    OVERHANG_H: tl.constexpr,
    OVERHANG_W: tl.constexpr,
):
    """``mask`` and that pixels of units lie on the map, on the axes on which a tile overhangs."""
    if OVERHANG_D:
        mask = mask & (plane < size[0])
    if OVERHANG_H:
        mask = mask & (row < size[1])
    if OVERHANG_W:
        mask = mask & (column < size[2])
    return mask


@triton.jit
def distances(
    j,
    line,
    e,
    CHANNELS: tl.constexpr,
    RUN_H: tl.constexpr,
    RUN_W: tl.constexpr,
    WINDOW_H: tl.constexpr,
    HOP_D: tl.constexpr,
    HOP_H: tl.constexpr,
):
    """Pixels (d, h, w) from pixel j of a unit to that of element e of a line of its window."""
    d = (line // WINDOW_H) * HOP_D - j // (RUN_W * RUN_H)
    h = (line % WINDOW_H) * HOP_H - (j // RUN_W) % RUN_H
    w = e // CHANNELS - j % RUN_W
    return d, h, w


@triton.jit
def on_taps(
    mask,
    distance,
    tap,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
):
    """``mask`` and that a distance is that of a tap (t, r, s), its quotient by the dilation."""
    d, h, w = distance
    t, r, s = tap
    mask = mask & (d >= 0) & (d % DILATION_D == 0) & (t < KERNEL_D)
    mask = mask & (h >= 0) & (h % DILATION_H == 0) & (r < KERNEL_H)
    return mask & (w >= 0) & (w % DILATION_W == 0) & (s < KERNEL_W)


@triton.jit
def place_between(
    j,
    t,
    r,
    s,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    RUN_H: tl.constexpr,
    RUN_W: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    HOP_D: tl.constexpr,
    HOP_H: tl.constexpr,
):
    """The pixel of the window (j, tap) that pixel j of a unit meets with a tap: a diagonal."""
    d = (j // (RUN_W * RUN_H))[:, None] + (t * DILATION_D)[None, :]
    h = ((j // RUN_W) % RUN_H)[:, None] + (r * DILATION_H)[None, :]
    w = (j % RUN_W)[:, None] + (s * DILATION_W)[None, :]
    return (d // HOP_D * WINDOW_H + h // HOP_H) * WINDOW_W + w


@triton.jit
def add_tap(
    offsets,
    w_strides,
    t,
    r,
    s,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    FLIPPED: tl.constexpr,
):
    """Offsets of a tap in the weight: with FLIPPED the source meets the last tap first."""
    if FLIPPED:
        offsets += (KERNEL_D - 1 - t) * w_strides[2] + (KERNEL_H - 1 - r) * w_strides[3]
        offsets += (KERNEL_W - 1 - s) * w_strides[4]
    else:
        offsets += t * w_strides[2] + r * w_strides[3] + s * w_strides[4]
    return offsets
