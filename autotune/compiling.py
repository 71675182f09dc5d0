"""Compile candidates in parallel processes, ahead of the launches that need them.

The processes have no CUDA context. What they compile lands in Triton's own disk cache, under the
key that a launch in any process looks up (:func:`tritonconv.runtime.aot.jit_source`).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import pickle
import selectors
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from tritonconv.runtime.aot import Compiled, compile_plan, parse_target
from tritonconv.runtime.entries import Resources
from tritonconv.runtime.operators import Algorithm, Operator, Problem

from .forkserver import dumps
from .measure import classify
from .search import Failure, Status
from .space import Candidate, Identity, identity
from .workers import (
    START_SECONDS,
    RemoteError,
    Worker,
    WorkerDiedError,
    WorkerTimeoutError,
)

COMPILE_SECONDS = 60.0
_NICE = 5  # measuring goes first
_FRUITLESS_STARTS = 3


@dataclass(frozen=True)
class CompileResult:
    """A candidate is compiled.

    Attributes:
        resources: what its largest kernel takes.
        seconds: what compiling took; next to nothing where it had been done before.
        built: kernels that were not in Triton's disk cache.
    """

    resources: Resources
    seconds: float
    built: int = 0


CompileOutcome = CompileResult | Failure
_JobKey = Identity


def default_jobs() -> int:
    """One process per CPU that this process may use, but for one that measures; at most 32."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min((cpus or 1) - 1, 32))


def compile_candidate(
    operator: Operator, problem: Problem, candidate: Candidate, arch: str
) -> CompileOutcome:
    """Compile the plan of a candidate in this process; what a process of the pool does."""
    begin = time.monotonic()
    try:
        plan = operator.algorithm(candidate.algorithm).plan(problem, candidate.config)
        with _missing() as missing:
            kernels = () if plan is None else compile_plan(plan, arch, launcher=True)
    except Exception as error:
        failure = classify(error)
        if failure.status is Status.LAUNCH:  # nothing was launched
            failure = Failure(Status.COMPILE, failure.reason)
        return failure
    return CompileResult(_largest(kernels), time.monotonic() - begin, len(missing))


@contextlib.contextmanager
def _missing() -> Iterator[list[str]]:
    """The names of kernels that Triton compiles inside, rather than finding them on disk."""
    names: list[str] = []
    before = triton.knobs.compilation.listener

    def listen(*, src: Any, cache_hit: bool, **more: Any) -> None:
        if not cache_hit:
            names.append(src.name)
        if before is not None:
            before(src=src, cache_hit=cache_hit, **more)

    triton.knobs.compilation.listener = listen
    try:
        yield names
    finally:
        triton.knobs.compilation.listener = before


def _largest(kernels: tuple[Compiled, ...]) -> Resources:
    def most(values: list[int | None]) -> int | None:
        known = [value for value in values if value is not None]
        return max(known) if len(known) == len(values) and known else None

    return Resources(
        most([kernel.registers for kernel in kernels]),
        most([kernel.spill_bytes for kernel in kernels]),
        most([kernel.shared_bytes for kernel in kernels]),
    )


class Compiler:
    """The object in a process of the pool."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        torch.set_num_threads(1)

    def compile(self, what: bytes, candidate: Candidate) -> CompileOutcome:
        """Compile a candidate of a pickled (operator, problem)."""
        operator, problem = _unpickled(what)
        return compile_candidate(operator, problem, candidate, self.arch)


@functools.lru_cache(maxsize=64)
def _unpickled(what: bytes) -> tuple[Operator, Problem]:
    operator, problem = pickle.loads(what)
    return operator, problem


@dataclass(frozen=True)
class _Job:
    key: _JobKey
    what: bytes
    candidate: Candidate


@dataclass(eq=False)
class _Seat:
    """A place for a worker: the worker in it, its job, and the job's deadline."""

    worker: Worker
    job: _Job | None = None
    deadline: float = 0.0
    starting: bool = True


