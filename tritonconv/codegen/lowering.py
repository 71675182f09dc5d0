"""The lowering table, ATen operator -> Triton expression, and what is taken apart before it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .ir import FULL, TO, compute_dtype

aten = torch.ops.aten

TYPE_NAMES = {
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bool: "tl.int1",
    torch.uint8: "tl.uint8",
    torch.int8: "tl.int8",
    torch.int16: "tl.int16",
    torch.int32: "tl.int32",
    torch.int64: "tl.int64",
}

_BITS = {torch.uint8: 8, torch.int8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}


def constant(value: float, dtype: torch.dtype, literal: bool) -> str:
    """The text of a constant.

    A Python literal stands for float32 and int32 only, where ``literal`` allows one: Triton gives a
    literal beside a float64 block its own idea of a dtype, and a ``tl.full`` never.
    """
    kind = TYPE_NAMES[dtype]
    if dtype is torch.bool:
        return f"tl.full([], {bool(value)}, tl.int1)"
    if not dtype.is_floating_point:
        if literal and dtype is torch.int32 and -(2**31) < value < 2**31:
            return repr(int(value))
        return f"tl.full([], {int(value)}, {kind})"
    value = float(value)
    if value == 0 and math.copysign(1.0, value) < 0:
        # Triton 3.6 writes every zero as +0.0.
        return f"(tl.full([], 0.0, {kind}) * -1.0)"
    if math.isnan(value) or math.isinf(value):
        text = f'float("{value}")'
    elif dtype is torch.float32:
        text = _short_float32(value)
    else:
        text = repr(value)
    # Below this Triton takes a literal for a float64.
    normal = value == 0 or not math.isfinite(value) or abs(value) >= 2**-126
    if literal and dtype is torch.float32 and normal:
        return text
    return f"tl.full([], {text}, {kind})"


def _short_float32(value: float) -> str:
    """The shortest decimal that rounds to the same float32."""
    for digits in range(1, 18):
        text = f"{value:.{digits}g}"
        if float(torch.tensor(float(text), dtype=torch.float32)) == float(
            torch.tensor(value, dtype=torch.float32)
        ):
            return repr(float(text))
    return repr(value)


class Context:
    """What a lowering sees of the node it writes: the dtype of the result, and its operands."""

    def __init__(
        self, node: fx.Node, names: dict[fx.Node, str], coords: frozenset[fx.Node]
    ) -> None:
        self.node = node
        self.names = names
        self.coords = coords

    @property
    def result(self) -> torch.dtype:
        """The dtype the node's value is held in."""
        return compute_dtype(self.node.meta["dtype"])

    def arg(self, position: int, name: str | None = None, default: Any = None) -> Any:
        """One raw argument."""
        if position < len(self.node.args):
            return self.node.args[position]
        return self.node.kwargs.get(name, default) if name else default

    def dtype_of(self, x: Any) -> torch.dtype:
        """The dtype an operand is held in."""
        if isinstance(x, fx.Node):
            return compute_dtype(x.meta["dtype"])
        return torch.result_type(torch.empty((), dtype=self.result), x)

    def common(self, *operands: Any) -> torch.dtype:
        """The dtype that PyTorch promotes these operands to."""
        dtypes = [
            torch.empty((), dtype=x.meta["dtype"]) if isinstance(x, fx.Node) else x
            for x in operands
        ]
        tensors = [d for d in dtypes if isinstance(d, Tensor)]
        dtype = tensors[0].dtype
        for other in dtypes:
            dtype = torch.result_type(torch.empty((), dtype=dtype), other)
        return compute_dtype(dtype)

    def text(self, x: Any, dtype: torch.dtype, literal: bool = True) -> str:
        """The text of an operand in ``dtype``."""
        if isinstance(x, fx.Node):
            if x.target is FULL:
                return constant(_cast_number(x.args[1], dtype), dtype, literal)
            name = self.names[x]
            own = compute_dtype(x.meta["dtype"])
            if own == dtype:
                return name
            if dtype is torch.bool:
                return f"({name} != 0)"
            if x in self.coords:  # may be a Python constant in the calling kernel
                return f"tl.cast({name}, {TYPE_NAMES[dtype]})"
            return f"{name}.to({TYPE_NAMES[dtype]})"
        return constant(_cast_number(x, dtype), dtype, literal)


