"""Play recorded tables back: the same search and tuning code without a GPU, on a virtual clock.

A table that was recorded with every candidate (``--effort full``) tells what any strategy would
have found, and when. Of a table with gaps only the recorded part takes part.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tritonconv.runtime.accuracy import Accuracy
from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.errors import bad_value
from tritonconv.runtime.operators import Field, Operator, Problem, get_operator
from tritonconv.runtime.tables import Entry, Timing, Trial, digest

from .measure import CandidateError, Policy
from .search import (
    Budget,
    Effort,
    Failure,
    Outcome,
    Status,
    StrategyName,
    make_strategy,
    search,
)
from .space import Candidate, CandidateKey, Space, candidate_key, space

COMPILE_SECONDS = 0.8
"""Of a candidate whose trial does not say; what a tile kernel takes on one core of a server."""
MEASURE_SECONDS = 0.03
"""Binding, capturing and the first round of one candidate."""


@dataclass
class VirtualClock:
    """A clock that only :meth:`advance` moves; call it for the seconds since it was made."""

    now: float = 0.0

    def __call__(self) -> float:
        """Seconds so far."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def recorded_trials(entry: Entry) -> Mapping[CandidateKey, Trial]:
    """The trials of an entry by candidate."""
    return {candidate_key(trial.algorithm, trial.config): trial for trial in entry.trials}


def outcome_of(trial: Trial | None) -> Outcome:
    """What a candidate came to when it was recorded."""
    if trial is None:
        return Failure(Status.CONSTRAINT, "not recorded")
    if trial.timing is not None:
        return trial.timing
    return Failure(Status(trial.status), trial.reason)


def recorded_device(entry: Entry) -> DeviceFacts:
    """The device that an entry was measured on."""
    return DeviceFacts(**entry.environment["device"])


def recorded_space(entry: Entry) -> Space:
    """The part of a problem's space that an entry has trials for.

    Raises:
        ArgumentValueError: the operator is not registered, or its default was not recorded.
    """
    operator = get_operator(entry.operator)
    full = space(operator, operator.parse(entry.problem), recorded_device(entry))
    trials = recorded_trials(entry)
    if full.default.as_key() not in trials:
        raise bad_value("entry", f"a trial of the default {full.default}", "none")
    return full.restricted(trials)


@dataclass
class ReplayTimer:
    """Plays one entry back; implements ``measure.Timer``."""

    trials: Mapping[CandidateKey, Trial]
    clock: VirtualClock
    noise: float
    rng: random.Random
    compiled: set[CandidateKey] = field(default_factory=set)

    def prepare(self, candidate: Candidate) -> Timing:
        """The recorded timing, after the time that compiling takes.

        Raises:
            CandidateError: the candidate failed when it was recorded, or was not recorded.
        """
        key = candidate.as_key()
        trial = self.trials.get(key)
        if key not in self.compiled:
            self.compiled.add(key)
            self.clock.advance(_compile_seconds(trial))
        outcome = outcome_of(trial)
        if isinstance(outcome, Failure):
            raise CandidateError(outcome)
        return outcome

    def sample(self, handle: Timing, seconds: float) -> list[float]:
        """Values whose percentiles are those that were recorded."""
        self.clock.advance(seconds)
        shift = 1 + self.noise * self.rng.gauss(0, 1)
        values = [handle.p20] * 3 + [handle.p50] * 3 + [handle.p80] * 3
        return [value * shift for value in values]

    def note(self, handle: Timing) -> str:
        """Nothing to say."""
        return ""

    def close(self) -> None:
        """Nothing to free."""


