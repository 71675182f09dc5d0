"""One case for every operator, dtype and set of scalar parameters that PyTorch accepts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonconv.codegen import Argument, Role
from tritonconv.codegen.lowering import TABLE, decompositions

DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool)

FLOATS = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0, -1.0, 0.5, -0.5, 1.5, 2.5)
FLOATS += (-2.5, 3.0, -3.0, 0.3, -0.7, 1e-40, -1e-30, 7.3, -88.0, 88.0, 1e18, -1e38)
SIGNED = (-100, -7, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 7, 31, 33, 100)
UNSIGNED = (0, 1, 2, 3, 5, 7, 8, 100, 200, 255)

# Parameters that are not tensors, by operator; every operator with a Scalar must be here.
SCALARS: dict[str, list[tuple[Any, ...]]] = {
    "div.Tensor_mode": [(None,), ("floor",), ("trunc",)],
    "div.Scalar_mode": [(3, None), (3, "floor"), (-2.5, "trunc")],
    "pow.Tensor_Scalar": [(e,) for e in (0, 1, 2, 3, 4, 5, -1, -2, 0.5, -0.5, 2.5, 7)],
    "clamp.default": [(-1, 2), (None, 0.5), (-0.5, None), (-1.5, 2.5)],
    "where.Scalar": [(1.5, -2), (2, 3)],
    "where.ScalarSelf": [(1.5,), (2,)],
    "where.ScalarOther": [(1.5,), (2,)],
    "leaky_relu.default": [(0.01,)],
    "leaky_relu_backward.default": [(0.01, False)],
    "elu.default": [(), (1.5,)],
    "elu_backward.default": [(1.0, 1.0, 1.0, False), (1.5, 1, 1, True)],
    "celu.default": [(1.5,)],
    "threshold.default": [(0.5, -1.0)],
    "threshold_backward.default": [(0.5,)],
    "hardtanh.default": [(), (-2.0, 0.5)],
    "hardtanh_backward.default": [(-1.0, 1.0)],
    "softplus.default": [(), (2.0, 10.0)],
    "softplus_backward.default": [(1.0, 20.0)],
    "hardshrink.default": [(0.5,)],
    "softshrink.default": [(0.5,)],
    "hardshrink_backward.default": [(0.5,)],
    "softshrink_backward.default": [(0.5,)],
    "lerp.Scalar": [(0.3,)],
    "nan_to_num.default": [(), (1.0, 2.0, -3.0)],
    "logit.default": [(), (1e-3,)],
    "logit_backward.default": [(), (1e-3,)],
    "gelu.default": [(), ("tanh",)],
    "gelu_backward.default": [(), ("tanh",)],
    "_to_copy.default": [(d,) for d in (*DTYPES, torch.bfloat16, torch.float16, torch.int8)],
    "add.Tensor": [(), (2,), (-1.5,)],
    "sub.Tensor": [(), (2,), (-1.5,)],
    "rsub.Tensor": [(), (2,)],
    "isclose.default": [()],
    "mse_loss.default": [(0,)],
    "huber_loss.default": [(0, 1.0)],
    "smooth_l1_loss.default": [(0, 1.0)],
}
_ANY_SCALAR = [(3,), (-2,), (2.5,), (True,)]
_KEYWORD = {"nan_to_num": (), "add": "alpha", "sub": "alpha", "rsub": "alpha", "_to_copy": "dtype"}
_KEYWORD |= {"gelu": "approximate", "gelu_backward": "approximate"}
aten = torch.ops.aten
# Operators that return several results or take an intermediate of another one, made functions of
# floats to one float.
WRAPPED: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "log_sigmoid_forward.default": (lambda x: aten.log_sigmoid_forward(x)[0],),
    "log_sigmoid_backward.default": (
        lambda grad, x: aten.log_sigmoid_backward(grad, x, torch.exp(-x.abs())),
    ),
    "_prelu_kernel_backward.default": (
        lambda grad, x, slope: aten._prelu_kernel_backward(grad, x, slope)[0],
        lambda grad, x, slope: aten._prelu_kernel_backward(grad, x, slope)[1],
    ),
}
# PyTorch refuses or does not define these for integers with a zero divisor.
_DIVIDES = ("div", "floor_divide", "remainder", "fmod")


@dataclass(frozen=True)
class Case:
    """One operator applied to operands of one dtype, with fixed parameters."""

    op: Any
    dtypes: tuple[torch.dtype, ...]
    parameters: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    number_first: bool = False
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or str(self.op).removeprefix("aten.")

    def __str__(self) -> str:
        kinds = "-".join(str(d).removeprefix("torch.") for d in self.dtypes)
        return f"{self.name}-{kinds}-{list(self.parameters)}{dict(self.keywords) or ''}"

    def __call__(self, *operands: Tensor) -> Tensor:
        if self.number_first:
            return self.op(*self.parameters, *operands, **dict(self.keywords))
        if self.name == "masked_fill.Tensor" and operands[2].dim():
            return torch.where(operands[1], operands[2], operands[0])  # it takes a 0-d value only
        if self.name in ("where.ScalarSelf", "where.Scalar", "elu_backward.default"):
            return self.op(operands[0], *self.parameters, *operands[1:])
        return self.op(*operands, *self.parameters, **dict(self.keywords))

    def arguments(self) -> tuple[Argument, ...]:
        return tuple(Argument(f"x{k}", d, Role.VALUE) for k, d in enumerate(self.dtypes))

    def operands(self) -> tuple[Tensor, ...]:
        packet = self.name.partition(".")[0]
        columns = []
        for k, dtype in enumerate(self.dtypes):
            if dtype.is_floating_point:
                values: tuple[Any, ...] = FLOATS
            elif dtype is torch.bool:
                values = (False, True)
            else:
                values = UNSIGNED if dtype is torch.uint8 else SIGNED
            divisor = k == 1 or self.number_first
            if packet in _DIVIDES and divisor and not dtype.is_floating_point:
                values = tuple(v for v in values if v != 0)
            if packet == "pow" and not dtype.is_floating_point and divisor:
                values = tuple(v for v in values if v >= 0)
            if self.name == "_to_copy.default" and not self.keywords[0][1].is_floating_point:
                values = tuple(v for v in values if v == v and abs(v) < 100)
                if self.keywords[0][1] is torch.uint8:
                    values = tuple(v for v in values if v >= 0)
            if packet.endswith("_backward"):
                # At NaN the derivatives of PyTorch's CPU and CUDA kernels differ.
                values = tuple(v for v in values if v == v)
            if len(self.dtypes) > 2:
                values = values[::3]
            columns.append(values)
        rows = list(itertools.product(*columns))
        return tuple(torch.tensor([r[k] for r in rows], dtype=d) for k, d in enumerate(self.dtypes))


def _tensor_count(op: Any) -> tuple[int, bool]:
    arguments = op._schema.arguments
    count = 0
    for argument in arguments:
        kind = str(argument.type)
        if kind == "Tensor" or (kind == "Optional[Tensor]" and "clamp" in op.name()):
            count += 1
    number_first = str(arguments[0].type) in ("number", "Scalar")
    return count, number_first


def _choices(op: Any) -> Iterator[tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]]:
    name = str(op).removeprefix("aten.")
    packet = name.partition(".")[0]
    known = SCALARS.get(name)
    if known is None:
        has_number = any(str(a.type) in ("number", "Scalar") for a in op._schema.arguments)
        needed = [
            a
            for a in op._schema.arguments
            if str(a.type) in ("number", "Scalar") and not a.has_default_value()
        ]
        known = _ANY_SCALAR if has_number and needed else [()]
    for parameters in known:
        keyword = None if name.endswith(".Scalar") else _KEYWORD.get(packet)
        if name.endswith("_mode"):
            yield parameters[:-1], (("rounding_mode", parameters[-1]),)
        elif keyword and parameters:
            yield (), ((keyword, parameters[0]),)
        else:
            yield parameters, ()


def _accepts(case: Case) -> bool:
    if "shift" in case.name and torch.bool in case.dtypes:
        return False  # accepted by the kernels but refused by PyTorch's shape inference
    try:
        case(*(torch.ones(2, dtype=d) for d in case.dtypes))
    except (RuntimeError, TypeError, NotImplementedError, IndexError):
        return False
    return True


def _mixed(op: Any, count: int) -> Iterator[tuple[torch.dtype, ...]]:
    name = str(op)
    if "where" in name:
        for dtype in DTYPES:
            yield (torch.bool, *(dtype,) * (count - 1))
        if count == 3:
            yield (torch.bool, torch.float32, torch.int32)
            yield (torch.bool, torch.float32, torch.float64)
        return
    if "masked_fill" in name:
        for dtype in DTYPES:
            yield (dtype, torch.bool, *(dtype,) * (count - 2))
        return
    for dtype in DTYPES:
        yield (dtype,) * count
    if count == 2 and "_backward" not in name and "loss" not in name:
        yield (torch.int32, torch.float32)
        yield (torch.float32, torch.float64)
        yield (torch.bool, torch.int32)
        yield (torch.int64, torch.int32)
        yield (torch.uint8, torch.int32)


def operators() -> list[Any]:
    """Every operator of the table and every operator that is taken apart, once."""
    return sorted({*TABLE, *decompositions()}, key=str)


def cases_of(op: Any) -> list[Case]:
    """The cases of one operator."""
    if (name := str(op).removeprefix("aten.")) in WRAPPED:
        return [
            Case(wrapper, (dtype,) * wrapper.__code__.co_argcount, (), (), label=name)
            for wrapper in WRAPPED[name]
            for dtype in (torch.float32, torch.float64)
        ]
    count, number_first = _tensor_count(op)
    found = []
    for parameters, keywords in _choices(op):
        for dtypes in _mixed(op, count):
            case = Case(op, dtypes, parameters, keywords, number_first)
            if _accepts(case):
                found.append(case)
    return found
