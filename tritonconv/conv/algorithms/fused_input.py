"""The forward product fused with its surroundings: a prologue, two inputs, statistics.

The kernel is the dense product (``product_forward``) with other ends: what it loads passes through
a generated function, or comes from one input after the other; what it stores is also summed up per
tile and channel. Rows are output pixels, columns output channels; the sum runs over channel blocks
(outer) and filter taps (inner).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import triton
import triton.language as tl

from ...codegen.program import ScalarFunction
from ...codegen.registry import program_of
from ...runtime.compat import TRITON_VERSION, interpreting
from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm
from ...runtime.plan import KernelCall, LaunchPlan, Slot, Workspace
from ...runtime.space import ConfigSpace, Footprint
from ..epilogue import COORDINATES
from ..fused_problem import FusedProblem
from ..prologue import per_channel
from .common import (
    TileConfig,
    epilogue_arguments,
    grouped_tile,
    inside,
    matmul_step,
    pixel_offset,
    pixels_of,
    position,
    product_constexprs,
    slot_dtypes,
    spatial_arguments,
    spatial_strides,
    tap_offset,
    tap_position,
    unsupported_dtype,
    unsupported_product,
    widen,
    widen_all,
)
from .footprints import product_footprint
from .fused_spaces import fused_space
from .tiles import needs_bounds


@triton.jit
def _add_products(
    acc,
    x_ptr,
    w_ptr,
    x_rows,
    w_columns,
    image,
    first_plane,
    first_row,
    first_column,
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
        t, r, s = tap_position(step % TAPS, KERNEL_D, KERNEL_H, KERNEL_W)
        if CHANNELS <= BLOCK_K:
            # One block: what the prologue reads per channel does not change in the loop.
            c = k
        else:
            c = (step // TAPS) * BLOCK_K + k
        x_tap = tap_offset(x_strides, t * DILATION_D, r * DILATION_H, s * DILATION_W)
        mask_x = mask_m
        if CHECK_BOUNDS:
            mask_x = inside(
                mask_x,
                first_plane + t * DILATION_D,
                first_row + r * DILATION_H,
                first_column + s * DILATION_W,
                in_size,
            )
        x_offsets = (x_rows + x_tap)[:, None] + (c * x_strides[1])[None, :]
        w_tap = tap_offset(w_strides, t, r, s)
        w_offsets = ((OFFSET + c) * w_strides[1] + w_tap)[:, None] + w_columns[None, :]
        if CHANNELS % BLOCK_K == 0:
            valid = mask_x[:, None]
            channel_mask = tl.full((1, 1), True, tl.int1)
            a = tl.load(x_ptr + x_offsets, mask=valid, other=0.0)
            b = tl.load(w_ptr + w_offsets, mask=mask_n[None, :], other=0.0)
        else:
            mask_c = c < CHANNELS
            valid = mask_x[:, None] & mask_c[None, :]
            channel_mask = mask_c[None, :]
            a = tl.load(x_ptr + x_offsets, mask=valid, other=0.0)
            b = tl.load(w_ptr + w_offsets, mask=mask_c[:, None] & mask_n[None, :], other=0.0)
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
                (first_plane + t * DILATION_D)[:, None],
                (first_row + r * DILATION_H)[:, None],
                (first_column + s * DILATION_W)[:, None],
                read,
                pro_ptrs,
                pro_strides,
            )
            # Padding is of what the prologue returns: zeros, not its value of zero.
            a = tl.where(valid, value, 0.0).to(a.dtype)
        acc = matmul_step(a, b, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def _add_both(
    acc,
    x_ptr,
    second_ptr,
    w_ptr,
    x_rows,
    second_rows,
    w_columns,
    first_plane,
    first_row,
    first_column,
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
        t, r, s = tap_position(step % TAPS, KERNEL_D, KERNEL_H, KERNEL_W)
        begin = (step // TAPS) * BLOCK_K
        other = begin >= CHANNELS
        c = tl.where(other, begin - CHANNELS, begin) + k
        tap = tap_offset(x_strides, t * DILATION_D, r * DILATION_H, s * DILATION_W)
        second_tap = tap_offset(second_strides, t * DILATION_D, r * DILATION_H, s * DILATION_W)
        rows = tl.where(other, second_rows + second_tap, x_rows + tap)
        # A constant stride of one must stay a constant, or nothing is loaded as a vector.
        x_channels = c * x_strides[1]
        second_channels = c * second_strides[1]
        mask_x = mask_m
        if CHECK_BOUNDS:
            mask_x = inside(
                mask_x,
                first_plane + t * DILATION_D,
                first_row + r * DILATION_H,
                first_column + s * DILATION_W,
                in_size,
            )
        from_ptr = tl.where(other, second_ptr, x_ptr)
        channels = tl.where(other, second_channels, x_channels)
        w_tap = tap_offset(w_strides, t, r, s)
        w_offsets = ((begin + k) * w_strides[1] + w_tap)[:, None] + w_columns[None, :]
        offsets = rows[:, None] + channels[None, :]
        a = tl.load(from_ptr + offsets, mask=mask_x[:, None], other=0.0)
        b = tl.load(w_ptr + w_offsets, mask=mask_n[None, :], other=0.0)
        acc = matmul_step(a, b, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def fused_forward_kernel(
    x_ptr,
    second_ptr,
    w_ptr,
    y_ptr,
    acc_ptr,
    mean_ptr,
    square_ptr,
    extra_ptrs,
    extra_strides,
    pro_ptrs,
    pro_strides,
    batch,
    in_size,
    out_size,
    x_strides,
    w_strides,
    y_strides,
    second_strides,
    CHANNELS: tl.constexpr,
    SECOND: tl.constexpr,
    FILTERS: tl.constexpr,
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
    CHECK_BOUNDS: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    PROLOGUE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    STATS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SAVE_ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = f(conv(g(x), w)) or f(conv([x, second], w)); CHANNELS are those of x in one group.

    With STATS the mean of every tile's column and the sum of squared distances from it go to
    (tile, channel).
    """
    if WIDE:
        batch = widen(batch)
        x_strides = widen_all(x_strides)
        w_strides = widen_all(w_strides)
        y_strides = widen_all(y_strides)
        second_strides = widen_all(second_strides)
    group = tl.program_id(1)
    pixels = pixels_of(batch, out_size)
    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tl.cdiv(FILTERS, BLOCK_N), GROUP_M
    )

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < pixels
    image, plane, row, column = position(m, out_size)
    first_plane = plane * STRIDE_D - PAD_D
    first_row = row * STRIDE_H - PAD_H
    first_column = column * STRIDE_W - PAD_W
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < FILTERS
    out_channel = group * FILTERS + n
    x_rows = pixel_offset(x_strides, image, first_plane, first_row, first_column)
    x_rows += group * CHANNELS * x_strides[1]
    w_columns = out_channel * w_strides[0]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SECOND > 0:
        second_rows = pixel_offset(second_strides, image, first_plane, first_row, first_column)
    if ONE_LOOP:
        acc = _add_both(
            acc,
            x_ptr,
            second_ptr,
            w_ptr,
            x_rows,
            second_rows,
            w_columns,
            first_plane,
            first_row,
            first_column,
            mask_m,
            mask_n,
            in_size,
            x_strides,
            second_strides,
            w_strides,
            CHANNELS,
            SECOND,
            KERNEL_D,
            KERNEL_H,
            KERNEL_W,
            DILATION_D,
            DILATION_H,
            DILATION_W,
            CHECK_BOUNDS,
            PRECISION,
            UPCAST,
            BLOCK_K,
        )
    else:
        acc = _add_products(
            acc,
            x_ptr,
            w_ptr,
            x_rows,
            w_columns,
            image,
            first_plane,
            first_row,
            first_column,
            mask_m,
            mask_n,
            in_size,
            x_strides,
            w_strides,
            group * CHANNELS,
            pro_ptrs,
            pro_strides,
            CHANNELS,
            0,
            KERNEL_D,
            KERNEL_H,
            KERNEL_W,
            DILATION_D,
            DILATION_H,
            DILATION_W,
            CHECK_BOUNDS,
            PROLOGUE,
            PER_CHANNEL,
            PRECISION,
            UPCAST,
            BLOCK_K,
        )
        if SECOND > 0:
            acc = _add_products(
                acc,
                second_ptr,
                w_ptr,
                second_rows,
                w_columns,
                image,
                first_plane,
                first_row,
                first_column,
                mask_m,
                mask_n,
                in_size,
                second_strides,
                w_strides,
                0,
                pro_ptrs,
                pro_strides,
                SECOND,
                CHANNELS,
                KERNEL_D,
                KERNEL_H,
                KERNEL_W,
                DILATION_D,
                DILATION_H,
                DILATION_W,
                CHECK_BOUNDS,
                None,
                PER_CHANNEL,
                PRECISION,
                UPCAST,
                BLOCK_K,
            )

    mask = mask_m[:, None] & mask_n[None, :]
    y_rows = pixel_offset(y_strides, image, plane, row, column)
    offsets = y_rows[:, None] + (out_channel * y_strides[1])[None, :]
    if EPILOGUE is None:
        result = acc
    else:
        if SAVE_ACC:
            tl.store(acc_ptr + offsets, acc.to(acc_ptr.dtype.element_ty), mask=mask)
        result = EPILOGUE(
            acc,
            image[:, None],
            out_channel[None, :],
            plane[:, None],
            row[:, None],
            column[:, None],
            mask,
            extra_ptrs,
            extra_strides,
        )
    stored = result.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, stored, mask=mask)
    if STATS:
        count = tl.minimum(pixels - tile_m * BLOCK_M, BLOCK_M).to(tl.float32)
        value = tl.where(mask_m[:, None], stored.to(tl.float32), 0.0)
        mean = tl.sum(value, axis=0) / count
        distance = tl.where(mask_m[:, None], value - mean[None, :], 0.0)
        at = tile_m * (FILTERS * tl.num_programs(1)) + out_channel
        tl.store(mean_ptr + at, mean, mask=mask_n)
        tl.store(square_ptr + at, tl.sum(distance * distance, axis=0), mask=mask_n)


