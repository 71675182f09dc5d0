"""Depthwise convolution (one input channel per group): direct kernels, no matrix instructions.

A matrix product would use one lane in sixteen. Programs own a tile of pixels × channels; the
gradient of the weight sums pixel ranges into float32 partials which a second kernel adds in a
fixed order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl

from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm, Config
from ...runtime.plan import KernelCall, LaunchPlan, Slot, Workspace
from ...runtime.space import Choice, ConfigSpace, Constraint, Derived, Footprint, PowerOfTwo
from ..problem import ConvProblem, Direction
from .common import (
    epilogue_arguments,
    geometry_constexprs,
    pixel_arguments,
    slot_dtypes,
    store_result,
    unsupported_dtype,
    widen,
    widen_strides,
)
from .footprints import depthwise_footprint
from .implicit_gemm import PRODUCT_SOURCES, reduction_call
from .tiles import around, needs_bounds


@triton.jit
def _depthwise_forward_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    acc_ptr,
    extra_ptrs,
    extra_strides,
    batch,
    height,
    width,
    out_height,
    out_width,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    w_stride_o,
    w_stride_i,
    w_stride_h,
    w_stride_w,
    y_stride_n,
    y_stride_c,
    y_stride_h,
    y_stride_w,
    filters,
    MULTIPLIER: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHECK_BOUNDS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SAVE_ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y[n, o, p, q] = Σ_{r,s} x[n, o // multiplier, p·stride + r·dilation − pad, …] · w[o]."""
    if WIDE:
        batch = widen(batch)
        x_stride_n, x_stride_c, x_stride_h, x_stride_w = widen_strides(
            x_stride_n, x_stride_c, x_stride_h, x_stride_w
        )
        w_stride_o, w_stride_i, w_stride_h, w_stride_w = widen_strides(
            w_stride_o, w_stride_i, w_stride_h, w_stride_w
        )
        y_stride_n, y_stride_c, y_stride_h, y_stride_w = widen_strides(
            y_stride_n, y_stride_c, y_stride_h, y_stride_w
        )
    tiles_c = tl.cdiv(filters, BLOCK_C)
    tile_p = tl.program_id(0) // tiles_c
    tile_c = tl.program_id(0) % tiles_c
    pixels = batch * out_height * out_width
    p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = p < pixels
    column = p % out_width
    row = (p // out_width) % out_height
    image = p // (out_width * out_height)
    o = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = o < filters
    if WIDE:
        image = image.to(tl.int64)
        row = row.to(tl.int64)
        column = column.to(tl.int64)
        o = o.to(tl.int64)
    first_row = row * STRIDE_H - PAD_H
    first_column = column * STRIDE_W - PAD_W
    x_rows = image * x_stride_n + first_row * x_stride_h + first_column * x_stride_w
    x_columns = (o // MULTIPLIER) * x_stride_c
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for r in range(KERNEL_H):
        in_row = first_row + r * DILATION_H
        mask_r = mask_p
        if CHECK_BOUNDS:
            mask_r = mask_r & (in_row >= 0) & (in_row < height)
        for s in tl.static_range(KERNEL_W):
            mask_x = mask_r
            if CHECK_BOUNDS:
                in_column = first_column + s * DILATION_W
                mask_x = mask_x & (in_column >= 0) & (in_column < width)
            tap = r * DILATION_H * x_stride_h + s * DILATION_W * x_stride_w
            x = tl.load(
                x_ptr + (x_rows + tap)[:, None] + x_columns[None, :],
                mask=mask_x[:, None] & mask_c[None, :],
                other=0.0,
            )
            w = tl.load(
                w_ptr + o * w_stride_o + r * w_stride_h + s * w_stride_w, mask=mask_c, other=0.0
            )
            acc += x.to(tl.float32) * w.to(tl.float32)[None, :]
    y_rows = image * y_stride_n + row * y_stride_h + column * y_stride_w
    store_result(
        acc,
        y_ptr,
        acc_ptr,
        y_rows[:, None] + (o * y_stride_c)[None, :],
        image[:, None],
        o[None, :],
        row[:, None] * 0,
        row[:, None],
        column[:, None],
        mask_p[:, None] & mask_c[None, :],
        extra_ptrs,
        extra_strides,
        EPILOGUE,
        SAVE_ACC,
    )


@triton.jit
def _depthwise_dgrad_kernel(
    grad_ptr,
    w_ptr,
    x_ptr,
    batch,
    height,
    width,
    out_height,
    out_width,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    w_stride_o,
    w_stride_i,
    w_stride_h,
    w_stride_w,
    y_stride_n,
    y_stride_c,
    y_stride_h,
    y_stride_w,
    channels,
    MULTIPLIER: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_x[n, c, h, w] = Σ_{j,r,s} grad_y[n, c·multiplier + j, p, q] · w[c·multiplier + j, r, s].

    (p, q) = (h + pad − r·dilation, …) / stride where that is exact and in range.
    """
    if WIDE:
        batch = widen(batch)
        x_stride_n, x_stride_c, x_stride_h, x_stride_w = widen_strides(
            x_stride_n, x_stride_c, x_stride_h, x_stride_w
        )
        w_stride_o, w_stride_i, w_stride_h, w_stride_w = widen_strides(
            w_stride_o, w_stride_i, w_stride_h, w_stride_w
        )
        y_stride_n, y_stride_c, y_stride_h, y_stride_w = widen_strides(
            y_stride_n, y_stride_c, y_stride_h, y_stride_w
        )
    tiles_c = tl.cdiv(channels, BLOCK_C)
    tile_p = tl.program_id(0) // tiles_c
    tile_c = tl.program_id(0) % tiles_c
    pixels = batch * height * width
    p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = p < pixels
    in_column = p % width
    in_row = (p // width) % height
    image = p // (width * height)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < channels
    if WIDE:
        image = image.to(tl.int64)
        in_row = in_row.to(tl.int64)
        in_column = in_column.to(tl.int64)
        c = c.to(tl.int64)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for r in range(KERNEL_H):
        scaled_row = in_row + PAD_H - r * DILATION_H
        row = scaled_row // STRIDE_H
        mask_r = mask_p & (scaled_row >= 0) & (scaled_row % STRIDE_H == 0) & (row < out_height)
        for s in tl.static_range(KERNEL_W):
            scaled_column = in_column + PAD_W - s * DILATION_W
            column = scaled_column // STRIDE_W
            mask_y = mask_r & (scaled_column >= 0) & (scaled_column % STRIDE_W == 0)
            mask_y = mask_y & (column < out_width)
            y_rows = image * y_stride_n + row * y_stride_h + column * y_stride_w
            for j in tl.static_range(MULTIPLIER):
                o = c * MULTIPLIER + j
                grad = tl.load(
                    grad_ptr + y_rows[:, None] + (o * y_stride_c)[None, :],
                    mask=mask_y[:, None] & mask_c[None, :],
                    other=0.0,
                )
                w = tl.load(
                    w_ptr + o * w_stride_o + r * w_stride_h + s * w_stride_w,
                    mask=mask_c,
                    other=0.0,
                )
                acc += grad.to(tl.float32) * w.to(tl.float32)[None, :]
    x_rows = image * x_stride_n + in_row * x_stride_h + in_column * x_stride_w
    tl.store(
        x_ptr + x_rows[:, None] + (c * x_stride_c)[None, :],
        acc.to(x_ptr.dtype.element_ty),
        mask=mask_p[:, None] & mask_c[None, :],
    )


@triton.jit
def _depthwise_wgrad_kernel(
    grad_ptr,
    x_ptr,
    partial_ptr,
    batch,
    height,
    width,
    out_height,
    out_width,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    w_stride_o,
    w_stride_i,
    w_stride_h,
    w_stride_w,
    y_stride_n,
    y_stride_c,
    y_stride_h,
    y_stride_w,
    filters,
    pixels_per_split,
    MULTIPLIER: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """partial[split, o, (r, s)] = Σ over the pixels of a split of grad_y[n, o, p, q] · x[n, …]."""
    if WIDE:
        batch = widen(batch)
        x_stride_n, x_stride_c, x_stride_h, x_stride_w = widen_strides(
            x_stride_n, x_stride_c, x_stride_h, x_stride_w
        )
        w_stride_o, w_stride_i, w_stride_h, w_stride_w = widen_strides(
            w_stride_o, w_stride_i, w_stride_h, w_stride_w
        )
        y_stride_n, y_stride_c, y_stride_h, y_stride_w = widen_strides(
            y_stride_n, y_stride_c, y_stride_h, y_stride_w
        )
        pixels_per_split = widen(pixels_per_split)
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    # One row of taps shares the gradient that is loaded: a third axis of the tile.
    s = tl.arange(0, BLOCK_S)
    r = tl.program_id(1)
    split = tl.program_id(2)
    o = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = o < filters
    pixels = batch * out_height * out_width
    first = split * pixels_per_split
    last = tl.minimum(first + pixels_per_split, pixels)
    channel = o // MULTIPLIER
    if WIDE:
        o = o.to(tl.int64)
        channel = channel.to(tl.int64)
    acc = tl.zeros((BLOCK_S, BLOCK_P, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask_p = p < last
        column = p % out_width
        row = (p // out_width) % out_height
        image = p // (out_width * out_height)
        if WIDE:
            image = image.to(tl.int64)
            row = row.to(tl.int64)
            column = column.to(tl.int64)
        y_rows = image * y_stride_n + row * y_stride_h + column * y_stride_w
        grad = tl.load(
            grad_ptr + y_rows[:, None] + (o * y_stride_c)[None, :],
            mask=mask_p[:, None] & mask_c[None, :],
            other=0.0,
        )
        in_row = row * STRIDE_H - PAD_H + r * DILATION_H
        in_column = (column * STRIDE_W - PAD_W)[None, :] + (s * DILATION_W)[:, None]
        mask_x = (mask_p & (in_row >= 0) & (in_row < height))[None, :] & (s < KERNEL_W)[:, None]
        mask_x = mask_x & (in_column >= 0) & (in_column < width)
        x_rows = (image * x_stride_n + in_row * x_stride_h)[None, :] + in_column * x_stride_w
        x = tl.load(
            x_ptr + x_rows[:, :, None] + (channel * x_stride_c)[None, None, :],
            mask=mask_x[:, :, None] & mask_c[None, None, :],
            other=0.0,
        )
        acc += grad.to(tl.float32)[None, :, :] * x.to(tl.float32)
    offsets = split.to(tl.int64) * (filters * TAPS) + (o * TAPS)[None, :]
    offsets += (r * KERNEL_W + s)[:, None]
    mask = (s < KERNEL_W)[:, None] & mask_c[None, :]
    tl.store(partial_ptr + offsets, tl.sum(acc, axis=1), mask=mask)


@dataclass(frozen=True)
class DepthwiseConfig(Config):
    """Tile of pixels × channels, and splits of the pixels for the gradient of the weight."""

    block_p: int
    block_c: int
    num_warps: int
    split: int = 1


class Depthwise(Algorithm):
    """Direct kernels for one input channel per group, any channel multiplier."""

    name: ClassVar[str] = "depthwise"
    config_type = DepthwiseConfig
    sources = PRODUCT_SOURCES

    def supports(self, problem: ConvProblem) -> str | None:
        """groups == in_channels > 1."""
        if not problem.depthwise:
            return "not one input channel per group"
        if len(problem.in_size) != 2:
            return "not two spatial axes"
        if problem.direction is Direction.DGRAD and problem.epilogue is not None:
            return "an epilogue on the gradient of the input"
        return unsupported_dtype(problem)

    def space(self, problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[DepthwiseConfig]:
        """Tiles along the fastest axis of the layout."""
        channels = triton.next_power_of_2(max(1, problem.out_channels))
        wgrad = problem.direction is Direction.WGRAD
        if problem.x_layout == "contiguous":
            block_p = PowerOfTwo("block_p", 64, 512 if wgrad else 1024)
            block_c = PowerOfTwo("block_c", 1, min(4, channels))
            first = (128 if wgrad else 256, 1)
        else:
            # Long columns of pixels: a thread loads its weights one by one and amortises them.
            block_p = PowerOfTwo("block_p", 8, 64) if wgrad else PowerOfTwo("block_p", 16, 256)
            block_c = PowerOfTwo("block_c", min(32, channels), min(128, channels))
            first = (16 if wgrad else 64, min(64, channels))

        @functools.cache
        def splits(block_c: int) -> tuple[int, ...]:
            return around(self._split(problem, block_c, device))

        split = Derived("split", splits) if wgrad else Choice("split", (1,))
        return ConfigSpace(
            DepthwiseConfig,
            (block_p, block_c, PowerOfTwo("num_warps", 1, 8), split),
            (
                Constraint(
                    "registers",
                    "more than 128 elements of the tile in a thread",
                    lambda block_p, block_c, num_warps: block_p * block_c <= 4096 * num_warps,
                ),
                Constraint(
                    "splits",
                    "a split of the pixels would be less than one block of them",
                    lambda block_p, split: (
                        split <= max(1, triton.cdiv(problem.out_pixels, block_p))
                    ),
                ),
            ),
            DepthwiseConfig(*first, 4, self._split(problem, first[1], device)),
        )

    def footprint(
        self, problem: ConvProblem, config: DepthwiseConfig, device: DeviceFacts
    ) -> Footprint:
        """Of the direct kernel, which multiplies on scalar units."""
        return depthwise_footprint(
            problem, config.block_p, config.block_c, config.num_warps, config.split, device
        )

    @staticmethod
    def _split(problem: ConvProblem, block_c: int, device: DeviceFacts) -> int:
        if problem.direction is not Direction.WGRAD:
            return 1
        programs = problem.kernel[0] * triton.cdiv(problem.out_channels, block_c)
        wanted = max(1, 4 * device.sm_count // programs)
        return min(wanted, max(1, problem.out_pixels // 512), 1024)

    def plan(self, problem: ConvProblem, config: DepthwiseConfig) -> LaunchPlan:
        """One launch; two for the gradient of the weight."""
        constexprs: dict[str, Any] = {
            "MULTIPLIER": problem.out_channels // problem.groups,
            **geometry_constexprs(problem),
            "WIDE": problem.wide,
            "BLOCK_P": config.block_p,
            "BLOCK_C": config.block_c,
        }
        if problem.direction is Direction.FORWARD:
            return self._forward(problem, config, constexprs)
        if problem.direction is Direction.DGRAD:
            tiles = triton.cdiv(problem.in_pixels, config.block_p) * triton.cdiv(
                problem.in_channels, config.block_c
            )
            call = KernelCall(
                _depthwise_dgrad_kernel,
                (tiles, 1, 1),
                (
                    Slot("grad_output"),
                    Slot("weight"),
                    Slot("grad_input"),
                    *pixel_arguments(problem),
                    problem.in_channels,
                ),
                constexprs,
                config.num_warps,
            )
            return LaunchPlan((call,), slot_dtypes(problem))
        return self._wgrad(problem, config, constexprs)

    @staticmethod
    def _forward(
        problem: ConvProblem, config: DepthwiseConfig, constexprs: dict[str, Any]
    ) -> LaunchPlan:
        epilogue = epilogue_arguments(problem)
        tiles = triton.cdiv(problem.out_pixels, config.block_p) * triton.cdiv(
            problem.out_channels, config.block_c
        )
        call = KernelCall(
            _depthwise_forward_kernel,
            (tiles, 1, 1),
            (
                Slot("input"),
                Slot("weight"),
                Slot("output"),
                Slot("acc" if epilogue.save_acc else "output"),
                epilogue.pointers,
                epilogue.strides,
                *pixel_arguments(problem),
                problem.out_channels,
            ),
            {
                **constexprs,
                "CHECK_BOUNDS": needs_bounds(problem),
                "EPILOGUE": epilogue.function,
                "SAVE_ACC": epilogue.save_acc,
            },
            config.num_warps,
        )
        return LaunchPlan((call,), slot_dtypes(problem))

    @staticmethod
    def _wgrad(
        problem: ConvProblem, config: DepthwiseConfig, constexprs: dict[str, Any]
    ) -> LaunchPlan:
        blocks = triton.cdiv(problem.out_pixels, config.block_p)
        per_split = triton.cdiv(blocks, max(1, min(config.split, blocks))) * config.block_p
        splits = max(1, triton.cdiv(problem.out_pixels, per_split))
        call = KernelCall(
            _depthwise_wgrad_kernel,
            (triton.cdiv(problem.out_channels, config.block_c), problem.kernel[0], splits),
            (
                Slot("grad_output"),
                Slot("input"),
                Slot("partial"),
                *pixel_arguments(problem),
                problem.out_channels,
                per_split,
            ),
            {**constexprs, "BLOCK_S": triton.next_power_of_2(problem.kernel[1])},
            config.num_warps,
        )
        space = Workspace("partial", (splits, problem.out_channels, problem.taps), torch.float32)
        dtypes = {**slot_dtypes(problem), "partial": torch.float32}
        return LaunchPlan((call, reduction_call(problem, splits)), dtypes, (space,))
