"""The laboratory in the measuring process; :mod:`.isolated` is the other end."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tritonconv.runtime.accuracy import Accuracy
from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.operators import Operator, Problem
from tritonconv.runtime.tables import Timing

from .forkserver import note, resolve
from .measure import CandidateError, DeviceLostError, Lab, Policy, Timer, look, summarize
from .search import Failure
from .space import Candidate

COMPILING = "compiling"
RUNNING = "running"


@dataclass(frozen=True)
class Lost:
    """The candidate broke this process's GPU context: nothing more can run in it."""

    reason: str


@dataclass
class _Timed:
    """A timer with what is prepared in it."""

    timer: Timer
    operator: Operator
    problem: Problem
    handles: dict[int, Any]


@dataclass(frozen=True)
class _Checked:
    """A checker and what it checks."""

    checker: Callable[[Candidate], Accuracy]
    operator: Operator
    problem: Problem


class LabHost:
    """A lab whose timers, checkers and handles are known by number.

    Failures of candidates are returned, not raised: an exception is an error of something else.
    """

    def __init__(self, lab: str, arguments: tuple[Any, ...]) -> None:
        self.lab: Lab = resolve(lab)(*arguments)
        self._compile = getattr(self.lab, "compile", None)
        self._numbers = itertools.count(1)
        self._timed: dict[int, _Timed] = {}
        self._checked: dict[int, _Checked] = {}

    def describe(self) -> tuple[DeviceFacts, str | None]:
        """The lab's device and what identifies the board, for the lock."""
        identity = getattr(self.lab, "identity", None)
        if identity is not None:
            return self.lab.facts, identity
        device = getattr(self.lab, "device", None)
        if isinstance(device, torch.device) and device.type == "cuda":
            return self.lab.facts, board(device.index)
        return self.lab.facts, None

    def state(self) -> dict[str, str | int]:
        """Driver and clock, where the lab says them."""
        state: dict[str, str | int] = getattr(self.lab, "state", dict)()
        return state

    def open_timer(self, operator: Operator, problem: Problem, policy: Policy, seed: int) -> int:
        """Start timing a problem."""
        number = next(self._numbers)
        timer = self.lab.timer(operator, problem, policy, seed)
        self._timed[number] = _Timed(timer, operator, problem, {})
        return number

    def open_checker(self, operator: Operator, problem: Problem, seed: int) -> int:
        """Start checking a problem; what is expected is computed now."""
        number = next(self._numbers)
        checker = self.lab.checker(operator, problem, seed)
        prepare = getattr(checker, "prepare", None)
        if prepare is not None:
            prepare()
        self._checked[number] = _Checked(checker, operator, problem)
        return number

    def prepare(
        self, number: int, candidate: Candidate, freed: Sequence[int]
    ) -> tuple[int, str] | Failure | Lost:
        """Prepare a candidate; its handle's number and its note."""
        timed = self._free(number, freed)
        handle = self._prepared(timed, candidate)
        if isinstance(handle, (Failure, Lost)):
            return handle
        own = next(self._numbers)
        timed.handles[own] = handle
        return own, timed.timer.note(handle)

    def first_round(
        self, number: int, candidate: Candidate, seconds: float, freed: Sequence[int]
    ) -> tuple[Timing, str] | Failure | Lost:
        """Prepare a candidate, time it briefly and forget it; its timing and its note."""
        timed = self._free(number, freed)
        handle = self._prepared(timed, candidate, once=True)
        if isinstance(handle, (Failure, Lost)):
            return handle
        samples = self._sampled(timed, handle, seconds)
        if isinstance(samples, (Failure, Lost)):
            return samples
        return summarize(samples), timed.timer.note(handle)

    def sample(self, number: int, handle: int, seconds: float) -> list[float] | Failure | Lost:
        """Microseconds per call."""
        timed = self._timed[number]
        return self._sampled(timed, timed.handles[handle], seconds)

    def take_turns(
        self, number: int, handles: Sequence[int], turns: int, seconds: float
    ) -> list[Timing] | tuple[int, Failure | Lost]:
        """Time several in turns, or say which of them failed."""
        timed = self._timed[number]
        values: list[list[float]] = [[] for _ in handles]
        for turn in range(turns):
            for offset in range(len(handles)):
                index = (turn + offset) % len(handles)
                note(index)
                samples = self._sampled(timed, timed.handles[handles[index]], seconds)
                if isinstance(samples, (Failure, Lost)):
                    return index, samples
                values[index] += samples
        return [summarize(samples) for samples in values]

    def check(self, number: int, candidate: Candidate) -> Accuracy | Failure | Lost:
        """Check the result of a candidate."""
        checked = self._checked[number]
        try:
            # What was timed in an earlier run may not be compiled on this machine.
            self._compile_first(checked.operator, checked.problem, candidate)
            return checked.checker(candidate)
        except CandidateError as error:
            return error.failure
        except DeviceLostError as error:
            return Lost(str(error))

    def close_timer(self, number: int) -> None:
        """Free what a timer holds."""
        timed = self._timed.pop(number, None)
        if timed is not None:
            timed.handles.clear()
            timed.timer.close()

    def close_checker(self, number: int) -> None:
        """Free what a checker holds."""
        self._checked.pop(number, None)

    def _free(self, number: int, freed: Sequence[int]) -> _Timed:
        timed = self._timed[number]
        for handle in freed:
            timed.handles.pop(handle, None)
        return timed

    def _prepared(self, timed: _Timed, candidate: Candidate, once: bool = False) -> Any:
        try:
            self._compile_first(timed.operator, timed.problem, candidate)
            return (look(timed.timer) if once else timed.timer.prepare)(candidate)
        except CandidateError as error:
            return error.failure
        except DeviceLostError as error:
            return Lost(str(error))

    def _compile_first(self, operator: Operator, problem: Problem, candidate: Candidate) -> None:
        """Apart from running it, so that either has its own deadline.

        The launch then finds the compiled kernel in Triton's cache.
        """
        if self._compile is not None:
            note(COMPILING)
            self._compile(operator, problem, candidate)
            note(RUNNING)

    def _sampled(self, timed: _Timed, handle: Any, seconds: float) -> list[float] | Failure | Lost:
        try:
            return timed.timer.sample(handle, seconds)
        except CandidateError as error:
            return error.failure
        except Exception as error:
            # It ran before: whatever a repetition raises, the context is not to be trusted.
            return Lost(f"{type(error).__name__}: {error}")


def board(index: int) -> str:
    """What identifies a board, whatever its number in this process is."""
    properties = torch.cuda.get_device_properties(index)
    uuid = getattr(properties, "uuid", None)
    return f"{properties.name}-{index}".replace(" ", "-") if uuid is None else str(uuid)


__all__ = ["COMPILING", "RUNNING", "LabHost", "Lost", "board"]
