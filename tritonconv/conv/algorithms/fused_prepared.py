"""A prologue once for every element of the input, in a launch of its own before the product.

The fused kernel computes a prologue anew for every tap of the filter and every column of tiles, in
registers, on the way from one copy in shared memory to the matrix instructions. Here the input
passes the function once, into a temporary with channels fastest that mostly stays in the L2 cache,
and the product streams its operands as the plain one does.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import triton
import triton.language as tl

from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm
from ...runtime.plan import KernelCall, LaunchPlan, Slot, Workspace
from ...runtime.space import ConfigSpace, Footprint
from ..fused_problem import FusedProblem
from ..problem import strides_for
from .common import (
    TileConfig,
    lifted,
    pixel_offset,
    pixels_of,
    position,
    spatial_strides,
    unsupported_dtype,
    unsupported_product,
    widen,
    widen_all,
)
from .footprints import product_footprint
from .fused_input import fused_slots, with_statistics
from .fused_products import fused_call, prologue_arguments, prologue_constexprs
from .fused_spaces import fused_space

_ELEMENTS = 4096
_WARPS = 4


@triton.jit
def prologue_kernel(
    x_ptr,
    out_ptr,
    pro_ptrs,
    pro_strides,
    batch,
    in_size,
    x_strides,
    out_strides,
    CHANNELS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[n, c, p] = g(x[n, c, p]) for a tile of pixels and channels."""
    tile = tl.program_id(0)
    if WIDE:
        batch = widen(batch)
        x_strides = widen_all(x_strides)
        out_strides = widen_all(out_strides)
        tile = tile.to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image, plane, row, column = position(m, in_size)
    mask_m = (m < pixels_of(batch, in_size))[:, None]
    if CHANNELS % BLOCK_C == 0:
        mask = mask_m
        channel_mask = tl.full((1, 1), True, tl.int1)
    else:
        channel_mask = (c < CHANNELS)[None, :]
        mask = mask_m & channel_mask
    rows = pixel_offset(x_strides, image, plane, row, column)
    x = tl.load(x_ptr + rows[:, None] + (c * x_strides[1])[None, :], mask=mask, other=0.0)
    if PER_CHANNEL:
        read = channel_mask
    else:
        read = mask
    value = PROLOGUE(
        x.to(tl.float32),
        image[:, None],
        c[None, :],
        plane[:, None],
        row[:, None],
        column[:, None],
        read,
        pro_ptrs,
        pro_strides,
    )
    rows = pixel_offset(out_strides, image, plane, row, column)
    offsets = rows[:, None] + (c * out_strides[1])[None, :]
    tl.store(out_ptr + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)


class PreparedInput(Algorithm):
    """The prologue in one launch, the product of what it made in another."""

    name: ClassVar[str] = "prepared_input"
    config_type = TileConfig
    sources = (
        "common",
        "fused_input",
        "fused_loops",
        "fused_products",
        "fused_spaces",
        "fused_statistics",
        "tiles",
    )

    def supports(self, problem: FusedProblem) -> str | None:
        """Problems with a prologue in a dtype of the generated kernels."""
        if problem.prologue is None:
            return "no prologue"
        return unsupported_dtype(problem) or unsupported_product(problem)

    def space(self, problem: FusedProblem, device: DeviceFacts) -> ConfigSpace[TileConfig]:
        """Tiles, warps and stages of the product; the launch before it has one config."""
        return fused_space(_of_prepared(problem), device)

    def plan(self, problem: FusedProblem, config: TileConfig) -> LaunchPlan:
        """The prologue, the product, and one that merges the tiles' statistics."""
        product = _of_prepared(problem)
        calls = (_prologue_call(problem, product), fused_call(product, config, "prepared"))
        plan = with_statistics(product, config, calls)
        made = Workspace("prepared", problem.x_shape, problem.dtype)
        dtypes = {**fused_slots(problem), **plan.dtypes, "prepared": problem.dtype}
        return replace(plan, dtypes=dtypes, workspaces=(made, *plan.workspaces))

    def footprint(
        self, problem: FusedProblem, config: TileConfig, device: DeviceFacts
    ) -> Footprint:
        """Of the product; the launch before it reads and writes the input once."""
        product = product_footprint(_of_prepared(problem), config, device)
        moved = math.prod(problem.x_shape) * problem.dtype.itemsize
        return replace(
            product,
            bytes_loaded=product.bytes_loaded + moved,
            bytes_stored=product.bytes_stored + moved,
            launches=product.launches + 1,
        )


# Of an H100: a load, conversions, some arithmetic, a mask and a conversion for one element, at the
# rate of all schedulers (the prologue of 64 channels at 56 x 56, batch 64, took 40 µs of the fused
# product's 81 to 86); bytes to memory and back; a launch.
_INSTRUCTIONS = 12
_INSTRUCTIONS_PER_US = 28.7e6
_BYTES_PER_US = 3.0e6
_LAUNCH_US = 2.0


def worth_preparing(problem: FusedProblem) -> bool:
    """Whether the prologue is expected to cost less by itself than in every tap's load."""
    if problem.prologue is None:
        return False
    columns = problem.groups * triton.cdiv(problem.filters_per_group, 128)
    repeated = problem.out_pixels * problem.taps * problem.channels_per_group * columns
    fused = repeated * _INSTRUCTIONS / _INSTRUCTIONS_PER_US
    alone = 2 * math.prod(problem.x_shape) * problem.dtype.itemsize / _BYTES_PER_US
    return fused > alone + _LAUNCH_US


def _of_prepared(problem: FusedProblem) -> FusedProblem:
    """The product that is left once the prologue has run: of an input with channels fastest."""
    strides = strides_for(problem.x_shape, "channels_last", False)
    return replace(problem, prologue=None, x_strides=strides)


def _prologue_call(problem: FusedProblem, product: FusedProblem) -> KernelCall:
    channels = problem.in_channels
    block_c = min(64, triton.next_power_of_2(channels))
    block_m = _ELEMENTS // block_c
    pixels = problem.batch * math.prod(problem.in_size)
    return KernelCall(
        prologue_kernel,
        (triton.cdiv(pixels, block_m), triton.cdiv(channels, block_c), 1),
        (
            Slot("input"),
            Slot("prepared"),
            *prologue_arguments(problem),
            problem.batch,
            lifted(problem.in_size, 1),
            spatial_strides(problem.x_strides),
            spatial_strides(product.x_strides),
        ),
        {
            "CHANNELS": channels,
            **prologue_constexprs(problem),
            "WIDE": problem.wide,
            "BLOCK_M": block_m,
            "BLOCK_C": block_c,
        },
        num_warps=_WARPS,
    )
