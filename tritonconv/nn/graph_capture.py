"""Forward and backward of a module as two CUDA graphs behind one autograd function.

A replay reads and writes where the capture did. Inputs and incoming gradients are copied there;
results and gradients are copied out, so that a caller may keep them and autograd may add to them.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import pickle
import random
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..runtime.errors import TritonConvError
from ..runtime.library import PLAIN_TYPES
from .graph_calls import CONSTANTS, Arguments, Survey, Unfit, modules_of

Tensor = torch.Tensor
_Tensors = Sequence[Tensor | None]
WARM_UP = 3


class GraphedStepError(TritonConvError, RuntimeError):
    """A backward pass that a CUDA graph cannot do; it is refused, never done wrongly."""


class CudaGraphs:
    """Recording and replaying on one device, in one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.side = torch.cuda.Stream(device)
        self.last: torch.cuda.Stream | None = None

    @staticmethod
    def serves(device: torch.device) -> bool:
        """Whether calls on a device can be captured."""
        return device.type == "cuda"

    @staticmethod
    def capturing() -> bool:
        """Whether somebody captures the current stream."""
        return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """A stream beside the present one, which waits for it and which it waits for."""
        with torch.cuda.device(self.device):
            outer = torch.cuda.current_stream()
            torch.cuda.synchronize()
            try:
                # Also where a capture fails, which leaves its own stream as the current one.
                with torch.cuda.stream(self.side):
                    yield
            finally:
                outer.wait_stream(self.side)

    def settle(self) -> None:
        """Give back what the warm-up left in the allocator for this stream."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def record(self, work: Callable[[], _Tensors]) -> tuple[Callable[[], None], _Tensors]:
        """Record work without doing it; what does it, and the tensors that it writes."""
        graph = torch.cuda.CUDAGraph()
        result: _Tensors | None = None
        refused = ""  # not the error itself, whose frames hold what was recorded
        try:
            # Other threads, such as one that pins memory, go on with what they do.
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local"
            ):
                try:
                    result = work()
                except Exception as error:  # the end of the capture raises another in its place
                    refused = _line(error)
        except Exception as error:
            refused = refused or _line(error)
        if refused or result is None:
            self._mend()
            raise Unfit(f"it cannot be captured: {refused}")
        return graph.replay, result

    def _mend(self) -> None:
        """A capture that fails leaves allocator and random numbers as if it went on."""
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        with contextlib.suppress(RuntimeError):  # where it was ended after all
            torch._C._cuda_endAllocateToPool(index, self.pool)
            torch._C._cuda_releasePool(index, self.pool)
        with torch.cuda.stream(torch.cuda.Stream(self.device)):
            number = torch.zeros(1, device=self.device)
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            number.zero_()
            graph.capture_end()

    def random_state(self) -> Tensor:
        """The device's random numbers."""
        return torch.cuda.get_rng_state(self.device)

    def restore_random(self, state: Tensor) -> None:
        """Go back to a state of the random numbers."""
        torch.cuda.set_rng_state(state, self.device)

    def order(self) -> None:
        """Let the current stream come after the replays before it."""
        current = torch.cuda.current_stream(self.device)
        if self.last is not None and current != self.last:
            current.wait_stream(self.last)
        self.last = current


def _line(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:160]}"


class _State:
    """What a warm-up may change beside the results, to be put back."""

    def __init__(self, model: nn.Module, buffers: Sequence[Tensor], graphs: CudaGraphs) -> None:
        self.graphs = graphs
        self.modules = modules_of(model)
        self.values = [(b, b.detach().clone()) for b in buffers]
        self.attributes = self._attributes()
        self.tables = [
            (table, dict(table))
            for m in self.modules
            for table in (m.__dict__["_buffers"], m.__dict__["_parameters"])
        ]
        self.device_random = graphs.random_state()
        self.host_random = self._host_random()
        self.settled: list[dict[str, Any]] = self.attributes

    def _attributes(self) -> list[dict[str, Any]]:
        return [dict(m.__dict__) for m in self.modules]

    @staticmethod
    def _host_random() -> tuple[Any, ...]:
        numpy: Any = sys.modules.get("numpy.random")
        third = None if numpy is None else numpy.get_state()
        return random.getstate(), torch.get_rng_state(), third

    def after_first(self) -> None:
        """What a first call fills for good, such as a cache, is no change."""
        self.settled = self._attributes()

    def restore(self) -> str:
        """Put everything back; why the module cannot be captured, if what changed tells."""
        reason = ""
        now = self._attributes()
        for before, after in zip(self.settled, now, strict=True):
            for name in before.keys() | after.keys():
                if not _same(before.get(name), after.get(name)):
                    reason = f"its forward changes the attribute {name}"
        if reason:
            for module, begun in zip(self.modules, self.attributes, strict=True):
                module.__dict__.clear()
                module.__dict__.update(begun)
        for table, items in self.tables:
            if table.keys() != items.keys() or any(table[k] is not items[k] for k in items):
                table.clear()
                table.update(items)
                reason = reason or "its forward replaces a buffer or parameter"
        with torch.no_grad():
            for buffer, value in self.values:
                buffer.copy_(value)
        self.graphs.restore_random(self.device_random)
        python, host, third = self.host_random
        now_python, now_host, now_third = self._host_random()
        drawn = python != now_python or not torch.equal(host, now_host)
        if third is not None and pickle.dumps(third) != pickle.dumps(now_third):
            drawn = True
            sys.modules["numpy.random"].set_state(third)
        if drawn:
            random.setstate(python)
            torch.set_rng_state(host)
            reason = reason or "its forward draws random numbers on the host"
        return reason


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    return type(one) is type(other) and type(one) in (*CONSTANTS, tuple) and bool(one == other)