def _cast_number(x: Any, dtype: torch.dtype) -> Any:
    if dtype is torch.bool:
        return bool(x)
    if dtype.is_floating_point:
        return x
    # Integers wrap, as PyTorch converts them.
    bits = _BITS[dtype]
    wrapped = int(x) & ((1 << bits) - 1)
    return wrapped if dtype is torch.uint8 or wrapped < 1 << (bits - 1) else wrapped - (1 << bits)


Render = Callable[[Context], str]


@dataclass(frozen=True)
class Lowering:
    """How one operator is written: the base name of its temporary, and its expression."""

    name: str
    render: Render


TABLE: dict[Any, Lowering] = {}
"""ATen overload -> :class:`Lowering`."""


def _find(name: str) -> Any:
    packet, _, overload = name.partition(".")
    found = getattr(getattr(aten, packet, None), overload or "default", None)
    if found is None:
        raise KeyError(f"aten has no {name}")
    return found


def _register(names: str, render: Render, label: str | None = None) -> None:
    for name in names.split():
        TABLE[_find(name)] = Lowering(label or name.partition(".")[0].strip("_"), render)


def _literal_ok(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.int32)


def _template(template: str, dtype: str = "result", logical: str | None = None) -> Render:
    """A rule that puts operands cast to one dtype into a template.

    ``dtype`` is ``result``, or ``common`` for the promoted dtype of the operands. ``logical`` is
    the template for booleans. Calls get typed constants, operators may get literals.
    """
    count = 1 + max(int(c) for c in "012" if f"{{{c}}}" in template)

    def render(context: Context) -> str:
        operands = [context.arg(k) for k in range(count)]
        kind = context.result if dtype == "result" else context.common(*operands)
        chosen = logical if kind is torch.bool and logical else template
        literal = _literal_ok(kind) and not chosen.startswith("dm.")
        return chosen.format(*(context.text(x, kind, literal) for x in operands))

    return render


# Arithmetic


def _add(sign: str, logical: str) -> Render:
    def render(context: Context) -> str:
        a, b, alpha = context.arg(0), context.arg(1), context.arg(2, "alpha", 1)
        kind = context.result
        left, right = context.text(a, kind), context.text(b, kind)
        if kind is torch.bool:
            return f"{left} {logical} {right}"
        if alpha != 1:
            right = f"{right} * {constant(alpha, kind, _literal_ok(kind))}"
        return f"{left} {sign} {right}"

    return render


def _rsub(context: Context) -> str:
    a, b, alpha = context.arg(0), context.arg(1), context.arg(2, "alpha", 1)
    kind = context.result
    right = context.text(a, kind)
    if alpha != 1:
        right = f"{right} * {constant(alpha, kind, _literal_ok(kind))}"
    return f"{context.text(b, kind)} - {right}"


_register("add.Tensor add.Scalar", _add("+", "|"))
_register("sub.Tensor sub.Scalar", _add("-", "^"))
_register("rsub.Tensor rsub.Scalar", _rsub)
_register("mul.Tensor mul.Scalar", _template("{0} * {1}", logical="{0} & {1}"))
_register("div.Tensor div.Scalar", _template("{0} / {1}"))


def _division(context: Context, mode: str | None) -> str:
    a, b, kind = context.arg(0), context.arg(1), context.result
    left, right = context.text(a, kind, False), context.text(b, kind, False)
    if mode is None:
        return f"{left} / {right}"
    if kind.is_floating_point:
        return f"dm.{mode}_divide({left}, {right})"
    if mode == "trunc" or kind is torch.uint8:
        return f"{left} // {right}"
    return f"dm.floor_divide_int({left}, {right})"


_register(
    "div.Tensor_mode div.Scalar_mode",
    lambda c: _division(c, c.arg(2, "rounding_mode")),
)
_register("floor_divide.default floor_divide.Scalar", lambda c: _division(c, "floor"))


def _remainder(context: Context) -> str:
    kind = context.result
    left, right = (context.text(context.arg(k), kind, False) for k in (0, 1))
    if kind.is_floating_point:
        return f"dm.remainder({left}, {right})"
    return f"{left} % {right}" if kind is torch.uint8 else f"dm.remainder_int({left}, {right})"


