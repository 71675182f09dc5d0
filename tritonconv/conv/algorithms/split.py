"""Products whose sum is split: small maps have too few tiles for a GPU.

Every part of the sum is written in float32 and the parts are added in a fixed order by a second
kernel, which applies the epilogue: no atomics.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...runtime.plan import KernelCall, LaunchPlan, Slot, Workspace
from ..problem import ConvProblem, Direction
from .common import (
    MAX_GRID_Z,
    TileConfig,
    epilogue_arguments,
    lifted,
    pixel_offset,
    pixels_of,
    position,
    slot_dtypes,
    slot_names,
    spatial_strides,
    store_result,
    widen,
    widen_all,
)
from .tiles import reduction_steps


@triton.jit
def split_range(steps, split, SPLITS: tl.constexpr):
    """First and last step (exclusive) of one part of a sum."""
    if SPLITS == 1:
        first = 0
        last = steps
    else:
        each = tl.cdiv(steps, SPLITS)
        first = tl.minimum(split * each, steps)
        last = tl.minimum(first + each, steps)
    return first, last


@triton.jit
def store_partial(acc, partial_ptr, split, pixel, pixels, channel, channels, mask):
    """Write one part of the sums of a tile to (split, pixel, channel)."""
    rows = (split.to(tl.int64) * pixels + pixel) * channels
    tl.store(partial_ptr + rows[:, None] + channel[None, :], acc, mask=mask)


@triton.jit
def _finish_kernel(
    partial_ptr,
    out_ptr,
    acc_ptr,
    extra_ptrs,
    extra_strides,
    batch,
    size,
    strides,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SAVE_ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[n, c, p] = f(Σ_split partial[split, (n, p), c], …), added in a fixed order."""
    tile = tl.program_id(0)
    if WIDE:
        tile = tile.to(tl.int64)
        batch = widen(batch)
        strides = widen_all(strides)
    pixels = pixels_of(batch, size)
    tiles_n = tl.cdiv(CHANNELS, BLOCK_N)
    m = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (m < pixels)[:, None] & (n < CHANNELS)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in tl.static_range(SPLITS):
        rows = (m + split * widen(pixels)) * CHANNELS
        acc += tl.load(partial_ptr + rows[:, None] + n[None, :], mask=mask, other=0.0)
    image, plane, row, column = position(m, size)
    out_rows = pixel_offset(strides, image, plane, row, column)
    store_result(
        acc,
        out_ptr,
        acc_ptr,
        out_rows[:, None] + (n * strides[1])[None, :],
        image[:, None],
        n[None, :],
        plane[:, None],
        row[:, None],
        column[:, None],
        mask,
        extra_ptrs,
        extra_strides,
        EPILOGUE,
        SAVE_ACC,
    )


def splittable(problem: ConvProblem) -> bool:
    """Whether the sum of a product over pixels may be split.

    On an H100 split input gradients of a problem with phases that no tap meets left some parts
    unwritten, probably as the loop divides by their number of taps. These stay whole, and so do
    all on three axes until a GPU has shown them right.
    """
    if problem.direction is not Direction.DGRAD:
        return True
    met = all(
        {tap * step % hop for tap in range(taps)} == set(range(hop))
        for taps, hop, step in zip(problem.kernel, problem.stride, problem.dilation, strict=True)
    )
    return met and len(problem.kernel) < 3


def splits_of(problem: ConvProblem, config: TileConfig) -> int:
    """Parts of the sum: no more than it has steps, or a grid has room for beside the phases."""
    if not splittable(problem):
        return 1
    phases = math.prod(problem.stride) if problem.direction is Direction.DGRAD else 1
    steps = reduction_steps(problem, config.block_k)
    return max(1, min(config.split_k, steps, MAX_GRID_Z // phases))


def finished(problem: ConvProblem, call: KernelCall, splits: int) -> LaunchPlan:
    """The plan of a product over pixels, with the second kernel where its sum is split."""
    dtypes = slot_dtypes(problem)
    if splits == 1:
        return LaunchPlan((call,), dtypes)
    epilogue = epilogue_arguments(problem)
    forward = problem.direction is Direction.FORWARD
    batch, channels, *size = problem.result_shape
    pixels = problem.out_pixels if forward else problem.in_pixels
    out = slot_names(problem.direction)[2]
    block_n = min(64, triton.next_power_of_2(channels))
    block_m = max(1, min(512 // block_n, triton.next_power_of_2(pixels)))
    finish = KernelCall(
        _finish_kernel,
        (triton.cdiv(pixels, block_m) * triton.cdiv(channels, block_n), 1, 1),
        (
            Slot("partial"),
            Slot(out),
            Slot("acc" if epilogue.save_acc else out),
            epilogue.pointers,
            epilogue.strides,
            batch,
            lifted(size, 1),
            spatial_strides(problem.y_strides if forward else problem.x_strides),
        ),
        {
            "CHANNELS": channels,
            "SPLITS": splits,
            "EPILOGUE": epilogue.function,
            "SAVE_ACC": epilogue.save_acc,
            "WIDE": problem.wide,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        },
        num_warps=4,
    )
    space = Workspace("partial", (splits, pixels, channels), torch.float32)
    return LaunchPlan((call, finish), {**dtypes, "partial": torch.float32}, (space,))
