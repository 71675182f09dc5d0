"""Training steps of a module as CUDA graphs, inside the loop that the user wrote.

The module keeps its identity: only its class changes, to one whose ``forward`` looks whether this
kind of call was captured. What a graph cannot do runs eagerly, as it did.
"""

from __future__ import annotations

import copyreg
import functools
import threading
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..runtime.errors import bad_type, bad_value
from . import graph_calls as calls
from .graph_calls import Arguments, Survey, Unfit
from .graph_capture import Capture, CudaGraphs, Ticket

FORMER = "_tritonconv_ungraphed"
"""Attribute of a module: its class without graphs."""
CAPTURES = "_tritonconv_captures"
"""Attribute of a module: its captures."""
LIMIT = 8
"""So many kinds of calls of a module stay captured; the one not used for longest goes first."""
MAX_ATTEMPTS = 64
"""So many captures are made of a module before it counts as one that changes all the time."""
MAX_FAILURES = 4
"""After so many kinds of calls that could not be captured no more are tried."""

SWITCHED_OFF = "inside of without_cuda_graphs()"
INSIDE = "it is part of a module that is being captured"
BUSY = "a forward pass of it still waits for its backward pass"
REPLICA = "it is a replica of nn.DataParallel"
THREADS = "another thread runs it"
_EXPECTED = {
    SWITCHED_OFF,
    INSIDE,
    calls.NO_GRAD,
    calls.EVALUATION,
    calls.NO_TENSOR,
    calls.CAPTURING,
    calls.TRACING,
    calls.NO_GPU.format("cpu"),
}
"""Reasons that no one needs to be warned of."""


_MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")


class _Local(threading.local):
    off = 0
    capturing = 0


_local = _Local()


@contextmanager
def without_cuda_graphs() -> Iterator[None]:
    """Run modules converted with ``cuda_graph=True`` eagerly, in this thread.

    For what a graph does not hold: gradients of gradients, a second backward pass through one call.

    Example:
        >>> import torch, tritonconv as tc
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Tanh())
        >>> _ = tc.nn.convert(model, cuda_graph=True)
        >>> x = torch.randn(1, 3, 8, 8, requires_grad=True)
        >>> with tc.nn.without_cuda_graphs():
        ...     y = model(x)
        >>> (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        >>> slope.square().sum().backward()
    """
    _local.off += 1
    try:
        yield
    finally:
        _local.off -= 1


@dataclass(frozen=True)
class CudaGraphReport:
    """What became of the calls of a module converted with ``cuda_graph=True``.

    Attributes:
        captured: kinds of calls that are held as graphs now.
        replayed: calls that ran as graphs.
        eager: by reason, how many calls did not.
    """

    captured: int
    replayed: int
    eager: dict[str, int]

    def __str__(self) -> str:
        lines = [f"captured kinds of calls: {self.captured}, replayed calls: {self.replayed}"]
        lines += [f"eager calls: {count}, as {reason}" for reason, count in self.eager.items()]
        return "\n".join(lines)