class CompilePool:
    """Processes that compile candidates for one architecture, first come, first served.

    A process that exceeds the timeout is killed and replaced, one that dies is replaced; only the
    candidate at fault fails. Submitting and waiting may happen in any thread.

    Example:
        >>> from tritonconv.autotune.compiling import CompilePool
        >>> from tritonconv.autotune.space import space
        >>> from tritonconv.runtime.device import nominal_device
        >>> from tritonconv.runtime.operators import get_operator
        >>> operator = get_operator("conv2d.forward")
        >>> problem = operator.parse({"in_channels": 8, "out_channels": 8, "height": 9})
        >>> candidates = space(operator, problem, nominal_device("sm_90")).candidates[:1]
        >>> with CompilePool("sm_90", jobs=1) as pool:
        ...     for candidate, found in pool.results(operator, problem, candidates):
        ...         type(found).__name__
        'CompileResult'
    """

    def __init__(
        self, arch: str, *, jobs: int | None = None, timeout: float = COMPILE_SECONDS
    ) -> None:
        """Start the processes in the background.

        Args:
            arch: ``sm_90`` and the like.
            jobs: number of processes; :func:`default_jobs` when None.
            timeout: seconds that one candidate may take.
        """
        parse_target(arch)
        self.arch = arch
        self.timeout = timeout
        self.jobs = default_jobs() if jobs is None else max(1, jobs)
        self._changed = threading.Condition()
        self._queue: collections.deque[_Job] = collections.deque()
        self._pending: set[_JobKey] = set()
        self._outcomes: dict[_JobKey, CompileOutcome] = {}
        self._failed_starts = 0
        self._broken: Exception | None = None
        self._closed = False
        self._wake, wakeup = socket.socketpair()
        self._wakeup = wakeup
        self._wake.setblocking(False)
        self._wakeup.setblocking(False)
        self._seats: list[_Seat] = []
        self._thread = threading.Thread(target=self._run, name="tritonconv-compile", daemon=True)
        self._thread.start()

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, operator: Operator, problem: Problem, candidates: Iterable[Candidate]) -> None:
        """Ask for candidates, which are compiled in this order behind what was asked for before.

        What was submitted already is not compiled again, unless it was dropped since.

        Raises:
            ArgumentValueError: the operator or problem cannot travel to another process.
        """
        what: bytes | None = None
        with self._changed:
            for candidate in candidates:
                key = _key(operator, problem, candidate)
                if key in self._pending or key in self._outcomes:
                    continue
                if without_plan(operator, problem, candidate):
                    self._outcomes[key] = CompileResult(Resources(), 0.0)
                    continue
                if what is None:
                    what = dumps((operator, problem))
                self._pending.add(key)
                self._queue.append(_Job(key, what, candidate))
            self._changed.notify_all()
        self._notify()

    def results(
        self, operator: Operator, problem: Problem, candidates: Iterable[Candidate]
    ) -> Iterator[tuple[Candidate, CompileOutcome]]:
        """Submit candidates and yield them with their outcomes, each as soon as it is there.

        They go before everything that nobody waits for. Candidates that are dropped while they
        wait are left out.

        Raises:
            RuntimeError: the pool is closed, or its processes cannot be started.
        """
        waiting = list(candidates)
        self.submit(operator, problem, waiting)
        self._hasten({_key(operator, problem, candidate) for candidate in waiting})
        while waiting:
            with self._changed:
                while True:
                    keys = [(c, _key(operator, problem, c)) for c in waiting]
                    ready = [(c, self._outcomes[key]) for c, key in keys if key in self._outcomes]
                    waiting = [c for c, key in keys if key in self._pending]
                    if ready or not waiting:
                        break
                    if self._broken is not None:
                        text = f"no compile process can be started: {self._broken}"
                        raise RuntimeError(text) from self._broken
                    if self._closed:
                        raise RuntimeError("the compile pool is closed")
                    self._changed.wait()
            yield from ready

    def _hasten(self, keys: set[_JobKey]) -> None:
        """Move jobs to the front of the queue, keeping their order."""
        with self._changed:
            wanted = [job for job in self._queue if job.key in keys]
            rest = [job for job in self._queue if job.key not in keys]
            self._queue = collections.deque([*wanted, *rest])

    def outcome(
        self, operator: Operator, problem: Problem, candidate: Candidate
    ) -> CompileOutcome | None:
        """What is known of a candidate by now; None when it is still to be compiled."""
        with self._changed:
            return self._outcomes.get(_key(operator, problem, candidate))

    def drop_pending(self) -> None:
        """Forget the candidates whose compilation has not begun."""
        with self._changed:
            self._pending.difference_update(job.key for job in self._queue)
            self._queue.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """Kill the processes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._notify()
        self._thread.join()
        self._wake.close()
        self._wakeup.close()

    def _notify(self) -> None:
        with contextlib.suppress(OSError):  # full: the thread is awake; closed: it has ended
            self._wakeup.send(b"x")

    # The rest runs in the pool's thread, which alone talks to the workers.

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    if self._closed:
                        return
                self._fill_seats()
                self._hand_out()
                self._wait()
        except Exception as error:  # an error here must not leave anybody waiting
            self._break(error)
        finally:
            for seat in self._seats:
                seat.worker.close()

    def _break(self, error: Exception) -> None:
        with self._changed:
            self._broken = error
            self._changed.notify_all()

    def _fill_seats(self) -> None:
        with self._changed:
            wanted = min(self.jobs, len(self._queue) + sum(s.job is not None for s in self._seats))
        while len(self._seats) < wanted and self._broken is None:
            self._seats.append(self._seat())

    def _seat(self) -> _Seat:
        worker = Worker(
            f"{Compiler.__module__}:{Compiler.__qualname__}",
            (self.arch,),
            environment={"CUDA_VISIBLE_DEVICES": ""},
            nice=_NICE,
        )
        return _Seat(worker, deadline=time.monotonic() + START_SECONDS)

    def _hand_out(self) -> None:
        for seat in self._seats:
            if seat.job is not None or seat.starting:
                continue
            with self._changed:
                if not self._queue:
                    return
                seat.job = self._queue.popleft()
            seat.deadline = time.monotonic() + self.timeout
            seat.worker.send("compile", seat.job.what, seat.job.candidate)

    def _wait(self) -> None:
        """Wait for an answer, a deadline or a submission, and take what came."""
        busy = [seat for seat in self._seats if seat.job is not None or seat.starting]
        now = time.monotonic()
        left = min((seat.deadline - now for seat in busy), default=None)
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            for seat in busy:
                selector.register(seat.worker, selectors.EVENT_READ, seat)
            events = selector.select(None if left is None else max(left, 0.0))
        for key, _ in events:
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self._wake.recv(4096)
            else:
                self._take(key.data)
        now = time.monotonic()
        for seat in busy:
            if (seat.job is not None or seat.starting) and now >= seat.deadline:
                self._take(seat, 0.0)

    def _take(self, seat: _Seat, seconds: float = 10.0) -> None:
        """Receive what a worker answers, or find out that it does not."""
        outcome: CompileOutcome | None = None
        replace = False
        try:
            outcome = seat.worker.receive(seconds)
        except WorkerTimeoutError as error:
            replace = True
            outcome = Failure(Status.COMPILE_TIMEOUT, f"did not compile within {self.timeout:g} s")
            cause: Exception = error
        except WorkerDiedError as error:
            replace = True
            outcome = Failure(Status.CRASH, f"while compiling, {error}")
            cause = error
        except RemoteError as error:
            # Not of the candidate, whose errors are outcomes: its parts cannot be made there.
            outcome = Failure(Status.CONSTRAINT, f"in the compile process: {error}"[:300])
        if seat.starting:
            seat.starting = False
            if replace:
                self._failed_starts += 1
                if self._failed_starts >= _FRUITLESS_STARTS:
                    self._break(cause)
            else:
                self._failed_starts = 0
        elif seat.job is not None:
            assert outcome is not None
            with self._changed:
                self._outcomes[seat.job.key] = outcome
                self._pending.discard(seat.job.key)
                self._changed.notify_all()
            seat.job = None
        if replace:
            seat.worker.close()
            self._seats.remove(seat)


def _key(operator: Operator, problem: Problem, candidate: Candidate) -> _JobKey:
    return identity(operator, problem, candidate)


def without_plan(operator: Operator, problem: Problem, candidate: Candidate) -> bool:
    """Whether a candidate calls PyTorch; asked only where the algorithm can run without a plan."""
    algorithm = operator.algorithm(candidate.algorithm)
    if type(algorithm).launch is Algorithm.launch:
        return False
    try:
        return algorithm.plan(problem, candidate.config) is None
    except Exception:  # reported from the process, as other candidates' errors are
        return False


__all__ = [
    "COMPILE_SECONDS",
    "CompileOutcome",
    "CompilePool",
    "CompileResult",
    "Resources",
    "compile_candidate",
    "default_jobs",
    "without_plan",
]
