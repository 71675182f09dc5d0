"""Products over boxes whose epilogue reads a tensor that lies in memory as the result does.

A residual is as much traffic as the result. Where the epilogue loads it, every program first waits
for the bias, puts it through shared memory, and only then asks for the residual. Here both are
asked for by the kernel, as early as the config says, and reach the epilogue as values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ...codegen import Role
from ...codegen.program import ScalarFunction
from ...codegen.registry import program_of
from ...runtime.compat import interpreting
from ...runtime.plan import Boxes, KernelCall, LaunchPlan, Slot
from ..epilogue import COORDINATES
from ..problem import ConvProblem, Direction, EpilogueSpec
from .boxed_products import box_products, flat_pixel, shape_of
from .boxed_products import product_plan as plain_plan
from .boxed_views import axes_of, pixel_boxes
from .common import grouped_tile, position, slot_dtypes, widen_all

LATE, EARLY, ENGINE, AHEAD = range(4)
"""When and how the operand is read: behind the product; before it, into registers; behind it by
the copy engine, into shared memory; the same, from an L2 cache that was told to fetch it before."""


@triton.jit
def prefetch_rows(pointers, mask, BYTES: tl.constexpr):
    """Have the L2 cache fetch BYTES from each of some addresses; NVIDIA only.

    It takes no register, and nobody waits for it. One instruction of 32 lanes asks for a sector of
    32 rows each; the bulk instruction of sm_90 would ask for one row after the other.
    """
    addresses = pointers.to(tl.int64)
    wanted = mask.to(tl.int32)
    for sector in tl.static_range(BYTES // 32):
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0;}",
            "=r,l,r",
            [addresses + sector * 32, wanted],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def boxed_operand_kernel(
    source,
    weight,
    y_ptr,
    y_boxes,
    acc_ptr,
    acc_boxes,
    operand_ptr,
    operand_boxes,
    vector_ptr,
    extra_ptrs,
    extra_strides,
    vector_stride,
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
    EPILOGUE: tl.constexpr,
    SAVE_ACC: tl.constexpr,
    VECTOR: tl.constexpr,
    FETCH: tl.constexpr,
    PREFETCH: tl.constexpr,
    STORE: tl.constexpr,
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
    """result[p, m] = EPILOGUE(Σ source · weight, operand[p, m], vector[m]).

    The product is that of ``boxed_product_kernel``. The operand has the result's strides; FETCH 0:
    it is loaded behind the product, 1: before it, 2: by the copy engine. VECTOR: -1 for none, or
    its place among the function's operands: 0 before the operand, 1 behind it. All others are
    loaded by the function. STORE: the copy engine writes the result, and leaves out what lies
    outside the map.

    What the engine moves is laid out in shared memory so that registers of a product's accumulator
    meet it without an exchange between threads: no barriers, and as many registers as without.
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
    if WIDE:
        strides = widen_all(strides)

    n = (n0 + tl.arange(0, BLOCK_N))[:, None]
    if VECTOR >= 0:
        vector = tl.load(vector_ptr + n * vector_stride, mask=n < COLUMNS, other=0.0)
    if PREFETCH:
        image, plane, row, column = box_pixels(
            image0, plane0, row0, column0, BOX_N, BOX_D, BOX_H, BOX_W
        )
        inside = (image < images) & (plane < size[0]) & (row < size[1]) & (column < size[2])
        rows = image * strides[0] + plane * strides[2] + row * strides[3] + column * strides[4]
        prefetch_rows(operand_ptr + rows + n0, inside, BLOCK_N * 2)
    if FETCH == 1:
        offsets, mask, image, plane, row, column = tile_offsets(
            image0, plane0, row0, column0, n, images, size, strides,
            COLUMNS, BLOCK_N, BOX_N, BOX_D, BOX_H, BOX_W,
        )  # fmt: skip
        operand = tl.load(operand_ptr + offsets, mask=mask, other=0.0)

    acc = box_products(
        source, weight, image0, plane0, row0, column0, n0, 0, source_size, DEPTH,
        KERNEL_D, KERNEL_H, KERNEL_W, HOP_D, HOP_H, HOP_W, FIRST_D, FIRST_H, FIRST_W,
        ADJOINT, 1, PRECISION, UPCAST, BOX_N, BOX_D, BOX_H, BOX_W, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    if FETCH != 1:
        offsets, mask, image, plane, row, column = tile_offsets(
            image0, plane0, row0, column0, n, images, size, strides,
            COLUMNS, BLOCK_N, BOX_N, BOX_D, BOX_H, BOX_W,
        )  # fmt: skip
    if SAVE_ACC:
        kept = acc.to(acc_ptr.dtype.element_ty)
        if STORE:
            store_box(acc_boxes, kept, image0, plane0, row0, column0, n0)
        else:
            tl.store(acc_ptr + offsets, kept, mask=mask)
    if FETCH == 2:
        loaded = operand_boxes.load([image0, plane0, row0, column0, n0])
        operand = tl.trans(loaded.reshape(BLOCK_M, BLOCK_N))
    if FETCH == 0:
        operand = tl.load(operand_ptr + offsets, mask=mask, other=0.0)
    if MERGED:
        flat = flat_pixel(image, plane, row, column, size, WIDE)
        image, plane, row, column = position(flat, map_size)
    other = widened(operand)
    if VECTOR < 0:
        result = EPILOGUE(acc, other, image, n, plane, row, column, mask, extra_ptrs, extra_strides)
    elif VECTOR == 0:
        result = EPILOGUE(
            acc, widened(vector), other, image, n, plane, row, column, mask,
            extra_ptrs, extra_strides,
        )  # fmt: skip
    else:
        result = EPILOGUE(
            acc, other, widened(vector), image, n, plane, row, column, mask,
            extra_ptrs, extra_strides,
        )  # fmt: skip
    if STORE:
        stored = result.to(y_ptr.dtype.element_ty)
        store_box(y_boxes, stored, image0, plane0, row0, column0, n0)
    else:
        tl.store(y_ptr + offsets, result.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_box(boxes, tile, image0, plane0, row0, column0, n0):
    """Write a tile (columns, pixels) to where a box of pixels begins."""
    shape: tl.constexpr = boxes.block_shape
    boxes.store([image0, plane0, row0, column0, n0], tl.trans(tile).reshape(shape))


@triton.jit
def widened(values):
    """Half precision as float32, as generated functions load it."""
    if values.dtype.primitive_bitwidth < 32:
        values = values.to(tl.float32)
    return values


@triton.jit
def box_pixels(
    image0,
    plane0,
    row0,
    column0,
    BOX_N: tl.constexpr,
    BOX_D: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
):
    """(image, plane, row, column) of the pixels of a box."""
    m = tl.arange(0, BOX_N * BOX_D * BOX_H * BOX_W)
    image = image0 + m // (BOX_W * BOX_H * BOX_D)
    plane = plane0 + m // (BOX_W * BOX_H) % BOX_D
    row = row0 + m // BOX_W % BOX_H
    return image, plane, row, column0 + m % BOX_W


@triton.jit
def tile_offsets(
    image0,
    plane0,
    row0,
    column0,
    n,
    images,
    size,
    strides,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_D: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
):
    """Offsets and mask of a tile (columns, pixels) of the result, and the pixels' coordinates."""
    image, plane, row, column = box_pixels(
        image0, plane0, row0, column0, BOX_N, BOX_D, BOX_H, BOX_W
    )
    image = image[None, :]
    plane = plane[None, :]
    row = row[None, :]
    column = column[None, :]
    mask = (image < images) & (plane < size[0]) & (row < size[1]) & (column < size[2])
    if COLUMNS % BLOCK_N != 0:
        mask = mask & (n < COLUMNS)
    offsets = image * strides[0] + plane * strides[2] + row * strides[3] + column * strides[4]
    return offsets + n, mask, image, plane, row, column


@dataclass(frozen=True)
class Operands:
    """Which operands of an epilogue the kernel itself asks for, by their place.

    Attributes:
        tile: one with the strides of the result.
        vector: one that depends on the channel only, or None.
    """

    tile: int
    vector: int | None


def operands_of(problem: ConvProblem) -> Operands | None:
    """The operands that the kernel asks for; None where none lies as the result does."""
    spec = problem.epilogue
    if spec is None:
        return None
    result = problem.x_strides if problem.direction is Direction.DGRAD else problem.y_strides
    tiles = [
        index
        for index, (strides, dtype) in enumerate(
            zip(spec.element_strides, spec.element_dtypes, strict=True)
        )
        if tuple(strides) == tuple(result) and dtype.is_floating_point and dtype.itemsize <= 4
    ]
    vectors = [
        index
        for index, (strides, dtype) in enumerate(
            zip(spec.element_strides, spec.element_dtypes, strict=True)
        )
        if strides[1] != 0
        and not any(s for axis, s in enumerate(strides) if axis != 1)
        and dtype.is_floating_point
        and dtype.itemsize <= 4
    ]
    if not tiles:
        return None
    return Operands(tiles[0], vectors[0] if vectors else None)


def fused_function(spec: EpilogueSpec, operands: Operands, wide: bool) -> Any:
    """The generated function to which the kernel passes its operands as values."""
    program = program_of(spec.function)
    names = [a.name for a in program.arguments if a.role is Role.ELEMENT]
    chosen = [index for index in (operands.tile, operands.vector) if index is not None]
    function = ScalarFunction(program, ()).with_roles(**{names[i]: Role.VALUE for i in chosen})
    return function.with_wide(wide).with_frame(COORDINATES[3]).program.jit


def operand_plan(problem: ConvProblem, config: Any) -> LaunchPlan:
    """Plan of a product over boxes, its operand asked for by the kernel."""
    (plain,) = plain_plan(problem, config).calls
    spec, operands = problem.epilogue, operands_of(problem)
    assert spec is not None and operands is not None
    tile, vector = operands.tile, operands.vector
    rest = [i for i in range(len(spec.element_dtypes)) if i not in (tile, vector)]
    pointers = tuple(Slot(f"element{i}") for i in rest)
    pointers += tuple(Slot(f"capture{i}") for i in range(len(spec.capture_dtypes)))
    groups = [spec.element_strides[i] for i in rest] + list(spec.capture_strides)

    axes = axes_of(problem)
    adjoint = problem.direction is Direction.DGRAD
    size, strides = (axes.in_size, axes.x_strides) if adjoint else (axes.out_size, axes.y_strides)
    columns = problem.in_channels if adjoint else problem.out_channels
    box = shape_of(problem, config.block_m, config.box)

    def moved(slot: str) -> Boxes:
        return pixel_boxes(slot, size, strides, columns, box, config.block_n)

    half = spec.element_dtypes[tile].itemsize == 2
    fetch = config.fetch if half else min(config.fetch, EARLY)
    engine = fetch in (ENGINE, AHEAD)
    # Triton's interpreter has no assembler. A row that is no whole tile is not worth a thought.
    ahead = fetch == AHEAD and not interpreting() and columns % config.block_n == 0
    constexprs = {name: value for name, value in plain.constexprs.items() if name != "SPLITS"}
    constexprs["EPILOGUE"] = fused_function(spec, operands, problem.wide)
    constexprs["VECTOR"] = -1 if vector is None else int(vector > tile)
    constexprs["FETCH"] = ENGINE if engine else fetch
    constexprs["PREFETCH"] = ahead
    constexprs["STORE"] = config.engine_store == 1
    source, weight, out, acc, _, _, *geometry = plain.args
    assert isinstance(out, Slot)
    call = KernelCall(
        boxed_operand_kernel,
        plain.grid,
        (
            source,
            weight,
            out,
            moved(out.name) if config.engine_store else 0,
            acc,
            moved("acc") if config.engine_store and spec.save_acc else 0,
            Slot(f"element{tile}"),
            moved(f"element{tile}") if engine else 0,
            out if vector is None else Slot(f"element{vector}"),
            pointers,
            tuple(stride for group in groups for stride in group),
            0 if vector is None else spec.element_strides[vector][1],
            *geometry,
        ),
        constexprs,
        plain.num_warps,
        plain.num_stages,
    )
    return LaunchPlan((call,), slot_dtypes(problem))