class Ticket:
    """One replayed forward pass, whose backward pass may follow once."""

    def __init__(self, versions: int) -> None:
        self.open = True
        self.versions = versions


class Capture:
    """The graphs of calls of one kind."""

    def __init__(
        self,
        graphs: CudaGraphs,
        model: nn.Module,
        forward: Callable[..., Any],
        asked: Arguments,
        state: Survey,
    ) -> None:
        """Warm up and capture.

        Args:
            graphs: where.
            model: the module, in training.
            forward: its function, called with it.
            asked: the call's arguments.
            state: of the module.

        Raises:
            Unfit: it cannot be captured; everything is as before.
        """
        self._graphs = graphs
        self._live: list[Tensor] = []
        kept = _State(model, state.buffers, graphs)
        try:
            with graphs.beside(), torch.autograd.set_multithreading_enabled(False):
                self._capture(functools.partial(forward, model), asked, state, kept)
        except BaseException as error:
            kept.restore()
            if isinstance(error, Exception) and not isinstance(error, Unfit):
                raise Unfit(f"its warm-up failed: {_line(error)}") from error
            raise
        finally:
            self._live = []
        reason = kept.restore()
        if reason:
            raise Unfit(reason, lasting=True)

    def _capture(
        self, forward: Callable[..., Any], asked: Arguments, state: Survey, kept: _State
    ) -> None:
        kind = asked.device.type
        amp, cast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self._static = [_static(leaf) for leaf in asked.leaves]
        args, kwargs = asked.rebuild(self._static)
        inputs = [x for x in self._static if isinstance(x, Tensor)]
        self._wanted_inputs = [k for k, x in enumerate(self._static) if _takes_gradients(x)]
        wanted = [t for t in (*inputs, *state.parameters) if t.requires_grad]
        incoming: list[Tensor] = []
        flat: list[Any] = []

        def ahead() -> list[Tensor]:
            # Casts of weights made outside of a graph would never be made again in it.
            with torch.autocast(kind, cast, amp, cache_enabled=False):
                result = forward(*args, **kwargs)
            flat[:], self._form = pytree.tree_flatten(result)
            self._live = [x for x in flat if _takes_gradients(x)]
            return [x.detach() for x in flat if isinstance(x, Tensor)]

        def back() -> _Tensors:
            # Backward passes run outside of the region of a forward pass.
            with torch.autocast(kind, enabled=False):
                return torch.autograd.grad(self._live, wanted, incoming, allow_unused=True)

        versions = [x._version for x in inputs]
        for turn in range(WARM_UP):
            ahead()
            if turn == 0:
                kept.after_first()
                reached = [_leaves_of(x) for x in self._live]
                if versions != [x._version for x in inputs]:
                    raise Unfit("its forward changes an argument in place", lasting=True)
                _check_results(flat, asked.device)
                if not frozenset().union(*reached) <= {id(t) for t in wanted}:
                    foreign = "a tensor that requires gradients and is no parameter of it"
                    raise Unfit(f"its forward reads {foreign}", lasting=True)
                incoming += [torch.zeros_like(x.detach()) for x in self._live]
            back()
        self._incoming = incoming
        # By target: the results that it takes part in.
        self._roads = [{k for k, ids in enumerate(reached) if id(t) in ids} for t in wanted]
        self._live = []
        flat.clear()
        self._graphs.settle()
        self._ahead, outputs = self._graphs.record(ahead)
        self._outputs = [t for t in outputs if t is not None]
        self._leaves = [None if isinstance(x, Tensor) else x for x in flat]
        self._places = [k for k, x in enumerate(flat) if isinstance(x, Tensor)]
        self._constant = [k for k, i in enumerate(self._places) if not flat[i].requires_grad]
        flat.clear()
        self._back, self._gradients = self._graphs.record(back)
        self._by_dtype: dict[torch.dtype, list[int]] = {}
        for k, gradient in enumerate(self._gradients):
            if gradient is not None:
                self._by_dtype.setdefault(gradient.dtype, []).append(k)

    def __call__(
        self, leaves: Sequence[Any], parameters: Sequence[Tensor]
    ) -> tuple[Any, weakref.ref[Ticket]]:
        """Replay.

        Args:
            leaves: of the arguments.
            parameters: of the module, in the order of its survey.

        Returns:
            What the module returns, and the ticket that lives until there is no backward pass.
        """
        self._graphs.order()
        with torch.no_grad():
            for static, leaf in zip(self._static, leaves, strict=True):
                if isinstance(static, Tensor):
                    static.copy_(leaf)
        trained = [p for p in parameters if p.requires_grad]
        ticket = Ticket(_versions(trained))
        targets = [*[leaves[k] for k in self._wanted_inputs], *trained]
        outputs = _Replay.apply(self, ticket, *targets)
        flat = list(self._leaves)
        for place, output in zip(self._places, outputs, strict=True):
            flat[place] = output
        return pytree.tree_unflatten(flat, self._form), weakref.ref(ticket)

    def forward(self) -> list[Tensor]:
        """Replay the forward pass; results that are the caller's."""
        self._ahead()
        return [output.clone() for output in self._outputs]

    def backward(self, incoming: _Tensors) -> list[Tensor | None]:
        """Replay the backward pass; gradients that are the caller's.

        Args:
            incoming: gradient of every result, None where there is none.
        """
        self._graphs.order()
        given = [g for k, g in enumerate(incoming) if k not in self._constant]
        for static, gradient in zip(self._incoming, given, strict=True):
            if gradient is None:
                static.zero_()
            else:
                static.copy_(gradient)
        self._back()
        results: list[Tensor | None] = [None] * len(self._gradients)
        for dtype, places in self._by_dtype.items():
            gradients = [g for k in places if (g := self._gradients[k]) is not None]
            # One launch for many; the product with one is the number itself.
            copies = (
                torch._foreach_mul(gradients, 1.0)
                if dtype.is_floating_point
                else [g.clone() for g in gradients]
            )
            for k, copy in zip(places, copies, strict=True):
                results[k] = copy
        if any(g is None for g in given):
            there = {k for k, g in enumerate(given) if g is not None}
            results = [
                g if roads & there else None for g, roads in zip(results, self._roads, strict=True)
            ]
        return results

    @property
    def wanted_inputs(self) -> int:
        """How many arguments take gradients."""
        return len(self._wanted_inputs)

    @property
    def constant(self) -> list[int]:
        """Results that take no gradients."""
        return self._constant


