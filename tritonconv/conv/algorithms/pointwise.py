"""1×1 convolution with stride 1 as a matrix product over pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import triton
import triton.language as tl

from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm
from ...runtime.plan import KernelCall, LaunchPlan, Slot
from ...runtime.space import ConfigSpace, Footprint
from ..problem import ConvProblem, Direction
from .common import (
    TileConfig,
    epilogue_arguments,
    grouped_tile,
    lifted,
    matmul_step,
    position,
    precision_constexprs,
    slot_dtypes,
    spatial_strides,
    store_result,
    unsupported_operands,
    widen,
    widen_all,
)
from .footprints import pointwise_footprint
from .product_wgrad import wgrad_plan
from .tiles import product_shape, tile_space


@triton.jit
def _pixel_gemm_kernel(
    a_ptr,
    w_ptr,
    out_ptr,
    acc_ptr,
    extra_ptrs,
    extra_strides,
    batch,
    size,
    map_pixels,
    a_strides,
    w_stride_k,
    w_stride_c,
    out_strides,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
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
    """out[n, p, c] = Σ_k a[n, p, k] · w[k, c], with p the flattened position in the map."""
    if WIDE:
        batch = widen(batch)
        a_strides = widen_all(a_strides)
        w_stride_k = widen(w_stride_k)
        w_stride_c = widen(w_stride_c)
        out_strides = widen_all(out_strides)
    pixels = batch * map_pixels
    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tl.cdiv(COLUMNS, BLOCK_N), GROUP_M
    )
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < pixels
    image = m // map_pixels
    _, plane, row, column = position(m, size)
    # The map is flat: one stride, that of the last axis, leads from pixel to pixel. Its size is an
    # argument, because the compiler sees the alignment of an argument and not of a product.
    pixel = m % map_pixels
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < COLUMNS
    k = tl.arange(0, BLOCK_K)
    a_rows = a_ptr + (image * a_strides[0] + pixel * a_strides[4])[:, None]
    w_columns = w_ptr + (n * w_stride_c)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        depth = start + k
        if DEPTH % BLOCK_K == 0:
            a = tl.load(a_rows + (depth * a_strides[1])[None, :], mask=mask_m[:, None], other=0.0)
            b = tl.load(w_columns + (depth * w_stride_k)[:, None], mask=mask_n[None, :], other=0.0)
        else:
            mask_k = depth < DEPTH
            a = tl.load(
                a_rows + (depth * a_strides[1])[None, :],
                mask=mask_m[:, None] & mask_k[None, :],
                other=0.0,
            )
            b = tl.load(
                w_columns + (depth * w_stride_k)[:, None],
                mask=mask_k[:, None] & mask_n[None, :],
                other=0.0,
            )
        acc = matmul_step(a, b, acc, PRECISION, UPCAST)

    rows = image * out_strides[0] + pixel * out_strides[4]
    store_result(
        acc,
        out_ptr,
        acc_ptr,
        rows[:, None] + (n * out_strides[1])[None, :],
        image[:, None],
        n[None, :],
        plane[:, None],
        row[:, None],
        column[:, None],
        mask_m[:, None] & mask_n[None, :],
        extra_ptrs,
        extra_strides,
        EPILOGUE,
        SAVE_ACC,
    )


def _flat_map(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the spatial axes of (batch, channels, *spatial) strides collapse into one."""
    expected = strides[-1]
    for size, stride in zip(reversed(sizes), reversed(strides[2:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


class Pointwise(Algorithm):
    """1×1, stride 1, no padding: a plain matrix product."""

    name: ClassVar[str] = "pointwise"
    config_type = TileConfig
    sources = ("common", "product_wgrad", "tiles")

    def supports(self, problem: ConvProblem) -> str | None:
        """1×1 taps over maps whose rows follow each other without gaps."""
        if problem.groups != 1:
            return "groups != 1"
        if not problem.pointwise:
            return "not a 1×1 kernel with stride 1 and no padding"
        if not _flat_map(problem.in_size, problem.x_strides):
            return "the rows of the input map do not follow each other"
        if not _flat_map(problem.out_size, problem.y_strides):
            return "the rows of the output map do not follow each other"
        return unsupported_operands(problem)

    def space(self, problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[TileConfig]:
        """The tiles of a matrix product."""
        return tile_space(problem, device)

    def plan(self, problem: ConvProblem, config: TileConfig) -> LaunchPlan:
        """One matrix product; the gradient of the weight is split over pixels."""
        if problem.direction is Direction.WGRAD:
            return wgrad_plan(problem, config)
        x, y, w = problem.x_strides, problem.y_strides, problem.w_strides
        if problem.direction is Direction.FORWARD:
            operand, a, w_pair, result, out = "input", x, (w[1], w[0]), "output", y
        else:
            operand, a, w_pair, result, out = "grad_output", y, (w[0], w[1]), "grad_input", x
        rows, columns, depth = product_shape(problem)
        epilogue = epilogue_arguments(problem)
        tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
        call = KernelCall(
            _pixel_gemm_kernel,
            (tiles if problem.out_pixels else 0, 1, 1),
            (
                Slot(operand),
                Slot("weight"),
                Slot(result),
                Slot("acc" if epilogue.save_acc else result),
                epilogue.pointers,
                epilogue.strides,
                problem.batch,
                lifted(problem.out_size, 1),
                math.prod(problem.out_size),
                spatial_strides(a),
                *w_pair,
                spatial_strides(out),
            ),
            {
                "DEPTH": depth,
                "COLUMNS": columns,
                "EPILOGUE": epilogue.function,
                "SAVE_ACC": epilogue.save_acc,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
                "GROUP_M": config.group_m,
                **precision_constexprs(problem),
            },
            config.num_warps,
            config.num_stages,
        )
        return LaunchPlan((call,), slot_dtypes(problem))

    def footprint(self, problem: ConvProblem, config: TileConfig, device: DeviceFacts) -> Footprint:
        """Of the matrix product."""
        return pointwise_footprint(problem, config, device)
