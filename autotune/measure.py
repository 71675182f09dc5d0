"""The measuring core: time candidates of one problem on the GPU, equally and repeatably.

Policies, part of every stored entry:

- ``graph-cold``: a CUDA graph of many calls that rotate over clones of the tensors, together more
  than three times the L2 cache, so that every call finds its data in memory and no host time is
  seen. Problems too small to fill the L2 with the permitted clones get it cleared before a replay.
- ``graph-hot``: the same over one set of tensors: data that fits stays in the L2.
- ``eager``: one call between two events, the L2 cleared before it.

All candidates are timed briefly first; the best few are then timed in turns whose order rotates, so
that drifting clocks hit all of them alike. The two steps know no GPU: they drive a :class:`Timer`.
"""

from __future__ import annotations

import functools
import gc
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import torch

from tritonconv.runtime.accuracy import Accuracy, check
from tritonconv.runtime.aot import compile_plan
from tritonconv.runtime.device import DeviceFacts, device_facts
from tritonconv.runtime.errors import TritonConvError
from tritonconv.runtime.launch import Executable
from tritonconv.runtime.operators import Operator, Problem
from tritonconv.runtime.tables import Timing

from .search import Failure, Status
from .space import Candidate

FIRST_ROUND_SECONDS = 0.01
TURNS = 10
TURN_SECONDS = 0.01
WARM_UP_SECONDS = 0.2

_MAX_CLONES = 256
_MAX_CALLS = 256
_REPLAY_SECONDS = 400e-6  # a replay lasts at least this long, so that its own start is hidden
_COLD_FACTOR = 3  # times the L2
_HOPELESS = 2.5  # times the fastest so far: not worth a graph


class Policy(StrEnum):
    """How candidates are timed; timings of different policies are never compared."""

    GRAPH_COLD = "graph-cold"
    GRAPH_HOT = "graph-hot"
    EAGER = "eager"


class CandidateError(TritonConvError):
    """A candidate cannot run; ``failure`` is what goes into the table."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.status}: {failure.reason}")
        self.failure = failure


class DeviceLostError(TritonConvError):
    """A candidate broke the GPU context of this process: nothing more can run in it."""


class Timer(Protocol):
    """Times the candidates of one problem."""

    def prepare(self, candidate: Candidate) -> Any:
        """Compile and run a candidate once and return a handle to time it by.

        Raises:
            CandidateError: the candidate does not compile or does not run.
        """
        ...

    def sample(self, handle: Any, seconds: float) -> list[float]:
        """Microseconds per call, repeated for about ``seconds``; at least three values."""
        ...

    def note(self, handle: Any) -> str:
        """What a reader of the timing should know; usually empty."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class Lab(Protocol):
    """Where candidates run: a GPU or, in tests, a recorded table."""

    @property
    def facts(self) -> DeviceFacts:
        """The device whose tables are written."""
        ...

    def timer(self, operator: Operator, problem: Problem, policy: Policy, seed: int) -> Timer:
        """Start timing a problem."""
        ...

    def checker(
        self, operator: Operator, problem: Problem, seed: int
    ) -> Callable[[Candidate], Accuracy]:
        """Start checking the results of a problem's candidates.

        The returned function raises :class:`CandidateError` when the candidate does not run.
        """
        ...


def summarize(samples: Sequence[float]) -> Timing:
    """Median, 20th and 80th percentile of samples in microseconds.

    Example:
        >>> summarize([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        Timing(p50=3.5, p20=2.0, p80=5.0, count=6)
    """
    ordered = sorted(samples)
    return Timing(
        round(statistics.median(ordered), 4),
        round(_percentile(ordered, 0.2), 4),
        round(_percentile(ordered, 0.8), 4),
        len(ordered),
    )


def _percentile(ordered: Sequence[float], fraction: float) -> float:
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def first_round(timer: Timer, handle: Any, seconds: float = FIRST_ROUND_SECONDS) -> Timing:
    """Time one candidate briefly."""
    return summarize(timer.sample(handle, seconds))


def take_turns(
    timer: Timer, handles: Sequence[Any], *, turns: int = TURNS, seconds: float = TURN_SECONDS
) -> list[Timing]:
    """Time several candidates in turns, another one leading each turn.

    Raises:
        CandidateError: a candidate failed, which it may do only after many calls.
    """
    samples: list[list[float]] = [[] for _ in handles]
    for turn in range(turns):
        for offset in range(len(handles)):
            index = (turn + offset) % len(handles)
            samples[index] += timer.sample(handles[index], seconds)
    return [summarize(values) for values in samples]


