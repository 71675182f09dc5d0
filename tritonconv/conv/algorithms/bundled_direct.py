"""Products of bundles of narrow groups whose channels are one step of the reduction.

A step is a tap. Pixels read through registers and the L1 cache, which asynchronous copies of 16
bytes pass by, were measured to be slower: 56 to 62 µs where copies take 47. The gradient of the
input without stride is the same product over the gradient of the output, with the filter turned
around.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...runtime.plan import KernelCall, LaunchPlan, Slot, Workspace
from ..problem import ConvProblem, Direction
from .common import (
    epilogue_arguments,
    inside,
    lifted,
    matmul_step,
    pixel_offset,
    pixels_of,
    position,
    precision_constexprs,
    slot_dtypes,
    spatial_strides,
    store_result,
    tap_offset,
    tap_position,
    widen,
    widen_all,
)


@triton.jit
def spread_taps_kernel(
    w_ptr,
    out_ptr,
    elements,
    w_strides,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    BUNDLE: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    GRADIENT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[bundle, tap, c, o] = w[o, c, tap] inside a group, else 0.

    For the gradient of the input out[bundle, tap, o, c], with the taps in reverse.
    """
    if WIDE:
        w_strides = widen_all(w_strides)
    INNER: tl.constexpr = BUNDLE * (CHANNELS if GRADIENT else FILTERS)
    OUTER: tl.constexpr = BUNDLE * (FILTERS if GRADIENT else CHANNELS)
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < elements
    inner = index % INNER
    outer = (index // INNER) % OUTER
    tap = (index // (INNER * OUTER)) % TAPS
    bundle = index // (INNER * OUTER * TAPS)
    if GRADIENT:
        c = inner
        o = outer
        tap = TAPS - 1 - tap
    else:
        c = outer
        o = inner
    t, r, s = tap_position(tap, KERNEL_D, KERNEL_H, KERNEL_W)
    offsets = (bundle * (BUNDLE * FILTERS) + o) * w_strides[0] + (c % CHANNELS) * w_strides[1]
    offsets += tap_offset(w_strides, t, r, s)
    own = mask & (o // FILTERS == c // CHANNELS)
    tl.store(out_ptr + index, tl.load(w_ptr + offsets, mask=own, other=0.0), mask=mask)


@triton.jit
def bundled_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    acc_ptr,
    extra_ptrs,
    extra_strides,
    batch,
    in_size,
    out_size,
    x_strides,
    y_strides,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
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
    EPILOGUE: tl.constexpr,
    SAVE_ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """y[pixel, n] = Σ_tap Σ_k x[pixel·stride + tap − pad, k] · w[bundle, tap, k, n]."""
    if WIDE:
        batch = widen(batch)
        x_strides = widen_all(x_strides)
        y_strides = widen_all(y_strides)
    bundle = tl.program_id(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < pixels_of(batch, out_size)
    image, plane, row, column = position(m, out_size)
    first_plane = plane * STRIDE_D - PAD_D
    first_row = row * STRIDE_H - PAD_H
    first_column = column * STRIDE_W - PAD_W
    n = tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    x_rows = pixel_offset(x_strides, image, first_plane, first_row, first_column)
    x_tile = (x_rows + bundle * DEPTH * x_strides[1])[:, None] + (k * x_strides[1])[None, :]
    w_tile = w_ptr + bundle * (TAPS * DEPTH * COLUMNS) + k[:, None] * COLUMNS + n[None, :]
    acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    for tap in range(TAPS):
        t, r, s = tap_position(tap, KERNEL_D, KERNEL_H, KERNEL_W)
        t = t * DILATION_D
        r = r * DILATION_H
        s = s * DILATION_W
        held = inside(mask_m, first_plane + t, first_row + r, first_column + s, in_size)
        x_tap = x_ptr + (x_tile + tap_offset(x_strides, t, r, s))
        a = tl.load(x_tap, mask=held[:, None], other=0.0)
        b = tl.load(w_tile + tap * (DEPTH * COLUMNS))
        acc = matmul_step(a, b, acc, PRECISION, UPCAST)
    channel = bundle * COLUMNS + n
    y_rows = pixel_offset(y_strides, image, plane, row, column)
    store_result(
        acc,
        y_ptr,
        acc_ptr,
        y_rows[:, None] + (channel * y_strides[1])[None, :],
        image[:, None],
        channel[None, :],
        plane[:, None],
        row[:, None],
        column[:, None],
        mask_m[:, None] & (n < COLUMNS)[None, :],
        extra_ptrs,
        extra_strides,
        EPILOGUE,
        SAVE_ACC,
    )


def direct(problem: ConvProblem, bundle: int) -> bool:
    """Whether a bundle's channels, and its filters, are powers of two that one step can hold.

    The gradient of the input is such a product only without stride.
    """
    widths = (bundle * problem.channels_per_group, bundle * problem.filters_per_group)
    if any(width & (width - 1) or not 16 <= width <= 64 for width in widths):
        return False
    if problem.direction is Direction.DGRAD:
        return all(hop == 1 for hop in problem.stride)
    return problem.direction is Direction.FORWARD


def direct_plan(
    problem: ConvProblem, bundle: int, block_m: int, num_warps: int, num_stages: int
) -> LaunchPlan:
    """The weight spread out by taps, and the product."""
    gradient = problem.direction is Direction.DGRAD
    kernel = lifted(problem.kernel, 1)
    dilation = lifted(problem.dilation, 1)
    padding = lifted(problem.padding, 0)
    depth, columns = bundle * problem.channels_per_group, bundle * problem.filters_per_group
    sizes = [lifted(problem.in_size, 1), lifted(problem.out_size, 1)]
    strides = [spatial_strides(problem.x_strides), spatial_strides(problem.y_strides)]
    pixels = problem.out_pixels
    if gradient:
        depth, columns = columns, depth
        sizes, strides = sizes[::-1], strides[::-1]
        pixels = problem.in_pixels
        reach = zip(kernel, dilation, padding, strict=True)
        padding = lifted([step * (taps - 1) - pad for taps, step, pad in reach], 0)
    bundles = problem.groups // bundle
    elements = bundles * problem.taps * depth * columns
    kernels = dict(zip(("KERNEL_D", "KERNEL_H", "KERNEL_W"), kernel, strict=True))
    spread = KernelCall(
        spread_taps_kernel,
        (triton.cdiv(elements, 512), 1, 1),
        (Slot("weight"), Slot("spread"), elements, spatial_strides(problem.w_strides)),
        {
            "CHANNELS": problem.channels_per_group,
            "FILTERS": problem.filters_per_group,
            "BUNDLE": bundle,
            **kernels,
            "GRADIENT": gradient,
            "WIDE": problem.wide,
            "BLOCK": 512,
        },
    )
    epilogue = epilogue_arguments(problem)
    names = ("grad_output", "grad_input") if gradient else ("input", "output")
    geometry: dict[str, Any] = {
        f"{label}_{axis}": value
        for label, values in (
            ("STRIDE", lifted(problem.stride, 1)),
            ("PAD", padding),
            ("DILATION", dilation),
        )
        for axis, value in zip("DHW", values, strict=True)
    }
    call = KernelCall(
        bundled_kernel,
        (triton.cdiv(pixels, block_m), bundles, 1),
        (
            Slot(names[0]),
            Slot("spread"),
            Slot(names[1]),
            Slot("acc" if epilogue.save_acc else names[1]),
            epilogue.pointers,
            epilogue.strides,
            problem.batch,
            *sizes,
            *strides,
        ),
        {
            "DEPTH": depth,
            "COLUMNS": columns,
            **kernels,
            **geometry,
            "EPILOGUE": epilogue.function,
            "SAVE_ACC": epilogue.save_acc,
            **precision_constexprs(problem),
            "BLOCK_M": block_m,
        },
        num_warps,
        num_stages,
    )
    return LaunchPlan(
        (spread, call),
        {**slot_dtypes(problem), "spread": problem.dtype},
        (Workspace("spread", (elements,), problem.dtype),),
    )
