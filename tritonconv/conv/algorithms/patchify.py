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
    epilogue_arguments,
    grouped_tile,
    matmul_step,
    pixel_offset,
    pixels_of,
    position,
    product_constexprs,
    slot_dtypes,
    spatial_arguments,
    store_result,
    tap_offset,
    unsupported_dtype,
    widen,
    widen_all,
)
from .footprints import patch_dgrad_footprint, product_footprint, window_footprint
from .product_wgrad import wgrad_plan
from .tiles import flat_rows, order_constraint, power_of_two, tile_constraints, tile_space
from .windows import flat_filters, window_forward_plan, window_position, window_space


@triton.jit
def _patchify_dgrad_kernel(
    grad_ptr,
    w_ptr,
    x_ptr,
    acc_ptr,
    extra_ptrs,
    extra_strides,
    batch,
    in_size,
    out_size,
    x_strides,
    w_strides,
    y_strides,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    CHANNELS_FASTEST: tl.constexpr,
    FLAT_ROWS: tl.constexpr,
    FLAT_FILTERS: tl.constexpr,
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
    """grad_x[n, c, p·kernel + r] = Σ_o grad_y[n, o, p] · w[o, c, r]."""
    if WIDE:
        batch = widen(batch)
        x_strides = widen_all(x_strides)
        w_strides = widen_all(w_strides)
        y_strides = widen_all(y_strides)
    LINE: tl.constexpr = CHANNELS * KERNEL_W
    COLUMNS: tl.constexpr = KERNEL_D * KERNEL_H * LINE
    pixels = pixels_of(batch, out_size)
    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tl.cdiv(COLUMNS, BLOCK_N), GROUP_M
    )
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < pixels
    image, plane, row, column = position(m, out_size)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < COLUMNS
    c, t, r, s = window_position(n, CHANNELS, KERNEL_D, KERNEL_H, KERNEL_W, CHANNELS_FASTEST)
    y_rows = pixel_offset(y_strides, image, plane, row, column)
    if FLAT_FILTERS:
        w_columns = n
    else:
        w_columns = c * w_strides[1] + tap_offset(w_strides, t, r, s)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, FILTERS, BLOCK_K):
        o = start + tl.arange(0, BLOCK_K)
        mask_o = o < FILTERS
        # Masks that cannot fail are left out: each one narrows what is loaded at once.
        mask_y = mask_m[:, None]
        if FILTERS % BLOCK_K != 0:
            mask_y = mask_y & mask_o[None, :]
        a = tl.load(grad_ptr + y_rows[:, None] + (o * y_strides[1])[None, :], mask_y, other=0.0)
        w_offsets = (o * w_strides[0])[:, None] + w_columns[None, :]
        if COLUMNS % BLOCK_N == 0 and FILTERS % BLOCK_K == 0:
            b = tl.load(w_ptr + w_offsets)
        else:
            b = tl.load(w_ptr + w_offsets, mask=mask_o[:, None] & mask_n[None, :], other=0.0)
        acc = matmul_step(a, b, acc, PRECISION, UPCAST)

    plane *= KERNEL_D
    row *= KERNEL_H
    column *= KERNEL_W
    x_rows = pixel_offset(x_strides, image, plane, row, column)
    if FLAT_ROWS:
        x_columns = (n % LINE) * x_strides[1] + tap_offset(x_strides, t, r, 0)
    else:
        x_columns = c * x_strides[1] + tap_offset(x_strides, t, r, s)
    mask = mask_m[:, None]
    if COLUMNS % BLOCK_N != 0 or EPILOGUE is not None:
        mask = mask & mask_n[None, :]
    store_result(
        acc,
        x_ptr,
        acc_ptr,
        x_rows[:, None] + x_columns[None, :],
        image[:, None],
        c[None, :],
        plane[:, None] + t[None, :],
        row[:, None] + r[None, :],
        column[:, None] + s[None, :],
        mask,
        extra_ptrs,
        extra_strides,
        EPILOGUE,
        SAVE_ACC,
    )


def _covered(problem: ConvProblem) -> bool:
    """Whether every element of the input belongs to a window."""
    sizes = zip(problem.out_size, problem.kernel, problem.in_size, strict=True)
    return all(out * taps == size for out, taps, size in sizes)


class Patchify(Algorithm):
    """kernel == stride, no padding, no dilation."""

    name: ClassVar[str] = "patchify"
    config_type = TileConfig
    sources = ("common", "product_wgrad", "tiles", "windows")

    def supports(self, problem: ConvProblem) -> str | None:
        """Ungrouped windows that tile the input."""
        if problem.groups != 1:
            return "groups != 1"
        if not problem.patches or problem.taps == 1:
            return "kernel != stride, or padding, or dilation"
        fused = problem.direction is Direction.DGRAD and problem.epilogue is not None
        if fused and not _covered(problem):
            return "an epilogue where elements of the result belong to no window"
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
                Choice("one_launch", (0,)),
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
        epilogue = epilogue_arguments(problem)
        # Stride is kernel, and there is no padding and no dilation: the kernel has no such names.
        constexprs = {
            name: value
            for name, value in product_constexprs(problem, config).items()
            if not name.startswith(("STRIDE_", "PAD_", "DILATION_"))
        }
        tiles = triton.cdiv(problem.out_pixels, config.block_m) * triton.cdiv(
            columns, config.block_n
        )
        call = KernelCall(
            _patchify_dgrad_kernel,
            (tiles, 1, 1),
            (
                Slot("grad_output"),
                Slot("weight"),
                Slot("grad_input"),
                Slot("acc" if epilogue.save_acc else "grad_input"),
                epilogue.pointers,
                epilogue.strides,
                *spatial_arguments(problem),
            ),
            {
                **constexprs,
                "CHANNELS_FASTEST": channels_fastest,
                "FLAT_ROWS": flat_rows(problem),
                "FLAT_FILTERS": flat_filters(problem, channels_fastest),
                "EPILOGUE": epilogue.function,
                "SAVE_ACC": epilogue.save_acc,
            },
            config.num_warps,
            config.num_stages,
        )
        zeroed = () if _covered(problem) else ("grad_input",)
        return LaunchPlan((call,), slot_dtypes(problem), zeroed=zeroed)

    def footprint(self, problem: ConvProblem, config: TileConfig, device: DeviceFacts) -> Footprint:
        """Of the product over windows."""
        if problem.direction is Direction.FORWARD:
            return window_footprint(problem, config, device)
        if problem.direction is Direction.WGRAD:
            return product_footprint(problem, config, device)
        return patch_dgrad_footprint(problem, config, device)