def time_once(timer: Timer, candidate: Candidate) -> tuple[Timing, str]:
    """Prepare a candidate and time it briefly: its timing and what a reader of it should know.

    A timer of another process does both at one request.

    Raises:
        CandidateError: it does not compile or does not run.
    """
    at_once: Callable[[Candidate], tuple[Timing, str]] | None = getattr(timer, "first_round", None)
    if at_once is not None:
        return at_once(candidate)
    handle = look(timer)(candidate)
    return first_round(timer, handle), timer.note(handle)


def look(timer: Timer) -> Callable[[Candidate], Any]:
    """How a timer prepares a candidate that is timed only once, if it has a cheaper way."""
    return getattr(timer, "glance", timer.prepare)


def time_in_turns(timer: Timer, handles: Sequence[Any]) -> list[Timing | Failure]:
    """:func:`take_turns`, with the failures of candidates that did not last in their places."""
    at_once: Callable[[Sequence[Any]], list[Timing | Failure]] | None = getattr(
        timer, "take_turns", None
    )
    if at_once is not None:
        return at_once(handles)
    return list(take_turns(timer, handles))


TensorSet = tuple[torch.Tensor, ...]
Run = Callable[[TensorSet], None]


def runner(operator: Operator, problem: Problem, candidate: Candidate, slots: Sequence[str]) -> Run:
    """A function that runs a candidate on tensors in the order of ``slots``.

    Whatever can be prepared is prepared here, once: the plan is built and bound.
    """
    algorithm = operator.algorithm(candidate.algorithm)
    names = tuple(slots)
    plan = algorithm.plan(problem, candidate.config)
    if plan is not None:
        executable = Executable(plan, names)
        return lambda tensors: executable(*tensors)
    config = candidate.config
    return lambda tensors: algorithm.launch(problem, config, dict(zip(names, tensors, strict=True)))


@contextmanager
def _plain_mode() -> Iterator[None]:
    """Shut out the caller's autograd and autocast, which would change what PyTorch runs."""
    with (
        torch.no_grad(),
        torch.autocast("cuda", enabled=False),
        torch.autocast("cpu", enabled=False),
    ):
        yield


def classify(error: Exception) -> Failure:
    """Sort what a candidate raised into a failure class."""
    text = " ".join(str(error).split())[:300]
    name = type(error).__name__
    if name == "OutOfResources":
        return Failure(Status.LAUNCH, text.split(". Reducing")[0])
    if isinstance(error, torch.OutOfMemoryError):
        return Failure(Status.LAUNCH, f"out of GPU memory: {text}")
    compiler = type(error).__module__.startswith("triton.") or "PassManager" in text
    if compiler and not text.startswith("Triton Error"):
        return Failure(Status.COMPILE, f"{name}: {text}")
    if isinstance(error, TritonConvError):
        return Failure(Status.CONSTRAINT, text)
    return Failure(Status.LAUNCH, f"{name}: {text}")


@dataclass(frozen=True)
class _Prepared:
    """A candidate ready to be timed: a captured graph of ``calls`` calls, or none."""

    run: Run
    sets: list[TensorSet]
    graph: torch.cuda.CUDAGraph | None
    calls: int
    seconds_per_sample: float
    note: str = ""