class Captures:
    """The captures of a module; they are neither copied with it nor pickled."""

    graphs: type[CudaGraphs] = CudaGraphs

    def __init__(self) -> None:
        self.compiled: Callable[..., Any] | None = None
        self.options: Mapping[str, Any] | None = None
        self.drop()

    def drop(self) -> None:
        """Forget everything: the module is about to change."""
        self._entries: OrderedDict[Any, Capture] = OrderedDict()
        self._storages: Any = None
        self._failed: dict[Any, str] = {}
        self._attempts = 0
        self._never = ""
        self._pool: CudaGraphs | None = None
        self._waiting: weakref.ref[Ticket] | None = None
        self._lock = threading.Lock()
        self.replayed = 0
        self.eager: Counter[str] = Counter()

    def __reduce__(self) -> tuple[Any, ...]:
        return Captures, ()

    def compile(self, forward: Callable[..., Any], options: Mapping[str, Any]) -> None:
        """Have graphs captured of the compiled forward, and eager calls made of it."""
        self.drop()
        self.compiled = torch.compile(forward, **options)
        self.options = options

    def report(self) -> CudaGraphReport:
        """What became of the calls."""
        return CudaGraphReport(len(self._entries), self.replayed, dict(self.eager))

    def run(self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a module: as a graph where that is possible."""
        reason = THREADS
        if self._lock.acquire(blocking=False):
            try:
                capture, asked, state = self._find(model, forward, args, kwargs)
                result, self._waiting = capture(asked.leaves, state.parameters)
                self.replayed += 1
                return result
            except Unfit as unfit:
                reason = unfit.reason
            finally:
                self._lock.release()
        self.eager[reason] += 1
        if self.eager[reason] == 1 and reason not in _EXPECTED:
            warnings.warn(
                f"{type(model).__name__} converted with cuda_graph=True runs eagerly: {reason}",
                stacklevel=5,
            )
        return forward(model, *args, **kwargs)

    def _find(
        self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Capture, Arguments, Survey]:
        """The capture for a call, made now if this is the first of its kind."""
        if _local.off:
            raise Unfit(SWITCHED_OFF)
        if _local.capturing:
            raise Unfit(INSIDE)
        if not torch.is_grad_enabled():
            raise Unfit(calls.NO_GRAD)
        if not model.training:
            raise Unfit(calls.EVALUATION)
        asked = calls.arguments(args, kwargs)
        device = asked.device
        if not self.graphs.serves(device):
            raise Unfit(calls.NO_GPU.format(device.type))
        if self.graphs.capturing():
            raise Unfit(calls.CAPTURING)
        if "_is_replica" in model.__dict__:
            raise Unfit(REPLICA)
        modes = calls.modes(device)
        if self._never:
            raise Unfit(self._never)
        state = calls.survey(model, device)
        waiting = self._waiting and self._waiting()
        if waiting and waiting.open:
            raise Unfit(BUSY)
        if state.storages != self._storages:
            # What was captured reads and writes where nothing is any more.
            self._entries.clear()
            self._failed.clear()
            self._storages = state.storages
        key = (modes, asked.key, state.flags)
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
            return found, asked, state
        if key in self._failed:
            raise Unfit(self._failed[key])
        return self._capture(model, forward, asked, key, state)

    def _capture(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        asked: Arguments,
        key: Any,
        state: Survey,
    ) -> tuple[Capture, Arguments, Survey]:
        if self._attempts >= MAX_ATTEMPTS:
            raise Unfit(f"{MAX_ATTEMPTS} captures were made: its calls keep changing")
        self._never = calls.never(model)
        if self._never:
            raise Unfit(self._never)
        self._attempts += 1
        if self._pool is None or self._pool.device != asked.device or not self._entries:
            self._pool = self.graphs(asked.device)  # a pool ends with the last graph in it
        while len(self._entries) >= LIMIT:
            self._entries.popitem(last=False)
        _local.capturing += 1
        try:
            made = Capture(self._pool, model, forward, asked, state)
        except Unfit as unfit:
            self._pool = None  # its allocations may be lost
            self._failed[key] = unfit.reason
            if unfit.lasting or len(self._failed) >= MAX_FAILURES:
                self._never = unfit.reason
            raise
        finally:
            _local.capturing -= 1
        # The first calls of a kind may fill caches of the module and of the library.
        state = calls.survey(model, asked.device)
        self._storages = state.storages
        self._entries[calls.modes(asked.device), asked.key, state.flags] = made
        return made, asked, state


class Graphed(nn.Module):
    """A module whose training steps are captured; made by :func:`tritonconv.nn.convert`."""

    def compile(self, **options: Any) -> None:
        """As ``torch.nn.Module.compile``: what is captured then is what the compiler makes of it.

        Args:
            options: of ``torch.compile``, but no graphs of its own (``mode="reduce-overhead"``).

        Raises:
            ArgumentValueError: a mode, a backend or an option of graphs.
        """
        from torch._inductor import config as inductor  # slow to import, and needed only here

        expected = "without CUDA graphs, which the module has already"
        if options.get("mode") in _MODES_WITH_GRAPHS:
            raise bad_value("mode", f"one {expected}", repr(options["mode"]))
        if options.get("backend") == "cudagraphs":
            raise bad_value("backend", f"one {expected}", "'cudagraphs'")
        own = (options.get("options") or {}).get("triton.cudagraphs")
        if own or (own is None and inductor.triton.cudagraphs):
            raise bad_value("options", expected, "triton.cudagraphs")
        self.__dict__[CAPTURES].compile(self.__dict__[FORMER].forward, options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the former class, as this one has no name that it could be found by."""
        reduced: Any = super().__reduce_ex__(protocol)
        made, args, *rest = reduced
        former, own = self.__dict__[FORMER], type(self)
        if made is copyreg.__newobj__ and args[0] is own:  # type: ignore[attr-defined]
            return _rebuilt, (former, *args[1:]), *rest
        args = tuple(former if arg is own else arg for arg in args)
        return (former if made is own else made), args, *rest


def _rebuilt(former: type[nn.Module], *args: Any) -> nn.Module:
    made = former.__new__(former, *args)
    made.__class__ = graphed_class(former)
    return made


_CLASSES: dict[type, type[nn.Module]] = {}


def graphed_class(former: type[nn.Module]) -> type[nn.Module]:
    """The class of modules of this class whose training steps are captured."""
    if former not in _CLASSES:
        _CLASSES[former] = _derived(former)
    return _CLASSES[former]


def _derived(former: type[nn.Module]) -> type[nn.Module]:
    eager = former.forward

    @functools.wraps(eager)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return eager(self, *args, **kwargs)
        captures: Captures = self.__dict__[CAPTURES]
        return captures.run(self, captures.compiled or eager, args, kwargs)

    names = ("__module__", "__qualname__", "__doc__")
    namespace = {name: getattr(former, name) for name in names}
    metaclass: Any = type(former)
    made: type[nn.Module] = metaclass(
        former.__name__, (Graphed, former), {**namespace, "forward": forward}
    )
    return made


def graph(model: nn.Module) -> str:
    """Have the training steps of a module captured; why not, where that cannot be."""
    if isinstance(model, Graphed):
        model.__dict__[CAPTURES].drop()
        return ""
    kind = type(model)
    if isinstance(model, fx.GraphModule | torch.jit.ScriptModule):
        return f"{kind.__name__} writes its own class"
    if "forward" in model.__dict__:
        return "its forward was replaced on the instance"
    if model.__dict__.get("_compiled_call_impl") is not None:
        return "it was compiled before: call its compile() after convert"
    try:
        model.__class__ = graphed_class(kind)
    except TypeError as error:
        return f"{kind.__name__} cannot be derived from: {error}"
    model.__dict__.update({FORMER: kind, CAPTURES: Captures()})
    return ""


def ungraph(model: nn.Module) -> Callable[[], None] | None:
    """Undo :func:`graph`; what does it again, compiled as it was, or None if it had not been."""
    former = model.__dict__.get(FORMER)
    if former is None or type(model) is not graphed_class(former):
        return None
    options = model.__dict__[CAPTURES].options
    model.__class__ = former
    del model.__dict__[FORMER], model.__dict__[CAPTURES]

    def again() -> None:
        if not graph(model) and options is not None:
            assert isinstance(model, Graphed)
            model.compile(**options)

    return again


def cuda_graph_report(model: nn.Module) -> CudaGraphReport:
    """How many calls of a module converted with ``cuda_graph=True`` ran as graphs, and why not.

    Args:
        model: the module that was given to :func:`convert`.

    Raises:
        ArgumentTypeError: it was not converted so.

    Example:
        >>> import torch, tritonconv as tc
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> _ = tc.nn.convert(model, batch_norm=True, cuda_graph=True)
        >>> _ = model(torch.randn(1, 3, 8, 8))
        >>> print(tc.nn.cuda_graph_report(model))
        captured kinds of calls: 0, replayed calls: 0
        eager calls: 1, as its tensors are on cpu
    """
    captures = model.__dict__.get(CAPTURES) if isinstance(model, nn.Module) else None
    if captures is None:
        expected = "a module converted with cuda_graph=True"
        raise bad_type("model", expected, type(model).__name__)
    report: CudaGraphReport = captures.report()
    return report


__all__ = [
    "CAPTURES",
    "CudaGraphReport",
    "Graphed",
    "cuda_graph_report",
    "graph",
    "graphed_class",
    "ungraph",
    "without_cuda_graphs",
]
