"""Programs and scalar functions: a traced graph, its views, and the tensors that it reads.

A :class:`Program` holds no tensor: it can be cached, differentiated and emitted without keeping a
user's parameters alive. A :class:`ScalarFunction` is a program together with the tensors it reads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..runtime.errors import bad_value
from .derive import call_differentiably, vjp_program
from .emit import emit_body, emit_header, function_name, lower
from .ir import FULL, LOAD, Argument, Load, Output, Role, Traced, evaluate
from .modules import digest, load_function
from .transport import pack_graph, unpack_graph


@dataclass(eq=False)
class Program(Traced):
    """A traced scalar function without its tensors, and what is made of it, each once.

    ``lowered`` is ``graph`` taken apart into operators of the lowering table and simplified, which
    is what gets emitted.
    """

    @functools.cached_property
    def lowered(self) -> fx.Graph:
        """The graph of table operators that is emitted."""
        return lower(self)

    @functools.cached_property
    def body(self) -> str:
        """The emitted module without its header."""
        return emit_body(self, self.lowered)

    @functools.cached_property
    def source(self) -> str:
        """The emitted module."""
        return emit_header(self) + self.body

    @functools.cached_property
    def key(self) -> str:
        """sha256 of :attr:`body`."""
        return digest(self.body)

    @property
    def name(self) -> str:
        """Name of the emitted function."""
        return function_name(self)

    @functools.cached_property
    def jit(self) -> Any:
        """The ``JITFunction``, loaded from the generated-module cache."""
        return load_function(self.source, self.name, self.key)

    @functools.cached_property
    def live(self) -> frozenset[str]:
        """Names of the arguments and loads (``"load:0"``) that some output depends on."""
        names: set[str] = set()
        position = iter(self.arguments)
        for node in self.lowered.nodes:
            if node.op == "placeholder":
                argument = next(position)
                if node.users:
                    names.add(argument.name)
            elif node.target is LOAD:
                names.add(f"load:{node.args[1]}")
        return frozenset(names)

    def __reduce__(self) -> Any:
        """Programs travel as plain data; derivatives made of them stay behind."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["_derived"] = {}
        values["graph"] = pack_graph(self.graph)
        return _arrived, (values,)

    def vjp(self, wrt: tuple[str, ...]) -> Program:
        """The program of the vector-Jacobian product, made once for each ``wrt``."""
        found = self._derived.get(wrt)
        if found is None:
            found = self._derived[wrt] = vjp_program(self, wrt)
        return found

    def changed(self, **changes: Any) -> Program:
        """The same program with other arguments or address width, made once for each choice."""
        key = ("changed", *sorted(changes.items()))
        found = self._derived.get(key)
        if found is None:
            found = replace(self, _derived={}, **changes)
            for shared in ("lowered",):
                if shared in self.__dict__:
                    found.__dict__[shared] = self.__dict__[shared]
            self._derived[key] = found
        return found


def _arrived(values: dict[str, Any]) -> Program:
    """The program whose parts :meth:`Program.__reduce__` sent."""
    return Program(**{**values, "graph": unpack_graph(values["graph"])})


