"""Measure in a process of its own, which a candidate may hang, crash or break.

A candidate that exceeds a timeout, kills the process or breaks its GPU context costs that process
only: it is killed and replaced, the candidate is never tried again by this lab, and whatever else
was prepared is prepared again when it is next needed. One process measures on a GPU at a time,
whoever's it is: a file lock is held while a timer is open.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tritonconv.runtime.accuracy import Accuracy
from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.operators import Operator, Problem
from tritonconv.runtime.settings import settings
from tritonconv.runtime.tables import Timing

from .compiling import COMPILE_SECONDS
from .forkserver import dumps
from .lab_host import COMPILING, LabHost, Lost
from .measure import (
    FIRST_ROUND_SECONDS,
    TURN_SECONDS,
    TURNS,
    CandidateError,
    DeviceLostError,
    NoDeviceError,
    Policy,
)
from .search import Failure, Status
from .space import Candidate, CandidateKey
from .workers import START_SECONDS, RemoteError, Worker, WorkerDiedError, WorkerTimeoutError

RUN_SECONDS = 10.0
_SETUP_SECONDS = 300.0  # tensors, and a float64 reference
_CLOSE_SECONDS = 30.0
_CUDA_LAB = "tritonconv.autotune.measure:CudaLab"


class GpuLock:
    """An exclusive lock on one GPU among the processes of this user; nested in one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._depth = 0
        self._file: int | None = None
        self._guard = threading.RLock()

    def acquire(self, patience: float = 5.0) -> None:
        """Wait for the lock; after some seconds of it, say so once."""
        with self._guard:
            if not self._depth:
                self._file = self._locked(time.monotonic() + patience)
            self._depth += 1

    def release(self) -> None:
        """Give the lock up as often as it was acquired."""
        with self._guard:
            self._depth -= 1
            if not self._depth and self._file is not None:
                os.close(self._file)
                self._file = None

    def _locked(self, patient_until: float) -> int:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        told = False
        try:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return file
                except BlockingIOError:
                    if not told and time.monotonic() > patient_until:
                        told = True
                        warnings.warn(
                            f"waiting for another process that measures on this GPU ({self.path})",
                            stacklevel=2,
                        )
                    time.sleep(0.05)
        except BaseException:
            os.close(file)
            raise


_locks: dict[Path, GpuLock] = {}


def gpu_lock(board: str) -> GpuLock:
    """The lock of a board, one object in this process: two labs of it do not wait for each other.

    Args:
        board: what identifies it among all boards of the machine.
    """
    path = Path(settings.cache_dir) / "locks" / f"gpu-{board}.lock"
    return _locks.setdefault(path, GpuLock(path))


