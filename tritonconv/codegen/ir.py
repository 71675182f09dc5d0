"""The form a scalar function is traced into: a graph of ATen operators on 0-d tensors, as data.

Everything else of this package works on it: tracing makes it, simplification rewrites it, the
lowering table and the emitter turn it into text, differentiation makes another one of it.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

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


def load_again(node: fx.Node, index: list[Any]) -> Tensor:
    """Record the same load in the graph that is being traced."""
    return LOAD(index, *node.args[1:])


@dataclass(eq=False)
class Traced:
    """A traced scalar function without its tensors, as data.

    ``graph`` is the program as PyTorch would run it (activations and their ``*_backward`` operators
    whole, so that derivatives are PyTorch's own). ``frame`` names the coordinates that the emitted
    function is called with, where these are more than the program has. ``narrow`` says that results
    are rounded to half precision by whoever stores them: derivatives do not inherit it.
    """

    origin: Origin
    order: int
    arguments: tuple[Argument, ...]
    outputs: tuple[Output, ...]
    captures: tuple[Capture, ...]
    loads: tuple[Load, ...]
    graph: fx.Graph
    wide: bool = False
    narrow: bool = False
    frame: tuple[str, ...] = ()
    lineage: tuple[str, ...] = ()
    _derived: dict[Any, Any] = field(default_factory=dict, repr=False)


_LOCK = threading.RLock()


def trace_graph(
    function: Callable[..., tuple[Tensor, ...]],
    dtypes: list[torch.dtype],
    decompositions: dict[Any, Any] | None = None,
) -> fx.Graph:
    """``make_fx`` of a function of 0-d tensors of these dtypes, whatever modes are active."""
    if torch._C._are_functorch_transforms_active():
        # A torch.func transform that is under way would wrap the scalars of the trace. Transforms
        # belong to a thread: another one is free of them.
        with ThreadPoolExecutor(max_workers=1) as executor:
            return executor.submit(trace_graph, function, dtypes, decompositions).result()
    with _LOCK, _disable_current_modes(), torch.autocast("cpu", enabled=False):
        inputs = [torch.zeros((), dtype=dtype) for dtype in dtypes]
        traced = make_fx(function, decomposition_table=decompositions, tracing_mode="fake")(*inputs)
    return traced.graph
