"""Which candidates to try, in which order, and when to stop.

A strategy is asked for a batch of candidates and told what became of them; a batch can be compiled
in parallel, and the first one is known before anything is measured. Nothing here knows a GPU:
:func:`search` drives any ``evaluate`` function, a measurement or the playback of a recorded table.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from tritonconv.runtime.errors import bad_value
from tritonconv.runtime.tables import Timing

from .space import PYTORCH_ALGORITHM, Candidate, CandidateKey, Space

EXHAUSTIVE_LIMIT = 32
QUICK_LIMIT = 32
BATCH = 16
EXPLORED_SHARE = 0.15
"""Share of candidates that are picked at random, because models are wrong somewhere."""

_NEAREST_SEEDS = 8
_MODEL_SEEDS = 6
_SLACK = 1.1  # a config this much slower than the best is still worth a look around it
_GAIN = 0.98  # a restart that gains less than this was in vain


class Effort(StrEnum):
    """How much of a space to try.

    ``none``: the first config of every algorithm. ``quick``: at most 32 candidates, fewer where a
    search ends earlier. ``full``: everything that the budget allows, the most promising first.
    """

    NONE = "none"
    QUICK = "quick"
    FULL = "full"


class Status(StrEnum):
    """Fate of a candidate; the values are written to tuned entries."""

    OK = "ok"
    """Accepted numerically and timed with the finalists: may win."""
    TIMED = "timed"
    """Timed in the first round only."""
    CONSTRAINT = "constraint"
    COMPILE = "compile"
    COMPILE_TIMEOUT = "compile_timeout"
    LAUNCH = "launch"
    RUN_TIMEOUT = "run_timeout"
    CRASH = "crash"
    """The process that ran it died, or its GPU context broke."""
    NUMERIC = "numeric"


@dataclass(frozen=True)
class Failure:
    """Why a candidate has no timing."""

    status: Status
    reason: str


Outcome = Timing | Failure


@dataclass(frozen=True)
class Budget:
    """Limits of one search; None is no limit."""

    seconds: float | None = None
    configs: int | None = None


class StrategyName(StrEnum):
    """How the candidates of a space are gone through; all begin with the default and the heads.

    ``auto``: exhaustive up to 32 candidates, descent beyond. ``exhaustive``: all, in order,
    whatever the effort. ``random``: in a seeded order. ``model``: as the hardware model predicts,
    with a share of random ones. ``descent``: from the default, winners of the nearest tuned
    problems, the model's best and random seeds to better neighbours, until none is better.
    """

    AUTO = "auto"
    EXHAUSTIVE = "exhaustive"
    RANDOM = "random"
    MODEL = "model"
    DESCENT = "descent"


LARGE_SPACE_STRATEGY = StrategyName.DESCENT
"""What ``auto`` takes beyond 32 candidates (docs/benchmarks compares them)."""


class Strategy(Protocol):
    """Proposes candidates, batch by batch."""

    @property
    def planned(self) -> int:
        """At most so many candidates are asked for in all."""
        ...

    def ask(self) -> tuple[Candidate, ...]:
        """The next batch, most promising first; empty when the search is over.

        Asked again before it is told, a strategy repeats its batch.
        """
        ...

    def tell(self, outcomes: Sequence[tuple[Candidate, Outcome]]) -> None:
        """What became of the batch, or of a part of it; the next batch follows."""
        ...


class _Batches(ABC):
    """What all strategies share: batches, a limit, and no candidate twice."""

    def __init__(self, space: Space, limit: int) -> None:
        self.space = space
        self.planned = min(limit, len(space.candidates))
        self._asked: set[CandidateKey] = set()
        self._batch: tuple[Candidate, ...] | None = None

    def ask(self) -> tuple[Candidate, ...]:
        if self._batch is None:
            batch: dict[CandidateKey, Candidate] = {}
            room = self.planned - len(self._asked)
            for candidate in self._propose() if room > 0 else ():
                key = candidate.as_key()
                if key not in self._asked and len(batch) < room:
                    batch.setdefault(key, candidate)
            self._asked.update(batch)
            self._batch = tuple(batch.values())
        return self._batch

    def tell(self, outcomes: Sequence[tuple[Candidate, Outcome]]) -> None:
        self._batch = None

    @abstractmethod
    def _propose(self) -> Iterable[Candidate]:
        """Candidates of the next batch; those asked for already are left out of it."""

    def _unasked(self) -> list[Candidate]:
        return [c for key, c in self.space.by_key.items() if key not in self._asked]


class _Listed(_Batches):
    """A plan that does not depend on outcomes."""

    def __init__(self, space: Space, limit: int, candidates: Iterable[Candidate]) -> None:
        super().__init__(space, limit)
        self._plan = list({c.as_key(): c for c in candidates}.values())

    def _propose(self) -> Iterable[Candidate]:
        count = max(BATCH, len(self.space.heads)) if not self._asked else BATCH
        taken, self._plan = self._plan[:count], self._plan[count:]
        return taken


class _Descent(_Batches):
    """Look around the best config until none around it is better; then once more elsewhere."""

    def __init__(
        self,
        space: Space,
        limit: int,
        nearest: Sequence[Candidate],
        rng: random.Random,
        exhaust: bool,
    ) -> None:
        super().__init__(space, limit)
        self._exhaust = exhaust
        self._shuffled = list(space.candidates)
        rng.shuffle(self._shuffled)
        self._by_model = model_order(space) if space.predicted else self._shuffled
        self._seeds = [*_openings(space, nearest[:_NEAREST_SEEDS]), *space.plausible]
        self._position = {key: index for index, key in enumerate(space.by_key)}
        self._times: dict[CandidateKey, float] = {}
        self._around: set[tuple[int, CandidateKey]] = set()
        self._before_restart: float | None = None

    def tell(self, outcomes: Sequence[tuple[Candidate, Outcome]]) -> None:
        super().tell(outcomes)
        for candidate, outcome in outcomes:
            if isinstance(outcome, Timing):
                self._times[candidate.as_key()] = outcome.p50

    def _propose(self) -> Iterable[Candidate]:
        if not self._asked:
            return [*self._seeds, *self._fresh(max(BATCH - len(self._seeds), _MODEL_SEEDS))]
        batch = self._neighbourhood()
        if batch:
            return [*batch, *self._random(round(EXPLORED_SHARE * len(batch)))]
        best = min(self._times.values(), default=None)
        before, self._before_restart = self._before_restart, best
        in_vain = best is not None and before is not None and best > _GAIN * before
        if in_vain and not self._exhaust:
            return ()
        return self._fresh(BATCH)

    def _neighbourhood(self) -> list[Candidate]:
        """Untried neighbours of the best configs, of the very best first; then exchanges."""
        ranked = sorted(self._times, key=lambda key: (self._times[key], self._position[key]))
        ranked = [key for key in ranked if self._times[key] <= _SLACK * self._times[ranked[0]]]
        batch: dict[CandidateKey, Candidate] = {}
        for kind, moves in enumerate((self.space.neighbours, self.space.exchanges)):
            for key in ranked:
                if len(batch) >= BATCH:
                    break
                if (kind, key) in self._around:
                    continue
                self._around.add((kind, key))
                around = moves(self.space.by_key[key])
                fresh = [c for c in around if c.as_key() not in self._asked]
                batch |= {c.as_key(): c for c in sorted(fresh, key=self._expected)}
            if batch:
                break
        return list(batch.values())

    def _fresh(self, count: int) -> list[Candidate]:
        """The model's best that are untried, and a share of random ones."""
        explored = max(1, round(EXPLORED_SHARE * count))
        untried = (c for c in self._by_model if c.as_key() not in self._asked)
        seeds = {c.as_key() for c in self._seeds}
        chosen = [c for c in untried if self._asked or c.as_key() not in seeds]
        return [*chosen[: count - explored], *self._random(explored)]

    def _random(self, count: int) -> list[Candidate]:
        untried = (c for c in self._shuffled if c.as_key() not in self._asked)
        return [candidate for _, candidate in zip(range(count), untried, strict=False)]

    def _expected(self, candidate: Candidate) -> float:
        return self.space.predicted.get(candidate.as_key(), 0.0)