class ReplayLab:
    """Plays recorded entries back; implements ``measure.Lab``.

    Args:
        entries: of one device.
        clock: what compiling and sampling advance.
        noise: relative standard deviation by which each round of samples is shifted.
        seed: of the noise.

    Raises:
        ArgumentValueError: there is no entry, or they are of several devices.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        *,
        clock: VirtualClock | None = None,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.clock = clock or VirtualClock()
        self.noise = noise
        self.seed = seed
        self._entries = {_problem_key(e.operator, e.problem): e for e in entries}
        devices = {recorded_device(entry) for entry in self._entries.values()}
        if len(devices) != 1:
            raise bad_value("entries", "entries of one device", f"{len(devices)} devices")
        (self.facts,) = devices

    def timer(self, operator: Operator, problem: Problem, policy: Policy, seed: int) -> ReplayTimer:
        """Start timing a problem."""
        trials = self._trials(operator, problem)
        rng = random.Random(f"{self.seed} {seed} {problem}")
        return ReplayTimer(trials, self.clock, self.noise, rng)

    def checker(
        self, operator: Operator, problem: Problem, seed: int
    ) -> Callable[[Candidate], Accuracy]:
        """Verdicts as they were recorded; a candidate that was never checked passes."""
        trials = self._trials(operator, problem)

        def check(candidate: Candidate) -> Accuracy:
            trial = trials.get(candidate.as_key())
            error = trial.max_error if trial is not None and trial.max_error is not None else 0.0
            wrong = trial is not None and trial.status == Status.NUMERIC
            return Accuracy(error, error / 2 if wrong else max(error, 1e-6), not wrong)

        return check

    def _trials(self, operator: Operator, problem: Problem) -> Mapping[CandidateKey, Trial]:
        entry = self._entries.get(_problem_key(operator.name, problem.fields()))
        if entry is None:
            raise bad_value("problem", "a recorded problem", str(problem))
        return recorded_trials(entry)


def _problem_key(operator: str, fields: Mapping[str, Field]) -> str:
    return digest([operator, dict(fields)])


def _compile_seconds(trial: Trial | None) -> float:
    recorded: Any = getattr(trial, "compile_s", None)
    return COMPILE_SECONDS if recorded is None else float(recorded)


@dataclass(frozen=True)
class Point:
    """The best that was known at some moment of a search."""

    seconds: float
    configs: int
    best_us: float


@dataclass(frozen=True)
class Curve:
    """Best-so-far of one strategy on one recorded problem.

    Attributes:
        strategy, seed: which search.
        operator, problem: of the entry.
        points: one for every improvement, and one for the end.
        optimum_us: the fastest that was recorded.
    """

    strategy: StrategyName
    seed: int
    operator: str
    problem: Mapping[str, Field]
    points: tuple[Point, ...]
    optimum_us: float

    def regret(self, *, seconds: float = math.inf, configs: float = math.inf) -> float:
        """Best so far over the optimum at a moment; infinite before the first timing."""
        best = math.inf
        for point in self.points:
            if point.seconds <= seconds and point.configs <= configs:
                best = min(best, point.best_us)
        return best / self.optimum_us


def play(
    entry: Entry,
    strategy: StrategyName,
    *,
    effort: Effort = Effort.FULL,
    budget: Budget | None = None,
    nearest: Sequence[CandidateKey] = (),
    seed: int = 0,
    jobs: int = 1,
    measure_s: float = MEASURE_SECONDS,
) -> Curve:
    """Run one strategy on a recorded entry.

    A batch is compiled by ``jobs`` workers, first come first served, and each candidate is measured
    once it is compiled and the GPU is free.
    """
    found = recorded_space(entry)
    trials = recorded_trials(entry)
    clock = VirtualClock()
    points: list[Point] = []
    tried = 0

    def evaluate(batch: Sequence[Candidate]) -> Iterator[tuple[Candidate, Outcome]]:
        nonlocal tried
        free = [clock.now] * jobs
        ready: list[tuple[float, int, Candidate]] = []
        for index, candidate in enumerate(batch):
            done = heapq.heappop(free) + _compile_seconds(trials.get(candidate.as_key()))
            heapq.heappush(free, done)
            ready.append((done, index, candidate))
        for done, _, candidate in sorted(ready):
            clock.now = max(clock.now, done)
            outcome = outcome_of(trials.get(candidate.as_key()))
            tried += 1
            if isinstance(outcome, Timing):
                clock.advance(measure_s)
                if not points or outcome.p50 < points[-1].best_us:
                    points.append(Point(clock.now, tried, outcome.p50))
            yield candidate, outcome

    search(
        make_strategy(strategy, found, effort, nearest=nearest, seed=seed),
        evaluate,
        budget,
        clock=clock,
    )
    if points:
        points.append(Point(clock.now, tried, points[-1].best_us))
    recorded = [trial.timing.p50 for trial in trials.values() if trial.timing is not None]
    return Curve(strategy, seed, entry.operator, dict(entry.problem), tuple(points), min(recorded))


def compare_strategies(
    entries: Iterable[Entry],
    strategies: Sequence[StrategyName] = (
        StrategyName.RANDOM,
        StrategyName.MODEL,
        StrategyName.DESCENT,
        StrategyName.EXHAUSTIVE,
    ),
    *,
    effort: Effort = Effort.FULL,
    budget: Budget | None = None,
    nearest: Callable[[Entry], Sequence[CandidateKey]] | None = None,
    seeds: Sequence[int] = range(5),
    jobs: int = 1,
    measure_s: float = MEASURE_SECONDS,
) -> tuple[Curve, ...]:
    """Best-so-far curves of strategies on recorded problems; entries without a timing are left out.

    Args:
        entries: with trials of all candidates, as ``--effort full`` records them.
        strategies: which to compare.
        effort: how much of each space.
        budget: of each search, on the virtual clock.
        nearest: seeds for an entry's search, such as winners of the other entries.
        seeds: each strategy is run with each of them.
        jobs: workers that compile.
        measure_s: seconds that measuring one candidate takes.
    """
    return tuple(
        play(
            entry,
            strategy,
            effort=effort,
            budget=budget,
            nearest=nearest(entry) if nearest is not None else (),
            seed=seed,
            jobs=jobs,
            measure_s=measure_s,
        )
        for entry in entries
        if any(trial.timing is not None for trial in entry.trials)
        for strategy in strategies
        for seed in seeds
    )


def mean_regret(
    curves: Iterable[Curve], *, seconds: float = math.inf, configs: float = math.inf
) -> Mapping[StrategyName, float]:
    """Geometric mean over problems and seeds of best-so-far over the optimum, by strategy."""
    logs: dict[StrategyName, list[float]] = {}
    for curve in curves:
        value = curve.regret(seconds=seconds, configs=configs)
        logs.setdefault(curve.strategy, []).append(math.log(value))
    return {name: math.exp(sum(values) / len(values)) for name, values in logs.items()}