class _Replay(torch.autograd.Function):
    """The two graphs in the eyes of autograd."""

    @staticmethod
    def forward(ctx: Any, capture: Capture, ticket: Ticket, *targets: Tensor) -> tuple[Any, ...]:
        ctx.capture, ctx.ticket = capture, ticket
        ctx.trained = targets[capture.wanted_inputs :]
        ctx.set_materialize_grads(False)
        outputs = capture.forward()
        ctx.mark_non_differentiable(*[outputs[k] for k in capture.constant])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise _refused("gradients of gradients are asked for (create_graph=True)")
        if not ctx.ticket.open:
            raise _refused("a second backward pass through one call (retain_graph=True)")
        if _versions(ctx.trained) != ctx.ticket.versions:
            raise _refused("a parameter was changed in place between forward and backward")
        ctx.ticket.open = False
        return None, None, *ctx.capture.backward(incoming)


def _refused(what: str) -> GraphedStepError:
    how = "call the module inside `with tritonconv.nn.without_cuda_graphs():` for that"
    return GraphedStepError(f"not in a module converted with cuda_graph=True: {what}; {how}")


def _versions(tensors: Sequence[Tensor]) -> int:
    return sum([t._version for t in tensors])


def _takes_gradients(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _static(leaf: Any) -> Any:
    """A place of its own for an argument, of the same form."""
    if not isinstance(leaf, Tensor):
        return leaf
    place = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
    with torch.no_grad():
        place.copy_(leaf)
    return place.requires_grad_(leaf.requires_grad)


def _check_results(flat: Sequence[Any], device: torch.device) -> None:
    for x in flat:
        kind = type(x)
        if kind in PLAIN_TYPES:
            if x.device != device or x.layout is not torch.strided:
                raise Unfit(f"it returns a {x.layout} tensor on {x.device}", lasting=True)
        elif kind not in CONSTANTS:
            raise Unfit(f"it returns a {kind.__name__}", lasting=True)
    if not any(_takes_gradients(x) for x in flat):
        raise Unfit("nothing that it returns requires gradients")


def _leaves_of(output: Tensor) -> frozenset[int]:
    """Identities of the tensors whose gradients a result contributes to."""
    if output.grad_fn is None:
        return frozenset({id(output)})
    found: set[int] = set()
    stack: list[Any] = [output.grad_fn]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            found.add(id(node.variable))
        stack.extend(following for following, _ in node.next_functions if following is not None)
    return frozenset(found)


__all__ = ["Capture", "CudaGraphs", "GraphedStepError", "Ticket"]
