"""Depthwise kernels that walk down the rows of a map, with the whole filter in registers.

A thread owns a few neighbouring columns of outputs. Every row of the input is read once and meets
all rows of the filter: it adds to the outputs of as many rows, a window of accumulators that moves
down by the rows of a step. Weights are loaded once, and there are no rows that neighbouring tiles
read again. The gradient of the weight holds its sums where the product holds weights, and a
window of the output's gradient where the product holds accumulators.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from ...codegen.modules import digest, load_function
from .depthwise_source import (
    HEADER,
    Stencil,
    Writer,
    add_lanes,
    all_of,
    begin,
    lanes,
    load_line,
    plus,
    product_source,
    wgrad_source,
)
from .depthwise_taps import Axis


def can_walk(height: Axis, depth: Axis) -> bool:
    """Whether a window that moves row by row serves an axis: no gaps, no rows without input."""
    flat = depth.taps == 1 and depth.out == 1 and depth.size == 1 and depth.padding == 0
    dense = height.stride == 1 and height.dilation == 1
    return flat and dense and 1 < height.taps <= height.out and height.padding < height.taps


def window(height: Axis) -> tuple[int, dict[int, int]]:
    """First row of outputs that a row read at zero serves; row of the window -> row of the filter.

    The window has as many rows as the filter: each one meets another row of it.
    """
    last = height.taps - 1
    if height.gradient:
        return -height.padding, {tap: tap for tap in range(height.taps)}
    return height.padding - last, {last - tap: tap for tap in range(height.taps)}


def _segments(stencil: Stencil) -> list[tuple[int, int]]:
    """Rows that are read for each segment of the outputs."""
    height = stencil.height
    low, taps = window(height)
    found = []
    for first in range(0, height.out, stencil.walk):
        last = min(first + stencil.walk, height.out)
        found.append((max(first - low - len(taps) + 1, 0), min(last - low, height.size)))
    return found


def _columns(write: Writer, stencil: Stencil, offsets: Iterable[int]) -> dict[int, str]:
    """Conditions of the columns that can lie outside, found once, before the rows."""
    found = {}
    for offset in offsets:
        place = plus("column", offset)
        parts = [f"({place} >= 0)"] * stencil.width.below(offset)
        parts += [f"({place} < x_size[2])"] * stencil.width.above(offset)
        if parts:
            name = f"ok_{offset}".replace("-", "m")
            write(f"{name} = ({all_of(parts)})[:, None]")
            found[offset] = name
    return found


def _value(row: int, offset: int, prefix: str = "x") -> str:
    return f"{prefix}_{row}_{offset}".replace("-", "m")


def _offset(row: int, column: int) -> str:
    """A row and a column further, as far as they are not zero."""
    return f" + {row} * x_sh" * (row != 0) + f" + {column} * x_sw" * (column != 0)


def walk_product_source(stencil: Stencil) -> str:
    """Module of the kernel of a forward product or a gradient of the input."""
    write = Writer()
    height, width, step = stencil.height, stencil.width, stencil.height.tile
    low, taps = window(height)
    high = low + len(taps) - 1
    columns = width.reads()
    outputs = range(width.tile)
    begin(write, stencil, "xwy")
    lanes(write, stencil, f"tiles_w * batch * {stencil.groups}")
    write("image = p // tiles_w")
    write(f"column = p % tiles_w * {width.tile}")
    write(f"first = tl.program_id(1) * {stencil.walk}")
    write(f"last = tl.minimum(first + {stencil.walk}, y_size[1])")
    write(f"start = tl.maximum(first - {high}, 0)")
    write(f"stop = tl.minimum(last + {-low}, x_size[1])")
    write("x_lane = x_ptr + ((image * x_sn + column * x_sw)[:, None] + o * x_sc)")
    write("y_base = (image * y_sn + column * y_sw)[:, None] + o * y_sc")
    for tensor in ("y", "acc")[: 1 + stencil.save_acc]:
        write(f"{tensor}_lane = {tensor}_ptr + y_base")
    for row in taps.values():
        for tap in range(width.taps):
            write(load_line(f"w_{row}_{tap}", f"w_ptr + (o + {row} * w_sh + {tap} * w_sw)", []))
    masks = _columns(write, stencil, columns)
    write(
        "everywhere = "
        + ("tl.full((BLOCK_P, 1), 1, tl.int1)" if stencil.full else "mask_p[:, None]")
    )
    for place in outputs:
        if (width.tiles - 1) * width.tile + place >= width.out:
            write(f"stored_{place} = everywhere & (column + {place} < y_size[2])[:, None]")
        else:
            write(f"stored_{place} = everywhere")
    for slot in range(len(taps) - 1 + step):
        for place in outputs:
            write(f"acc_{slot}_{place} = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)")
    exact = all((stop - start) % step == 0 for start, stop in _segments(stencil))

    def load_rows(prefix: str, at: str, check: bool) -> None:
        """All columns of the rows of a step; those past the last one are zeros."""
        write(f"x_row = x_lane + ({at}) * x_sh")
        for j in range(step):
            inside = f"({at} + {j} < stop)"
            for offset in columns:
                parts = [masks[k] for k in (offset,) if k in masks] + [inside] * check
                mask = f", mask={all_of(parts)}, other=0.0" if parts else ""
                write(f"{_value(j, offset, prefix)} = tl.load(x_row{_offset(j, offset)}{mask})")

    if stencil.ahead:
        load_rows("x", "start", not exact)
    with write.block(f"for row in range(start, stop, {step}):"):
        if stencil.ahead:
            load_rows("n", f"row + {step}", True)
        else:
            load_rows("x", "row", not exact)
        for j in range(step):
            for offset, pairs in columns.items():
                write(f"x = as_float({_value(j, offset)})")
                for slot, row in taps.items():
                    for place, tap in pairs:
                        acc = f"acc_{slot + j}_{place}"
                        write(f"{acc} = tl.fma(x, w_{row}_{tap}, {acc})")
            _store_row(write, stencil, j, f"row + {low + j}")
        for slot in range(len(taps) - 1 + step):
            for place in outputs:
                if slot < len(taps) - 1:
                    write(f"acc_{slot}_{place} = acc_{slot + step}_{place}")
                else:
                    write(f"acc_{slot}_{place} = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)")
        if stencil.ahead:
            for j in range(step):
                for offset in columns:
                    write(f"{_value(j, offset)} = {_value(j, offset, 'n')}")
    # Rows of outputs below the last row that is read.
    rest = min(max(0, height.out - height.size - low), len(taps) - 1)
    if rest:
        write(f"below = start + tl.cdiv(stop - start, {step}) * {step} + {low}")
        for slot in range(rest):
            _store_row(write, stencil, slot, f"below + {slot}")
    head = (
        "@triton.jit\ndef depthwise_kernel(\n    x_ptr, w_ptr, y_ptr, acc_ptr, extra_ptrs,"
        " extra_strides, batch, x_size, y_size,\n    x_strides, w_strides, y_strides, channels,\n"
        "    EPILOGUE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,\n):\n"
    )
    title = "the gradient of the input" if width.gradient else "the forward product"
    return HEADER.format(title=f"depthwise convolution by rows, {title}") + head + write.text


def _store_row(write: Writer, stencil: Stencil, slot: int, row: str) -> None:
    """Epilogue and stores of the outputs of one row, where it belongs to the segment."""
    write(f"out_row = {row}")
    write("in_segment = (out_row >= first) & (out_row < last)")
    tensors = ("y", "acc")[: 1 + stencil.save_acc]
    for tensor in tensors:
        write(f"{tensor}_row = {tensor}_lane + out_row * y_sh")
    for place in range(stencil.width.tile):
        result = f"acc_{slot}_{place}"
        offset = f" + {place} * y_sw" if place else ""
        write(f"mask = stored_{place} & in_segment")
        if stencil.coordinates:
            where = ["everywhere.to(tl.int32) * 0"] * (stencil.coordinates - 2)
            where += ["everywhere.to(tl.int32) * 0 + out_row", f"(column + {place})[:, None]"]
            where = where[-stencil.coordinates :]
            write(f"result = EPILOGUE({result}, image[:, None], o, {', '.join(where)},")
            write("    mask, extra_ptrs, extra_strides)")
        for tensor in tensors:
            value = "result" if stencil.coordinates and tensor == "y" else result
            element = f"{tensor}_ptr.dtype.element_ty"
            write(f"tl.store({tensor}_row{offset}, {value}.to({element}), mask=mask)")


def walk_wgrad_source(stencil: Stencil) -> str:
    """Module of the kernel that sums the products of some strips of a map, row by row.

    partial[split, tap, o]: a split is a part of the strips, of one segment of the rows read.
    """
    write = Writer()
    height, width, step = stencil.height, stencil.width, stencil.height.tile
    low, taps = window(height)
    columns = width.reads()
    places = range(width.tile)
    write("tile_c = tl.program_id(0)")
    begin(write, stencil, "xy")
    write("segment = tl.program_id(1)")
    wide = ".to(tl.int64)" if stencil.wide else ""
    write(f"part = tl.program_id(2){wide}")
    write("split = part * tl.num_programs(1) + segment")
    write("first = part * per_split")
    write("last = tl.minimum(first + per_split, batch * tiles_w)")
    write(f"start = segment * {stencil.walk}")
    write(f"stop = tl.minimum(start + {stencil.walk}, x_size[1])")
    for row in range(height.taps):
        for tap in range(width.taps):
            write(f"acc_0_{row}_{tap} = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)")
    channel_mask = [] if stencil.even else ["mask_c"]
    exact = height.size % stencil.walk == 0 and stencil.walk % step == 0

    def load_gradient(slot: int, row: str) -> None:
        """The row of the window at a slot; rows outside of the map are zeros."""
        write(f"out_row = {row}")
        write("in_map = (out_row >= 0) & (out_row < y_size[1])")
        write("y_row = y_lane + out_row * y_sh")
        for place in places:
            parts = [f"in_map & held_{place}", *channel_mask]
            offset = f"y_row + {place} * y_sw" if place else "y_row"
            write(load_line(f"grad_{slot}_{place}", offset, parts))

    with write.block("for begin in range(first, last, BLOCK_P):"):
        write(f"p = (begin + tl.arange(0, BLOCK_P)){wide}")
        if stencil.full:
            write("everywhere = tl.full((BLOCK_P, 1), 1, tl.int1)")
        else:
            write("everywhere = (p < last)[:, None]")
            write("p = tl.minimum(p, last - 1)")
        write("image = p // tiles_w")
        write(f"column = p % tiles_w * {width.tile}")
        masks = _columns(write, stencil, columns)
        for place in places:
            inside = (width.tiles - 1) * width.tile + place < width.out
            more = "" if inside else f" & (column + {place} < y_size[2])[:, None]"
            write(f"held_{place} = everywhere{more}")
        own = f"(o // {stencil.multiplier})" if stencil.multiplier > 1 else "o"
        write(f"x_lane = x_ptr + ((image * x_sn + column * x_sw)[:, None] + {own} * x_sc)")
        write("y_lane = grad_ptr + ((image * y_sn + column * y_sw)[:, None] + o * y_sc)")
        for slot in range(len(taps) - 1):
            load_gradient(slot, f"start + {low + slot}")
        with write.block(f"for row in range(start, stop, {step}):"):
            write("x_row = x_lane + row * x_sh")
            for j in range(step):
                for offset in columns:
                    parts = [masks[k] for k in (offset,) if k in masks] + channel_mask
                    parts += [f"(row + {j} < stop)"] * (not exact)
                    mask = f", mask={all_of(parts)}, other=0.0" if parts else ""
                    write(f"{_value(j, offset)} = tl.load(x_row{_offset(j, offset)}{mask})")
            for j in range(step):
                load_gradient(len(taps) - 1 + j, f"row + {low + len(taps) - 1 + j}")
            for j in range(step):
                for offset, pairs in columns.items():
                    write(f"x = as_float({_value(j, offset)})")
                    for slot, tap_h in taps.items():
                        for place, tap in pairs:
                            acc = f"acc_0_{tap_h}_{tap}"
                            write(f"{acc} = tl.fma(x, grad_{slot + j}_{place}, {acc})")
            for slot in range(len(taps) - 1):
                for place in places:
                    write(f"grad_{slot}_{place} = grad_{slot + step}_{place}")
    write("first_d = 0")
    write("first_h = 0")
    add_lanes(write, stencil, [(0, r, s) for r in range(height.taps) for s in range(width.taps)])
    head = (
        "@triton.jit\ndef depthwise_kernel(\n    grad_ptr, x_ptr, partial_ptr, batch, x_size,"
        " y_size, x_strides, y_strides,\n    channels, per_split,\n"
        "    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,\n):\n"
    )
    title = "depthwise convolution by rows, partial sums of the gradient of the weight"
    return HEADER.format(title=title) + head + write.text


@functools.lru_cache(maxsize=1024)
def generated_kernel(stencil: Stencil) -> Any:
    """The kernel of a stencil: partial sums of a weight gradient where it names a filter."""
    gradient = stencil.filter != (0, 0)
    if stencil.walk:
        source = walk_wgrad_source(stencil) if gradient else walk_product_source(stencil)
    else:
        source = wgrad_source(stencil) if gradient else product_source(stencil)
    return load_function(source, "depthwise_kernel", digest(source))
