"""The small kernels around a depthwise product: weights rearranged, partial sums added."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...runtime.plan import KernelCall, Slot, Workspace
from ..problem import ConvProblem
from .common import lifted, sum_partials_call, widen_all


@triton.jit
def pack_weight_kernel(
    w_ptr,
    out_ptr,
    filters,
    elements,
    w_strides,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[(t, r, s), o] = w[o, 0, t, r, s] in float32: lanes of neighbouring channels read rows."""
    if WIDE:
        w_strides = widen_all(w_strides)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < elements
    tap = index // filters
    offsets = (
        index % filters * w_strides[0]
        + tap // (KERNEL_H * KERNEL_W) * w_strides[2]
        + tap // KERNEL_W % KERNEL_H * w_strides[3]
        + tap % KERNEL_W * w_strides[4]
    )
    tl.store(out_ptr + index, tl.load(w_ptr + offsets, mask=mask).to(tl.float32), mask=mask)


def weight_strides(problem: ConvProblem) -> tuple[int, ...]:
    """Strides of the weight on three spatial axes."""
    return (*problem.w_strides[:2], *lifted(problem.w_strides[2:], 0))


def packed_strides(problem: ConvProblem) -> tuple[int, ...]:
    """Strides of the rearranged weight, likewise."""
    _, rows, columns = lifted(problem.kernel, 1)
    filters = problem.out_channels
    return (1, 0, rows * columns * filters, columns * filters, filters)


def packing_call(problem: ConvProblem) -> tuple[KernelCall, Workspace]:
    """Rearrange the weight into the workspace ``packed``."""
    elements = problem.out_channels * problem.taps
    call = KernelCall(
        pack_weight_kernel,
        (triton.cdiv(elements, 256), 1, 1),
        (
            Slot("weight"),
            Slot("packed"),
            problem.out_channels,
            elements,
            weight_strides(problem),
        ),
        {**_kernel_constexprs(problem), "BLOCK": 256},
        num_warps=4,
    )
    return call, Workspace("packed", (elements,), torch.float32)


def summing_call(problem: ConvProblem, splits: int) -> tuple[KernelCall, Workspace]:
    """Add the workspace ``partial`` into the gradient of the weight."""
    elements = problem.out_channels * problem.taps
    call = sum_partials_call(problem, splits, elements, taps_first=True, block=32, block_s=64)
    return call, Workspace("partial", (splits, elements), torch.float32)


def _kernel_constexprs(problem: ConvProblem) -> dict[str, int]:
    _, rows, columns = lifted(problem.kernel, 1)
    return {"KERNEL_H": rows, "KERNEL_W": columns, "WIDE": problem.wide}