def _fmod(context: Context) -> str:
    kind = context.result
    left, right = (context.text(context.arg(k), kind, False) for k in (0, 1))
    return f"dm.fmod({left}, {right})" if kind.is_floating_point else f"{left} % {right}"


_register("remainder.Tensor remainder.Scalar remainder.Scalar_Tensor", _remainder)
_register("fmod.Tensor fmod.Scalar", _fmod)


def _pow(context: Context) -> str:
    base, exponent, kind = context.arg(0), context.arg(1), context.result
    number = exponent.args[1] if getattr(exponent, "target", None) is FULL else exponent
    if not isinstance(base, fx.Node) or isinstance(number, fx.Node):
        number = None
    x = context.text(base, kind, False)
    if number is not None and number in (2, 3, 4):
        return {2: f"{x} * {x}", 3: f"{x} * {x} * {x}", 4: f"({x} * {x}) * ({x} * {x})"}[number]
    if not kind.is_floating_point:
        bits = _BITS[kind]
        steps = bits if number is None else max(int(number), 1).bit_length()
        return f"dm.pow_int({x}, {context.text(exponent, kind, False)}, {steps})"
    one = constant(1.0, kind, _literal_ok(kind))
    special = {
        0.5: f"dm.sqrt({x})",
        -0.5: f"{one} / dm.sqrt({x})",
        -1: f"{one} / {x}",
        -2: f"{one} / ({x} * {x})",
    }
    if number is not None and number in special:
        return special[number]
    return f"dm.pow({x}, {context.text(exponent, kind, False)})"


_register("pow.Tensor_Tensor pow.Tensor_Scalar pow.Scalar", _pow)
_register("abs.default", _template("tl.abs({0})"))


def _neg(context: Context) -> str:
    kind = context.result
    x = context.text(context.arg(0), kind)
    # Triton 3.6 computes -x as 0 - x, which makes +0.0 of +0.0.
    return f"-1.0 * {x}" if kind.is_floating_point else f"-{x}"


_register("neg.default", _neg)


def _sign(context: Context) -> str:
    kind = context.result
    x = context.text(context.arg(0), kind)
    if kind is torch.bool:
        return x
    return f"({x} != 0).to({TYPE_NAMES[kind]})" if kind is torch.uint8 else f"dm.sign({x})"


_register("sign.default sgn.default", _sign)


def _own(template: str, number: str | None = None) -> Render:
    """A predicate on one operand in its own dtype; ``number`` for integers and booleans."""

    def render(context: Context) -> str:
        x = context.arg(0)
        kind = context.dtype_of(x)
        chosen = template if kind.is_floating_point or number is None else number
        return chosen.format(context.text(x, kind))

    return render


_FALSE = "tl.full([], False, tl.int1)"
_register("signbit.default", _own("dm.signbit({0})", "{0} < 0"))
_register("isnan.default", _own("{0} != {0}", _FALSE))
_register("isinf.default", _own('tl.abs({0}) == float("inf")', _FALSE))
_register("isfinite.default", _own('tl.abs({0}) < float("inf")', "tl.full([], True, tl.int1)"))
_register("isposinf.default", _own('{0} == float("inf")', _FALSE))
_register("isneginf.default", _own('{0} == float("-inf")', _FALSE))

# Elementary functions


def _unary(names: str, template: str) -> None:
    _register(names, _template(template))


_unary("exp.default", "tl.exp({0})")
_unary("exp2.default", "tl.exp2({0})")
_unary("log.default", "tl.log({0})")
_unary("log2.default", "tl.log2({0})")
_unary("sin.default", "tl.sin({0})")
_unary("cos.default", "tl.cos({0})")
_unary("erf.default", "tl.erf({0})")
_unary("rsqrt.default", "tl.rsqrt({0})")
for _name in [
    "sqrt",
    "expm1",
    "log1p",
    "log10",
    "tan",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "tanh",
    "asinh",
    "acosh",
    "atanh",
    "erfc",
    "erfinv",
    "lgamma",
    "sigmoid",
]:
    _unary(f"{_name}.default", f"dm.{_name}({{0}})")
