"""The frozen description of one convolution call: what is planned, tuned and looked up."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..codegen.program import Program
from ..codegen.registry import find_program, register_program
from ..runtime.errors import bad_value
from ..runtime.operators import Field

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

FLOAT8 = torch.float8_e4m3fn

PRECISIONS = ("ieee", "tf32x3", "tf32")
"""How products of float32 operands are formed."""

FAST_ACCUM = "fast_accum"
"""The precision of float8 products whose sums a GPU may keep in fewer bits than float32 has."""

AXES: dict[int, tuple[str, ...]] = {
    1: ("width",),
    2: ("height", "width"),
    3: ("depth", "height", "width"),
}
"""Names of the spatial axes by rank."""


class Direction(enum.StrEnum):
    """Which of the three convolution products a problem asks for."""

    FORWARD = "forward"
    DGRAD = "dgrad"
    WGRAD = "wgrad"


FUSED = {Direction.FORWARD: "fused", Direction.DGRAD: "transposed"}
"""What the field ``epilogue`` says of a product with one. A layer's row in a suite is for all three
products, and only one of them has the epilogue: dgrad is the product of a transposed convolution.
"""


@dataclass(frozen=True)
class EpilogueSpec:
    """The generated function fused behind the accumulator and the layout of what it reads.

    Attributes:
        function: key of the scalar function.
        element_dtypes, element_strides: operands read at the element of the product's result (of
            ``y`` for forward, of ``x`` for dgrad); stride 0 broadcasts.
        capture_dtypes, capture_shapes, capture_strides: tensors read at computed indices.
        save_acc: also store the accumulator, which the gradient of the function reads.
    """

    function: str
    element_dtypes: tuple[torch.dtype, ...] = ()
    element_strides: tuple[tuple[int, ...], ...] = ()
    capture_dtypes: tuple[torch.dtype, ...] = ()
    capture_shapes: tuple[tuple[int, ...], ...] = ()
    capture_strides: tuple[tuple[int, ...], ...] = ()
    save_acc: bool = False

    def __reduce__(self) -> Any:
        """A pickled spec takes its program along: keys mean something in one process only."""
        values = tuple(getattr(self, field.name) for field in dataclasses.fields(self))
        return _arrived_spec, (values, find_program(self.function))


def _arrived_spec(values: tuple[Any, ...], program: Program | None) -> EpilogueSpec:
    if program is not None:
        register_program(program)
    return EpilogueSpec(*values)


def output_size(
    in_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """Spatial extent of a convolution's output; ``padding`` holds (low, high) per axis."""
    return tuple(
        (size + low + high - step * (taps - 1) - 1) // hop + 1
        for size, taps, hop, (low, high), step in zip(
            in_size, kernel, stride, padding, dilation, strict=True
        )
    )


