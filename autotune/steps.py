"""Time training steps of a whole model: as it is, and on the library's kernels."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tritonconv.nn import CudaGraphReport, convert, cuda_graph_report
from tritonconv.runtime.backend import backend
from tritonconv.runtime.errors import bad_value
from tritonconv.runtime.tables import Timing

from .harvest import AUTOCAST, build_model, images_for, loss_of, memory_format
from .measure import NoDeviceError
from .precompiling import precompile

EAGER, OURS = "PyTorch", "tritonconv"
COMPILED, CAPTURED = ", compiled", ", graph"
CONVERTED = ", cuda_graph=True"
"""Behind the name of a contender whose graphs are inside of the model, by ``nn.convert``."""
WARM_UP = 5
ROUNDS = 3
HOST_STEPS = 3
"""Steps of each contender in each round whose host time is taken."""
INTERRUPTED = "interrupted: fewer steps than asked"


@dataclass(frozen=True)
class StepTime:
    """A training step of one contender.

    Attributes:
        contender: ``PyTorch``, ``tritonconv``, or either with ``, compiled`` or ``, graph``; ours
            with ``, cuda_graph=True``.
        timing: milliseconds of a step on the device, optimiser included; None when it did not run.
        first_s: seconds until the first step was done: what compiling and choosing kernels cost,
            ahead of it or in it.
        converted: layers that run on the library's kernels.
        reason: why it did not run, or what the reader of its time should know.
        host_ms: median milliseconds in which the host issues a step to an idle device, without
            waiting for its end. Where it is not below ``timing``, the host is what a step waits
            for. (A step of more launches than a device queues, about a thousand, waits for some.)
    """

    contender: str
    timing: Timing | None
    first_s: float
    converted: int = 0
    reason: str = ""
    host_ms: float | None = None


def step_times(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    batch: int = 8,
    size: Sequence[int] = (224, 224),
    channels: int | None = None,
    dtype: str = "bfloat16",
    layout: str = "channels_last",
    compiled: bool = False,
    graph: bool = False,
    one_thread: bool = False,
    batch_norm: bool = False,
    layer_norm: bool = False,
    convert_graph: bool = False,
    steps: int = 20,
    jobs: int | None = None,
    device: torch.device | str = "cuda",
    progress: Callable[[str], None] | None = None,
) -> list[StepTime]:
    """Time forward, backward and SGD with momentum of a model before and after ``nn.convert``.

    A network that is written on this library's functions is its own second contender; as PyTorch's,
    it runs on PyTorch's kernels. All contenders start from the same weights and see the same batch.
    They take turns, ``steps`` steps at a time, after a few that warm them up; a step is timed on
    the device. PyTorch runs with cuDNN's benchmark mode on.

    Args:
        name, arguments, channels: as :func:`~tritonconv.autotune.harvest.build_model` takes them.
        batch: images.
        size: spatial sizes of an image, two or three.
        dtype: ``bfloat16`` and ``float16`` through autocast, ``float32`` without.
        layout: memory format of model and images.
        compiled: also time both under ``torch.compile``.
        graph: capture the whole step of each, optimiser included, into a CUDA graph and replay
            that: what the host does for a step no longer counts.
        one_thread: run backward passes on the calling thread, not on autograd's own.
        batch_norm: convert batch norms too.
        layer_norm: convert layer norms too.
        convert_graph: convert with ``cuda_graph=True``: loss and optimiser stay outside of graphs,
            and PyTorch's contender is eager. With ``compiled``, what is captured is compiled.
        steps: of each contender in each of three rounds.
        jobs: processes that compile our kernels ahead of the first step; one per CPU but one when
            None, none when 0: then that step compiles them one by one.
        device: the GPU; a CPU is timed by the host's clock.
        progress: told in a line what is being done; a first step compiles, which takes a while.

    Returns:
        A row for every contender. After Ctrl-C they hold what was timed until then, and say so.

    Raises:
        KeyboardInterrupt: interrupted before any step was timed.
        NoDeviceError: there is no GPU.
        ArgumentValueError: an unknown name, argument, dtype or layout; graphs without a GPU.
    """
    if jobs is not None and (type(jobs) is not int or jobs < 0):
        raise bad_value("jobs", "a number of processes, or None", repr(jobs))
    for option, asked in (("graph", graph), ("convert_graph", convert_graph)):
        if asked and torch.device(device).type != "cuda":
            raise bad_value(option, "False where the device is no GPU", f"True on {device}")
    if convert_graph and graph:
        raise bad_value("convert_graph", "False with graph", "True")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise NoDeviceError("the time of training steps needs a CUDA GPU, and PyTorch sees none")
    if dtype not in AUTOCAST:
        raise bad_value("dtype", " | ".join(AUTOCAST), repr(dtype))
    model = build_model(name, arguments, channels=channels).train()
    images = images_for(model, batch, size, channels, layout, device)
    contenders = [
        _Contender(
            who,
            model,
            images,
            dtype,
            layout,
            compiled=how,
            graph=graph,
            one_thread=one_thread,
            batch_norm=batch_norm,
            layer_norm=layer_norm,
            convert_graph=convert_graph,
        )
        for how in ((False, True) if compiled else (False,))
        for who in (EAGER, OURS)
    ]
    say = progress or (lambda line: None)
    try:
        for contender in contenders:
            if jobs != 0 and contender.ours and contender.images.is_cuda:
                say(f"{contender.name}: compiling its kernels in parallel")
                say(f"{contender.name}: {contender.compile_ahead(jobs)}")
            say(f"{contender.name}: first step")
            contender.warm_up()
            say(f"{contender.name}: {contender.reason or f'{contender.first_s:.1f} s'}")
        for turn in range(ROUNDS):
            say(f"round {turn + 1} of {ROUNDS}, {steps} steps each")
            for contender in contenders:
                contender.run(steps)
    except KeyboardInterrupt:
        if not any(contender.milliseconds for contender in contenders):
            raise
        for contender in contenders:
            contender.reason = contender.reason or INTERRUPTED
    return [contender.result() for contender in contenders]


class _Contender:
    """One model in training on the device."""

    def __init__(
        self,
        who: str,
        model: nn.Module,
        images: torch.Tensor,
        dtype: str,
        layout: str,
        *,
        compiled: bool = False,
        graph: bool = False,
        one_thread: bool = False,
        batch_norm: bool = False,
        layer_norm: bool = False,
        convert_graph: bool = False,
    ) -> None:
        self.ours = who == OURS
        self.inside = convert_graph and self.ours
        self.name = who + (COMPILED if compiled else "") + (CAPTURED if graph else "")
        self.name += CONVERTED if self.inside else ""
        self.graph = graph
        self.one_thread = one_thread
        self.replay: Callable[[], torch.Tensor] | None = None
        self.images = images
        self.amp = AUTOCAST[dtype]
        self.milliseconds: list[float] = []
        self.host: list[float] = []
        self.ahead_s = self.first_s = 0.0
        self.reason = ""
        form = memory_format(layout, images.dim())
        own = copy.deepcopy(model).to(images.device)
        own.to(memory_format=form)  # type: ignore[call-overload]  # stubs want a dtype too
        self.written_on_ours = any(_is_ours(module) for module in own.modules())
        self.converted = 0
        if self.ours:
            report = convert(
                own, batch_norm=batch_norm, layer_norm=layer_norm, cuda_graph=self.inside
            )
            self.converted = len(report.converted)
        self.parameters = tuple(own.parameters())
        self.tensors = (*self.parameters, *own.buffers())
        self.module = own
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-4, momentum=0.9)
        self.compiles_inside = compiled and self.inside
        outside = compiled and not self.inside
        self.model: Callable[[torch.Tensor], Any] = torch.compile(own) if outside else own

    def compile_ahead(self, jobs: int | None) -> str:
        """Compile what the first step would; what was done, or why nothing was, in a line."""
        begin = time.perf_counter()
        try:
            return str(precompile(self.module, self.images, amp=self.amp, jobs=jobs))
        except Exception as error:  # the first step compiles, or says why it cannot run
            return f"nothing is compiled ahead: {type(error).__name__}: {error}"
        finally:
            self.ahead_s = time.perf_counter() - begin

    def step(self) -> torch.Tensor:
        if self.replay is not None:
            return self.replay()
        self.optimizer.zero_grad(set_to_none=True)
        return self._train()

    def _train(self) -> torch.Tensor:
        """A step from gradients that are not there, as a graph has to find them."""
        kind = self.images.device.type
        region = (
            nullcontext()
            if self.amp is None
            # Casts of weights that were made outside of a graph would never be made again in it.
            else torch.autocast(kind, dtype=self.amp, cache_enabled=not self.graph)
        )
        with region:
            output = self.model(self.images)
        loss = loss_of(output)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def warm_up(self) -> None:
        begin = time.perf_counter()
        if self.compiles_inside:  # not before its problems were looked for, in plain code
            self.module.compile()
        with self._guarded(), _beside(self.images.device) if self.graph else nullcontext():
            self.step()
            self._wait()
            self.first_s = self.ahead_s + time.perf_counter() - begin
            for _ in range(WARM_UP - 1):
                self.step()
            self._wait()
            if self.graph:
                self.optimizer.zero_grad(set_to_none=True)
                self.replay = capture(self._train)

    def run(self, steps: int) -> None:
        if self.reason:
            return
        with self._guarded():
            self.step()  # caches and clocks belong to the one that ran before
            for _ in range(HOST_STEPS):
                self._wait()
                begin = time.perf_counter()
                loss = self.step()
                self.host.append((time.perf_counter() - begin) * 1e3)
            marks = [self._mark()]
            for _ in range(steps):
                loss = self.step()
                marks.append(self._mark())
            self._wait()
            self.milliseconds += [_milliseconds(a, b) for a, b in itertools.pairwise(marks)]
            if not bool(torch.isfinite(loss)):
                self.reason = "the loss is not finite: what was timed is no training"

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """A contender that cannot run says why, and the others still do."""
        device = self.images.device
        try:
            with ExitStack() as stack:
                stack.enter_context(_benchmark())
                if not self.ours:  # a network that is written on our functions, too
                    stack.enter_context(backend("torch"))
                if self.one_thread:
                    stack.enter_context(torch.autograd.set_multithreading_enabled(False))
                if device.type == "cuda":
                    stack.enter_context(torch.cuda.device(device))
                yield
        except Exception as error:
            self.reason = f"{type(error).__name__}: {error}"

    def _wait(self) -> None:
        if self.images.is_cuda:
            torch.cuda.synchronize(self.images.device)

    def _mark(self) -> torch.cuda.Event | float:
        """A moment on the device; on a CPU, which has no other clock, on the host."""
        if not self.images.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _calls(self) -> CudaGraphReport:
        return cuda_graph_report(self.module)

    def result(self) -> StepTime:
        times = self.milliseconds
        timing = None
        if times and self.reason in ("", INTERRUPTED):
            low, *_, high = statistics.quantiles(times, n=5) if len(times) > 1 else times * 2
            timing = Timing(statistics.median(times), low, high, len(times))
        reason = self.reason
        if self.ours and not self.converted and not self.written_on_ours:
            reason = reason or "no layer was converted: these are PyTorch's kernels"
        if self.inside and timing is not None and not (calls := self._calls()).replayed:
            reason = reason or f"no graphs: {'; '.join(calls.eager)}"
        host = statistics.median(self.host) if timing is not None and self.host else None
        return StepTime(self.name, timing, self.first_s, self.converted, reason, host)


def capture(train: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Capture a training step into a CUDA graph, without running it; what is returned replays it.

    The step has run a few times on the current stream, which is not the default one, and the
    gradients are set to None: then each replay writes them anew.

    Args:
        train: forward, backward and optimiser on tensors that stay where they are.

    Raises:
        RuntimeError: it does what a graph cannot hold; the message is that of the operation.
    """
    graph = torch.cuda.CUDAGraph()
    loss: torch.Tensor | None = None
    refused: Exception | None = None
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            try:
                loss = train()
            except Exception as error:  # the end of the capture raises another in its place
                refused = error
    except Exception as error:
        refused = refused or error
    if refused is not None or loss is None:
        text = f"the step cannot be captured: {type(refused).__name__}: {refused}"
        raise RuntimeError(text) from refused
    result = loss

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """A stream beside the present one, which waits for it and which it waits for."""
    if device.type != "cuda":
        yield
        return
    outer, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(outer)
    try:
        # Also where a capture fails, which leaves its own stream behind as the current one.
        with torch.cuda.stream(side):
            yield
    finally:
        outer.wait_stream(side)


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "tritonconv"


def _milliseconds(begin: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return (end - begin) * 1e3
    return float(begin.elapsed_time(end))


@contextmanager
def _benchmark() -> Iterator[None]:
    """cuDNN picks by timing: for the contenders that ask it, and for what we leave to it."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
