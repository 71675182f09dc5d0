"""Products over boxes of pixels that the copy engine fetches, zeros where they leave the map.

A tile of pixels is a box (images, planes, rows, columns); what a tap reads is the same box moved,
one load of a tensor descriptor without addresses or masks. All operands of matrix instructions
stay in shared memory where they were put.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ...runtime.plan import KernelCall, LaunchPlan, Slot, Workspace
from ..problem import ConvProblem, Direction
from .boxed_views import (
    Four,
    axes_of,
    box_shapes,
    last_axis,
    pixel_boxes,
    run_shapes,
    weight_boxes,
)
from .common import (
    NO_EPILOGUE,
    TileConfig,
    epilogue_arguments,
    grouped_tile,
    lifted,
    matmul_step,
    position,
    precision_constexprs,
    slot_dtypes,
    slot_names,
    spatial_strides,
    store_result,
    tap_offset,
    tap_position,
    widen,
    widen_all,
)
from .product_wgrad import reduction_call
from .split import SplitSum, finished, split_range


@triton.jit
def meeting(
    place,
    size,
    KERNEL: tl.constexpr,
    HOP: tl.constexpr,
    FIRST: tl.constexpr,
    BOX: tl.constexpr,
):
    """First tap along an axis for which a box meets the map, and their number.

    Without padding, and with boxes wider than it, that is all of them, which constants say. There
    is one at least, so that nothing is divided by zero: it reads zeros.
    """
    if (FIRST < BOX) and (-FIRST < BOX):
        first = 0
        count: tl.constexpr = KERNEL
    else:
        if HOP > 0:
            first = tl.cdiv(tl.maximum(1 - BOX - place, 0), HOP)
            last = tl.maximum(size - 1 - place, 0) // HOP
        else:
            first = tl.cdiv(tl.maximum(place - size + 1, 0), -HOP)
            last = tl.maximum(place + BOX - 1, 0) // (-HOP)
        first = tl.minimum(first, KERNEL - 1)
        count = tl.maximum(tl.minimum(last, KERNEL - 1) - first + 1, 1)
    return first, count


@triton.jit
def box_products(
    source,
    weight,
    image0,
    plane0,
    row0,
    column0,
    n0,
    split,
    source_size,
    DEPTH: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    HOP_D: tl.constexpr,
    HOP_H: tl.constexpr,
    HOP_W: tl.constexpr,
    FIRST_D: tl.constexpr,
    FIRST_H: tl.constexpr,
    FIRST_W: tl.constexpr,
    ADJOINT: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_D: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sums (columns, pixels) of a tile, or of one of SPLITS parts, over channels and taps.

    Taps that leave the map for all of the box are left out.

    Columns are the rows of a tile and pixels its columns: a left operand that is reshaped would
    pass registers, which Triton 3.6 overwrites while products still read them.
    """
    BLOCK_M: tl.constexpr = BOX_N * BOX_D * BOX_H * BOX_W
    t0, t_count = meeting(plane0 + FIRST_D, source_size[0], KERNEL_D, HOP_D, FIRST_D, BOX_D)
    r0, r_count = meeting(row0 + FIRST_H, source_size[1], KERNEL_H, HOP_H, FIRST_H, BOX_H)
    s0, s_count = meeting(column0 + FIRST_W, source_size[2], KERNEL_W, HOP_W, FIRST_W, BOX_W)
    taps = t_count * r_count * s_count
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first, last = split_range(taps * tl.cdiv(DEPTH, BLOCK_K), split, SPLITS)
    for step in range(first, last):
        k = step // taps * BLOCK_K
        tap = step % taps
        s = s0 + tap % s_count
        r = r0 + tap // s_count % r_count
        t = t0 + tap // (s_count * r_count)
        tap = (t * KERNEL_H + r) * KERNEL_W + s
        pixels = source.load(
            [
                image0,
                plane0 + (t * HOP_D + FIRST_D),
                row0 + (r * HOP_H + FIRST_H),
                column0 + (s * HOP_W + FIRST_W),
                k,
            ]
        ).reshape(BLOCK_M, BLOCK_K)
        if ADJOINT:
            # The weight's rows are what is summed over.
            filters = tl.trans(weight.load([tap, k, n0]).reshape(BLOCK_K, BLOCK_N))
        else:
            filters = weight.load([tap, n0, k]).reshape(BLOCK_N, BLOCK_K)
        acc = matmul_step(filters, tl.trans(pixels), acc, PRECISION, UPCAST)
    return acc


