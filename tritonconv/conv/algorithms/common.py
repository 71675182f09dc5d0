"""What several convolution algorithms share: device functions, tile configs, argument packing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ...codegen.program import ScalarFunction
from ...codegen.registry import program_of
from ...runtime.compat import interpreting
from ...runtime.operators import Config
from ...runtime.plan import Arg, KernelCall, Slot
from ..epilogue import COORDINATES
from ..problem import FLOAT8, ConvProblem, Direction

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class TileConfig(Config):
    """Tile of an implicit matrix product and how it is executed.

    Attributes:
        block_m, block_n, block_k: rows, columns and depth of a tile.
        num_warps, num_stages: of the kernel.
        group_m: rows of tiles whose columns are computed together.
        split_k: parts of the sum.
        one_launch: whether the program that stores the last part of a tile adds them all (1);
            otherwise a second kernel does.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    split_k: int = 1
    one_launch: int = 0


def unsupported_dtype(problem: ConvProblem) -> str | None:
    """Why generated kernels cannot serve the dtype, or None."""
    if problem.dtype not in TRITON_DTYPES:
        return f"dtype {problem.dtype} (generated kernels serve float16, bfloat16, float32)"
    return None


def unsupported_operands(problem: ConvProblem) -> str | None:
    """The same for products on matrix instructions, which take float8 operands too."""
    return None if problem.dtype is FLOAT8 else unsupported_dtype(problem)


MAX_GRID_Y = MAX_GRID_Z = 65535


def unsupported_product(problem: ConvProblem) -> str | None:
    """Why an implicit product cannot serve a problem, or None: groups and phases are grid axes."""
    if problem.groups > MAX_GRID_Y:
        return f"more than {MAX_GRID_Y} groups"
    if problem.direction is Direction.DGRAD and math.prod(problem.stride) > MAX_GRID_Z:
        return f"more than {MAX_GRID_Z} phases of the stride"
    return unsupported_operands(problem)


def precision_constexprs(problem: ConvProblem) -> dict[str, Any]:
    """How products are formed. bfloat16 products are garbage in Triton's interpreter: upcast."""
    return {
        "PRECISION": problem.precision,
        "UPCAST": interpreting() and problem.dtype in (torch.bfloat16, FLOAT8),
        "WIDE": problem.wide,
    }


@dataclass(frozen=True)
class EpilogueArguments:
    """The epilogue as kernel arguments: generated function, pointers, strides."""

    function: Any
    pointers: tuple[Slot, ...]
    strides: tuple[int, ...]
    save_acc: bool


NO_EPILOGUE = EpilogueArguments(None, (), (), False)


def epilogue_arguments(problem: ConvProblem) -> EpilogueArguments:
    """Arguments for the problem's epilogue; empty tuples when it has none."""
    spec = problem.epilogue
    if spec is None:
        return NO_EPILOGUE
    pointers = tuple(Slot(f"element{i}") for i in range(len(spec.element_dtypes)))
    pointers += tuple(Slot(f"capture{i}") for i in range(len(spec.capture_dtypes)))
    strides = tuple(s for group in spec.element_strides + spec.capture_strides for s in group)
    function = ScalarFunction(program_of(spec.function), ()).with_wide(problem.wide)
    program = function.with_frame(COORDINATES[3]).program
    return EpilogueArguments(program.jit, pointers, strides, spec.save_acc)


def slot_dtypes(problem: ConvProblem) -> dict[str, torch.dtype]:
    """The dtype of every slot of a problem, in slot order (inputs, outputs, extras)."""
    first, second, out = slot_names(problem.direction)
    dtypes = {first: problem.dtype, second: problem.dtype, out: problem.result_dtype}
    spec = problem.epilogue
    if spec is not None:
        if spec.save_acc:
            dtypes["acc"] = problem.dtype
        for index, dtype in enumerate(spec.element_dtypes):
            dtypes[f"element{index}"] = dtype
        for index, dtype in enumerate(spec.capture_dtypes):
            dtypes[f"capture{index}"] = dtype
    return dtypes


def slot_names(direction: Direction) -> tuple[str, str, str]:
    """The two operands and the result of a product, by slot name."""
    return {
        Direction.FORWARD: ("input", "weight", "output"),
        Direction.DGRAD: ("grad_output", "weight", "grad_input"),
        Direction.WGRAD: ("grad_output", "input", "grad_weight"),
    }[direction]


