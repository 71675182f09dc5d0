"""The gradient of the input with all stride phases as columns of one product.

A row of the product is a unit, a box of neighbouring input pixels with all their channels; its
reduction is the window of the output's gradient that any of them reads. The weights are spread to a
matrix [unit, window] first, zero where an output pixel of the window is no tap of the pixel.

A zero weight meets output pixels that only the unit's other pixels read: an infinite or NaN
gradient makes NaN of all pixels of the units whose window holds it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...runtime.plan import KernelCall, LaunchPlan, Slot, Workspace
from ..problem import ConvProblem
from .banded_windows import in_half_vectors, within
from .common import (
    epilogue_arguments,
    lifted,
    matmul_step,
    pixel_offset,
    position,
    precision_constexprs,
    row_position,
    slot_dtypes,
    spatial_strides,
    store_result,
    tap_offset,
    widen,
    widen_all,
)
from .packed_geometry import PackedConfig, axes_of, product_of


@triton.jit
def _column_position(
    n,
    CHANNELS: tl.constexpr,
    UNIT_D: tl.constexpr,
    UNIT_H: tl.constexpr,
    UNIT_W: tl.constexpr,
    CHANNELS_FASTEST: tl.constexpr,
):
    """(channel, plane, row, column) of an element of a unit, in the order of the input's memory.

    A row of a unit is divided out at once: the compiler sees that it is the same along a vector.
    """
    if CHANNELS_FASTEST:
        LINE: tl.constexpr = UNIT_W * CHANNELS
        plane, row = row_position(n // LINE, UNIT_D, UNIT_H)
        return n % CHANNELS, plane, row, (n % LINE) // CHANNELS
    else:
        line = n // UNIT_W
        plane, row = row_position(line % (UNIT_D * UNIT_H), UNIT_D, UNIT_H)
        return n // (UNIT_D * UNIT_H * UNIT_W), plane, row, n % UNIT_W


@triton.jit
def packed_weight_kernel(
    w_ptr,
    packed_ptr,
    elements,
    w_strides,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    UNIT_D: tl.constexpr,
    UNIT_H: tl.constexpr,
    UNIT_W: tl.constexpr,
    WINDOW_D: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    LEAD_D: tl.constexpr,
    LEAD_H: tl.constexpr,
    LEAD_W: tl.constexpr,
    HOP_D: tl.constexpr,
    HOP_H: tl.constexpr,
    HOP_W: tl.constexpr,
    CHANNELS_FASTEST: tl.constexpr,
    SHARE: tl.constexpr,
    WIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """packed[(a, c), (chunk, q, o)] = w[o, c, r], r the tap between pixel a and window pixel q.

    Where neighbours share a step, rows of the window are padded to whole steps.

    Pixel a lies LEAD behind the input pixel of tap 0 of the window's first pixel, and HOP input
    pixels part a window's pixels: r·dilation = a + LEAD − q·HOP where that is a tap.
    """
    if WIDE:
        w_strides = widen_all(w_strides)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = index % DEPTH
    n = index // DEPTH
    c, plane, row, column = _column_position(n, CHANNELS, UNIT_D, UNIT_H, UNIT_W, CHANNELS_FASTEST)
    ROW: tl.constexpr = (WINDOW_W + SHARE - 1) // SHARE
    offset = k // BLOCK_K
    line = offset // ROW
    w = offset % ROW
    o = (line // (WINDOW_D * WINDOW_H)) * BLOCK_K + k % BLOCK_K
    if SHARE > 1:
        w = w * SHARE + o // FILTERS
        o = o % FILTERS
    t = plane + LEAD_D - (line // WINDOW_H % WINDOW_D) * HOP_D
    r = row + LEAD_H - (line % WINDOW_H) * HOP_H
    s = column + LEAD_W - w * HOP_W
    taken = (index < elements) & (n < CHANNELS * UNIT_D * UNIT_H * UNIT_W) & (o < FILTERS)
    taken = taken & (t >= 0) & (t % DILATION_D == 0) & (t < KERNEL_D * DILATION_D)
    taken = taken & (r >= 0) & (r % DILATION_H == 0) & (r < KERNEL_H * DILATION_H)
    taken = taken & (s >= 0) & (s % DILATION_W == 0) & (s < KERNEL_W * DILATION_W)
    w_tap = tap_offset(w_strides, t // DILATION_D, r // DILATION_H, s // DILATION_W)
    weight = tl.load(w_ptr + o * w_strides[0] + c * w_strides[1] + w_tap, mask=taken, other=0.0)
    tl.store(packed_ptr + index, weight, mask=index < elements)


@triton.jit
def packed_dgrad_kernel(
    grad_ptr,
    packed_ptr,
    x_ptr,
    acc_ptr,
    extra_ptrs,
    extra_strides,
    batch,
    in_size,
    out_size,
    x_strides,
    y_strides,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    UNIT_D: tl.constexpr,
    UNIT_H: tl.constexpr,
    UNIT_W: tl.constexpr,
    RUN_D: tl.constexpr,
    RUN_H: tl.constexpr,
    RUN_W: tl.constexpr,
    FIRST_D: tl.constexpr,
    FIRST_H: tl.constexpr,
    FIRST_W: tl.constexpr,
    WINDOW_D: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SKIP_D: tl.constexpr,
    SKIP_H: tl.constexpr,
    SKIP_W: tl.constexpr,
    CHECK_D: tl.constexpr,
    CHECK_H: tl.constexpr,
    CHECK_W: tl.constexpr,
    OVERHANG_D: tl.constexpr,
    OVERHANG_H: tl.constexpr,
    OVERHANG_W: tl.constexpr,
    CHANNELS_FASTEST: tl.constexpr,
    FLAT_ROWS: tl.constexpr,
    SHARE: tl.constexpr,
    CACHED: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SAVE_ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad_x[unit, (a, c)] = Σ_{q,o} grad_y[o, pixel q of its window] · packed[(a, c), (q, o)]."""
    tile = tl.program_id(0)
    if WIDE:
        tile = widen(tile)
        batch = widen(batch)
        x_strides = widen_all(x_strides)
        y_strides = widen_all(y_strides)
    ROW: tl.constexpr = (WINDOW_W + SHARE - 1) // SHARE
    OFFSETS: tl.constexpr = WINDOW_D * WINDOW_H * ROW
    CHUNKS: tl.constexpr = (FILTERS + BLOCK_K - 1) // BLOCK_K
    DEPTH: tl.constexpr = OFFSETS * CHUNKS * BLOCK_K
    COLUMNS: tl.constexpr = CHANNELS * UNIT_D * UNIT_H * UNIT_W
    planes = tl.cdiv(in_size[0], UNIT_D)
    rows = tl.cdiv(in_size[1], UNIT_H)
    columns = tl.cdiv(in_size[2], UNIT_W)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < batch * (planes * rows * columns)
    image, plane, row, column = position(m, (planes, rows, columns))
    first_plane = plane * RUN_D + FIRST_D
    first_row = row * RUN_H + FIRST_H
    first_column = column * RUN_W + FIRST_W
    y_rows = pixel_offset(y_strides, image, first_plane, first_row, first_column)
    k = tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    packed = packed_ptr + (k[:, None] + n[None, :] * DEPTH)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(OFFSETS * CHUNKS):
        # Windows of one block of channels after the other: their pixels are met again soon.
        if CHUNKS == 1:
            offset = step
            o = k
        else:
            offset = step % OFFSETS
            o = (step // OFFSETS) * BLOCK_K + k
        d, h = row_position(offset // ROW, WINDOW_D, WINDOW_H)
        d *= SKIP_D
        h *= SKIP_H
        w = (offset % ROW) * (SHARE * SKIP_W)
        taken = mask_m
        if CHECK_D:
            taken = taken & within(first_plane + d, out_size[0])
        if CHECK_H:
            taken = taken & within(first_row + h, out_size[1])
        if SHARE > 1:
            # Pixels, not elements, so that the compiler sees whole vectors with one bound.
            neighbour = (k // FILTERS) * SKIP_W
            mask = taken[:, None]
            if CHECK_W:
                mask = mask & within((first_column + w)[:, None] + neighbour[None, :], out_size[2])
            if WINDOW_W % SHARE != 0:
                mask = mask & (neighbour < WINDOW_W * SKIP_W - w)[None, :]
            y_columns = (k % FILTERS) * y_strides[1] + neighbour * y_strides[4]
        else:
            if CHECK_W:
                taken = taken & within(first_column + w, out_size[2])
            mask = taken[:, None]
            if FILTERS % BLOCK_K != 0:
                mask = mask & (o < FILTERS)[None, :]
            y_columns = o * y_strides[1]
        if CACHED:
            mask = mask & in_half_vectors(k, BLOCK_K)[None, :]
        y_offsets = (y_rows + tap_offset(y_strides, d, h, w))[:, None] + y_columns[None, :]
        a = tl.load(grad_ptr + y_offsets, mask=mask, other=0.0)
        b = tl.load(packed)
        packed += BLOCK_K
        acc = matmul_step(a, b, acc, PRECISION, UPCAST)

    c, t, r, s = _column_position(n, CHANNELS, UNIT_D, UNIT_H, UNIT_W, CHANNELS_FASTEST)
    plane *= UNIT_D
    row *= UNIT_H
    if FLAT_ROWS:
        # Written as a remainder, the compiler sees that a row of a unit is contiguous.
        LINE: tl.constexpr = UNIT_W * CHANNELS if CHANNELS_FASTEST else UNIT_W
        x_rows = pixel_offset(x_strides, image, plane, row, 0) + column * LINE
        x_columns = tap_offset(x_strides, t, r, 0) + n % LINE
        if not CHANNELS_FASTEST:
            x_columns += c * x_strides[1]
        inside_w = (n % LINE)[None, :] < ((in_size[2] - column * UNIT_W) * (LINE // UNIT_W))[
            :, None
        ]
        column *= UNIT_W
    else:
        column *= UNIT_W
        x_rows = pixel_offset(x_strides, image, plane, row, column)
        x_columns = c * x_strides[1] + tap_offset(x_strides, t, r, s)
        inside_w = column[:, None] + s[None, :] < in_size[2]
    mask = mask_m[:, None]
    if COLUMNS != BLOCK_N or EPILOGUE is not None:
        mask = mask & (n < COLUMNS)[None, :]
    in_plane = plane[:, None] + t[None, :]
    in_row = row[:, None] + r[None, :]
    in_column = column[:, None] + s[None, :]
    if OVERHANG_D:
        mask = mask & (in_plane < in_size[0])
    if OVERHANG_H:
        mask = mask & (in_row < in_size[1])
    if OVERHANG_W:
        mask = mask & inside_w
    store_result(
        acc,
        x_ptr,
        acc_ptr,
        x_rows[:, None] + x_columns[None, :],
        image[:, None],
        c[None, :],
        in_plane,
        in_row,
        in_column,
        mask,
        extra_ptrs,
        extra_strides,
        EPILOGUE,
        SAVE_ACC,
    )


def packed_plan(problem: ConvProblem, config: PackedConfig) -> LaunchPlan:
    """Two launches: the weights spread to one matrix, then the product with it."""
    axes = axes_of(problem, config.run)
    product = product_of(problem, config.run, config.block_k)
    depth = product.steps * config.block_k
    elements = product.block_n * depth
    channels_fastest = problem.x_strides[1] <= problem.x_strides[-1]
    shared: dict[str, Any] = {
        "CHANNELS": problem.in_channels,
        "FILTERS": problem.out_channels,
        "CHANNELS_FASTEST": channels_fastest,
        "SHARE": product.share,
        "BLOCK_K": config.block_k,
    }
    kernel, stride = lifted(problem.kernel, 1), lifted(problem.stride, 1)
    pad, dilation = lifted(problem.padding, 0), lifted(problem.dilation, 1)
    spread: dict[str, Any] = {"WIDE": problem.wide, "DEPTH": depth, "BLOCK": 1024}
    walked: dict[str, Any] = {"CACHED": bool(config.cached), "BLOCK_M": config.block_m}
    for index, (name, axis) in enumerate(zip("DHW", axes, strict=True)):
        shared |= {f"UNIT_{name}": axis.unit, f"WINDOW_{name}": axis.window}
        spread |= {
            f"KERNEL_{name}": kernel[index],
            f"DILATION_{name}": dilation[index],
            f"LEAD_{name}": pad[index] - axis.first * stride[index],
            f"HOP_{name}": axis.skip * stride[index],
        }
        walked |= {
            f"RUN_{name}": axis.run,
            f"FIRST_{name}": axis.first,
            f"SKIP_{name}": axis.skip,
            f"CHECK_{name}": axis.checked,
            f"OVERHANG_{name}": lifted(problem.in_size, 1)[index] % axis.unit != 0,
        }
    pack = KernelCall(
        packed_weight_kernel,
        (triton.cdiv(elements, 1024), 1, 1),
        (Slot("weight"), Slot("packed"), elements, spatial_strides(problem.w_strides)),
        {**shared, **spread},
    )
    pixel = problem.in_channels if channels_fastest else 1
    epilogue = epilogue_arguments(problem)
    multiply = KernelCall(
        packed_dgrad_kernel,
        (triton.cdiv(product.units, config.block_m), 1, 1),
        (
            Slot("grad_output"),
            Slot("packed"),
            Slot("grad_input"),
            Slot("acc" if epilogue.save_acc else "grad_input"),
            epilogue.pointers,
            epilogue.strides,
            problem.batch,
            lifted(problem.in_size, 1),
            lifted(problem.out_size, 1),
            spatial_strides(problem.x_strides),
            spatial_strides(problem.y_strides),
        ),
        {
            **shared,
            **walked,
            "FLAT_ROWS": problem.x_strides[-1] == pixel
            and (not channels_fastest or problem.x_strides[1] == 1),
            "EPILOGUE": epilogue.function,
            "SAVE_ACC": epilogue.save_acc,
            **precision_constexprs(problem),
            "BLOCK_N": product.block_n,
        },
        config.num_warps,
        config.num_stages,
    )
    return LaunchPlan(
        (pack, multiply),
        {**slot_dtypes(problem), "packed": problem.dtype},
        (Workspace("packed", (product.block_n, depth), problem.dtype),),
    )
