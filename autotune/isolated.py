"""Measure in a process of its own, which a candidate may hang, crash or break.

A candidate that exceeds a timeout, kills the process or breaks its GPU context costs that process
only: it is killed and replaced, the candidate is never tried again by this lab, and whatever else
was prepared is prepared again when it is next needed. One process measures on a GPU at a time,
whoever's it is: a file lock is held while a timer is open.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tritonconv.runtime.accuracy import Accuracy
from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.errors import TritonConvError
from tritonconv.runtime.operators import Operator, Problem
from tritonconv.runtime.tables import Timing

from .compiling import COMPILE_SECONDS
from .forkserver import dumps
from .gpu_lock import GpuLock, gpu_lock
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
from .space import Candidate, Identity, identity
from .workers import START_SECONDS, RemoteError, Worker, WorkerDiedError, WorkerTimeoutError

RUN_SECONDS = 10.0
_SETUP_SECONDS = 300.0  # tensors, and a float64 reference
_CLOSE_SECONDS = 30.0
_CUDA_LAB = "tritonconv.autotune.measure:CudaLab"


class SetupFailedError(TritonConvError):
    """A problem could not be set up in the process, which works otherwise."""


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
        self.stopping = False
        self.quarantined: dict[Identity, Failure] = {}
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

    def state(self) -> dict[str, str | int]:
        """Driver and clock of the GPU now."""
        state: dict[str, str | int] = self.setup("state")
        return state

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

    def interrupt(self) -> None:
        """End for good what another thread is doing here: Ctrl-C there, no candidate's fault."""
        self.stopping = True
        self.close()

    def _give_way(self) -> None:
        if self.stopping:
            raise KeyboardInterrupt

    def ready(self) -> Worker:
        """The process, replaced when the last one is gone; of interest to timers and checkers."""
        self._give_way()
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
        key = identity(operator, problem, candidate)
        phase: list[str] = []

        def heed(what: str) -> float:
            phase[:] = [what]
            return self.compile_timeout if what == COMPILING else timeout

        try:
            found = self.ready().call(method, *arguments, timeout=timeout, heed=heed)
        except (WorkerTimeoutError, WorkerDiedError) as error:
            self._give_way()
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
        failure = self.quarantined.get(identity(operator, problem, candidate))
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
            self._give_way()
            if method != "describe":
                # A problem that is too much for a process is not the end of the others, if a fresh
                # process works.
                with contextlib.suppress(WorkerTimeoutError, WorkerDiedError, RemoteError):
                    self.ready().call("describe", timeout=START_SECONDS)
                    raise SetupFailedError(f"{method}: {error}") from error
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
        if self.lab.stopping:
            return
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
            self.lab._give_way()
            lost = self.lab.verdict(error, False)
        else:
            if isinstance(found, list):
                return found
            running[0], what = found
            if isinstance(what, Failure):
                return running[0], what
            self.lab.close()
            lost = Failure(Status.CRASH, " ".join(what.reason.split())[:300])
        key = identity(self.operator, self.problem, handles[running[0]].candidate)
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


__all__ = ["Handle", "WorkerChecker", "WorkerLab", "WorkerTimer"]