def lifted(values: Sequence[int], absent: int) -> tuple[int, int, int]:
    """Values per spatial axis as (depth, height, width), ``absent`` for the axes that are not.

    Kernels are written for three spatial axes: fewer are a map of depth (and height) one.

    Example:
        >>> lifted((3, 5), 1), lifted((7,), 0)
        ((1, 3, 5), (0, 0, 7))
    """
    depth, height, width = (absent,) * (3 - len(values)) + tuple(values)
    return depth, height, width


def spatial_arguments(problem: ConvProblem) -> tuple[Arg, ...]:
    """Batch; sizes of input and output map (3 each); strides of input, weight, output (5 each)."""
    return (
        problem.batch,
        lifted(problem.in_size, 1),
        lifted(problem.out_size, 1),
        spatial_strides(problem.x_strides),
        spatial_strides(problem.w_strides),
        spatial_strides(problem.y_strides),
    )


def spatial_strides(strides: Sequence[int]) -> tuple[int, ...]:
    """Strides (batch, channel, *spatial) of a tensor with three spatial axes."""
    return (*strides[:2], *lifted(strides[2:], 0))


def spatial_constexprs(problem: ConvProblem) -> dict[str, int]:
    """The filter's geometry on three axes, which kernels are specialised on."""
    return {
        f"{label}_{axis}": value
        for label, values, absent in (
            ("KERNEL", problem.kernel, 1),
            ("STRIDE", problem.stride, 1),
            ("PAD", problem.padding, 0),
            ("DILATION", problem.dilation, 1),
        )
        for axis, value in zip("DHW", lifted(values, absent), strict=True)
    }


def product_constexprs(problem: ConvProblem, config: TileConfig) -> dict[str, Any]:
    """Sizes of one group, geometry, precision and tile: what every product is specialised on."""
    return {
        "CHANNELS": problem.channels_per_group,
        "FILTERS": problem.filters_per_group,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        **spatial_constexprs(problem),
        **precision_constexprs(problem),
    }


