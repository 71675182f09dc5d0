"""Compare what a call would run now with the untuned default and with PyTorch's own kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.operators import Operator, Problem
from tritonconv.runtime.settings import settings
from tritonconv.runtime.tables import Tier, Timing, default_choice, tuned_table

from .measure import CandidateError, CudaLab, Lab, Policy, Timer, take_turns
from .roofline import floor_us
from .search import Status
from .space import PYTORCH_ALGORITHM, Candidate

TUNED, DEFAULT, TORCH = "tuned", "default", "torch"
GENERATED = "generated"
"""The best kernel of our own that is known: the tuned one, unless that is PyTorch's."""
TORCH_ELSEWHERE = "torch elsewhere"
"""PyTorch on tensors in the other memory format, where it is faster there."""


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
        measured: contenders in the order tuned, default, generated, torch, torch elsewhere; torch
            is missing where PyTorch does not serve the problem, the last where it was not asked
            for, or where there is no other way to ask PyTorch for the same.
        floor_us: least time possible; None on a device whose ceilings are not known.
    """

    operator: str
    problem: Problem
    tier: Tier
    measured: tuple[Measured, ...]
    floor_us: float | None

    def timing(self, contender: str) -> Timing | None:
        """The timing of a contender."""
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

    def versus_torch(self, contender: str = TUNED) -> float | None:
        """How many times faster than PyTorch at its best, in each memory format it was timed in."""
        ratios = [self.versus(other, contender) for other in (TORCH, TORCH_ELSEWHERE)]
        return min((ratio for ratio in ratios if ratio is not None), default=None)


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
    generated = _best_generated(operator, problem, rows[0][1], facts)
    if generated is not None:
        rows.append((GENERATED, generated))
    for algorithm in operator.algorithms:
        # float32 by three TF32 products, which PyTorch does not have, has its float32 for a rival.
        emulated = problem.fields().get("precision") == "tf32x3"
        served = emulated or algorithm.supports(problem) is None
        if algorithm.name == PYTORCH_ALGORITHM and served:
            rows.append((TORCH, Candidate(algorithm.name, algorithm.configs(problem, facts)[0])))
    return choice.tier, rows


def _best_generated(
    operator: Operator, problem: Problem, tuned: Candidate, facts: DeviceFacts
) -> Candidate | None:
    """The tuned kernel if it is ours, else the fastest of ours in the entry, else a default."""
    if tuned.algorithm != PYTORCH_ALGORITHM:
        return tuned
    ours = {a.name: a for a in operator.candidates(problem) if a.name != PYTORCH_ALGORITHM}
    current = operator.source_hashes()
    for located in tuned_table(facts).exact(operator, problem):
        timed = [
            (trial.status != Status.OK, trial.timing.p50, trial)
            for trial in located.entry.trials
            if trial.timing is not None
            and trial.algorithm in ours  # and what was timed is what would run
            and located.entry.sources.get(trial.algorithm) == current[trial.algorithm]
        ]
        if timed:
            trial = min(timed, key=lambda row: row[:2])[2]
            algorithm = ours[trial.algorithm]
            return Candidate(algorithm.name, algorithm.config_type.from_dict(trial.config))
    defaults = (Candidate(a.name, operator.space(a, problem, facts)[0]) for a in ours.values())
    return next(defaults, None)


def bench(
    pairs: Iterable[tuple[Operator, Problem]],
    device: torch.device | int | None = None,
    *,
    policy: Policy = Policy.GRAPH_COLD,
    turns: int = 20,
    seed: int = 0,
    lab: Lab | None = None,
    everywhere: bool = False,
    progress: Callable[[Comparison], None] | None = None,
) -> list[Comparison]:
    """Time tuned, default, the best generated kernel and PyTorch in turns for every problem.

    A kernel that two contenders share is timed once, so that equal kernels show equal times.
    PyTorch runs float32 products of three TF32 ones, which it does not have, in full precision;
    always with cuDNN's benchmark mode on and without the demand for a fixed order of sums;
    with ``everywhere`` it is also timed, afterwards, on tensors in other memory formats.

    Raises:
        NoDeviceError: there is no GPU.
    """
    lab = lab or CudaLab(device)
    results = []
    for operator, problem in pairs:
        tier, rows = contenders(operator, problem, lab)
        measured = _measured(operator, problem, rows, lab, policy, turns, seed)
        if everywhere and any(a.name == PYTORCH_ALGORITHM for a in operator.algorithms):
            measured += _elsewhere(operator, problem, lab, policy, turns, seed)
        comparison = Comparison(
            operator.name, problem, tier, measured, floor_us(problem, lab.facts)
        )
        results.append(comparison)
        if progress is not None:
            progress(comparison)
    return results


def _measured(
    operator: Operator,
    problem: Problem,
    rows: list[tuple[str, Candidate]],
    lab: Lab,
    policy: Policy,
    turns: int,
    seed: int,
) -> tuple[Measured, ...]:
    """Time contenders on a problem; one that is too large for the device says so in every row."""
    try:
        timer = lab.timer(operator, problem, policy, seed)
        try:
            return _measure(timer, rows, turns)
        finally:
            timer.close()
    except (CandidateError, torch.OutOfMemoryError) as error:
        reason = f"{type(error).__name__}: {error}"
        return tuple(Measured(name, candidate, None, reason) for name, candidate in rows)


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
    # Where calls are not captured, they run here.
    with _pytorch_at_its_best():
        taken = take_turns(timer, list(handles.values()), turns=turns)
    timings = dict(zip(handles, taken, strict=True))
    return tuple(
        Measured(
            name,
            candidate,
            timings.get((name == TORCH, candidate)),
            failed.get((name == TORCH, candidate)) or timer.note(handles[name == TORCH, candidate]),
        )
        for name, candidate in rows
    )


def _elsewhere(
    operator: Operator, problem: Problem, lab: Lab, policy: Policy, turns: int, seed: int
) -> tuple[Measured, ...]:
    """PyTorch on the same computation with its tensors laid out differently: the fastest."""
    found: list[Measured] = []
    for other in operator.elsewhere(problem):
        if other.fields() == problem.fields():
            continue
        torch_own = operator.algorithm(PYTORCH_ALGORITHM)
        candidate = Candidate(torch_own.name, torch_own.configs(other, lab.facts)[0])
        found += _measured(operator, other, [(TORCH, candidate)], lab, policy, turns, seed)
    ran = [row for row in found if row.timing is not None]
    if not ran:
        return ()
    best = min(ran, key=lambda row: row.timing.p50 if row.timing else math.inf)
    return (replace(best, contender=TORCH_ELSEWHERE),)


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
