"""The gradient of the input: rows are input pixels of one stride phase, columns input channels.

Only taps that meet the phase are visited: no zero work. All phases are one launch.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ...runtime.last_arrival import last_to_arrive
from ...runtime.plan import KernelCall, LaunchPlan, Slot
from ..problem import ConvProblem
from .common import (
    TileConfig,
    below,
    grouped_tile,
    lifted,
    matmul_step,
    pixel_offset,
    pixels_of,
    position,
    product_constexprs,
    spatial_arguments,
    store_result,
    tap_offset,
    widen,
    widen_all,
)
from .split import (
    SplitSum,
    add_parts,
    finished,
    split_range,
    store_part,
    store_partial,
)


@triton.jit
def _first_tap(
    phase,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    DILATION: tl.constexpr,
    STEP: tl.constexpr,
):
    """The first tap of an axis' phase; KERNEL (no tap at all) where the dilation skips it."""
    first = phase * 0
    if STRIDE != 1:
        first += KERNEL
        for i in tl.static_range(STEP):
            first = tl.where((phase + PAD - i * DILATION) % STRIDE == 0, i, first)
    return first


@triton.jit
def _taps_from(first, KERNEL: tl.constexpr, STEP: tl.constexpr):
    """How many taps of an axis a phase meets."""
    return tl.maximum((KERNEL - first + STEP - 1) // STEP, 0)


@triton.jit
def conv_dgrad_kernel(
    grad_ptr,
    w_ptr,
    x_ptr,
    acc_ptr,
    parts_ptr,
    arrivals_ptr,
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
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STEP_D: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    SOME_WITHOUT_TAPS: tl.constexpr,
    SPLITS: tl.constexpr,
    ONE_LAUNCH: tl.constexpr,
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
    """grad_x[n, c, i] = Σ_{o,r} grad_y[n, o, p] · w[o, c, r].

    p = (i + pad − r·dilation) / stride, on every axis, where that is exact and in range. With
    SPLITS every part of the sum goes to ``parts_ptr`` in float32, as in the forward product.
    """
    if WIDE:
        batch = widen(batch)
        x_strides = widen_all(x_strides)
        w_strides = widen_all(w_strides)
        y_strides = widen_all(y_strides)
    group = tl.program_id(1)
    split = tl.program_id(2) % SPLITS
    phase = tl.program_id(2) // SPLITS
    phase_w = phase % STRIDE_W
    phase_h = (phase // STRIDE_W) % STRIDE_H
    # The remainder tells the compiler of a stride of one.
    phase_d = (phase // (STRIDE_W * STRIDE_H)) % STRIDE_D
    planes = tl.cdiv(in_size[0], STRIDE_D)
    rows = tl.cdiv(in_size[1], STRIDE_H)
    columns = tl.cdiv(in_size[2], STRIDE_W)
    pixels = batch * (planes * rows * columns)
    tile_m, tile_n = grouped_tile(
        tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tl.cdiv(CHANNELS, BLOCK_N), GROUP_M
    )

    first_t = _first_tap(phase_d, KERNEL_D, STRIDE_D, PAD_D, DILATION_D, STEP_D)
    first_r = _first_tap(phase_h, KERNEL_H, STRIDE_H, PAD_H, DILATION_H, STEP_H)
    first_s = _first_tap(phase_w, KERNEL_W, STRIDE_W, PAD_W, DILATION_W, STEP_W)
    taps_h = _taps_from(first_r, KERNEL_H, STEP_H)
    taps_w = _taps_from(first_s, KERNEL_W, STEP_W)
    taps = _taps_from(first_t, KERNEL_D, STEP_D) * taps_h * taps_w
    steps = tl.cdiv(FILTERS, BLOCK_K) * taps
    if SOME_WITHOUT_TAPS:
        # The first steps' addresses are computed before the loop, entered or not: what they divide
        # by must not be zero, or the compiler concludes that every phase has taps.
        taps = tl.maximum(taps, 1)
        taps_h = tl.maximum(taps_h, 1)
        taps_w = tl.maximum(taps_w, 1)

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    image, plane, row, column = position(m, (planes, rows, columns))
    in_plane = plane * STRIDE_D + phase_d
    in_row = row * STRIDE_H + phase_h
    in_column = column * STRIDE_W + phase_w
    mask_m = below(m < pixels, in_plane, in_row, in_column, in_size)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < CHANNELS

    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin, end = split_range(steps, split, SPLITS)
    for step in range(begin, end):
        tap = step % taps
        line = tap // taps_w
        s = first_s + (tap % taps_w) * STEP_W
        if KERNEL_D == 1:
            t = first_t
            r = first_r + line * STEP_H
        else:
            t = first_t + (line // taps_h) * STEP_D
            r = first_r + (line % taps_h) * STEP_H
        o = (step // taps) * BLOCK_K + k
        # The phase makes these divisions exact wherever the result is in range.
        plane = in_plane + (PAD_D - t * DILATION_D)
        row = in_row + (PAD_H - r * DILATION_H)
        column = in_column + (PAD_W - s * DILATION_W)
        mask_y = mask_m & (plane >= 0) & (row >= 0) & (column >= 0)
        plane = plane // STRIDE_D
        row = row // STRIDE_H
        column = column // STRIDE_W
        mask_y = below(mask_y, plane, row, column, out_size)
        y_rows = pixel_offset(y_strides, image, plane, row, column)
        out_channel = group * FILTERS + o
        y_offsets = y_rows[:, None] + (out_channel * y_strides[1])[None, :]
        w_tap = tap_offset(w_strides, t, r, s)
        w_offsets = (out_channel * w_strides[0] + w_tap)[:, None] + (n * w_strides[1])[None, :]
        if FILTERS % BLOCK_K == 0:
            a = tl.load(grad_ptr + y_offsets, mask=mask_y[:, None], other=0.0)
            b = tl.load(w_ptr + w_offsets, mask=mask_n[None, :], other=0.0)
        else:
            mask_o = o < FILTERS
            a = tl.load(grad_ptr + y_offsets, mask=mask_y[:, None] & mask_o[None, :], other=0.0)
            b = tl.load(w_ptr + w_offsets, mask=mask_o[:, None] & mask_n[None, :], other=0.0)
        acc = matmul_step(a, b, acc, PRECISION, UPCAST)

    in_channel = group * CHANNELS + n
    mask = mask_m[:, None] & mask_n[None, :]
    if SPLITS > 1 and not ONE_LAUNCH:
        pixel = (image * in_size[0] + in_plane) * in_size[1] + in_row
        pixel = pixel * in_size[2] + in_column
        channels = tl.num_programs(1) * CHANNELS
        all_pixels = pixels_of(batch, in_size)
        store_partial(acc, parts_ptr, split, pixel, all_pixels, in_channel, channels, mask)
        return
    whole = True
    if SPLITS > 1:
        tile = (phase * tl.num_programs(1) + group) * tl.num_programs(0) + tl.program_id(0)
        store_part(acc, parts_ptr, tile, split, SPLITS)
        whole = last_to_arrive(arrivals_ptr + tile, SPLITS)
    if whole:
        if SPLITS > 1:
            total = add_parts(parts_ptr, tile, SPLITS, BLOCK_M, BLOCK_N)
        else:
            total = acc
        x_rows = pixel_offset(x_strides, image, in_plane, in_row, in_column)
        store_result(
            total,
            x_ptr,
            acc_ptr,
            x_rows[:, None] + (in_channel * x_strides[1])[None, :],
            image[:, None],
            in_channel[None, :],
            in_plane[:, None],
            in_row[:, None],
            in_column[:, None],
            mask,
            extra_ptrs,
            extra_strides,
            EPILOGUE,
            SAVE_ACC,
        )


def every_phase_has_taps(problem: ConvProblem) -> bool:
    """Whether every phase of the stride meets a tap of the filter, on every axis."""
    return all(
        len({tap * step % hop for tap in range(taps)}) == hop
        for taps, hop, step in zip(problem.kernel, problem.stride, problem.dilation, strict=True)
    )


def dgrad_plan(problem: ConvProblem, config: TileConfig) -> LaunchPlan:
    """Plan of the gradient of the input: one launch over all stride phases."""
    phase_pixels = problem.batch * math.prod(
        triton.cdiv(size, hop) for size, hop in zip(problem.in_size, problem.stride, strict=True)
    )
    tiles = triton.cdiv(phase_pixels, config.block_m) * triton.cdiv(
        problem.channels_per_group, config.block_n
    )
    steps = lifted(
        [
            hop // math.gcd(hop, step)
            for hop, step in zip(problem.stride, problem.dilation, strict=True)
        ],
        1,
    )
    split = SplitSum.of(problem, config)
    call = KernelCall(
        conv_dgrad_kernel,
        (tiles, problem.groups, math.prod(problem.stride) * split.parts),
        (
            Slot("grad_output"),
            Slot("weight"),
            *split.arguments(problem),
            *spatial_arguments(problem),
        ),
        {
            **product_constexprs(problem, config),
            **{f"STEP_{axis}": step for axis, step in zip("DHW", steps, strict=True)},
            "SOME_WITHOUT_TAPS": not every_phase_has_taps(problem),
            **split.constexprs(),
        },
        config.num_warps,
        config.num_stages,
    )
    return finished(problem, config, call, split)