def _openings(space: Space, nearest: Sequence[Candidate]) -> list[Candidate]:
    """The default, PyTorch's kernel, the nearest winner, the other heads, the other winners.

    A search of few configs, as on the sibling of a device that was tuned, gets the likeliest.
    """
    pytorch = [head for head in space.heads if head.algorithm == PYTORCH_ALGORITHM]
    return [space.default, *pytorch, *nearest[:1], *space.heads, *nearest[1:]]


def model_order(space: Space) -> list[Candidate]:
    """The candidates as the hardware model ranks them; those it does not know in the middle."""
    known = sorted(space.predicted[key] for key in space.by_key if key in space.predicted)
    middle = known[len(known) // 2] if known else 0.0
    return sorted(
        space.candidates, key=lambda candidate: space.predicted.get(candidate.as_key(), middle)
    )


def _with_exploration(ordered: Sequence[Candidate], rng: random.Random) -> list[Candidate]:
    """The same candidates, a share of the places given to random ones."""
    queue = {candidate.as_key(): candidate for candidate in ordered}
    picks = list(queue)
    rng.shuffle(picks)
    mixed: list[Candidate] = []
    while queue:
        key = next(iter(queue))
        if rng.random() < EXPLORED_SHARE:
            while picks[-1] not in queue:
                picks.pop()
            key = picks.pop()
        mixed.append(queue.pop(key))
    return mixed


def make_strategy(
    name: StrategyName,
    space: Space,
    effort: Effort,
    *,
    nearest: Sequence[CandidateKey] = (),
    max_configs: int | None = None,
    seed: int = 0,
) -> Strategy:
    """A fresh strategy over a space; the same arguments and outcomes give the same batches.

    Args:
        name: which.
        space: the candidates of a problem.
        effort: ``none`` asks for the heads alone, ``quick`` for at most 32 candidates.
        nearest: winners of the nearest tuned problems, the first of them directly after
            the default and PyTorch's kernel; unknown ones are ignored.
        max_configs: at most so many candidates, whatever the effort.
        seed: of everything random.

    Raises:
        ArgumentValueError: ``max_configs`` is not positive.
    """
    if max_configs is not None and max_configs < 1:
        raise bad_value("max_configs", "at least 1", max_configs)
    small = len(space.candidates) <= EXHAUSTIVE_LIMIT
    if name is StrategyName.AUTO:
        name = StrategyName.EXHAUSTIVE if small else LARGE_SPACE_STRATEGY
    limit = len(space.candidates)
    if effort is Effort.NONE:
        limit = len(space.heads)
    elif effort is Effort.QUICK and name is not StrategyName.EXHAUSTIVE:
        limit = QUICK_LIMIT
    limit = min(limit, max_configs or limit)
    rng = random.Random(seed)
    near = [space.by_key[key] for key in nearest if key in space.by_key]
    if effort is Effort.NONE:
        near = []
    if name is StrategyName.DESCENT:
        return _Descent(space, limit, near, rng, exhaust=effort is Effort.FULL)
    rest = list(space.candidates)
    if name is StrategyName.RANDOM or (name is StrategyName.MODEL and not space.predicted):
        rng.shuffle(rest)
    elif name is StrategyName.MODEL:
        rest = _with_exploration(model_order(space), rng)
    return _Listed(space, limit, [*_openings(space, near), *space.plausible, *rest])


@dataclass(frozen=True)
class Searched:
    """What a search found, in the order evaluated, and whether its strategy came to an end."""

    outcomes: tuple[tuple[Candidate, Outcome], ...]
    complete: bool


Evaluate = Callable[[Sequence[Candidate]], Iterable[tuple[Candidate, Outcome]]]
"""Takes a batch and yields what becomes of its candidates, one by one, in any order."""


def search(
    strategy: Strategy,
    evaluate: Evaluate,
    budget: Budget | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Searched:
    """Evaluate what a strategy asks for until it ends or the budget is used up.

    The budget is looked at between outcomes; at least one candidate is evaluated, however small
    the budget. A batch that would pass the budget of configs is cut.
    """
    budget = budget or Budget()
    begin = clock()
    outcomes: list[tuple[Candidate, Outcome]] = []

    def room() -> int | None:
        if budget.configs is None:
            return None
        return max(budget.configs, 1) - len(outcomes)

    def late() -> bool:
        return budget.seconds is not None and clock() - begin >= budget.seconds

    while batch := strategy.ask():
        if outcomes and (room() == 0 or late()):
            return Searched(tuple(outcomes), complete=False)
        asked = batch[: room()]
        told: list[tuple[Candidate, Outcome]] = []
        ended = False
        running = iter(evaluate(asked))
        for row in running:
            told.append(row)
            outcomes.append(row)
            ended = len(told) < len(asked) and late()
            if ended:
                break
        close = getattr(running, "close", None)
        if close is not None:
            close()  # a generator may hold on to what it compiles
        strategy.tell(told)
        if ended or len(asked) < len(batch):
            return Searched(tuple(outcomes), complete=False)
    return Searched(tuple(outcomes), complete=True)


def settled(strategy: Strategy, known: Mapping[CandidateKey, Outcome]) -> bool:
    """Whether a strategy comes to its end on outcomes that are known; uses the strategy up."""
    while batch := strategy.ask():
        if any(candidate.as_key() not in known for candidate in batch):
            return False
        strategy.tell([(candidate, known[candidate.as_key()]) for candidate in batch])
    return True