class CudaTimer:
    """Times the candidates of one problem on the current CUDA device."""

    def __init__(
        self,
        operator: Operator,
        problem: Problem,
        device: torch.device,
        policy: Policy,
        seed: int,
    ) -> None:
        self.operator = operator
        self.problem = problem
        self.device = device
        self.policy = policy
        self.fastest = math.inf  # seconds of a call, of the candidates prepared so far
        _warm_up(device.index)
        l2_bytes = device_facts(device).l2_bytes
        self.sets: list[TensorSet] = []
        generator = torch.Generator(device)
        generator.manual_seed(seed)
        with torch.cuda.device(device), _plain_mode():
            first = operator.make_tensors(problem, device, generator)
            self.slots = tuple(first)
            self.sets.append(tuple(first.values()))
            # By storage: slots may be views of one another.
            held = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in first.values()}
            size = max(sum(storage.nbytes() for storage in held.values()), 1)
            cold_bytes = _COLD_FACTOR * l2_bytes
            wanted = 1
            if policy is Policy.GRAPH_COLD:
                wanted = min(cold_bytes // size + 1, _MAX_CLONES)
            for _ in range(wanted - 1):
                tensors = operator.make_tensors(problem, device, generator)
                self.sets.append(tuple(tensors.values()))
            self.clear_before_replay = policy is Policy.GRAPH_COLD and wanted * size <= cold_bytes
            # Reading it fills the L2 with clean lines.
            self.filler = torch.zeros(cold_bytes // 4, dtype=torch.int32, device=device)
            self.clear_seconds = cold_bytes / (device_facts(device).memory_gbps * 1e9)
            torch.cuda.synchronize(device)

    def prepare(self, candidate: Candidate) -> _Prepared:
        """Compile, run and, unless the policy is eager, capture a candidate."""
        return self._prepare(candidate, math.inf)

    def glance(self, candidate: Candidate) -> _Prepared:
        """:meth:`prepare` for a first look: what is far from the fastest gets no graph."""
        return self._prepare(candidate, _HOPELESS * self.fastest)

    def _prepare(self, candidate: Candidate, limit: float) -> _Prepared:
        with torch.cuda.device(self.device), _plain_mode():
            try:
                run = runner(self.operator, self.problem, candidate, self.slots)
                sets = [tuple(_alias(tensor) for tensor in tensors) for tensors in self.sets]
                estimate = self._estimate(run, sets)
            except Exception as error:
                require_alive(self.device, candidate, self.problem, error)
                raise CandidateError(classify(error)) from error
            by_events = _Prepared(run, sets, None, 1, estimate + self.clear_seconds)
            if self.policy is Policy.EAGER:
                return by_events
            self.fastest = min(self.fastest, estimate)
            if estimate > limit:  # or the host was busy: look again before giving up on it
                estimate = min(estimate, self._estimate(run, sets), self._estimate(run, sets))
            if estimate > limit:
                return replace(by_events, note="timed by events, as it is far from the fastest")
            clones = calls = len(sets)
            if not self.clear_before_replay:
                repeats = math.ceil(_REPLAY_SECONDS / (estimate * clones))
                calls = clones * max(1, min(repeats, _MAX_CALLS // clones))
            try:
                graph = self._capture(run, sets, calls)
                seconds = self._replay_seconds(graph)
            except Exception as error:
                require_alive(self.device, candidate, self.problem, error)
                reason = classify(error).reason
                return replace(
                    by_events, note=f"timed by events, as graph capture failed: {reason}"
                )
            clear = self.clear_seconds if self.clear_before_replay else 0.0
            return _Prepared(run, sets, graph, calls, seconds + clear)

    def sample(self, handle: _Prepared, seconds: float) -> list[float]:
        """Microseconds per call; one value per replay, or per call when timed by events."""
        count = max(3, min(int(seconds / handle.seconds_per_sample), 200))
        clear = handle.graph is None or self.clear_before_replay
        with torch.cuda.device(self.device), _plain_mode():
            events = [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                for _ in range(count)
            ]
            for index, (start, end) in enumerate(events):
                if clear:
                    self.filler.sum()
                start.record()
                if handle.graph is not None:
                    handle.graph.replay()
                else:
                    handle.run(handle.sets[index % len(handle.sets)])
                end.record()
            torch.cuda.synchronize(self.device)
            return [start.elapsed_time(end) * 1e3 / handle.calls for start, end in events]

    def note(self, handle: _Prepared) -> str:
        """Says so when a candidate could not be captured."""
        return handle.note

    def close(self) -> None:
        """Give the tensors back to the device."""
        self.sets.clear()
        self.filler = torch.empty(0)
        gc.collect()
        with suppress(RuntimeError):  # of a device that is lost; that error is on its way already
            torch.cuda.empty_cache()

    def _estimate(self, run: Run, sets: list[TensorSet]) -> float:
        """Seconds of one call, after the calls that compile and bind it."""
        run(sets[0])
        run(sets[0])
        torch.cuda.synchronize(self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        calls = 3
        start.record()
        for index in range(calls):
            run(sets[index % len(sets)])
        end.record()
        torch.cuda.synchronize(self.device)
        seconds: float = start.elapsed_time(end) * 1e-3 / calls
        return max(seconds, 1e-6)

    def _replay_seconds(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(self.device)
        seconds: float = start.elapsed_time(end) * 1e-3
        return max(seconds, 1e-6)

    def _capture(self, run: Run, sets: list[TensorSet], calls: int) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # libraries set up their workspace for the stream
            run(sets[0])
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process (a loader that pins memory) may go on during the capture.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for index in range(calls):
                run(sets[index % len(sets)])
        return graph


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory under another tensor object.

    An algorithm that calls PyTorch may make its output slot the tensor that PyTorch allocated; the
    next candidate must still find the original.
    """
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor)  # type: ignore[call-overload]


def require_alive(
    device: torch.device, candidate: Candidate, problem: Problem, cause: Exception
) -> None:
    """Tell an error that only a candidate made from one that broke the GPU context.

    Raises:
        DeviceLostError: the context is broken.
    """
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceLostError(f"{candidate} on {problem} broke the GPU context: {error}") from cause


@functools.cache
def _warm_up(index: int) -> None:
    """Keep the GPU busy for a moment, once per process, so that its clocks are up."""
    with torch.cuda.device(index), _plain_mode():
        a = torch.ones(4096, 4096, dtype=torch.float16, device="cuda")
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        elapsed = 0.0
        while elapsed < WARM_UP_SECONDS:
            start.record()
            for _ in range(50):
                a @ a
            end.record()
            end.synchronize()
            elapsed += start.elapsed_time(end) * 1e-3


class NumericCheck:
    """Compares candidates of one problem with plain PyTorch in float64.

    Every call gets fresh tensors: equal inputs, outputs that hold NaN. A candidate that leaves an
    element unwritten, or reads what it should have written, is found out.
    """

    def __init__(
        self, operator: Operator, problem: Problem, device: torch.device, seed: int
    ) -> None:
        self.operator = operator
        self.problem = problem
        self.device = device
        self.seed = seed
        self.expected: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None

    def _tensors(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator(self.device)
        generator.manual_seed(self.seed)
        return self.operator.make_tensors(self.problem, self.device, generator)

    def _expect(
        self, tensors: dict[str, torch.Tensor]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        exact = self.operator.reference(self.problem, tensors, torch.float64)
        plain: dict[torch.dtype, dict[str, torch.Tensor]] = {}
        expected = {}
        for name in self.operator.outputs(self.problem):
            dtype = tensors[name].dtype
            if dtype not in plain:
                plain[dtype] = self.operator.reference(self.problem, tensors, dtype)
            expected[name] = (exact[name], plain[dtype][name])
        return expected

    def prepare(self) -> None:
        """Compute what is expected, which the first check does otherwise."""
        if self.expected is None:
            with _plain_mode():
                self.expected = self._expect(self._tensors())

    def __call__(self, candidate: Candidate) -> Accuracy:
        """Run a candidate once and judge all its outputs; the worst verdict is returned.

        Raises:
            CandidateError: the candidate does not run.
        """
        with _plain_mode():
            tensors = self._tensors()
            if self.expected is None:
                self.expected = self._expect(tensors)
            try:
                run = runner(self.operator, self.problem, candidate, tuple(tensors))
                run(tuple(tensors.values()))
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
            except Exception as error:
                if self.device.type == "cuda":
                    require_alive(self.device, candidate, self.problem, error)
                raise CandidateError(classify(error)) from error
            verdicts = [
                check(tensors[name], exact, plain, dtype=tensors[name].dtype)
                for name, (exact, plain) in self.expected.items()
            ]
        return max(verdicts, key=lambda v: (not v.ok, v.error / v.budget if v.budget else v.error))


class CudaLab:
    """The laboratory of one CUDA device."""

    def __init__(self, device: torch.device | int | None = None) -> None:
        if not torch.cuda.is_available():
            raise NoDeviceError("measuring needs a CUDA GPU, and PyTorch sees none")
        if isinstance(device, torch.device):
            device = device.index
        index = torch.cuda.current_device() if device is None else device
        self.device = torch.device("cuda", index)

    @property
    def facts(self) -> DeviceFacts:
        """The device whose tables are written."""
        return device_facts(self.device)

    def state(self) -> dict[str, str | int]:
        """Driver and clock, to be recorded with an entry, where NVIDIA's library says them."""
        found: dict[str, str | int] = {}
        with suppress(Exception):  # the library is optional, and so is what it knows
            found["sm_mhz"] = int(torch.cuda.clock_rate(self.device))
        with suppress(OSError, IndexError):
            text = Path("/proc/driver/nvidia/version").read_text()
            found["driver"] = re.findall(r"\d+\.\d+(?:\.\d+)?", text)[0]
        return found

    def compile(self, operator: Operator, problem: Problem, candidate: Candidate) -> None:
        """Compile a candidate, if it is not compiled yet, and run nothing.

        Raises:
            CandidateError: it does not compile.
        """
        try:
            plan = operator.algorithm(candidate.algorithm).plan(problem, candidate.config)
            if plan is not None:
                compile_plan(plan, self.facts.arch, resources=False)
        except Exception as error:
            raise CandidateError(classify(error)) from error

    def timer(self, operator: Operator, problem: Problem, policy: Policy, seed: int) -> Timer:
        """Start timing a problem."""
        return CudaTimer(operator, problem, self.device, policy, seed)

    def checker(
        self, operator: Operator, problem: Problem, seed: int
    ) -> Callable[[Candidate], Accuracy]:
        """Start checking the results of a problem's candidates."""
        return NumericCheck(operator, problem, self.device, seed)


class NoDeviceError(TritonConvError, RuntimeError):
    """There is no GPU that could be measured."""
