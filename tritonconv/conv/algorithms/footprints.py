"""What a config asks of the device, in closed form: blocks, shared memory, traffic, arithmetic.

Shared memory follows Triton's software pipeline. An operand whose loads can be asynchronous (at
least four bytes at a time) has one buffer per stage where warp groups multiply out of shared memory
(sm_90), otherwise one fewer; any other operand has one. After the loop the same memory serves to
rearrange the accumulator for the store. The figures are compared with compiled kernels in
tests/autotune/test_hardware.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...runtime.device import DeviceFacts
from ...runtime.space import Footprint
from ..problem import ConvProblem, Direction
from .common import TileConfig
from .tiles import flat_rows, product_shape, reduction_steps


def cdiv(value: int, divisor: int) -> int:
    """Division rounded up."""
    return -(-value // divisor)


@dataclass(frozen=True)
class _Product:
    """What all configs of a problem share.

    Attributes:
        grid_rows, columns: of one grid of tiles.
        grids: groups × stride phases.
        depth: of the reduction that blocks of k tile.
        taps: filter taps that the loop visits for each block of k, over all phases.
        most_taps: likewise, of the phase with the most.
        a_streams, b_streams: whether the operand's loads can be asynchronous.
        unrolled: the trip count is a constant, so that a single trip is no loop.
        row_result: the result is contiguous along columns.
        split: the reduction is over pixels, and is split over blocks of them.
        matrix: products run on matrix instructions, unlike IEEE single precision.
        itemsize: bytes of an operand's element.
        out_elements: of the result.
    """

    grid_rows: int
    columns: int
    grids: int
    depth: int
    taps: int
    most_taps: int
    a_streams: bool
    b_streams: bool
    unrolled: bool
    row_result: bool
    split: bool
    matrix: bool
    itemsize: int
    out_elements: int


def product_footprint(problem: ConvProblem, config: TileConfig, device: DeviceFacts) -> Footprint:
    """Of an implicit matrix product in any direction (dense, grouped; wgrad of the others)."""
    return _footprint(_product(problem), config, device)


def pointwise_footprint(problem: ConvProblem, config: TileConfig, device: DeviceFacts) -> Footprint:
    """Of a matrix product over pixels."""
    if problem.direction is Direction.WGRAD:
        return product_footprint(problem, config, device)
    return _footprint(_pointwise(problem), config, device)


def window_footprint(problem: ConvProblem, config: TileConfig, device: DeviceFacts) -> Footprint:
    """Of the forward product over flattened windows."""
    return _footprint(_window(problem), config, device)


def patch_dgrad_footprint(
    problem: ConvProblem, config: TileConfig, device: DeviceFacts
) -> Footprint:
    """Of the gradient of the input where windows tile it."""
    return _footprint(_patch_dgrad(problem), config, device)


def _footprint(product: _Product, config: TileConfig, device: DeviceFacts) -> Footprint:
    m, n, k = config.block_m, config.block_n, config.block_k
    size = product.itemsize
    tiles = cdiv(product.grid_rows, m) * cdiv(product.columns, n) * product.grids
    blocks_k = cdiv(product.depth, k)
    splits = 1
    if product.split:
        per_split = cdiv(blocks_k, max(1, min(config.split_k, blocks_k)))
        splits = max(1, cdiv(blocks_k, per_split))
        blocks_k = per_split
    steps = blocks_k * product.most_taps
    all_steps = tiles // product.grids * splits * blocks_k * product.taps
    if not product.split:
        # The sum is over blocks and taps, and so are its parts.
        splits = max(1, min(config.split_k, steps))
        steps = cdiv(steps, splits)
    partial = splits > 1
    gathers = partial and config.one_launch == 1
    amd = device.arch.startswith("gfx")
    grouped = device.arch == "sm_90" and product.matrix and m >= 64 and config.num_warps >= 4
    looped = not (product.unrolled and steps * splits <= 1)
    buffers = 1
    if looped and config.num_stages > 1:
        buffers = config.num_stages if grouped else config.num_stages - 1
    a_streams = product.a_streams
    if product.split and size == 2 and not grouped:
        a_streams = False  # transposed in registers on its way to the matrix instruction
    a_bytes, b_bytes = m * k * size, n * k * size
    pipeline = a_bytes * (buffers if a_streams else 1) + b_bytes * (
        buffers if product.b_streams else 1
    )
    scratch = 0
    if product.row_result or partial:
        scratch = m * n * (4 if partial else size)
        if m * n >= 32768:  # rearranged in two halves
            scratch //= 2
    result = product.out_elements * (8 * splits + size if partial else size)
    loads = all_steps * (min(m, product.grid_rows) + min(n, product.columns)) * k * size
    return Footprint(
        programs=tiles * splits,
        threads=config.num_warps * (64 if amd else 32),
        shared_bytes=max(pipeline, scratch),
        accumulators=m * n // (config.num_warps * (64 if amd else 32)),
        bytes_loaded=loads,
        bytes_stored=result,
        flops=2 * all_steps * m * n * k,
        steps=steps,
        in_flight=max(1, config.num_stages - 1) if a_streams and product.b_streams else 1,
        launches=2 if partial and not gathers else 1,
        gathered_bytes=4 * splits * m * n if gathers else 0,
        matrix=product.matrix,
    )


def _scalar(problem: ConvProblem) -> bool:
    return problem.dtype.itemsize == 4 and problem.precision == "ieee"


def _aligned(strides: Sequence[int], unit: int, size: int) -> bool:
    """Whether loads along axis ``unit`` take four bytes or more: Triton specialises on 16."""
    if size >= 4:
        return True
    others = (stride for axis, stride in enumerate(strides) if axis != unit)
    return strides[unit] == 1 and all(stride % 16 == 0 for stride in others)


def rows_of(problem: ConvProblem, strides: Sequence[int], channels: int) -> bool:
    """Whether a tile of pixels × channels streams: channels are contiguous and groups aligned."""
    size = problem.dtype.itemsize
    return _aligned(strides, 1, size) and (problem.groups == 1 or channels * size % 4 == 0)


def _weight_rows(problem: ConvProblem) -> bool:
    """Whether weights stream along their input channels."""
    others = [stride for axis, stride in enumerate(problem.w_strides) if axis != 1]
    if problem.taps == 1:
        others = others[:1]
    size = problem.dtype.itemsize
    return size >= 4 or (problem.w_strides[1] == 1 and all(stride % 16 == 0 for stride in others))


@functools.lru_cache(maxsize=256)
def _product(problem: ConvProblem) -> _Product:
    _, columns, depth = product_shape(problem)
    channels, filters = problem.channels_per_group, problem.filters_per_group
    size = problem.dtype.itemsize
    if problem.direction is Direction.WGRAD:
        x_streams = rows_of(problem, problem.x_strides, channels) and (
            channels * size % 4 == 0 or flat_rows(problem)
        )
        pixels = problem.out_size[-1] % 16 == 0 and _aligned(
            problem.y_strides, len(problem.y_strides) - 1, size
        )
        return _Product(
            grid_rows=filters,
            columns=columns,
            grids=problem.groups,
            depth=depth,
            taps=problem.groups,
            most_taps=1,
            a_streams=rows_of(problem, problem.y_strides, filters) or pixels,
            b_streams=x_streams,
            unrolled=False,
            row_result=problem.w_strides[1] == 1,
            split=True,
            matrix=not _scalar(problem),
            itemsize=size,
            out_elements=math.prod(problem.w_shape),
        )
    if problem.direction is Direction.FORWARD:
        return _Product(
            grid_rows=problem.out_pixels,
            columns=filters,
            grids=problem.groups,
            depth=channels,
            taps=problem.taps * problem.groups,
            most_taps=problem.taps,
            a_streams=rows_of(problem, problem.x_strides, channels),
            b_streams=_weight_rows(problem),
            unrolled=True,
            row_result=problem.y_strides[1] == 1,
            split=False,
            matrix=not _scalar(problem),
            itemsize=size,
            out_elements=math.prod(problem.y_shape),
        )
    phases = math.prod(problem.stride)
    phase_pixels = problem.batch * math.prod(
        cdiv(size, hop) for size, hop in zip(problem.in_size, problem.stride, strict=True)
    )
    return _Product(
        grid_rows=phase_pixels,
        columns=channels,
        grids=problem.groups * phases,
        depth=filters,
        # Every tap meets one phase.
        taps=problem.taps * problem.groups,
        most_taps=reduction_steps(problem, filters),
        a_streams=rows_of(problem, problem.y_strides, filters),
        b_streams=_weight_rows(problem),
        unrolled=phases == 1,
        row_result=problem.x_strides[1] == 1,
        split=False,
        matrix=not _scalar(problem),
        itemsize=size,
        out_elements=math.prod(problem.x_shape),
    )


@functools.lru_cache(maxsize=256)
def _pointwise(problem: ConvProblem) -> _Product:
    rows, columns, depth = product_shape(problem)
    size = problem.dtype.itemsize
    forward = problem.direction is Direction.FORWARD
    a = problem.x_strides if forward else problem.y_strides
    w = problem.w_strides
    a_pair = (a[0], a[1], a[-1])
    along_pixels = (rows // max(1, problem.batch)) % 16 == 0 and _aligned(a_pair, 2, size)
    return _Product(
        grid_rows=rows,
        columns=columns,
        grids=1,
        depth=depth,
        taps=1,
        most_taps=1,
        a_streams=_aligned(a_pair, 1, size) or along_pixels,
        b_streams=_aligned(w[:2], 1, size) or _aligned(w[:2], 0, size),
        unrolled=True,
        row_result=(problem.y_strides if forward else problem.x_strides)[1] == 1,
        split=False,
        matrix=not _scalar(problem),
        itemsize=size,
        out_elements=rows * columns,
    )


@functools.lru_cache(maxsize=256)
def _window(problem: ConvProblem) -> _Product:
    size = problem.dtype.itemsize
    x, w = problem.x_strides, problem.w_strides
    kernel_w = problem.kernel[-1]
    channels_fastest = x[1] <= x[-1]
    if channels_fastest:
        run = problem.in_channels * (kernel_w if flat_rows(problem) else 1)
        a_streams = _aligned(x, 1, size)
        flat = (w[1], w[-1]) == (1, problem.in_channels)
    else:
        run = kernel_w
        a_streams = _aligned(x, len(x) - 1, size) and not any(problem.padding)
        flat = (w[-1], w[1]) == (1, problem.taps)
    b_streams = size >= 4 or (flat and w[0] % 16 == 0)
    return _Product(
        grid_rows=problem.out_pixels,
        columns=problem.out_channels,
        grids=1,
        depth=problem.taps * problem.in_channels,
        taps=1,
        most_taps=1,
        a_streams=size >= 4 or (a_streams and run * size % 4 == 0),
        b_streams=b_streams,
        unrolled=True,
        row_result=problem.y_strides[1] == 1,
        split=False,
        matrix=not _scalar(problem),
        itemsize=size,
        out_elements=math.prod(problem.y_shape),
    )


@functools.lru_cache(maxsize=256)
def _patch_dgrad(problem: ConvProblem) -> _Product:
    size = problem.dtype.itemsize
    y, w = problem.y_strides, problem.w_strides
    last = problem.x_strides[1] <= problem.x_strides[-1]
    flat = (w[1], w[-1]) == (1, problem.in_channels) if last else (w[-1], w[1]) == (1, problem.taps)
    along_pixels = problem.out_size[-1] % 16 == 0 and _aligned(y, len(y) - 1, size)
    return _Product(
        grid_rows=problem.out_pixels,
        columns=problem.taps * problem.in_channels,
        grids=1,
        depth=problem.out_channels,
        taps=1,
        most_taps=1,
        a_streams=_aligned(y, 1, size) or along_pixels,
        b_streams=size >= 4 or (flat and w[0] % 16 == 0),
        unrolled=True,
        row_result=problem.x_strides[1] == 1,
        split=False,
        matrix=not _scalar(problem),
        itemsize=size,
        out_elements=math.prod(problem.x_shape),
    )