def dense_strides(shape: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    """Strides of a fresh tensor (batch, channels, *spatial) in either memory format."""
    order = [0, *range(2, len(shape)), 1] if channels_last else list(range(len(shape)))
    strides = [0] * len(shape)
    running = 1
    for axis in reversed(order):
        strides[axis] = running
        running *= max(shape[axis], 1)
    return tuple(strides)


LAYOUTS = ("channels_last", "contiguous", "strided")
_WIDE_SPAN = 2**30  # offsets this far apart are wide


def wide_stride(size: int) -> int:
    """The least stride at which an axis of several elements makes a problem wide."""
    return -(-_WIDE_SPAN // max(size - 1, 1))


def strides_for(shape: Sequence[int], layout: str, wide: bool = False) -> tuple[int, ...]:
    """Strides that :func:`_layout` calls by this name: what a tensor of a tuned entry gets.

    Args:
        shape: (batch, channels, *spatial).
        layout: one of :data:`LAYOUTS`.
        wide: place the elements of a strided tensor so far apart that offsets need int64.
    """
    if layout == "strided":
        # Every second element of a contiguous tensor; or, where these would be too far apart for
        # a problem that is not wide, one element expanded.
        strides = [2 * hop for hop in dense_strides(shape, False)]
        axis = next((axis for axis, size in enumerate(shape) if size > 1), 0)
        if wide:
            strides[axis] = max(strides[axis], wide_stride(shape[axis]))
        elif _span(shape, strides) >= _WIDE_SPAN:
            strides = [0] * len(shape)
        return tuple(strides)
    strides = list(dense_strides(shape, layout == "channels_last"))
    if layout == "contiguous" and shape[1] == 1 and _layout(shape, strides) != layout:
        strides[1] = 2  # the stride of one channel is never used: it only names the layout
    return tuple(strides)


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    return sum((size - 1) * abs(hop) for size, hop in zip(shape, strides, strict=True))


def _layout(shape: Sequence[int], strides: Sequence[int]) -> str:
    def same(channels_last: bool) -> bool:
        dense = dense_strides(shape, channels_last)
        return all(
            size == 1 or have == want
            for size, have, want in zip(shape, strides, dense, strict=True)
        )

    if same(True) and (not same(False) or strides[1] == 1):
        return "channels_last"
    return "contiguous" if same(False) else "strided"


@dataclass(frozen=True)
class ConvProblem:
    """One convolution product: sizes, geometry, dtype and the strides of its three tensors.

    ``x`` is the input, ``w`` the weight, ``y`` the output of the *forward* convolution; for dgrad
    the product is written to a tensor shaped as ``x``, for wgrad to one shaped as ``w``. Sizes are
    in elements, strides in elements, in the order (batch, channels, *spatial).

    ``out_dtype`` is the dtype of the result where it is not the operands' own: of a float8 product,
    which always has an epilogue that scales it, and of one whose epilogue quantises its result.
    """

    direction: Direction
    batch: int
    in_channels: int
    out_channels: int
    groups: int
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    dtype: torch.dtype
    precision: str
    x_strides: tuple[int, ...]
    w_strides: tuple[int, ...]
    y_strides: tuple[int, ...]
    epilogue: EpilogueSpec | None = None
    out_dtype: torch.dtype | None = None

    @property
    def operator(self) -> str:
        """``conv2d.forward`` and its like."""
        return f"conv{len(self.in_size)}d.{self.direction}"

    @property
    def x_shape(self) -> tuple[int, ...]:
        """(batch, in_channels, *spatial)."""
        return (self.batch, self.in_channels, *self.in_size)

    @property
    def w_shape(self) -> tuple[int, ...]:
        """(out_channels, in_channels / groups, *kernel)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def y_shape(self) -> tuple[int, ...]:
        """(batch, out_channels, *output spatial)."""
        return (self.batch, self.out_channels, *self.out_size)

    @property
    def result_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that the product writes."""
        return {
            Direction.FORWARD: self.y_shape,
            Direction.DGRAD: self.x_shape,
            Direction.WGRAD: self.w_shape,
        }[self.direction]

    @property
    def result_strides(self) -> tuple[int, ...]:
        """Strides of the tensor that the product writes."""
        return {
            Direction.FORWARD: self.y_strides,
            Direction.DGRAD: self.x_strides,
            Direction.WGRAD: self.w_strides,
        }[self.direction]

    @property
    def result_dtype(self) -> torch.dtype:
        """Dtype of the tensor that the product writes."""
        return self.dtype if self.out_dtype is None else self.out_dtype

    @property
    def taps(self) -> int:
        """Number of filter taps."""
        return math.prod(self.kernel)

    @property
    def out_pixels(self) -> int:
        """Output positions over the whole batch."""
        return self.batch * math.prod(self.out_size)

    @property
    def in_pixels(self) -> int:
        """Input positions over the whole batch."""
        return self.batch * math.prod(self.in_size)

    @property
    def channels_per_group(self) -> int:
        """Input channels that one output channel reads."""
        return self.in_channels // self.groups

    @property
    def filters_per_group(self) -> int:
        """Output channels of one group."""
        return self.out_channels // self.groups

    @property
    def depthwise(self) -> bool:
        """Every group has one input channel (and there are several groups)."""
        return self.groups > 1 and self.groups == self.in_channels

    @property
    def pointwise(self) -> bool:
        """1×1 taps with stride 1 and no padding: a matrix product."""
        return (
            self.taps == 1
            and all(hop == 1 for hop in self.stride)
            and not any(self.padding)
            and self.in_size == self.out_size
        )

    @property
    def patches(self) -> bool:
        """Kernel equals stride, no padding or dilation: windows tile the input."""
        return (
            self.kernel == self.stride
            and not any(self.padding)
            and all(step == 1 for step in self.dilation)
            and all(
                o * k <= i for o, k, i in zip(self.out_size, self.kernel, self.in_size, strict=True)
            )
        )

    @property
    def x_layout(self) -> str:
        """Memory format of the input: channels_last, contiguous or strided."""
        return _layout(self.x_shape, self.x_strides)

    @property
    def w_layout(self) -> str:
        """Memory format of the weight."""
        return _layout(self.w_shape, self.w_strides)

    @property
    def y_layout(self) -> str:
        """Memory format of the output."""
        return _layout(self.y_shape, self.y_strides)

    @property
    def wide(self) -> bool:
        """Whether an element offset of some tensor, or the number of pixels, can pass 2^31."""
        tensors = [
            (self.x_shape, self.x_strides),
            (self.w_shape, self.w_strides),
            (self.y_shape, self.y_strides),
        ]
        if self.epilogue is not None:
            tensors += [(self.result_shape, strides) for strides in self.epilogue.element_strides]
            tensors += zip(self.epilogue.capture_shapes, self.epilogue.capture_strides, strict=True)
        spans = [_span(shape, strides) for shape, strides in tensors if 0 not in shape]
        # Offsets of padded positions reach outside the tensor by at most one padded window.
        spans += [self.in_pixels, self.out_pixels]
        return any(span >= _WIDE_SPAN for span in spans)

    @property
    def reads_operand(self) -> bool:
        """Whether the epilogue reads a tensor that lies in memory as the result does: a residual.

        It is as much traffic as the result: what is fast with a bias alone says little.
        """
        if self.epilogue is None:
            return False
        return self.result_memory in self.epilogue.element_strides

    @property
    def result_memory(self) -> tuple[int, ...]:
        """Strides of the result as it is written."""
        return self.x_strides if self.direction is Direction.DGRAD else self.y_strides

    def fields(self) -> Mapping[str, Field]:
        """What tuned entries are keyed by: geometry and layouts as strings, sizes as integers."""
        kind = "dense" if self.groups == 1 else "depthwise" if self.depthwise else "grouped"
        fused = "none"
        if self.epilogue is not None:
            fused = FUSED[self.direction] + ("+operand" if self.reads_operand else "")
            fused += "+acc" if self.epilogue.save_acc else ""
        if self.dtype is FLOAT8:
            fused = "scaled"
        fields: dict[str, Field] = {
            "kind": kind,
            "kernel": _join(self.kernel),
            "stride": _join(self.stride),
            "padding": _join(self.padding),
            "dilation": _join(self.dilation),
            "dtype": _DTYPE_NAMES[self.dtype],
            "precision": self.precision,
            "layout": self.x_layout,
            "weight_layout": self.w_layout,
            "output_layout": self.y_layout,
            "epilogue": fused,
            "wide": self.wide,
            "batch": self.batch,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "groups": self.groups,
        }
        for axis, size, out in zip(
            AXES[len(self.in_size)], self.in_size, self.out_size, strict=True
        ):
            fields[axis] = size
            fields[f"out_{axis}"] = out
        if self.out_dtype is not None:  # others have no such field: their entries stay theirs
            fields["output_dtype"] = _DTYPE_NAMES[self.out_dtype]
        return fields

    def flops(self) -> int:
        """Multiply-adds × 2, zero padding counted as work."""
        return 2 * self.out_pixels * self.out_channels * self.channels_per_group * self.taps

    def bytes_moved(self) -> int:
        """Every element that is touched once: input, weight, output, operands of the epilogue."""
        read = math.prod(
            min(size, out * taps, (out - 1) * hop + step * (taps - 1) + 1)
            for size, out, hop, step, taps in zip(
                self.in_size, self.out_size, self.stride, self.dilation, self.kernel, strict=True
            )
        )
        x_count = math.prod(self.x_shape)
        if self.direction is not Direction.DGRAD:  # a gradient is written everywhere
            x_count = self.batch * self.in_channels * read
        count = x_count + math.prod(self.w_shape) + math.prod(self.y_shape)
        total = count * self.dtype.itemsize
        total += math.prod(self.y_shape) * (self.result_dtype.itemsize - self.dtype.itemsize)
        if self.epilogue is not None:
            for dtype, strides in zip(
                self.epilogue.element_dtypes, self.epilogue.element_strides, strict=True
            ):
                total += dtype.itemsize * math.prod(
                    size for size, hop in zip(self.result_shape, strides, strict=True) if hop
                )
            if self.epilogue.save_acc:
                total += math.prod(self.result_shape) * self.dtype.itemsize
        return total

    def __str__(self) -> str:
        sizes = "x".join(str(size) for size in self.in_size)
        text = (
            f"{self.operator} N{self.batch} C{self.in_channels} {sizes} M{self.out_channels} "
            f"K{_join(self.kernel)} S{_join(self.stride)} P{_join(self.padding)}"
        )
        if any(step != 1 for step in self.dilation):
            text += f" D{_join(self.dilation)}"
        if self.groups != 1:
            text += f" G{self.groups}"
        dtype = _DTYPE_NAMES[self.dtype]
        if self.out_dtype is not None:
            dtype += f"->{_DTYPE_NAMES[self.out_dtype]}"
        return f"{text} {dtype} {self.x_layout}"


def _join(values: Sequence[int]) -> str:
    return "x".join(str(value) for value in values)


def _numbers(value: Any, rank: int, name: str) -> tuple[int, ...]:
    try:
        if isinstance(value, str):
            numbers = tuple(int(part) for part in value.split("x"))
        elif isinstance(value, Sequence):
            numbers = tuple(int(part) for part in value)
        else:
            numbers = (int(value),)
    except ValueError:
        raise bad_value(name, f"{rank} integers such as 3 or 3x3", repr(value)) from None
    if len(numbers) == 1:
        numbers *= rank
    if len(numbers) != rank:
        raise bad_value(name, f"1 or {rank} integers", repr(value))
    return numbers


_ALIASES = {
    "N": "batch",
    "C": "in_channels",
    "M": "out_channels",
    "H": "height",
    "W": "width",
    "D": "depth",
    "K": "kernel",
    "S": "stride",
    "P": "padding",
    "G": "groups",
}
_DEFAULTS: dict[str, Any] = {
    "batch": 1,
    "kernel": 1,
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
    "dtype": "float32",
    "precision": "ieee",
    "layout": "channels_last",
}
_REQUIRED = ("in_channels", "out_channels")
_KNOWN = {
    *_DEFAULTS,
    *_REQUIRED,
    "weight_layout",
    "output_layout",
    "output_dtype",
    "kind",
    "epilogue",
    "wide",
    "name",
}


def parse_problem(direction: Direction, rank: int, fields: Mapping[str, Any]) -> ConvProblem:
    """Build a problem from named values, as a suite, the command line or a tuned entry has them.

    Args:
        direction: which product.
        rank: number of spatial axes.
        fields: ``in_channels``, ``out_channels`` and the sizes of the spatial axes (``depth``,
            ``height``, ``width``) are required; a missing one is the first that is given.
            ``kernel``, ``stride``, ``padding`` and ``dilation`` are an integer, ``"3x3"`` or a
            list; ``N C D H W M K S P G`` are accepted as short names. ``epilogue`` stands for a
            bias and a ReLU: ``"fused"`` on the forward product, ``"transposed"`` on dgrad;
            followed by ``"+operand"`` for a residual and GELU instead, then by ``"+acc"`` where
            the accumulator is kept.
            ``output_dtype`` is that of a scaled or quantised result (float8 operands: bfloat16).

    Raises:
        ArgumentValueError: an unknown or missing field, or a value that cannot be.
    """
    values = {**_DEFAULTS}
    axes = AXES[rank]
    for raw, value in fields.items():
        name = _ALIASES.get(raw, raw)
        if name not in _KNOWN and name not in axes and name not in {f"out_{a}" for a in axes}:
            raise bad_value("problem field", ", ".join(sorted(_KNOWN | set(axes))), repr(raw))
        values[name] = value
    first = next((values[axis] for axis in axes if axis in values), None)
    missing = [name for name in _REQUIRED if name not in values]
    if first is None or missing:
        raise bad_value("problem", f"{', '.join((*_REQUIRED, *axes))}", dict(fields))
    if values["dtype"] not in DTYPES:
        raise bad_value("dtype", " | ".join(DTYPES), repr(values["dtype"]))
    float8 = DTYPES[values["dtype"]] is FLOAT8
    precisions = ("ieee", FAST_ACCUM) if float8 else PRECISIONS
    if values["precision"] not in (*precisions, "tf32", "tf32x3"):
        raise bad_value("precision", " | ".join(precisions), repr(values["precision"]))
    out_dtype = _out_dtype(direction, values["dtype"], values.get("output_dtype"))
    layouts = {
        name: values.get(name, values["layout"])
        for name in ("layout", "weight_layout", "output_layout")
    }
    for name, layout in layouts.items():
        if layout not in LAYOUTS:
            raise bad_value(name, " | ".join(LAYOUTS), repr(layout))
    kernel, stride, padding, dilation = (
        _numbers(values[name], rank, name) for name in ("kernel", "stride", "padding", "dilation")
    )
    in_size = tuple(int(values.get(axis, first)) for axis in axes)
    symmetric = tuple((pad, pad) for pad in padding)
    plain = output_size(in_size, kernel, stride, symmetric, dilation)
    out_size = tuple(
        int(values.get(f"out_{axis}", size)) for axis, size in zip(axes, plain, strict=True)
    )
    batch, in_channels, out_channels, groups = (
        int(values[name]) for name in ("batch", "in_channels", "out_channels", "groups")
    )
    if groups < 1 or in_channels % groups or out_channels % groups:
        raise bad_value("groups", f"a divisor of {in_channels} and {out_channels}", groups)
    if min(out_size) < 1:
        raise bad_value("problem", "an output of at least one element per axis", out_size)
    wide = bool(values.get("wide", False))
    shapes = (
        (batch, in_channels, *in_size),
        (out_channels, in_channels // groups, *kernel),
        (batch, out_channels, *out_size),
    )
    x_strides, w_strides, y_strides = (
        strides_for(shape, layout, wide)
        for shape, layout in zip(shapes, layouts.values(), strict=True)
    )
    return ConvProblem(
        direction=direction,
        batch=batch,
        in_channels=in_channels,
        out_channels=out_channels,
        groups=groups,
        in_size=in_size,
        out_size=out_size,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        dtype=DTYPES[values["dtype"]],
        precision=_precision(values["dtype"], values["precision"]),
        x_strides=x_strides,
        w_strides=w_strides,
        y_strides=y_strides,
        out_dtype=out_dtype,
    )


def _precision(dtype: str, precision: str) -> str:
    """The precision that says something for this dtype; a suite's is for all of its dtypes."""
    if dtype == "float8_e4m3fn":
        return FAST_ACCUM if precision == FAST_ACCUM else "ieee"
    return precision if dtype == "float32" else "ieee"


def _out_dtype(direction: Direction, dtype: str, asked: str | None) -> torch.dtype | None:
    """The dtype of a scaled or quantised result; None where it is the operands' own."""
    float8 = DTYPES[dtype] is FLOAT8
    if direction is not Direction.FORWARD:
        if float8 or asked not in (None, dtype):
            raise bad_value(
                "dtype", "no float8 in a gradient, which none has", repr(asked or dtype)
            )
        return None
    if asked is None:
        return torch.bfloat16 if float8 else None
    every = [name for name in DTYPES if name != "float64"]
    given = every if float8 else [dtype, "float8_e4m3fn"]
    if asked not in given:
        raise bad_value("output_dtype", " | ".join(given), repr(asked))
    return None if asked == dtype and not float8 else DTYPES[asked]