class ScalarFunction:
    """A scalar function that can be run, differentiated and emitted as Triton.

    Made by :func:`tritonconv.codegen.trace`; equal when program and captured tensors are the same.

    Example:
        >>> import torch
        >>> from tritonconv.codegen import Argument, Role, trace
        >>> slope = torch.tensor([0.1, 0.2])
        >>> def leaky(x, c):
        ...     return torch.where(x > 0, x, x * slope[c])
        >>> x = Argument("x", torch.float32, Role.VALUE)
        >>> c = Argument("c", torch.int32, Role.COORD)
        >>> f = trace(leaky, (x, c))
        >>> f(torch.tensor([1.0, -1.0]), torch.tensor([0, 1]))
        tensor([ 1.0000, -0.2000])
        >>> f.load_pattern(0)
        ('c',)
        >>> [output.name for output in f.vjp(("x", "load:0")).outputs]
        ['d_x', 'd_load:0', 'i_load:0']
    """

    __slots__ = ("__weakref__", "captures", "program")

    def __init__(self, program: Program, captures: tuple[Tensor, ...]) -> None:
        self.program = program
        self.captures = captures

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ScalarFunction)
            and self.program is other.program
            and len(self.captures) == len(other.captures)
            and all(a is b for a, b in zip(self.captures, other.captures, strict=True))
        )

    def __hash__(self) -> int:
        return hash((id(self.program), *map(id, self.captures)))

    def __repr__(self) -> str:
        arguments = ", ".join(a.name for a in self.arguments)
        outputs = ", ".join(o.name for o in self.outputs)
        return f"<ScalarFunction {self.name}({arguments}) -> {outputs} from {self.location}>"

    @property
    def name(self) -> str:
        """Name of the emitted function."""
        return self.program.name

    @property
    def location(self) -> str:
        """``file:line`` of the user's function."""
        return self.program.origin.location

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """The arguments, in the order of ``__call__``."""
        return self.program.arguments

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Names and dtypes of the results."""
        return self.program.outputs

    @property
    def loads(self) -> tuple[Load, ...]:
        """The reads of captured tensors; derivatives keep the numbering of the first function."""
        return self.program.loads

    @property
    def key(self) -> str:
        """sha256 of the emitted program without its header; equal programs share it."""
        return self.program.key

    @property
    def source(self) -> str:
        """Text of the emitted module."""
        return self.program.source

    @property
    def jit(self) -> Any:
        """The emitted ``@triton.jit`` function, loaded from the generated-module cache.

        Its signature is ``(values..., coords..., mask, ptrs, strides)``.
        """
        return self.program.jit

    def load_pattern(self, k: int) -> tuple[str, ...] | None:
        """Which coordinates load ``k`` reads at, one a dimension; ``None`` for computed indices."""
        return self.program.loads[k].pattern

    def reads(self, name: str) -> bool:
        """Whether an output depends on this argument (or on ``"load:k"``)."""
        return name in self.program.live

    def vjp(self, wrt: tuple[str, ...]) -> ScalarFunction:
        """The vector-Jacobian product with respect to arguments and loads.

        Args:
            wrt: Argument names and ``"load:0"``, ``"load:1"``, ...; all floating point.

        Returns:
            A scalar function of the same arguments followed by one cotangent ``grad_<output>``
            (role ELEMENT) for each floating output. Its outputs are, in the order of ``wrt``,
            ``d_<argument>``, and for a load ``d_load:k`` and ``i_load:k``, the row-major index of
            the element that was read. It can be differentiated again.
        """
        return ScalarFunction(self.program.vjp(tuple(wrt)), self.captures)

    def with_roles(self, **roles: Role) -> ScalarFunction:
        """The same program with some arguments supplied in another way."""
        names = [a.name for a in self.arguments]
        for name, role in roles.items():
            if name not in names:
                raise bad_value("with_roles", f"names among {', '.join(names)}", name)
            if role is Role.COORD and self.arguments[names.index(name)].dtype.is_floating_point:
                raise bad_value(f"with_roles: {name}", "VALUE or ELEMENT for a float", role.name)
        arguments = tuple(replace(a, role=roles.get(a.name, a.role)) for a in self.arguments)
        if arguments == self.arguments:
            return self
        return ScalarFunction(self.program.changed(arguments=arguments), self.captures)

    def with_wide(self, wide: bool = True) -> ScalarFunction:
        """The same program with all address arithmetic in int64."""
        if wide == self.program.wide:
            return self
        return ScalarFunction(self.program.changed(wide=wide), self.captures)

    def with_narrow(self, narrow: bool = True) -> ScalarFunction:
        """The same program for results that are stored in half precision.

        Functions that need many instructions in float32 may be off by 2e-7 where the rounding of
        the result hides it. Derivatives are those of the exact function.
        """
        if narrow == self.program.narrow:
            return self
        return ScalarFunction(self.program.changed(narrow=narrow), self.captures)

    def with_frame(self, axes: Sequence[str]) -> ScalarFunction:
        """The same program, emitted for a caller that has these coordinates and maybe more.

        Args:
            axes: Names of the caller's coordinates, in the order of the call.
        """
        own = [a.name for a in self.arguments if a.role is Role.COORD]
        if [name for name in axes if name in own] != own:
            raise bad_value("with_frame", f"coordinates with {', '.join(own)} among them", axes)
        frame = () if list(axes) == own else tuple(axes)
        if frame == self.program.frame:
            return self
        return ScalarFunction(self.program.changed(frame=frame), self.captures)

    def __call__(
        self, *arguments: Tensor, captures: Sequence[Tensor] | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Evaluate with PyTorch over broadcastable tensors; PyTorch can differentiate it.

        Args:
            arguments: One tensor (or number) for each argument, broadcast against each other.
            captures: Tensors to read in place of the captured ones.

        Returns:
            One tensor, or a tuple for a function of several outputs, of the broadcast shape.
        """
        return _evaluate_with_torch(
            self.program, arguments, self.captures if captures is None else tuple(captures)
        )


def _evaluate_with_torch(
    program: Program, arguments: tuple[Any, ...], captures: tuple[Tensor, ...]
) -> Tensor | tuple[Tensor, ...]:
    if len(arguments) != len(program.arguments):
        names = ", ".join(a.name for a in program.arguments)
        raise bad_value("arguments", f"{len(program.arguments)} ({names})", len(arguments))
    if len(captures) != len(program.captures):
        raise bad_value("captures", f"{len(program.captures)} tensors", len(captures))
    devices = [x.device for x in (*arguments, *captures) if isinstance(x, Tensor)]
    device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
    values = [
        torch.as_tensor(value, device=device).to(argument.dtype)
        for value, argument in zip(arguments, program.arguments, strict=True)
    ]
    # torch.broadcast_shapes goes through symbolic shapes and costs ten times as much.
    shape = np.broadcast_shapes(*(v.shape for v in values))
    # A 0-d tensor would take part in type promotion as a scalar; in the traced program all
    # operands have the same standing, so every value here has at least one dimension.
    values = [v.reshape(1) if v.dim() == 0 else v for v in values]

    def load(node: fx.Node, index: list[Any]) -> Tensor:
        dtype: Any = node.args[3]
        source = captures[node.args[2]]  # type: ignore[index]
        read = source[tuple(index)] if index else source.reshape(1)
        return read.to(device=device, dtype=dtype)

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.target is FULL:
            return torch.full((1,), args[1], dtype=kwargs["dtype"], device=device)
        return call_differentiably(node, args, kwargs)

    with torch.autocast(device.type, enabled=False):
        results = evaluate(program.graph, values, load, call)
    results = tuple(
        (r.reshape(()) if not shape else r.expand(shape)).to(o.dtype)
        for r, o in zip(results, program.outputs, strict=True)
    )
    return results[0] if len(results) == 1 else results
