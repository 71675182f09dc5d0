"""Kernel equal to stride (patch embedding, downsampling): windows tile the input.

Every input element belongs to at most one window, so all three directions are plain matrix
products between output pixels and flattened windows, without zero work.
"""

from __future__ import annotations

from typing import ClassVar

import triton
import triton.language as tl

from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm
from ...runtime.plan import KernelCall, LaunchPlan, Slot
from ...runtime.space import Choice, ConfigSpace, Footprint, Int, PowerOfTwo
from ..problem import ConvProblem, Direction
from .common import (
    TileConfig,
    grouped_tile,
    matmul_step,
    pixel_arguments,
    precision_constexprs,
    slot_dtypes,
    unsupported_dtype,
    widen,
    widen_strides,
)
from .footprints import patch_dgrad_footprint, product_footprint, window_footprint
from .implicit_gemm import wgrad_plan
from .tiles import flat_rows, order_constraint, power_of_two, tile_constraints, tile_space
from .windows import flat_filters, window_forward_plan, window_space


@triton.jit
def _patchify_dgrad_kernel(
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
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    CHANNELS_FASTEST: tl.constexpr,
    FLAT_ROWS: tl.constexpr,
    FLAT_FILTERS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """grad_x[n, c, p·KH + r, q·KW + s] = Σ_o grad_y[n, o, p, q] · w[o, c, r, s]."""
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
    COLUMNS: tl.constexpr = KERNEL_H * KERNEL_W * CHANNELS
    pixels = batch * out_height * out_width
    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tl.cdiv(COLUMNS, BLOCK_N), GROUP_M
    )
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < pixels
    column = m % out_width
    row = (m // out_width) % out_height
    image = m // (out_width * out_height)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < COLUMNS
    if CHANNELS_FASTEST:
        c = n % CHANNELS
        s = (n // CHANNELS) % KERNEL_W
        r = n // (CHANNELS * KERNEL_W)
    else:
        s = n % KERNEL_W
        r = (n // KERNEL_W) % KERNEL_H
        c = n // (KERNEL_W * KERNEL_H)
    if WIDE:
        image = image.to(tl.int64)
        row = row.to(tl.int64)
        column = column.to(tl.int64)
        c = c.to(tl.int64)
    y_rows = image * y_stride_n + row * y_stride_h + column * y_stride_w
    if FLAT_FILTERS:
        w_columns = n
    else:
        w_columns = c * w_stride_i + r * w_stride_h + s * w_stride_w

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, FILTERS, BLOCK_K):
        o = start + tl.arange(0, BLOCK_K)
        mask_o = o < FILTERS
        if WIDE:
            o = o.to(tl.int64)
        # Masks that cannot fail are left out: each one narrows what is loaded at once.
        mask_y = mask_m[:, None]
        if FILTERS % BLOCK_K != 0:
            mask_y = mask_y & mask_o[None, :]
        a = tl.load(grad_ptr + y_rows[:, None] + (o * y_stride_c)[None, :], mask=mask_y, other=0.0)
        w_offsets = (o * w_stride_o)[:, None] + w_columns[None, :]
        if COLUMNS % BLOCK_N == 0 and FILTERS % BLOCK_K == 0:
            b = tl.load(w_ptr + w_offsets)
        else:
            b = tl.load(w_ptr + w_offsets, mask=mask_o[:, None] & mask_n[None, :], other=0.0)
        acc = matmul_step(a, b, acc, PRECISION, UPCAST)

    x_rows = image * x_stride_n + row * KERNEL_H * x_stride_h + column * KERNEL_W * x_stride_w
    if FLAT_ROWS:
        x_columns = (n % (CHANNELS * KERNEL_W)) * x_stride_c + r * x_stride_h
    else:
        x_columns = c * x_stride_c + r * x_stride_h + s * x_stride_w
    mask = mask_m[:, None]
    if COLUMNS % BLOCK_N != 0:
        mask = mask & mask_n[None, :]
    offsets = x_rows[:, None] + x_columns[None, :]
    tl.store(x_ptr + offsets, acc.to(x_ptr.dtype.element_ty), mask=mask)


class Patchify(Algorithm):
    """kernel == stride, no padding, no dilation."""

    name: ClassVar[str] = "patchify"
    config_type = TileConfig
    sources = ("common", "implicit_gemm", "tiles", "windows")

    def supports(self, problem: ConvProblem) -> str | None:
        """Ungrouped windows that tile the input."""
        if problem.groups != 1:
            return "groups != 1"
        if not problem.patches or problem.taps == 1:
            return "kernel != stride, or padding, or dilation"
        return unsupported_dtype(problem)

    def space(self, problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[TileConfig]:
        """Tiles over the flattened window."""
        if problem.direction is Direction.FORWARD:
            return window_space(problem, device)
        if problem.direction is Direction.WGRAD:
            return tile_space(problem, device)
        columns = problem.taps * problem.in_channels
        block_n = power_of_two(columns, 16, 128)
        return ConfigSpace(
            TileConfig,
            (
                Int("num_stages", 2, 4),
                PowerOfTwo("num_warps", 2, 8),
                PowerOfTwo("block_m", 32, 256),
                PowerOfTwo("block_n", 16, power_of_two(columns, 16, 256)),
                PowerOfTwo("block_k", 32, 64),
                Choice("group_m", (8, 1)),
                Choice("split_k", (1,)),
            ),
            (*tile_constraints(), order_constraint(problem, device, problem.out_pixels, columns)),
            TileConfig(128, min(64, block_n), 32, 4, 3),
        )

    def plan(self, problem: ConvProblem, config: TileConfig) -> LaunchPlan:
        """One matrix product; input elements outside every window get a zero gradient."""
        if problem.direction is Direction.FORWARD:
            return window_forward_plan(problem, config)
        if problem.direction is Direction.WGRAD:
            return wgrad_plan(problem, config)
        columns = problem.taps * problem.in_channels
        channels_fastest = problem.x_strides[1] <= problem.x_strides[-1]
        tiles = triton.cdiv(problem.out_pixels, config.block_m) * triton.cdiv(
            columns, config.block_n
        )
        call = KernelCall(
            _patchify_dgrad_kernel,
            (tiles, 1, 1),
            (Slot("grad_output"), Slot("weight"), Slot("grad_input"), *pixel_arguments(problem)),
            {
                "CHANNELS": problem.in_channels,
                "FILTERS": problem.out_channels,
                "KERNEL_H": problem.kernel[0],
                "KERNEL_W": problem.kernel[1],
                "CHANNELS_FASTEST": channels_fastest,
                "FLAT_ROWS": flat_rows(problem),
                "FLAT_FILTERS": flat_filters(problem, channels_fastest),
                **precision_constexprs(problem),
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
                "GROUP_M": config.group_m,
            },
            config.num_warps,
            config.num_stages,
        )
        covered = all(
            out * taps == size
            for out, taps, size in zip(
                problem.out_size, problem.kernel, problem.in_size, strict=True
            )
        )
        return LaunchPlan((call,), slot_dtypes(problem), zeroed=() if covered else ("grad_input",))

    def footprint(self, problem: ConvProblem, config: TileConfig, device: DeviceFacts) -> Footprint:
        """Of the product over windows."""
        if problem.direction is Direction.FORWARD:
            return window_footprint(problem, config, device)
        if problem.direction is Direction.WGRAD:
            return product_footprint(problem, config, device)
        return patch_dgrad_footprint(problem, config, device)