@triton.jit
def position(index, size):
    """(image, plane, row, column) of a flat index over a batch of maps of ``size`` (d, h, w)."""
    column = index % size[2]
    row = (index // size[2]) % size[1]
    plane = (index // (size[2] * size[1])) % size[0]
    image = index // (size[2] * size[1] * size[0])
    return image, plane, row, column


@triton.jit
def pixels_of(batch, size):
    """Positions in a batch of maps."""
    return batch * (size[0] * size[1] * size[2])


@triton.jit
def pixel_offset(strides, image, plane, row, column):
    """Element offset of a position, without its channel."""
    return image * strides[0] + plane * strides[2] + row * strides[3] + column * strides[4]


@triton.jit
def tap_offset(strides, plane, row, column):
    """Element offset of a step in space: of a filter's tap, of a pixel within its map."""
    return plane * strides[2] + row * strides[3] + column * strides[4]


@triton.jit
def inside(mask, plane, row, column, size):
    """``mask`` and that a position lies in the map."""
    mask = mask & (plane >= 0) & (plane < size[0])
    mask = mask & (row >= 0) & (row < size[1])
    return mask & (column >= 0) & (column < size[2])


@triton.jit
def below(mask, plane, row, column, size):
    """``mask`` and that a position lies before the map's end on every axis."""
    return mask & (plane < size[0]) & (row < size[1]) & (column < size[2])


@triton.jit
def tap_position(tap, KERNEL_D: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr):
    """(t, r, s) of a flat filter tap."""
    t, r = row_position(tap // KERNEL_W, KERNEL_D, KERNEL_H)
    return t, r, tap % KERNEL_W


@triton.jit
def row_position(line, KERNEL_D: tl.constexpr, KERNEL_H: tl.constexpr):
    """(t, r) of a flat row of a filter. The compiler cannot know that a 2-D one has no other t."""
    if KERNEL_D == 1:
        t = line * 0
        r = line
    else:
        t = line // KERNEL_H
        r = line % KERNEL_H
    return t, r


@triton.jit
def widen_all(strides):
    """Five strides (n, c, d, h, w) as int64, so that every product with them is."""
    return (
        widen(strides[0]),
        widen(strides[1]),
        widen(strides[2]),
        widen(strides[3]),
        widen(strides[4]),
    )


@triton.jit
def widen(a):
    """An integer argument as int64, whether it arrives as int32 or as the constant 1."""
    return a * tl.full((), 1, tl.int64)


@triton.jit
def matmul_step(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a · b with a float32 accumulator.

    Hopper's float8 instructions keep about 14 bits of a sum. Unless PRECISION is ``fast_accum``
    such sums are of at most 128 products, and are added up in float32; other GPUs ignore it.
    """
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if a.dtype.is_fp8():
        if PRECISION == "fast_accum":
            acc = tl.dot(a, b, acc)
        else:
            DEPTH: tl.constexpr = a.shape[1]
            EXACT: tl.constexpr = DEPTH if DEPTH < 128 else 128
            acc = tl.dot(a, b, acc, max_num_imprecise_acc=EXACT)
    elif PRECISION == "fast_accum":
        acc = tl.dot(a, b, acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile coordinates in an order that reuses operands in L2: GROUP_M rows at a time."""
    per_group = GROUP_M * tiles_n
    first = (pid // per_group) * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + (pid % per_group) % rows, (pid % per_group) // rows


@triton.jit
def store_result(
    acc,
    y_ptr,
    acc_ptr,
    offsets,
    batch_index,
    channel,
    plane,
    row,
    column,
    mask,
    extra_ptrs,
    extra_strides,
    EPILOGUE: tl.constexpr,
    SAVE_ACC: tl.constexpr,
):
    """Apply the generated epilogue to the accumulator tile and store it."""
    if EPILOGUE is None:
        result = acc
    else:
        if SAVE_ACC:
            tl.store(acc_ptr + offsets, acc.to(acc_ptr.dtype.element_ty), mask=mask)
        result = EPILOGUE(
            acc, batch_index, channel, plane, row, column, mask, extra_ptrs, extra_strides
        )
    tl.store(y_ptr + offsets, result.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_partials_kernel(
    partial_ptr,
    out_ptr,
    filters,
    elements,
    partials,
    splits,
    w_strides,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    BUNDLE: tl.constexpr,
    TAPS_FIRST: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out[o, c, t, r, s] = Σ_split partial[split, place], added in a fixed order.

    The place of an element among the ``partials`` of a split is (o, (t, r, s), c), in a bundle of
    groups (o, (t, r, s), o's group, c), and with TAPS_FIRST, for one channel, ((t, r, s), o).
    """
    first = tl.program_id(0)
    if WIDE:
        first = first.to(tl.int64)
        w_strides = widen_all(w_strides)
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    index = first * BLOCK + tl.arange(0, BLOCK)
    mask = index < elements
    place = index
    if TAPS_FIRST:
        o = index % filters
        tap = index // filters
        c = index * 0
    else:
        c = index % CHANNELS
        tap = (index // CHANNELS) % TAPS
        o = index // (CHANNELS * TAPS)
        if BUNDLE > 1:
            group = (o // FILTERS) % BUNDLE
            place = (o * TAPS + tap) * (BUNDLE * CHANNELS) + group * CHANNELS + c
    total = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for begin in range(0, splits, BLOCK_S):
        split = (begin + tl.arange(0, BLOCK_S))[:, None]
        offsets = split.to(tl.int64) * partials + place[None, :]
        total += tl.load(partial_ptr + offsets, mask=(split < splits) & mask[None, :], other=0.0)
    t, r, s = tap_position(tap, KERNEL_D, KERNEL_H, KERNEL_W)
    offsets = widen(o) * w_strides[0] + c * w_strides[1] + tap_offset(w_strides, t, r, s)
    tl.store(out_ptr + offsets, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=mask)


def sum_partials_call(
    problem: ConvProblem,
    splits: int,
    partials: int,
    *,
    bundle: int = 1,
    taps_first: bool = False,
    block: int = 256,
    block_s: int = 8,
) -> KernelCall:
    """Add the partial sums of a split weight gradient in a fixed order.

    Args:
        problem: the gradient of the weight.
        splits: how often the workspace ``partial`` holds all partial sums.
        partials: partial sums of one split.
        bundle: groups of a bundle, of whose product the diagonal blocks are wanted.
        taps_first: whether taps come before filters among the partial sums.
        block: elements of a program.
        block_s: splits that are read at once.
    """
    elements = math.prod(problem.w_shape)
    depth, height, width = lifted(problem.kernel, 1)
    return KernelCall(
        sum_partials_kernel,
        (triton.cdiv(elements, block), 1, 1),
        (
            Slot("partial"),
            Slot("grad_weight"),
            problem.out_channels,
            elements,
            partials,
            splits,
            spatial_strides(problem.w_strides),
        ),
        {
            "CHANNELS": problem.channels_per_group,
            "FILTERS": problem.filters_per_group,
            "BUNDLE": bundle,
            "TAPS_FIRST": taps_first,
            "KERNEL_D": depth,
            "KERNEL_H": height,
            "KERNEL_W": width,
            "WIDE": problem.wide,
            "BLOCK": block,
            "BLOCK_S": min(block_s, triton.next_power_of_2(splits)),
        },
        num_warps=4,
    )
