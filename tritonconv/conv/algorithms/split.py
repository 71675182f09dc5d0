"""Products whose sum is split: small maps have too few tiles for a GPU.

Every part of the sum is written in float32, and the parts are added in a fixed order before the
epilogue: by the program that stores the last part of a tile, or by a second kernel. No
floating-point atomics: programs are counted, sums are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ...runtime.plan import Arg, KernelCall, LaunchPlan, Slot, Workspace
from ..problem import ConvProblem, Direction
from .common import (
    MAX_GRID_Z,
    NO_EPILOGUE,
    EpilogueArguments,
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
    """Write one part of the sums of a tile to (split, pixel, channel): for a second kernel."""
    rows = (split.to(tl.int64) * pixels + pixel) * channels
    tl.store(partial_ptr + rows[:, None] + channel[None, :], acc, mask=mask)


@triton.jit
def store_part(acc, parts_ptr, tile, split, SPLITS: tl.constexpr):
    """Write one part of the sums of a tile, whole and unmasked, to (tile, split, row, column)."""
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = acc.shape[1]
    base = parts_ptr + (tile.to(tl.int64) * SPLITS + split) * (ROWS * COLUMNS)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    tl.store(base + row[:, None] * COLUMNS + column[None, :], acc)


@triton.jit
def add_parts(parts_ptr, tile, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of what :func:`store_part` wrote for a tile, in the order of the parts."""
    base = parts_ptr + tile.to(tl.int64) * (SPLITS * ROWS * COLUMNS)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    parts = base + row[:, None] * COLUMNS + column[None, :]
    total = tl.load(parts, cache_modifier=".cg")
    if SPLITS <= 16:
        for _ in tl.static_range(SPLITS - 1):
            parts += ROWS * COLUMNS
            total += tl.load(parts, cache_modifier=".cg")
    else:
        for _ in range(SPLITS - 1):
            parts += ROWS * COLUMNS
            total += tl.load(parts, cache_modifier=".cg")
    return total


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


def splits_of(problem: ConvProblem, config: TileConfig) -> int:
    """Parts of the sum: no more than it has steps, or a grid has room for beside the phases."""
    phases = math.prod(problem.stride) if problem.direction is Direction.DGRAD else 1
    steps = reduction_steps(problem, config.block_k)
    return max(1, min(config.split_k, steps, MAX_GRID_Z // phases))


@dataclass(frozen=True)
class SplitSum:
    """How the sum of a product over pixels is split, and what its kernel is given for that.

    Attributes:
        parts: of the sum; one: whole.
        one_launch: whether the last program of a tile adds the parts.
        epilogue: what the kernel applies itself.
    """

    parts: int
    one_launch: bool
    epilogue: EpilogueArguments

    @classmethod
    def of(cls, problem: ConvProblem, config: TileConfig) -> SplitSum:
        """As a config asks and the problem allows."""
        parts = splits_of(problem, config)
        one_launch = parts > 1 and config.one_launch == 1
        whole = parts == 1 or one_launch
        return cls(parts, one_launch, epilogue_arguments(problem) if whole else NO_EPILOGUE)

    def arguments(self, problem: ConvProblem) -> tuple[Arg, ...]:
        """Result, saved accumulator, parts, counters; pointers and strides of the epilogue."""
        out = slot_names(problem.direction)[2]
        return (
            Slot(out),
            Slot("acc" if self.epilogue.save_acc else out),
            Slot("partial" if self.parts > 1 else out),
            Slot("arrivals" if self.one_launch else out),
            self.epilogue.pointers,
            self.epilogue.strides,
        )

    def constexprs(self) -> dict[str, Any]:
        """What the kernel is specialised on."""
        return {
            "SPLITS": self.parts,
            "ONE_LAUNCH": self.one_launch,
            "EPILOGUE": self.epilogue.function,
            "SAVE_ACC": self.epilogue.save_acc,
        }


def finished(
    problem: ConvProblem, config: TileConfig, call: KernelCall, split: SplitSum
) -> LaunchPlan:
    """The plan of a product over pixels, with what a split sum needs besides its kernel.

    Args:
        problem, config: what the plan is of.
        call: the product, on a grid of (tiles, groups, phases × parts).
        split: how its sum is split.
    """
    dtypes = slot_dtypes(problem)
    splits = split.parts
    if splits == 1:
        return LaunchPlan((call,), dtypes)
    dtypes["partial"] = torch.float32
    if split.one_launch:
        tiles = math.prod(call.grid) // splits
        dtypes["arrivals"] = torch.int32
        shape = (tiles, splits, config.block_m, config.block_n)
        parts = Workspace("partial", shape, torch.float32)
        arrivals = Workspace("arrivals", (tiles,), torch.int32, counters=True)
        return LaunchPlan((call,), dtypes, (parts, arrivals))
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
    return LaunchPlan((call, finish), dtypes, (space,))
