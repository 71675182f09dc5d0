"""Compare what a call would run now with the untuned default and with PyTorch's own kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tritonconv.runtime.operators import Operator, Problem
from tritonconv.runtime.settings import settings
from tritonconv.runtime.tables import Tier, Timing, default_choice, tuned_table

from .measure import CandidateError, CudaLab, Lab, Policy, Timer, take_turns
from .roofline import floor_us
from .space import PYTORCH_ALGORITHM, Candidate

TUNED, DEFAULT, TORCH = "tuned", "default", "torch"


@dataclass(frozen=True)
class Measured:
    """One contender on one problem; ``timing`` is None when it does not run, for ``reason``."""

    contender: str
    candidate: Candidate
    timing: Timing | None
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """All contenders on one problem.

    Attributes:
        operator: its name.
        problem: what was run.
        tier: which step of the table's read order serves the problem.
        measured: contenders in the order tuned, default, torch; torch is missing where
            PyTorch does not serve the problem.
        floor_us: least time possible; None on a device whose ceilings are not known.
    """

    operator: str
    problem: Problem
    tier: Tier
    measured: tuple[Measured, ...]
    floor_us: float | None

    def timing(self, contender: str) -> Timing | None:
        """The timing of ``tuned``, ``default`` or ``torch``."""
        return next((row.timing for row in self.measured if row.contender == contender), None)

    def of_floor(self, contender: str = TUNED) -> float | None:
        """Share of the floor that a contender reaches, 1 being as fast as possible."""
        timing = self.timing(contender)
        if timing is None or self.floor_us is None:
            return None
        return self.floor_us / timing.p50

    def versus(self, other: str, contender: str = TUNED) -> float | None:
        """How many times faster than ``other`` a contender is."""
        mine, theirs = self.timing(contender), self.timing(other)
        return None if mine is None or theirs is None else theirs.p50 / mine.p50


def contenders(
    operator: Operator, problem: Problem, lab: Lab
) -> tuple[Tier, list[tuple[str, Candidate]]]:
    """Who competes on a problem, and which tier names the tuned one."""
    facts = lab.facts
    choice = tuned_table(facts).lookup(operator, problem)
    default = default_choice(operator, problem, facts)
    rows = [
        (TUNED, Candidate(choice.algorithm, choice.config)),
        (DEFAULT, Candidate(default.algorithm, default.config)),
    ]
    for algorithm in operator.candidates(problem):
        if algorithm.name == PYTORCH_ALGORITHM:
            rows.append((TORCH, Candidate(algorithm.name, algorithm.configs(problem, facts)[0])))
    return choice.tier, rows


def bench(
    pairs: Iterable[tuple[Operator, Problem]],
    device: torch.device | int | None = None,
    *,
    policy: Policy = Policy.GRAPH_COLD,
    turns: int = 20,
    seed: int = 0,
    lab: Lab | None = None,
    progress: Callable[[Comparison], None] | None = None,
) -> list[Comparison]:
    """Time tuned, default and PyTorch in turns for every problem.

    A kernel that two contenders share is timed once, so that equal kernels show equal times.
    PyTorch runs with cuDNN's benchmark mode on and without the demand for a fixed order of sums.

    Raises:
        NoDeviceError: there is no GPU.
    """
    lab = lab or CudaLab(device)
    results = []
    for operator, problem in pairs:
        tier, rows = contenders(operator, problem, lab)
        timer = lab.timer(operator, problem, policy, seed)
        try:
            measured = _measure(timer, rows, turns)
        finally:
            timer.close()
        comparison = Comparison(
            operator.name, problem, tier, measured, floor_us(problem, lab.facts)
        )
        results.append(comparison)
        if progress is not None:
            progress(comparison)
    return results


def _measure(timer: Timer, rows: list[tuple[str, Candidate]], turns: int) -> tuple[Measured, ...]:
    # PyTorch as a rival is not PyTorch as our candidate: it may pick any of its kernels.
    handles: dict[tuple[bool, Candidate], Any] = {}
    failed: dict[tuple[bool, Candidate], str] = {}
    for rival, candidate in dict.fromkeys((name == TORCH, c) for name, c in rows):
        try:
            with _pytorch_at_its_best() if rival else nullcontext():
                handles[rival, candidate] = timer.prepare(candidate)
        except CandidateError as error:
            failed[rival, candidate] = str(error)
    timings = dict(
        zip(handles, take_turns(timer, list(handles.values()), turns=turns), strict=True)
    )
    return tuple(
        Measured(
            name,
            candidate,
            timings.get((name == TORCH, candidate)),
            failed.get((name == TORCH, candidate)) or timer.note(handles[name == TORCH, candidate]),
        )
        for name, candidate in rows
    )


@contextmanager
def _pytorch_at_its_best() -> Iterator[None]:
    """cuDNN picks the fastest kernel by timing, and may add in any order."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with settings.override(atomics=True):
            yield
    finally:
        torch.backends.cudnn.benchmark = before