@triton.jit
def flat_pixel(image, plane, row, column, size, WIDE: tl.constexpr):
    """The number of a pixel in a batch of maps."""
    flat = column + size[2] * (row + size[1] * (plane + size[0] * image))
    if WIDE:
        flat = column + widen(size[2]) * (row + widen(size[1]) * (plane + widen(size[0]) * image))
    return flat


@triton.jit
def boxed_product_kernel(
    source,
    weight,
    y_ptr,
    acc_ptr,
    extra_ptrs,
    extra_strides,
    images,
    size,
    source_size,
    strides,
    map_size,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    HOP_D: tl.constexpr,
    HOP_H: tl.constexpr,
    HOP_W: tl.constexpr,
    FIRST_D: tl.constexpr,
    FIRST_H: tl.constexpr,
    FIRST_W: tl.constexpr,
    ADJOINT: tl.constexpr,
    MERGED: tl.constexpr,
    SPLITS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SAVE_ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_D: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """result[p, m] = Σ_{tap,k} source[p + first + tap·hop, k] · weight[tap, (m, k) or (k, m)].

    ``size`` holds planes, rows and columns, all axes merged where the filter allows, ``map_size``
    those of the result. With SPLITS every part of the sum goes to ``y_ptr[split, pixel, column]``
    in float32.
    """
    BLOCK_M: tl.constexpr = BOX_N * BOX_D * BOX_H * BOX_W
    boxes = (tl.cdiv(size[0], BOX_D), tl.cdiv(size[1], BOX_H), tl.cdiv(size[2], BOX_W))
    tiles = tl.cdiv(images, BOX_N) * boxes[0] * boxes[1] * boxes[2]
    tile_m, tile_n = grouped_tile(tl.program_id(0), tiles, tl.cdiv(COLUMNS, BLOCK_N), GROUP_M)
    image0, plane0, row0, column0 = position(tile_m, boxes)
    image0 *= BOX_N
    plane0 *= BOX_D
    row0 *= BOX_H
    column0 *= BOX_W
    n0 = tile_n * BLOCK_N

    split = tl.program_id(1)
    acc = box_products(
        source, weight, image0, plane0, row0, column0, n0, split, source_size, DEPTH,
        KERNEL_D, KERNEL_H, KERNEL_W, HOP_D, HOP_H, HOP_W, FIRST_D, FIRST_H, FIRST_W,
        ADJOINT, SPLITS, PRECISION, UPCAST, BOX_N, BOX_D, BOX_H, BOX_W, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    m = tl.arange(0, BLOCK_M)[None, :]
    n = (n0 + tl.arange(0, BLOCK_N))[:, None]
    image = image0 + m // (BOX_W * BOX_H * BOX_D)
    plane = plane0 + m // (BOX_W * BOX_H) % BOX_D
    row = row0 + m // BOX_W % BOX_H
    column = column0 + m % BOX_W
    mask = (image < images) & (plane < size[0]) & (row < size[1]) & (column < size[2])
    if COLUMNS % BLOCK_N != 0:
        mask = mask & (n < COLUMNS)
    if WIDE:
        strides = widen_all(strides)
        images = widen(images)
    flat = flat_pixel(image, plane, row, column, size, WIDE)
    if SPLITS > 1:
        pixels_of_all = images * (size[0] * size[1] * size[2])
        offsets = (split.to(tl.int64) * pixels_of_all + flat) * COLUMNS + n
        tl.store(y_ptr + offsets, acc, mask=mask)
    else:
        offsets = image * strides[0] + plane * strides[2] + row * strides[3] + column * strides[4]
        offsets += n
        if MERGED:
            image, plane, row, column = position(flat, map_size)
        store_result(
            acc,
            y_ptr,
            acc_ptr,
            offsets,
            image,
            n,
            plane,
            row,
            column,
            mask,
            extra_ptrs,
            extra_strides,
            EPILOGUE,
            SAVE_ACC,
        )


@triton.jit
def load_run(tensor, image, plane, row, column, channel, RUN: tl.constexpr):
    """Consecutive pixels along axis RUN, which is the last one of the descriptor."""
    if RUN == 0:
        values = tensor.load([plane, row, column, image, channel])
    elif RUN == 1:
        values = tensor.load([image, row, column, plane, channel])
    elif RUN == 2:
        values = tensor.load([image, plane, column, row, channel])
    else:
        values = tensor.load([image, plane, row, column, channel])
    return values.reshape(values.shape[3], values.shape[4])


@triton.jit
def reached(shift, size, source_size, BOX: tl.constexpr, EXACT: tl.constexpr):
    """First position along an axis and number of boxes from which a shift stays in the map."""
    if EXACT and BOX == 1:
        first = tl.maximum(-shift, 0)
        count = tl.maximum(tl.minimum(size, source_size - shift) - first, 0)
    else:
        first = 0
        count = tl.cdiv(size, BOX)
    return first, count


@triton.jit
def boxed_wgrad_kernel(
    grad,
    source,
    out_ptr,
    images,
    size,
    source_size,
    w_strides,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    HOP_D: tl.constexpr,
    HOP_H: tl.constexpr,
    HOP_W: tl.constexpr,
    FIRST_D: tl.constexpr,
    FIRST_H: tl.constexpr,
    FIRST_W: tl.constexpr,
    TAPS: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
    RUN: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_D: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """grad_w[o, tap, c] = Σ_p grad_y[p, o] · x[p + first + tap·hop, c] for TAPS taps a program.

    A box of pixels is a run along one axis, so that its tile is a matrix as it is loaded: both
    operands stay in shared memory. BLOCK_K pixels of a step are one run or several. The gradient's
    tile is read once for all taps. With PARTIAL every split of the steps writes its float32 sum to
    ``out_ptr[split, o, (tap, c)]``; otherwise the result goes to the weight.
    """
    RUNS: tl.constexpr = BLOCK_K // (BOX_N * BOX_D * BOX_H * BOX_W)
    ALL: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    tiles_c: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(FILTERS, BLOCK_M), (ALL // TAPS) * tiles_c, GROUP_M
    )
    split = tl.program_id(1)
    m0 = tile_m * BLOCK_M
    c0 = tile_n % tiles_c * BLOCK_N
    tap0 = tile_n // tiles_c * TAPS

    # Taps of one program that agree on a shift need no more of an axis than where it stays inside.
    t, r, s = tap_position(tap0, KERNEL_D, KERNEL_H, KERNEL_W)
    d0, depth = reached(t * HOP_D + FIRST_D, size[0], source_size[0], BOX_D, TAPS <= KERNEL_W)
    h0, height = reached(r * HOP_H + FIRST_H, size[1], source_size[1], BOX_H, TAPS <= KERNEL_W)
    w0, width = reached(s * HOP_W + FIRST_W, size[2], source_size[2], BOX_W, TAPS == 1)
    runs = tl.cdiv(images, BOX_N) * depth * height * width
    # Nothing is divided by zero where a tap never meets the map.
    counts = (tl.maximum(depth, 1), tl.maximum(height, 1), tl.maximum(width, 1))
    steps = tl.cdiv(runs, RUNS)
    each = tl.cdiv(steps, tl.num_programs(1))
    first = split * each
    last = tl.minimum(first + each, steps)

    # Tuples of Triton grow by sums, and change their type by that.
    zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    accs = (zeros,)
    for _ in tl.static_range(TAPS - 1):
        accs = accs + (zeros,)  # type: ignore[assignment]  # noqa: RUF005
    for step in range(first, last):
        for run in tl.static_range(RUNS):
            # A run behind the last one lies behind the last image: zeros.
            image, plane, row, column = position(step * RUNS + run, counts)
            image *= BOX_N
            plane = d0 + plane * BOX_D
            row = h0 + row * BOX_H
            column = w0 + column * BOX_W
            a = load_run(grad, image, plane, row, column, m0, RUN)
            added = ()
            for index in tl.static_range(TAPS):
                t, r, s = tap_position(tap0 + index, KERNEL_D, KERNEL_H, KERNEL_W)
                b = load_run(
                    source,
                    image,
                    plane + (t * HOP_D + FIRST_D),
                    row + (r * HOP_H + FIRST_H),
                    column + (s * HOP_W + FIRST_W),
                    c0,
                    RUN,
                )
                acc = matmul_step(tl.trans(a), b, accs[index], PRECISION, UPCAST)
                added = added + (acc,)  # type: ignore[assignment]  # noqa: RUF005
            accs = added  # type: ignore[assignment]

    o = m0 + tl.arange(0, BLOCK_M)
    c = c0 + tl.arange(0, BLOCK_N)
    mask = (o < FILTERS)[:, None] & (c < CHANNELS)[None, :]
    if WIDE:
        o = o.to(tl.int64)
        w_strides = widen_all(w_strides)
    for index in tl.static_range(TAPS):
        tap = tap0 + index
        if PARTIAL:
            base = split.to(tl.int64) * (FILTERS * ALL * CHANNELS)
            offsets = base + (o * (ALL * CHANNELS))[:, None] + (tap * CHANNELS + c)[None, :]
        else:
            t, r, s = tap_position(tap, KERNEL_D, KERNEL_H, KERNEL_W)
            columns = c * w_strides[1] + tap_offset(w_strides, t, r, s)
            offsets = (o * w_strides[0])[:, None] + columns[None, :]
        tl.store(out_ptr + offsets, accs[index].to(out_ptr.dtype.element_ty), mask=mask)


def _geometry(problem: ConvProblem) -> dict[str, int]:
    """The filter on three axes: where the box of tap t begins, ``t · hop + first``."""
    found: dict[str, int] = {}
    sign = -1 if problem.direction is Direction.DGRAD else 1
    for axis, taps, pad, step in zip(
        "DHW",
        lifted(problem.kernel, 1),
        lifted(problem.padding, 0),
        lifted(problem.dilation, 1),
        strict=True,
    ):
        found[f"KERNEL_{axis}"] = taps
        found[f"HOP_{axis}"] = sign * step
        found[f"FIRST_{axis}"] = -sign * pad
    return found


def _box(shape: Four) -> dict[str, int]:
    return {f"BOX_{axis}": extent for axis, extent in zip("NDHW", shape, strict=True)}


def shape_of(problem: ConvProblem, pixels: int, index: int) -> Four:
    """The box that a config's index names: the last one where there are fewer."""
    axes = axes_of(problem)
    adjoint = problem.direction is Direction.DGRAD
    shapes = box_shapes(axes.in_size if adjoint else axes.out_size, axes.kernel, pixels)
    return shapes[min(index, len(shapes) - 1)]


def run_shape(size: Four, pixels: int, index: int) -> Four:
    """The run of pixels that a config's index names: the last one where there are fewer."""
    shapes = run_shapes(size, pixels)
    return shapes[min(index, len(shapes) - 1)]


def box_count(size: Four, shape: Four) -> int:
    """Boxes that cover a map."""
    return math.prod(-(-extent // step) for extent, step in zip(size, shape, strict=True))


def product_plan(problem: ConvProblem, config: Any) -> LaunchPlan:
    """Plan of a product over pixels: the output, or the gradient of the input."""
    axes = axes_of(problem)
    adjoint = problem.direction is Direction.DGRAD
    size = axes.in_size if adjoint else axes.out_size
    strides = axes.x_strides if adjoint else axes.y_strides
    depth, columns = problem.in_channels, problem.out_channels
    source_size, source_strides = axes.in_size, axes.x_strides
    if adjoint:
        depth, columns = columns, depth
        source_size, source_strides = axes.out_size, axes.y_strides
    box = shape_of(problem, config.block_m, config.box)
    first, _, out = slot_names(problem.direction)
    block = (config.block_k, config.block_n) if adjoint else (config.block_n, config.block_k)
    splits = product_splits(problem, config)
    fused = epilogue_arguments(problem) if splits == 1 else NO_EPILOGUE
    out = out if splits == 1 else "partial"
    call = KernelCall(
        boxed_product_kernel,
        (box_count(size, box) * triton.cdiv(columns, config.block_n), splits, 1),
        (
            pixel_boxes(first, source_size, source_strides, depth, box, config.block_k),
            weight_boxes(problem, *block),
            Slot(out),
            Slot("acc" if fused.save_acc else out),
            fused.pointers,
            fused.strides,
            size[0],
            size[1:],
            source_size[1:],
            (strides[0], 1, *strides[1:]),
            lifted(problem.in_size if adjoint else problem.out_size, 1),
        ),
        {
            "DEPTH": depth,
            "COLUMNS": columns,
            **_geometry(problem),
            "ADJOINT": adjoint,
            "MERGED": axes.merged,
            "SPLITS": splits,
            "EPILOGUE": fused.function,
            "SAVE_ACC": fused.save_acc,
            **precision_constexprs(problem),
            **_box(box),
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP_M": config.group_m,
        },
        config.num_warps,
        config.num_stages,
    )
    return finished(problem, config, call, SplitSum(splits, False, fused))


def product_splits(problem: ConvProblem, config: TileConfig) -> int:
    """Parts of the sum of a product over pixels: no more than it has steps."""
    forward = problem.direction is Direction.FORWARD
    depth = problem.in_channels if forward else problem.out_channels
    return max(1, min(config.split_k, problem.taps * triton.cdiv(depth, config.block_k)))


def wgrad_steps(problem: ConvProblem, config: TileConfig, index: int) -> tuple[int, int, int]:
    """Steps over all pixels, steps of one split, and the number of splits that have some."""
    size = axes_of(problem).out_size
    run = run_shape(size, config.block_k, index)
    steps = triton.cdiv(box_count(size, run), config.block_k // max(run))
    per_split = triton.cdiv(steps, max(1, min(config.split_k, steps)))
    return steps, per_split, triton.cdiv(steps, per_split)


def wgrad_plan(problem: ConvProblem, config: Any) -> LaunchPlan:
    """Plan of the gradient of the weight: split over pixels, then a fixed-order sum."""
    axes = axes_of(problem)
    run = run_shape(axes.out_size, config.block_k, config.box)
    axis = run.index(max(run)) if max(run) > 1 else 3
    _, _, splits = wgrad_steps(problem, config, config.box)
    tiles = triton.cdiv(problem.out_channels, config.block_m)
    tiles *= triton.cdiv(problem.in_channels, config.block_n) * (problem.taps // config.taps)
    partial = splits > 1
    filters, channels = problem.out_channels, problem.in_channels
    call = KernelCall(
        boxed_wgrad_kernel,
        (tiles, splits, 1),
        (
            last_axis(
                pixel_boxes(
                    "grad_output", axes.out_size, axes.y_strides, filters, run, config.block_m
                ),
                axis,
            ),
            last_axis(
                pixel_boxes("input", axes.in_size, axes.x_strides, channels, run, config.block_n),
                axis,
            ),
            Slot("partial" if partial else "grad_weight"),
            axes.out_size[0],
            axes.out_size[1:],
            axes.in_size[1:],
            spatial_strides(problem.w_strides),
        ),
        {
            "CHANNELS": channels,
            "FILTERS": filters,
            **_geometry(problem),
            "TAPS": config.taps,
            "PARTIAL": partial,
            **precision_constexprs(problem),
            "RUN": axis,
            **_box(run),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP_M": config.group_m,
        },
        config.num_warps,
        config.num_stages,
    )
    if not partial:
        return LaunchPlan((call,), slot_dtypes(problem))
    columns = problem.taps * problem.in_channels
    space = Workspace("partial", (splits, problem.out_channels, columns), torch.float32)
    dtypes = {**slot_dtypes(problem), "partial": torch.float32}
    return LaunchPlan((call, reduction_call(problem, splits)), dtypes, (space,))