@triton.jit
def _merge_statistics_kernel(
    mean_ptr,
    square_ptr,
    out_mean_ptr,
    out_var_ptr,
    batch,
    out_size,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and biased variance of every channel from those of its tiles (Chan et al.).

    Σ (v − μ)² = Σ_tiles (squares + count · (mean − μ)²): nothing large is subtracted.
    """
    if WIDE:
        batch = widen(batch)
    pixels = pixels_of(batch, out_size)
    tiles = tl.cdiv(pixels, TILE)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < CHANNELS
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for begin in range(0, tiles, BLOCK_T):
        tile = begin + tl.arange(0, BLOCK_T)
        count = tl.maximum(tl.minimum(pixels - tile * TILE, TILE), 0).to(tl.float32)
        mask = (tile < tiles)[:, None] & mask_c[None, :]
        at = tile[:, None] * CHANNELS + c[None, :]
        total += tl.load(mean_ptr + at, mask=mask, other=0.0) * (count / pixels)[:, None]
    mean = tl.sum(total, axis=0)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for begin in range(0, tiles, BLOCK_T):
        tile = begin + tl.arange(0, BLOCK_T)
        count = tl.maximum(tl.minimum(pixels - tile * TILE, TILE), 0).to(tl.float32)
        mask = (tile < tiles)[:, None] & mask_c[None, :]
        at = tile[:, None] * CHANNELS + c[None, :]
        distance = tl.load(mean_ptr + at, mask=mask, other=0.0) - mean[None, :]
        squares = tl.load(square_ptr + at, mask=mask, other=0.0)
        total += tl.where(mask, squares + count[:, None] * distance * distance, 0.0)
    tl.store(out_mean_ptr + c, mean, mask=mask_c)
    tl.store(out_var_ptr + c, tl.sum(total, axis=0) / pixels, mask=mask_c)


# Triton 3.9 loads single elements through a pointer that was chosen from two; 3.6 whole rows.
_ONE_LOOP = interpreting() or TRITON_VERSION < (3, 7)


def fused_slots(problem: FusedProblem) -> dict[str, torch.dtype]:
    """The dtype of every slot of a problem, in slot order (inputs, outputs, extras)."""
    slots = slot_dtypes(problem)
    dtypes = {"input": slots.pop("input")}
    if problem.second_channels:
        dtypes["second"] = problem.dtype
    dtypes["weight"], dtypes["output"] = slots.pop("weight"), slots.pop("output")
    if "acc" in slots:
        dtypes["acc"] = slots.pop("acc")
    if problem.stats:
        dtypes |= {"mean": torch.float32, "var": torch.float32}
    dtypes |= slots
    if problem.prologue is not None:
        for index, dtype in enumerate(problem.prologue.capture_dtypes):
            dtypes[f"prologue{index}"] = dtype
    return dtypes


class FusedInput(Algorithm):
    """Implicit product whose ends are fused with what comes before and after."""

    name: ClassVar[str] = "fused_input"
    config_type = TileConfig
    sources = ("common", "fused_spaces", "tiles")

    def supports(self, problem: FusedProblem) -> str | None:
        """Forward products in a dtype of the generated kernels; two inputs have one group."""
        if problem.second_channels and problem.groups != 1:
            return "two inputs in groups"
        return unsupported_dtype(problem) or unsupported_product(problem)

    def space(self, problem: FusedProblem, device: DeviceFacts) -> ConfigSpace[TileConfig]:
        """Tiles, warps and stages."""
        return fused_space(problem, device)

    def plan(self, problem: FusedProblem, config: TileConfig) -> LaunchPlan:
        """One launch, and one that merges the tiles' statistics."""
        tiles_m = triton.cdiv(problem.out_pixels, config.block_m)
        tiles = tiles_m * triton.cdiv(problem.filters_per_group, config.block_n)
        fused = epilogue_arguments(problem)
        two = problem.second_channels > 0
        first = problem.first_channels // problem.groups
        divides = first % config.block_k == problem.second_channels % config.block_k == 0
        alike = (problem.x_strides[1] == 1) == (problem.second_strides[1:2] == (1,))
        call = KernelCall(
            fused_forward_kernel,
            (tiles, problem.groups, 1),
            (
                Slot("input"),
                Slot("second" if two else "input"),
                Slot("weight"),
                Slot("output"),
                Slot("acc" if fused.save_acc else "output"),
                Slot("tile_mean" if problem.stats else "output"),
                Slot("tile_square" if problem.stats else "output"),
                fused.pointers,
                fused.strides,
                *_prologue_arguments(problem),
                *spatial_arguments(problem),
                spatial_strides(problem.second_strides if two else problem.x_strides),
            ),
            {
                **product_constexprs(problem, config),
                "CHANNELS": first,
                "SECOND": problem.second_channels,
                "CHECK_BOUNDS": needs_bounds(problem),
                "ONE_LOOP": two and divides and alike and _ONE_LOOP,
                **_prologue_constexprs(problem),
                "STATS": problem.stats,
                "EPILOGUE": fused.function,
                "SAVE_ACC": fused.save_acc,
            },
            config.num_warps,
            config.num_stages,
        )
        dtypes = fused_slots(problem)
        if not problem.stats:
            return LaunchPlan((call,), dtypes)
        shape = (tiles_m, problem.out_channels)
        spaces = tuple(Workspace(n, shape, torch.float32) for n in ("tile_mean", "tile_square"))
        dtypes |= dict.fromkeys(("tile_mean", "tile_square"), torch.float32)
        return LaunchPlan((call, _merge_call(problem, config)), dtypes, spaces)

    def footprint(
        self, problem: FusedProblem, config: TileConfig, device: DeviceFacts
    ) -> Footprint:
        """Of the product; what is fused with it is small beside it."""
        return product_footprint(problem, config, device)


def _prologue_arguments(problem: FusedProblem) -> tuple[tuple[Slot, ...], tuple[int, ...]]:
    """Pointers and strides of what the prologue reads."""
    spec = problem.prologue
    if spec is None:
        return (), ()
    pointers = tuple(Slot(f"prologue{index}") for index in range(len(spec.capture_dtypes)))
    return pointers, tuple(hop for strides in spec.capture_strides for hop in strides)


def _prologue_constexprs(problem: FusedProblem) -> dict[str, Any]:
    """The prologue's generated function, and whether it reads vectors over channels only."""
    if problem.prologue is None:
        return {"PROLOGUE": None, "PER_CHANNEL": False}
    program = program_of(problem.prologue.function)
    function = ScalarFunction(program, ()).with_wide(problem.wide).with_frame(COORDINATES[3])
    return {"PROLOGUE": function.program.jit, "PER_CHANNEL": per_channel(program)}


def _merge_call(problem: FusedProblem, config: TileConfig) -> KernelCall:
    tiles = triton.cdiv(problem.out_pixels, config.block_m)
    block_t = min(2048, triton.next_power_of_2(tiles))
    block_c = min(4 if block_t > 256 else 16, triton.next_power_of_2(problem.out_channels))
    return KernelCall(
        _merge_statistics_kernel,
        (triton.cdiv(problem.out_channels, block_c), 1, 1),
        (
            Slot("tile_mean"),
            Slot("tile_square"),
            Slot("mean"),
            Slot("var"),
            problem.batch,
            spatial_arguments(problem)[2],
        ),
        {
            "CHANNELS": problem.out_channels,
            "TILE": config.block_m,
            "WIDE": problem.wide,
            "BLOCK_T": block_t,
            "BLOCK_C": block_c,
        },
        num_warps=8 if block_t * block_c >= 4096 else 4,
    )