class WorkerLab:
    """A lab whose candidates run in a child process.

    Example:
        A lab of one GPU, closed at the end::

            with WorkerLab() as lab:
                reports = tune(operator, problems, lab=lab)
    """

    def __init__(
        self,
        device: torch.device | int | None = None,
        *,
        run_timeout: float = RUN_SECONDS,
        compile_timeout: float = COMPILE_SECONDS,
        lab: str | None = None,
        lab_arguments: tuple[Any, ...] = (),
    ) -> None:
        """Start the process in the background.

        Args:
            device: the GPU; the current one when None.
            run_timeout: seconds that preparing, timing or checking a candidate may take.
            compile_timeout: seconds that compiling it may take.
            lab: import path ``package.module:name`` of another lab, made in the process from
                ``lab_arguments``; a CUDA lab on ``device`` when None.
            lab_arguments: arguments of ``lab``.

        Raises:
            NoDeviceError: no ``lab`` is named, and PyTorch sees no GPU.
        """
        if lab is None:
            if not torch.cuda.is_available():
                raise NoDeviceError("measuring needs a CUDA GPU, and PyTorch sees none")
            lab, lab_arguments = _CUDA_LAB, (_index(device),)
        self.run_timeout = run_timeout
        self.compile_timeout = compile_timeout
        self.generation = 0
        self.quarantined: dict[tuple[str, Problem, CandidateKey], Failure] = {}
        self._arguments = (lab, lab_arguments)
        self._described: tuple[DeviceFacts, GpuLock | None] | None = None
        self.abandoned: list[_Remote] = []
        self._worker: Worker | None = None
        self._start()

    def __enter__(self) -> WorkerLab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def facts(self) -> DeviceFacts:
        """The device whose tables are written."""
        return self._describe()[0]

    def timer(self, operator: Operator, problem: Problem, policy: Policy, seed: int) -> WorkerTimer:
        """Start timing a problem; waits until no other process measures on the GPU."""
        lock = self._describe()[1]
        if lock is not None:
            lock.acquire()
        try:
            return WorkerTimer(self, operator, problem, policy, seed, lock)
        except BaseException:
            if lock is not None:
                lock.release()
            raise

    def checker(
        self, operator: Operator, problem: Problem, seed: int
    ) -> Callable[[Candidate], Accuracy]:
        """Start checking the results of a problem's candidates."""
        while self.abandoned:  # checkers that nobody has any more hold tensors in the process
            self.abandoned.pop().close("close_checker")
        return WorkerChecker(self, operator, problem, seed)

    def close(self) -> None:
        """Kill the process; a later use starts another."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def ready(self) -> Worker:
        """The process, replaced when the last one is gone; of interest to timers and checkers."""
        if self._worker is None or not self._worker.alive:
            self._start()
        assert self._worker is not None
        return self._worker

    def attempt(
        self,
        operator: Operator,
        problem: Problem,
        candidate: Candidate,
        method: str,
        *arguments: Any,
        timeout: float,
    ) -> Any:
        """Have the process do something with one candidate; of interest to timers and checkers.

        Raises:
            CandidateError: the candidate failed; if the process had to be replaced, the candidate
                is quarantined.
        """
        key = (operator.name, problem, candidate.as_key())
        phase: list[str] = []

        def heed(what: str) -> float:
            phase[:] = [what]
            return self.compile_timeout if what == COMPILING else timeout

        try:
            found = self.ready().call(method, *arguments, timeout=timeout, heed=heed)
        except (WorkerTimeoutError, WorkerDiedError) as error:
            failure = self.verdict(error, phase == [COMPILING])
        else:
            if isinstance(found, Failure):
                raise CandidateError(found)
            if not isinstance(found, Lost):
                return found
            self.close()
            failure = Failure(Status.CRASH, " ".join(found.reason.split())[:300])
        self.quarantined[key] = failure
        raise CandidateError(failure)

    def admit(self, operator: Operator, problem: Problem, candidate: Candidate) -> None:
        """Refuse a candidate that cost a process before.

        Raises:
            CandidateError: with the failure of that time.
        """
        failure = self.quarantined.get((operator.name, problem, candidate.as_key()))
        if failure is not None:
            raise CandidateError(failure)

    def verdict(self, error: Exception, compiling: bool) -> Failure:
        """What becomes of a candidate that cost the process; of interest to timers."""
        if isinstance(error, WorkerDiedError):
            doing = "while compiling" if compiling else "while running"
            return Failure(Status.CRASH, f"{doing}, {error}")
        if compiling:
            reason = f"did not compile within {self.compile_timeout:g} s"
            return Failure(Status.COMPILE_TIMEOUT, reason)
        return Failure(Status.RUN_TIMEOUT, f"did not finish within {self.run_timeout:g} s")

    def _start(self) -> None:
        self.close()
        self.generation += 1
        self._worker = Worker(f"{LabHost.__module__}:{LabHost.__qualname__}", self._arguments)

    def _describe(self) -> tuple[DeviceFacts, GpuLock | None]:
        if self._described is None:
            facts, board = self.setup("describe")
            self._described = facts, None if board is None else gpu_lock(board)
        return self._described

    def setup(self, method: str, *arguments: Any) -> Any:
        """Have the process do something that is no candidate's; of interest to timers and checkers.

        Raises:
            DeviceLostError: the process cannot do it, whatever the candidate.
            RemoteError: it raised.
        """
        try:
            worker = self.ready()
            return worker.call(method, *arguments, timeout=max(_SETUP_SECONDS, START_SECONDS))
        except (WorkerTimeoutError, WorkerDiedError) as error:
            raise DeviceLostError(f"the measuring process: {error}") from error


def _index(device: torch.device | int | None) -> int:
    if isinstance(device, torch.device):
        device = device.index
    if device is None:
        # Asking for the current device would make a context here, which costs GPU memory.
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    return device


class _Remote:
    """A timer or checker of the process, opened again in the process that replaces it."""

    def __init__(self, lab: WorkerLab, opener: str, arguments: tuple[Any, ...]) -> None:
        dumps(arguments)  # what cannot travel is an error here, not in the middle of tuning
        self.lab = lab
        self.generation = 0
        self._opener = opener
        self._arguments = arguments
        self._number = 0
        self.number()

    def number(self) -> int:
        """Its number in the process of now."""
        self.lab.ready()
        if self.generation != self.lab.generation:
            self._number = self.lab.setup(self._opener, *self._arguments)
            self.generation = self.lab.generation
        return self._number

    def close(self, closer: str) -> None:
        """Close it, unless its process is gone."""
        worker = self.lab._worker
        if self.generation == self.lab.generation and worker is not None and worker.alive:
            with contextlib.suppress(WorkerTimeoutError, WorkerDiedError, RemoteError):
                worker.call(closer, self._number, timeout=_CLOSE_SECONDS)


@dataclass(eq=False)
class Handle:
    """A candidate that is prepared in the process of some generation."""

    candidate: Candidate
    number: int
    generation: int
    note: str


class WorkerTimer:
    """A timer in the lab's process: the protocol, and two steps that take one request each."""

    def __init__(
        self,
        lab: WorkerLab,
        operator: Operator,
        problem: Problem,
        policy: Policy,
        seed: int,
        lock: GpuLock | None,
    ) -> None:
        self.lab = lab
        self.operator = operator
        self.problem = problem
        self._remote = _Remote(lab, "open_timer", (operator, problem, policy, seed))
        self._lock = lock
        self._freed: list[tuple[int, int]] = []

    def prepare(self, candidate: Candidate) -> Handle:
        """Compile and run a candidate once and return a handle to time it by."""
        handle = Handle(candidate, 0, 0, "")
        self._prepare(handle)
        return handle

    def sample(self, handle: Handle, seconds: float) -> list[float]:
        """Microseconds per call.

        Raises:
            CandidateError: the candidate fails now, although it was prepared before.
        """
        self._current(handle)
        samples: list[float] = self._attempt(
            handle.candidate,
            "sample",
            handle.number,
            seconds,
            timeout=self.lab.run_timeout + 2 * seconds,
        )
        return samples

    def note(self, handle: Handle) -> str:
        """What a reader of the timing should know; usually empty."""
        return handle.note

    def first_round(
        self, candidate: Candidate, seconds: float = FIRST_ROUND_SECONDS
    ) -> tuple[Timing, str]:
        """Prepare a candidate, time it briefly and let go of it; its timing and its note.

        Raises:
            CandidateError: as :meth:`prepare`.
        """
        self.lab.admit(self.operator, self.problem, candidate)
        number = self._remote.number()
        found: tuple[Timing, str] = self.lab.attempt(
            self.operator,
            self.problem,
            candidate,
            "first_round",
            number,
            candidate,
            seconds,
            self._take_freed(),
            timeout=self.lab.run_timeout + 2 * seconds,
        )
        return found

    def take_turns(
        self, handles: Sequence[Handle], *, turns: int = TURNS, seconds: float = TURN_SECONDS
    ) -> list[Timing | Failure]:
        """Time several in turns, inside the process.

        When one of them fails, the others are timed again from the start.
        """
        failures: dict[int, Failure] = {}
        while True:
            left: list[int] = []
            for index, handle in enumerate(handles):
                if index in failures:
                    continue
                try:
                    self._current(handle)
                except CandidateError as error:
                    failures[index] = error.failure
                else:
                    left.append(index)
            current = {handles[index].generation for index in left} <= {self.lab.generation}
            if not current:  # preparing one of them cost the process: prepare the others again
                continue
            outcome = self._turns([handles[index] for index in left], turns, seconds)
            if isinstance(outcome, list):
                timings = dict(zip(left, outcome, strict=True))
                return [
                    failures[index] if index in failures else timings[index]
                    for index in range(len(handles))
                ]
            position, failure = outcome
            failures[left[position]] = failure

    def close(self) -> None:
        """Free everything, and the GPU for other processes."""
        try:
            self._remote.close("close_timer")
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def _turns(
        self, handles: Sequence[Handle], turns: int, seconds: float
    ) -> list[Timing] | tuple[int, Failure]:
        if not handles:
            return []
        limit = self.lab.run_timeout + 2 * seconds
        running = [0]

        def heed(index: int) -> float:
            running[:] = [index]
            return limit

        numbers = [handle.number for handle in handles]
        lost: Failure | None = None
        try:
            found = self.lab.ready().call(
                "take_turns",
                self._remote.number(),
                numbers,
                turns,
                seconds,
                timeout=limit,
                heed=heed,
            )
        except (WorkerTimeoutError, WorkerDiedError) as error:
            lost = self.lab.verdict(error, False)
        else:
            if isinstance(found, list):
                return found
            running[0], what = found
            if isinstance(what, Failure):
                return running[0], what
            self.lab.close()
            lost = Failure(Status.CRASH, " ".join(what.reason.split())[:300])
        key = (self.operator.name, self.problem, handles[running[0]].candidate.as_key())
        self.lab.quarantined[key] = lost
        return running[0], lost

    def _attempt(self, candidate: Candidate, method: str, *arguments: Any, timeout: float) -> Any:
        return self.lab.attempt(
            self.operator,
            self.problem,
            candidate,
            method,
            self._remote.number(),
            *arguments,
            timeout=timeout,
        )

    def _prepare(self, handle: Handle) -> None:
        self.lab.admit(self.operator, self.problem, handle.candidate)
        handle.number, handle.note = self._attempt(
            handle.candidate,
            "prepare",
            handle.candidate,
            self._take_freed(),
            timeout=self.lab.run_timeout,
        )
        handle.generation = self.lab.generation
        weakref.finalize(handle, self._freed.append, (handle.generation, handle.number))

    def _current(self, handle: Handle) -> None:
        """Prepare a handle again whose process is gone."""
        self.lab.admit(self.operator, self.problem, handle.candidate)
        self.lab.ready()
        if handle.generation != self.lab.generation:
            self._prepare(handle)

    def _take_freed(self) -> list[int]:
        """Handles that nobody has any more: their graphs hold GPU memory in the process."""
        freed = [number for generation, number in self._freed if generation == self.lab.generation]
        self._freed.clear()
        return freed


class WorkerChecker:
    """A checker in the lab's process."""

    def __init__(self, lab: WorkerLab, operator: Operator, problem: Problem, seed: int) -> None:
        self.lab = lab
        self.operator = operator
        self.problem = problem
        self._remote: _Remote | None = None
        self._arguments = (operator, problem, seed)

    def __call__(self, candidate: Candidate) -> Accuracy:
        """Run a candidate once and judge all its outputs.

        Raises:
            CandidateError: the candidate does not run.
        """
        self.lab.admit(self.operator, self.problem, candidate)
        if self._remote is None:
            self._remote = _Remote(self.lab, "open_checker", self._arguments)
            weakref.finalize(self, self.lab.abandoned.append, self._remote)
        verdict: Accuracy = self.lab.attempt(
            self.operator,
            self.problem,
            candidate,
            "check",
            self._remote.number(),
            candidate,
            timeout=self.lab.run_timeout,
        )
        return verdict


__all__ = ["GpuLock", "Handle", "WorkerChecker", "WorkerLab", "WorkerTimer", "gpu_lock"]