_unary("atan2.default", "dm.atan2({0}, {1})")
_unary("hypot.default", "dm.hypot({0}, {1})")
_unary("copysign.Tensor copysign.Scalar", "dm.copysign({0}, {1})")
_unary("nextafter.default", "dm.nextafter({0}, {1})")


def _reciprocal(context: Context) -> str:
    kind = context.result
    return f"{constant(1.0, kind, _literal_ok(kind))} / {context.text(context.arg(0), kind)}"


_register("reciprocal.default", _reciprocal)


def _rounding(function: str) -> Render:
    def render(context: Context) -> str:
        kind = context.result
        x = context.text(context.arg(0), kind)
        return f"{function}({x})" if kind.is_floating_point else x

    return render


_register("floor.default", _rounding("tl.floor"))
_register("ceil.default", _rounding("tl.ceil"))
_register("trunc.default", _rounding("dm.trunc"))
_register("round.default", _rounding("dm.rint"))
_register("frac.default", _template("dm.frac({0})"))

# Minimum, maximum, clamp


def _extreme(function: str, number: str, logical: str, kind: torch.dtype, a: str, b: str) -> str:
    if kind.is_floating_point:
        return f"dm.{function}({a}, {b})"
    return f"{a} {logical} {b}" if kind is torch.bool else f"tl.{number}({a}, {b})"


def _pairwise(function: str, number: str, logical: str) -> Render:
    def render(context: Context) -> str:
        kind = context.result
        a, b = (context.text(context.arg(k), kind, False) for k in (0, 1))
        return _extreme(function, number, logical, kind, a, b)

    return render


_LOWER, _UPPER = ("maximum", "maximum", "|"), ("minimum", "minimum", "&")
_register("minimum.default", _pairwise(*_UPPER))
_register("maximum.default", _pairwise(*_LOWER))
_register("fmin.default", _pairwise("fmin", "minimum", "&"))
_register("fmax.default", _pairwise("fmax", "maximum", "|"))
_register("clamp_min.default clamp_min.Tensor", _pairwise(*_LOWER))
_register("clamp_max.default clamp_max.Tensor", _pairwise(*_UPPER))


def _clamp(context: Context) -> str:
    kind = context.result
    text = context.text(context.arg(0), kind, False)
    for bound, rule in ((context.arg(1, "min"), _LOWER), (context.arg(2, "max"), _UPPER)):
        if bound is not None:
            text = _extreme(*rule, kind, text, context.text(bound, kind, False))
    return text


_register("clamp.default clamp.Tensor", _clamp)


def _relu(context: Context) -> str:
    kind = context.result
    x, zero = context.text(context.arg(0), kind), constant(0, kind, False)
    return _extreme(*_LOWER, kind, x, zero)


_register("relu.default", _relu)

# Comparisons, choice, logic, bits

for _name, _sign_text in {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
}.items():
    _register(
        f"{_name}.Tensor {_name}.Scalar", _template(f"{{0}} {_sign_text} {{1}}", dtype="common")
    )


def _choice(context: Context, condition: Any, a: Any, b: Any) -> str:
    kind = context.result
    literal = _literal_ok(kind)
    texts = (context.text(a, kind, literal), context.text(b, kind, literal))
    return f"tl.where({context.text(condition, torch.bool)}, {texts[0]}, {texts[1]})"


_register(
    "where.self where.ScalarOther where.ScalarSelf where.Scalar",
    lambda c: _choice(c, c.arg(0), c.arg(1), c.arg(2)),
)
_register(
    "masked_fill.Scalar masked_fill.Tensor",
    lambda c: _choice(c, c.arg(1), c.arg(2), c.arg(0)),
)


def _boolean(template: str) -> Render:
    def render(context: Context) -> str:
        count = 2 if "{1}" in template else 1
        return template.format(*(context.text(context.arg(k), torch.bool) for k in range(count)))

    return render


