"""The gradient of the weight by programs that walk images, planes or rows of the map.

The pixels of a map are cut into blocks. A program keeps one block and walks the images, so that
offsets and bounds of its rows are computed once and a step of the loop only moves two pointers:
with a division per pixel and step the integer units, not the matrix units, set the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...runtime.operators import Config
from ...runtime.plan import KernelCall, LaunchPlan, Slot, Workspace
from ..problem import ConvProblem
from .common import (
    TileConfig,
    grouped_tile,
    lifted,
    matmul_step,
    pixel_offset,
    position,
    product_constexprs,
    slot_dtypes,
    spatial_strides,
    tap_offset,
    tap_position,
    widen_all,
)
from .product_wgrad import reduction_call
from .tiles import flat_map, needs_bounds


@triton.jit
def within(mask, index, size):
    """``mask`` and that an index lies on an axis."""
    return mask & (index >= 0) & (index < size)


@triton.jit
def walked_wgrad_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    batch,
    steps,
    step_size,
    block_size,
    blocks,
    blocks_per_split,
    steps_per_split,
    block_splits,
    in_size,
    x_strides,
    w_strides,
    y_strides,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    GROUPS: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    FLAT: tl.constexpr,
    WALK: tl.constexpr,
    FLAT_MAP: tl.constexpr,
    CHECK_BOUNDS: tl.constexpr,
    EVEN_BLOCKS: tl.constexpr,
    IMAGES: tl.constexpr,
    EVEN_IMAGES: tl.constexpr,
    TAPS: tl.constexpr,
    CACHED: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """grad_w[o, c, r] = Σ_{n,p} grad_y[n, o, p] · x[n, c, p·stride + r·dilation − pad].

    A pixel is (step, place): ``step_size`` holds the axes (after the image) that a step moves
    along, ``block_size`` those that a block of BLOCK_K places lies on, the other axes being one. A
    program computes TAPS neighbouring taps from the same rows of the gradient.
    """
    if WIDE:
        x_strides = widen_all(x_strides)
        w_strides = widen_all(w_strides)
        y_strides = widen_all(y_strides)
    ALL_TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    COLUMNS: tl.constexpr = ALL_TAPS * CHANNELS
    CHANNEL_TILES: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(1)
    split = tl.program_id(2)
    tile_m, tile_n = grouped_tile(
        tl.program_id(0),
        tl.cdiv(FILTERS, BLOCK_M),
        (ALL_TAPS // TAPS) * CHANNEL_TILES,
        GROUP_M,
    )
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < FILTERS
    out_channel = group * FILTERS + m
    first_tap = (tile_n // CHANNEL_TILES) * TAPS
    channel = (tile_n % CHANNEL_TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = channel < CHANNELS
    y_columns = out_channel * y_strides[1]
    x_columns = (group * CHANNELS + channel) * x_strides[1]
    if CACHED:
        # Copies of 16 bytes pass the L1 cache by, those of 8 bytes do not.
        x_columns = x_columns // CACHED * CACHED + x_columns % CACHED

    first_block = (split % block_splits) * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, blocks)
    first_step = (split // block_splits) * steps_per_split
    last_step = tl.minimum(first_step + steps_per_split, steps)
    if WIDE:
        first_step = first_step.to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    accs = ()
    for _i in tl.static_range(TAPS):
        accs += (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)  # type: ignore[assignment]
    for block in range(first_block, last_block):
        place = block * BLOCK_K + k
        on_image, plane, row, column = position(place, block_size)
        map_size = block_size[0] * block_size[1] * block_size[2]
        if IMAGES == 1:
            # The compiler sees neighbours in a map of one image, not in a remainder.
            on_image = place * 0
            valid = place < map_size
        else:
            on_image = place // map_size
            valid = on_image < IMAGES
        in_plane = plane * STRIDE_D
        in_row = row * STRIDE_H
        in_column = column * STRIDE_W
        if FLAT:
            y_rows = place * y_strides[4]
            x_rows = place * x_strides[4]
        else:
            x_rows = pixel_offset(x_strides, on_image, in_plane, in_row, in_column)
            if FLAT_MAP:
                pixel = place - on_image * map_size
                y_rows = on_image * y_strides[0] + pixel * y_strides[4]
            else:
                y_rows = pixel_offset(y_strides, on_image, plane, row, column)
        y_offsets = y_columns[:, None] + y_rows[None, :]
        x_offsets = x_rows[:, None] + x_columns[None, :]
        bounds = ()
        for i in tl.static_range(TAPS):
            lies = valid
            if CHECK_BOUNDS:
                down, over, along = tap_position(first_tap + i, KERNEL_D, KERNEL_H, KERNEL_W)
                if WALK < 1:
                    lies = within(lies, in_plane + (down * DILATION_D - PAD_D), in_size[0])
                if WALK < 2:
                    lies = within(lies, in_row + (over * DILATION_H - PAD_H), in_size[1])
                lies = within(lies, in_column + (along * DILATION_W - PAD_W), in_size[2])
            bounds += (lies,)  # type: ignore[assignment]
        for step in range(first_step, last_step):
            if FLAT:
                y_step = grad_ptr + step * BLOCK_K * y_strides[4]
                x_step = x_ptr + step * BLOCK_K * x_strides[4]
                present = step * BLOCK_K + k < batch
            else:
                at_image, at_plane, at_row, _none = position(step, step_size)
                at_image *= IMAGES
                y_step = grad_ptr + pixel_offset(y_strides, at_image, at_plane, at_row, 0)
                x_step = x_ptr + pixel_offset(
                    x_strides, at_image, at_plane * STRIDE_D, at_row * STRIDE_H, 0
                )
                present = at_image + on_image < batch
            mask_y = valid
            if not EVEN_IMAGES:
                mask_y = mask_y & present
            # Masks that cannot fail are left out: each one narrows what is loaded at once.
            if FILTERS % BLOCK_M != 0:
                a = tl.load(y_step + y_offsets, mask=mask_y[None, :] & mask_m[:, None], other=0.0)
            elif EVEN_IMAGES and EVEN_BLOCKS:
                a = tl.load(y_step + y_offsets)
            else:
                a = tl.load(y_step + y_offsets, mask=mask_y[None, :], other=0.0)
            sums = ()
            for i in tl.static_range(TAPS):
                t, r, s = tap_position(first_tap + i, KERNEL_D, KERNEL_H, KERNEL_W)
                plane_shift = t * DILATION_D - PAD_D
                row_shift = r * DILATION_H - PAD_H
                column_shift = s * DILATION_W - PAD_W
                x_tap = x_step + tap_offset(x_strides, plane_shift, row_shift, column_shift)
                mask_x = bounds[i]  # type: ignore[var-annotated]
                if not EVEN_IMAGES:
                    mask_x = mask_x & present
                if CHECK_BOUNDS and WALK >= 1:
                    mask_x = within(mask_x, at_plane * STRIDE_D + plane_shift, in_size[0])
                if CHECK_BOUNDS and WALK >= 2:
                    mask_x = within(mask_x, at_row * STRIDE_H + row_shift, in_size[1])
                if CHANNELS % BLOCK_N != 0:
                    b = tl.load(
                        x_tap + x_offsets, mask=mask_x[:, None] & mask_n[None, :], other=0.0
                    )
                elif EVEN_IMAGES and EVEN_BLOCKS and not CHECK_BOUNDS:
                    b = tl.load(x_tap + x_offsets)
                else:
                    b = tl.load(x_tap + x_offsets, mask=mask_x[:, None], other=0.0)
                total = matmul_step(a, b, accs[i], PRECISION, UPCAST)
                sums += (total,)  # type: ignore[assignment]
            accs = sums

    mask = mask_m[:, None] & mask_n[None, :]
    for i in tl.static_range(TAPS):
        if PARTIAL:
            base = split.to(tl.int64) * (GROUPS * FILTERS * COLUMNS)
            n = (first_tap + i) * CHANNELS + channel
            offsets = base + out_channel.to(tl.int64)[:, None] * COLUMNS + n[None, :]
            tl.store(out_ptr + offsets, accs[i], mask=mask)
        else:
            down, over, along = tap_position(first_tap + i, KERNEL_D, KERNEL_H, KERNEL_W)
            w_columns = channel * w_strides[1] + tap_offset(w_strides, down, over, along)
            offsets = (out_channel * w_strides[0])[:, None] + w_columns[None, :]
            tl.store(out_ptr + offsets, accs[i].to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class WalkedConfig(Config):
    """Tile of the product and how its pixels are walked.

    Attributes:
        block_m, block_n, block_k: filters, channels and pixels of a tile.
        num_warps, num_stages: of the kernel.
        group_m: rows of tiles whose columns are computed together.
        split_k: programs for one tile, about.
        taps: neighbouring taps that one program computes from the same rows of the gradient.
        walk: axes of the map that a step moves along, the images aside: 0 none, 1 depth, 2 depth
            and height.
        images: images on whose pixels a block lies, where a step moves by images only.
        cached: whether rows of the input may be kept in the L1 cache: taps share them.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    split_k: int = 1
    taps: int = 1
    walk: int = 0
    images: int = 1
    cached: int = 0

    @property
    def tile(self) -> TileConfig:
        """What all implicit products have."""
        return TileConfig(
            self.block_m,
            self.block_n,
            self.block_k,
            self.num_warps,
            self.num_stages,
            self.group_m,
            self.split_k,
        )


