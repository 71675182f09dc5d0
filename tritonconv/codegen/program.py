"""The traced form of a scalar function: a graph of ATen operators on 0-d tensors, and its views.

A :class:`Program` holds no tensor: it can be cached, differentiated and emitted without keeping a
user's parameters alive. A :class:`ScalarFunction` is a program together with the tensors it reads.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..runtime.errors import bad_value

_LIBRARY = torch.library.Library("tritonconv_codegen", "DEF")
_LIBRARY.define("load(Tensor[] index, int slot, int capture, ScalarType dtype) -> Tensor")
_LIBRARY.define("stop(Tensor x) -> Tensor")


def _load_fake(index: list[Tensor], slot: int, capture: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((), dtype=dtype)


def _stop(x: Tensor) -> Tensor:
    return x.clone()


_LIBRARY.impl("load", _load_fake, "CompositeExplicitAutograd")
_LIBRARY.impl("stop", _stop, "CompositeExplicitAutograd")
torch.library.register_fake("tritonconv_codegen::load", _load_fake, lib=_LIBRARY)
torch.library.register_fake("tritonconv_codegen::stop", torch.empty_like, lib=_LIBRARY)

LOAD = torch.ops.tritonconv_codegen.load.default
"""``load(index, slot, capture, dtype)``: read number ``slot``, of a captured tensor."""

STOP = torch.ops.tritonconv_codegen.stop.default
"""``stop(x)``: the identity without a gradient; what a user's ``x.detach()`` becomes."""

FULL = torch.ops.aten.full.default
"""``full([], value, dtype=...)``: the only form of a constant in a program's graph."""

TO = torch.ops.aten._to_copy.default
"""``_to_copy(x, dtype=...)``: the only form of a cast in a program's graph."""

LOW_PRECISION = (torch.float16, torch.bfloat16)


class Role(enum.Enum):
    """How the emitted function gets an argument."""

    VALUE = "value"
    """A block the calling kernel holds in registers: an accumulator, an attention score."""

    COORD = "coord"
    """An integer coordinate the kernel supplies; never differentiable."""

    ELEMENT = "element"
    """A tensor operand that the emitted function loads at the current coordinates."""


@dataclass(frozen=True)
class Argument:
    """One argument of a scalar function: its name, the dtype it is traced in, and its role."""

    name: str
    dtype: torch.dtype
    role: Role


@dataclass(frozen=True)
class Output:
    """One result of a scalar function."""

    name: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Capture:
    """Shape and dtype of a tensor that the function closes over, and what the function calls it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str = ""


@dataclass(frozen=True)
class Load:
    """One read ``captured[index]``.

    Attributes:
        capture: Position in ``captures`` of the tensor that is read.
        dtype: The dtype the program computes with; half precision is loaded as float32.
        pattern: The coordinate names, one a dimension, when the indices are distinct plain
            coordinates (``()`` for a 0-d tensor); ``None`` for computed indices.
    """

    capture: int
    dtype: torch.dtype
    pattern: tuple[str, ...] | None


@dataclass(frozen=True)
class Origin:
    """The user's function: its name, where it is written, and its text."""

    name: str
    file: str
    line: int
    text: str

    @property
    def location(self) -> str:
        """``file:line`` without directories, so that it is equal on all machines."""
        return f"{self.file}:{self.line}"

    def __str__(self) -> str:
        return f"scalar function {self.name!r} ({self.location})"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a stored value is computed in: float32 for half precision, else itself."""
    return torch.float32 if dtype in LOW_PRECISION else dtype


def evaluate(
    graph: fx.Graph,
    arguments: Sequence[Any],
    load: Callable[[fx.Node, list[Any]], Any],
    call: Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any] | None = None,
) -> tuple[Any, ...]:
    """Run a program's graph on ``arguments``; ``load(node, indices)`` answers its loads."""
    environment: dict[fx.Node, Any] = {}
    supply = iter(arguments)
    for node in graph.nodes:
        if node.op == "placeholder":
            environment[node] = next(supply)
        elif node.op == "output":
            return tuple(fx.map_arg(node.args[0], environment.__getitem__))
        else:
            args = fx.map_arg(node.args, environment.__getitem__)
            kwargs = fx.map_arg(node.kwargs, environment.__getitem__)
            if node.target is LOAD:
                environment[node] = load(node, list(args[0]))
            elif node.target is STOP:
                # detach cuts this level of differentiation, stop records the cut for the next.
                environment[node] = STOP(args[0].detach())
            elif call is not None:
                environment[node] = call(node, args, kwargs)
            else:
                environment[node] = node.target(*args, **kwargs)
    raise AssertionError("the graph has no output")


def call_differentiably(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a node's operator; one whose derivative PyTorch lacks is called in parts."""
    from .lowering import decompositions

    target: Any = node.target
    if target is torch.ops.aten.hardsigmoid_backward.default:
        target = decompositions()[target]
    return target(*args, **kwargs)


def load_again(node: fx.Node, index: list[Any]) -> Tensor:
    """Record the same load in the graph that is being traced."""
    return LOAD(index, *node.args[1:])


@dataclass(eq=False)
class Program:
    """A traced scalar function without its tensors.

    ``graph`` is the program as PyTorch would run it (activations and their ``*_backward`` operators
    whole, so that derivatives are PyTorch's own); ``lowered`` is the same program taken apart into
    operators of the lowering table and simplified, which is what gets emitted.
    """

    origin: Origin
    order: int
    arguments: tuple[Argument, ...]
    outputs: tuple[Output, ...]
    captures: tuple[Capture, ...]
    loads: tuple[Load, ...]
    graph: fx.Graph
    wide: bool = False
    lineage: tuple[str, ...] = ()
    _derived: dict[Any, Program] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def lowered(self) -> fx.Graph:
        """The graph of table operators that is emitted."""
        from .lowering import lower

        return lower(self)

    @functools.cached_property
    def body(self) -> str:
        """The emitted module without its header."""
        from .emit import emit_body

        return emit_body(self)

    @functools.cached_property
    def source(self) -> str:
        """The emitted module."""
        from .emit import emit_header

        return emit_header(self) + self.body

    @functools.cached_property
    def key(self) -> str:
        """sha256 of :attr:`body`."""
        from .modules import digest

        return digest(self.body)

    @property
    def name(self) -> str:
        """Name of the emitted function."""
        from .emit import function_name

        return function_name(self)

    @functools.cached_property
    def jit(self) -> Any:
        """The ``JITFunction``, loaded from the generated-module cache."""
        from .modules import load_function

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
        """Programs travel as plain data."""
        from .transport import pack, unpack

        return unpack, (pack(self),)

    def vjp(self, wrt: tuple[str, ...]) -> Program:
        """The program of the vector-Jacobian product, made once for each ``wrt``."""
        found = self._derived.get(wrt)
        if found is None:
            from .derive import vjp_program

            found = self._derived[wrt] = vjp_program(self, wrt)
        return found

    def changed(self, **fields: Any) -> Program:
        """The same program with other arguments or address width, made once for each choice."""
        key = ("changed", *sorted(fields.items()))
        found = self._derived.get(key)
        if found is None:
            found = replace(self, _derived={}, **fields)
            for shared in ("lowered",):
                if shared in self.__dict__:
                    found.__dict__[shared] = self.__dict__[shared]
            self._derived[key] = found
        return found


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
