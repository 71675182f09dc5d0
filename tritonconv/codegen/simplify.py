"""Canonical form and simplification of a program's graph.

Every rule keeps the value for every input, NaN, infinities and the sign of a zero that can still
become an infinity included: ``x * 0`` and ``x - x`` stay, and ``x + 0.0`` goes only where no later
operator can tell ``-0.0`` from ``0.0``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from .errors import NotScalarError, UnsupportedOpError
from .ir import FULL, LOAD, STOP, TO
from .lowering import is_supported, supported_ops

aten = torch.ops.aten

# On a 0-d tensor these return their first argument, perhaps in another dtype.
_SAME_VALUE = {
    aten.alias,
    aten.clone,
    aten.contiguous,
    aten.detach,
    aten.expand,
    aten.lift,
    aten.lift_fresh,
    aten.lift_fresh_copy,
    aten.permute,
    aten.positive,
    aten.reshape,
    aten.squeeze,
    aten.t,
    aten.view,
    aten._reshape_alias,
    aten._unsafe_view,
    aten.sum,
    aten.mean,
    aten.prod,
    aten.amax,
    aten.amin,
    aten.logsumexp,
    torch.ops.prims.view_of,
    torch.ops.prims.broadcast_in_dim,
}

_CASTS = {aten._to_copy, aten.to, torch.ops.prims.convert_element_type}

_ONES = {aten.ones, aten.ones_like, aten.new_ones}
# What an uninitialised scalar holds is never read: derivative formulas fill it at once.
_ZEROS = {aten.zeros, aten.zeros_like, aten.new_zeros, aten.zero, aten.empty_like, aten.new_empty}
_FULLS = {
    aten.full: 1,
    aten.full_like: 1,
    aten.new_full: 2,
    aten.scalar_tensor: 0,
    torch.ops.prims.scalar_tensor: 0,
}

_COMMUTATIVE = {
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.minimum.default,
    aten.maximum.default,
    aten.eq.Tensor,
    aten.ne.Tensor,
    aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor,
    aten.bitwise_xor.Tensor,
    aten.logical_and.default,
    aten.logical_or.default,
    aten.logical_xor.default,
}

# Their results can differ by more than a sign of zero between operands 0.0 and -0.0.
_ZERO_SIGN_MATTERS = {
    aten.div,
    aten.reciprocal,
    aten.rsqrt,
    aten.atan2,
    aten.copysign,
    aten.signbit,
    aten.pow,
    aten.floor_divide,
    aten.remainder,
    aten.fmod,
    aten._to_copy,
    aten.nextafter,
}

_MISSING = object()


def const_value(x: Any) -> Any:
    """The Python number of a constant node or of a number, else a private marker."""
    if isinstance(x, fx.Node):
        return x.args[1] if x.target is FULL else _MISSING
    return x if isinstance(x, (bool, int, float)) else _MISSING


def is_const(x: Any) -> bool:
    """Whether this argument is a number or a constant node."""
    return const_value(x) is not _MISSING


def _equals(x: Any, number: float) -> bool:
    value = const_value(x)
    return value is not _MISSING and not isinstance(value, bool) and value == number


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    """A Python number as a tensor of this dtype holds it."""
    with _disable_current_modes():
        return torch.full((), value, dtype=dtype).item()


class _Builder:
    """Copies a graph node by node, sharing equal expressions."""

    def __init__(self, where: str) -> None:
        self.graph = fx.Graph()
        self.where = where
        self.seen: dict[Any, fx.Node] = {}

    def constant(self, value: Any, dtype: torch.dtype) -> fx.Node:
        return self.emit(FULL, ([], _rounded(value, dtype)), {"dtype": dtype}, dtype)

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        if x.meta["dtype"] == dtype:
            return x
        if x.target is FULL:
            return self.folded(TO, (x,), {"dtype": dtype}, dtype)
        return self.emit(TO, (x,), {"dtype": dtype}, dtype)

    def emit(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], dtype: Any
    ) -> fx.Node:
        key = self._key(target, args, kwargs)
        node = self.seen.get(key)
        if node is None:
            node = self.graph.call_function(target, args, kwargs)
            node.meta["dtype"] = dtype
            self.seen[key] = node
        return node

    def folded(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], dtype: Any
    ) -> fx.Node:
        """The constant that an operator makes of constants."""

        def real(x: fx.Node) -> Tensor:
            return torch.full((), x.args[1], dtype=x.kwargs["dtype"])  # type: ignore[arg-type]

        with _disable_current_modes(), torch.no_grad():
            value = target(*fx.map_arg(args, real), **fx.map_arg(kwargs, real))
            return self.constant(value.to(dtype).item(), dtype)

    def _key(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is LOAD:
            return (LOAD, tuple(args[0]), args[2])
        parts = [self._part(a) for a in args]
        if target in _COMMUTATIVE and len(parts) == 2:
            parts.sort(key=repr)
        return (target, *parts, *((k, self._part(v)) for k, v in sorted(kwargs.items())))

    def _part(self, x: Any) -> Any:
        if isinstance(x, fx.Node):
            return ("node", id(x))
        if isinstance(x, (list, tuple)):
            return tuple(self._part(i) for i in x)
        return (type(x), repr(x))  # 1, 1.0 and True differ; so do 0.0 and -0.0


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _functional(target: Any) -> Any:
    """``mul.Tensor`` for ``mul_.Tensor``; an out-of-place operator for itself."""
    name = target._schema.name.split("::")[1]
    if not (target._schema.is_mutable and name.endswith("_")):
        return target
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, target._overloadname, target) if packet is not None else target


def canonical(graph: fx.Graph, where: str, finish: bool = False) -> fx.Graph:
    """Rewrite what ``make_fx`` recorded into canonical form, and simplify.

    Constants become ``full``, casts become ``_to_copy``, operators that do nothing to a 0-d tensor
    go, in-place operators become functional.

    Args:
        graph: Nodes with ``meta["val"]``.
        where: The user's function, for errors.
        finish: Also apply the rules that hold for the value but not for its derivatives.
    """
    builder = _Builder(where)
    new: dict[fx.Node, fx.Node] = {}
    live = _live(graph)
    for node in graph.nodes:
        if node.op == "placeholder":
            copy = builder.graph.placeholder(node.name)
            copy.meta["dtype"] = node.meta["val"].dtype
            new[node] = copy
            continue
        if node.op == "output":
            builder.graph.output(fx.map_arg(node.args[0], new.__getitem__))
            continue
        if node not in live:
            continue
        value = node.meta.get("val")
        if node.op != "call_function" or (node.target is not operator.getitem and value is None):
            raise NotScalarError(f"{where}: {node.target} cannot be part of a scalar function")
        args = fx.map_arg(node.args, new.__getitem__)
        kwargs = fx.map_arg(node.kwargs, new.__getitem__)
        if node.target in (LOAD, STOP, operator.getitem):
            new[node] = builder.emit(node.target, args, kwargs, value.dtype)
            continue
        target = _functional(node.target)
        packet = target.overloadpacket
        if isinstance(value, Tensor) and value.dim():
            raise NotScalarError(
                f"{where}: {node.target} makes a tensor of shape {tuple(value.shape)}; "
                "a scalar function works on 0-d tensors"
            )
        if packet in _ONES:
            new[node] = builder.constant(1, value.dtype)
        elif packet in _ZEROS:
            new[node] = builder.constant(0, value.dtype)
        elif packet in _FULLS and not isinstance(args[_FULLS[packet]], fx.Node):
            new[node] = builder.constant(args[_FULLS[packet]], value.dtype)
        elif packet is aten.fill:
            new[node] = (
                builder.cast(args[1], value.dtype)
                if isinstance(args[1], fx.Node)
                else builder.constant(args[1], value.dtype)
            )
        elif packet is aten.copy:
            new[node] = builder.cast(args[1], value.dtype)
        elif packet in _CASTS or packet in _SAME_VALUE:
            new[node] = builder.cast(args[0], value.dtype)
        else:
            if not is_supported(target):
                raise UnsupportedOpError(str(target), where, supported_ops())
            dtype = value.dtype if isinstance(value, Tensor) else None
            new[node] = builder.emit(target, args, kwargs, dtype)
    return simplify(builder.graph, finish)


def simplify(graph: fx.Graph, finish: bool = False) -> fx.Graph:
    """Fold constants, drop identities, share subexpressions, drop dead nodes; to a fixed point."""
    while True:
        size = len(graph.nodes)
        graph, changed = _pass(graph, finish)
        if not changed and len(graph.nodes) == size:
            return graph


def _pass(graph: fx.Graph, finish: bool) -> tuple[fx.Graph, bool]:
    builder = _Builder("")
    new: dict[fx.Node, fx.Node] = {}
    live = _live(graph)
    changed = False
    for node in graph.nodes:
        if node.op == "placeholder":
            new[node] = builder.graph.placeholder(node.name)
            new[node].meta["dtype"] = node.meta["dtype"]
        elif node.op == "output":
            builder.graph.output(fx.map_arg(node.args[0], new.__getitem__))
        elif node not in live:
            changed = True
        else:
            args = fx.map_arg(node.args, new.__getitem__)
            kwargs = fx.map_arg(node.kwargs, new.__getitem__)
            replacement = _rule(builder, node, args, kwargs, finish)
            changed |= replacement is not None
            if replacement is None:
                target: Any = node.target
                if finish:
                    target, args, kwargs = _uniform(builder, node, args, kwargs)
                replacement = builder.emit(target, args, kwargs, node.meta["dtype"])
            new[node] = replacement
    return builder.graph, changed


_TENSOR_FORM = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.add.Tensor: aten.add.Tensor,
    aten.sub.Tensor: aten.sub.Tensor,
    aten.mul.Tensor: aten.mul.Tensor,
    aten.div.Tensor: aten.div.Tensor,
}


def _uniform(
    builder: _Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """One spelling for expressions that are the same, so that they are shared."""
    target: Any = node.target
    dtype = node.meta["dtype"]
    if dtype not in (torch.float32, torch.float64):
        # A number beside a bfloat16 scalar is not rounded to bfloat16; a constant node would be.
        return target, args, kwargs
    if target in (aten.rsub.Scalar, aten.rsub.Tensor) and not kwargs and len(args) == 2:
        minuend = args[1]
        if not isinstance(minuend, fx.Node):
            minuend = builder.constant(minuend, dtype)
        return aten.sub.Tensor, (minuend, args[0]), {}
    if target is aten.pow.Tensor_Scalar and _equals(args[1], 2) and args[0].meta["dtype"] == dtype:
        return aten.mul.Tensor, (args[0], args[0]), {}
    form = _TENSOR_FORM.get(target)
    if form is None or kwargs or len(args) != 2:
        return target, args, kwargs
    a, b = args
    if form is aten.add.Tensor and isinstance(b, fx.Node) and b.target is aten.neg.default:
        return aten.sub.Tensor, (a, b.args[0]), {}
    if form in (aten.add.Tensor, aten.mul.Tensor) and is_const(a):
        a, b = b, a
    if isinstance(b, fx.Node) and b.target is FULL and b.meta["dtype"] == dtype:
        b = b.args[1]
    elif not isinstance(b, fx.Node):
        b = _rounded(b, dtype)
    return form, (a, b), {}


def _live(graph: fx.Graph) -> set[fx.Node]:
    live: set[fx.Node] = set()
    pending = [n for n in graph.nodes if n.op == "output"]
    while pending:
        node = pending.pop()
        for operand in node.all_input_nodes:
            if operand not in live:
                live.add(operand)
                pending.append(operand)
    return live


def _zero_sign_matters(node: fx.Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if _packet(user) in _ZERO_SIGN_MATTERS:
                return True
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _rule(
    builder: _Builder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], finish: bool
) -> fx.Node | None:
    """What one node simplifies to, or ``None``."""
    target, dtype = node.target, node.meta["dtype"]
    if target in (FULL, LOAD, STOP, operator.getitem) or dtype is None:
        return None
    operands = [a for a in (*args, *kwargs.values()) if isinstance(a, fx.Node)]
    if operands and all(o.target is FULL for o in operands):
        return builder.folded(target, args, kwargs, dtype)  # type: ignore[arg-type]
    if target is TO:
        inner = args[0]
        return inner if inner.meta["dtype"] == dtype else None
    alpha = kwargs.get("alpha", 1)
    if target in (aten.add.Tensor, aten.add.Scalar) and alpha == 1:
        pairs = ((args[0], args[1]), (args[1], args[0]))
        for kept, zero in pairs:
            if isinstance(kept, fx.Node) and _equals(zero, 0):
                exact = not dtype.is_floating_point or math.copysign(1.0, const_value(zero)) < 0
                if exact or (finish and not _zero_sign_matters(node)):
                    return builder.cast(kept, dtype)
    if (
        target in (aten.sub.Tensor, aten.sub.Scalar)
        and isinstance(args[0], fx.Node)
        and _equals(args[1], 0)
        and math.copysign(1.0, const_value(args[1])) * alpha > 0
    ):
        return builder.cast(args[0], dtype)
    if target in (aten.mul.Tensor, aten.mul.Scalar):
        for kept, one in ((args[0], args[1]), (args[1], args[0])):
            if isinstance(kept, fx.Node) and _equals(one, 1):
                return builder.cast(kept, dtype)
    if target in (aten.div.Tensor, aten.div.Scalar, aten.pow.Tensor_Scalar) and (
        isinstance(args[0], fx.Node) and _equals(args[1], 1)
    ):
        return builder.cast(args[0], dtype)
    if target is aten.neg.default and args[0].target is aten.neg.default:
        return args[0].args[0]
    if target is aten.where.self:
        condition, a, b = args
        if a is b:
            return builder.cast(a, dtype)
        if condition.target is FULL:
            return builder.cast(a if condition.args[1] else b, dtype)
    return None