@dataclass(frozen=True)
class Walk:
    """How a config divides the pixels of a problem: steps × blocks, and their shares.

    Attributes:
        flat: a pixel is a row of a matrix, whatever its map: a step moves by one block.
        step_size, block_size: axes of steps and of blocks, the others one.
        steps, blocks: in all.
        steps_per_split, blocks_per_split: of one program.
        block_splits: parts of the blocks; the parts of the steps follow each other behind them.
        splits: programs for one tile.
    """

    flat: bool
    step_size: tuple[int, int, int]
    block_size: tuple[int, int, int]
    steps: int
    blocks: int
    steps_per_split: int
    blocks_per_split: int
    block_splits: int
    splits: int


_REFILL = 3
"""Steps that it costs to begin with another block of pixels: addresses, an empty pipeline."""


def is_flat(problem: ConvProblem) -> bool:
    """Whether pixels of both maps are rows of a matrix, one stride apart over all images."""
    return problem.pointwise and all(
        flat_map(problem.in_size, strides)
        and (problem.batch == 1 or strides[0] == math.prod(problem.in_size) * strides[-1])
        for strides in (problem.x_strides, problem.y_strides)
    )


def walk_of(problem: ConvProblem, config: WalkedConfig) -> Walk:
    """Divide the pixels as a config asks."""
    depth, height, width = lifted(problem.out_size, 1)
    if is_flat(problem):
        step_size, block_size = (1, 1, 1), (1, 1, config.block_k)
        steps, blocks = triton.cdiv(problem.out_pixels, config.block_k), 1
    else:
        sizes = (depth, height, width)
        ones = (1, 1, 1)
        step_size = lifted((*sizes[: config.walk], *ones[config.walk :]), 1)
        block_size = lifted((*ones[: config.walk], *sizes[config.walk :]), 1)
        images = config.images if config.walk == 0 else 1
        steps = triton.cdiv(problem.batch, images) * math.prod(step_size)
        blocks = triton.cdiv(images * math.prod(block_size), config.block_k)
    asked = max(1, min(config.split_k, steps * blocks))

    def longest(parts: int) -> tuple[int, int, int, int]:
        """Length of the longest program where the blocks are divided so."""
        per_block = triton.cdiv(blocks, parts)
        per_step = triton.cdiv(steps, max(1, asked // parts))
        return per_block * (per_step + _REFILL), parts, per_block, per_step

    parts = {*range(1, min(asked, blocks, 16) + 1), min(asked, blocks)}
    _, _, per_block, per_step = min(map(longest, sorted(parts)))
    block_splits = max(1, triton.cdiv(blocks, max(1, per_block)))
    return Walk(
        is_flat(problem),
        step_size,
        block_size,
        steps,
        blocks,
        per_step,
        per_block,
        block_splits,
        block_splits * max(1, triton.cdiv(steps, max(1, per_step))),
    )


def walked_plan(problem: ConvProblem, config: WalkedConfig, *, whole: bool = True) -> LaunchPlan:
    """Plan of the gradient of the weight: split over pixels, then a fixed-order sum.

    Args:
        problem: the gradient of the weight.
        config: its config.
        whole: otherwise the plan is the product alone, whose parts are all in ``partial``.
    """
    walk = walk_of(problem, config)
    images = config.images if config.walk == 0 and not walk.flat else 1
    taps = config.taps
    channel_tiles = triton.cdiv(problem.channels_per_group, config.block_n)
    tiles = triton.cdiv(problem.filters_per_group, config.block_m)
    tiles *= problem.taps // taps * channel_tiles
    partial = walk.splits > 1 or not whole
    counted = problem.out_pixels if walk.flat else problem.batch
    even = counted % (config.block_k if walk.flat else images) == 0
    places = images * math.prod(walk.block_size)
    call = KernelCall(
        walked_wgrad_kernel,
        (tiles, problem.groups, walk.splits),
        (
            Slot("grad_output"),
            Slot("input"),
            Slot("partial" if partial else "grad_weight"),
            counted,
            walk.steps,
            walk.step_size,
            walk.block_size,
            walk.blocks,
            walk.blocks_per_split,
            walk.steps_per_split,
            walk.block_splits,
            lifted(problem.in_size, 1),
            spatial_strides(problem.x_strides),
            spatial_strides(problem.w_strides),
            spatial_strides(problem.y_strides),
        ),
        {
            **product_constexprs(problem, config.tile),
            "GROUPS": problem.groups,
            "FLAT": walk.flat,
            "WALK": config.walk,
            "FLAT_MAP": flat_map(problem.out_size, problem.y_strides),
            "CHECK_BOUNDS": needs_bounds(problem),
            "EVEN_BLOCKS": places % config.block_k == 0,
            "IMAGES": images,
            "EVEN_IMAGES": even,
            "TAPS": taps,
            "CACHED": 8 // problem.dtype.itemsize if config.cached else 0,
            "PARTIAL": partial,
        },
        config.num_warps,
        config.num_stages,
    )
    if not partial or not whole:
        return LaunchPlan((call,), slot_dtypes(problem))
    columns = problem.taps * problem.channels_per_group
    space = Workspace("partial", (walk.splits, problem.out_channels, columns), torch.float32)
    dtypes = {**slot_dtypes(problem), "partial": torch.float32}
    return LaunchPlan((call, reduction_call(problem, walk.splits)), dtypes, (space,))