_register("logical_and.default", _boolean("{0} & {1}"))
_register("logical_or.default", _boolean("{0} | {1}"))
_register("logical_xor.default", _boolean("{0} ^ {1}"))
_register("logical_not.default", _boolean("{0} == 0"))
for _name, _sign_text in {"and": "&", "or": "|", "xor": "^"}.items():
    _register(
        f"bitwise_{_name}.Tensor bitwise_{_name}.Scalar bitwise_{_name}.Scalar_Tensor",
        _template(f"{{0}} {_sign_text} {{1}}"),
        f"bit_{_name}",
    )
    _register(f"__{_name}__.Tensor __{_name}__.Scalar", _template(f"{{0}} {_sign_text} {{1}}"))


def _bitwise_not(context: Context) -> str:
    kind = context.result
    x = context.text(context.arg(0), kind)
    if kind is torch.bool:
        return f"{x} == 0"
    # Triton 3.6 interprets ~ as ^ -1, which NumPy refuses for unsigned numbers.
    return f"{x} ^ 255" if kind is torch.uint8 else f"~{x}"


_register("bitwise_not.default", _bitwise_not, "bit_not")


def _shift(direction: str) -> Render:
    def render(context: Context) -> str:
        kind = context.result
        a, b = (context.text(context.arg(k), kind, False) for k in (0, 1))
        name = "unsigned_shift_right" if direction == "right" and kind is torch.uint8 else None
        return f"dm.{name or 'shift_' + direction}({a}, {b}, {_BITS[kind]})"

    return render


_register(
    "bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar bitwise_left_shift.Scalar_Tensor "
    "__lshift__.Scalar __lshift__.Tensor",
    _shift("left"),
    "shift_left",
)
_register(
    "bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar "
    "bitwise_right_shift.Scalar_Tensor __rshift__.Scalar __rshift__.Tensor",
    _shift("right"),
    "shift_right",
)
TABLE[TO] = Lowering("cast", lambda c: c.text(c.arg(0), c.result))


# Operators that are taken apart first

_DECOMPOSED = """
gelu gelu_backward silu silu_backward relu6 leaky_relu leaky_relu_backward elu elu_backward
celu selu softplus softplus_backward hardswish hardswish_backward hardsigmoid hardsigmoid_backward
hardtanh hardtanh_backward mish mish_backward log_sigmoid_forward log_sigmoid_backward threshold
threshold_backward sigmoid_backward tanh_backward logit logit_backward hardshrink softshrink
lerp.Scalar lerp.Tensor addcmul addcdiv xlogy.Tensor xlogy.Scalar_Other xlogy.Scalar_Self logaddexp
logaddexp2 nan_to_num heaviside square sinc special_entr special_xlog1py deg2rad rad2deg
_prelu_kernel _prelu_kernel_backward infinitely_differentiable_gelu_backward
float_power.Tensor_Scalar float_power.Tensor_Tensor mse_loss huber_loss smooth_l1_loss isclose
softshrink_backward hardshrink_backward
"""


def _hardtanh(x: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    return torch.clamp(x, low, high)


def _shrink_backward(grad: Tensor, x: Tensor, limit: float) -> Tensor:
    return torch.where((x >= -limit) & (x <= limit), 0.0, grad)


@functools.cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """The operators that are taken apart into operators of the table, and how."""
    from torch._decomp import decomposition_table

    ours: dict[Any, Callable[..., Any]] = {
        aten.hardtanh.default: _hardtanh,
        aten.softshrink_backward.default: _shrink_backward,
        aten.hardshrink_backward.default: _shrink_backward,
        # PyTorch's own decomposition multiplies in another order than its kernels.
        aten.sigmoid_backward.default: lambda grad, y: grad * (1 - y) * y,
    }
    table = dict(ours)
    for name in _DECOMPOSED.split():
        try:
            op = _find(name)
        except KeyError:
            continue
        if op not in table and op in decomposition_table:
            table[op] = decomposition_table[op]
    return table


def is_supported(op: Any) -> bool:
    """Whether an operator is in the table or taken apart into it."""
    return op in TABLE or op in decompositions()


def supported_ops() -> tuple[str, ...]:
    """Names of the ATen overloads that a scalar function may use.

    Example:
        >>> from tritonconv.codegen import supported_ops
        >>> "aten.tanh.default" in supported_ops()
        True
    """
    return tuple(sorted({str(op) for op in (*TABLE, *decompositions())}))
