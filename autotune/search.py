"""Which candidates to try, in which order, and when to stop.

Nothing here knows a GPU: a search drives any ``evaluate`` function, a measurement or the playback
of a recorded table.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tritonconv.runtime.tables import Timing

from .space import Candidate, CandidateKey, Space

EXHAUSTIVE_LIMIT = 64
QUICK_LIMIT = 64


class Effort(StrEnum):
    """How much of a space to try.

    ``none``: the first config of every algorithm. ``quick``: everything up to 64 candidates, of a
    larger space 64. ``full``: everything that the budget allows.
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


@dataclass(frozen=True)
class Searched:
    """What a search found, in the order tried, and whether it ended before its plan did."""

    outcomes: tuple[tuple[Candidate, Outcome], ...]
    complete: bool


def schedule(
    space: Space,
    effort: Effort,
    *,
    nearest: Sequence[CandidateKey] = (),
    max_configs: int | None = None,
    seed: int = 0,
) -> tuple[Candidate, ...]:
    """The candidates to try, most promising first; the same arguments give the same list.

    The default leads, then the first config of every other algorithm (PyTorch's own kernel is one
    of them), then winners of the nearest tuned problems, then the rest: in order when all of it
    is tried, shuffled by ``seed`` when not.
    """
    by_key = {candidate.as_key(): candidate for candidate in space.candidates}
    ordered: dict[CandidateKey, Candidate] = {}

    def add(candidates: Iterable[Candidate]) -> None:
        for candidate in candidates:
            ordered.setdefault(candidate.as_key(), candidate)

    add([space.default, *space.heads])
    if effort is not Effort.NONE:
        add(by_key[key] for key in nearest if key in by_key)
        rest = [candidate for candidate in space.candidates if candidate.as_key() not in ordered]
        if len(space.candidates) > EXHAUSTIVE_LIMIT:
            random.Random(seed).shuffle(rest)
        add(rest)
    listed = tuple(ordered.values())
    if effort is Effort.QUICK:
        listed = listed[:QUICK_LIMIT]
    return listed[:max_configs]


def search(
    candidates: Sequence[Candidate],
    evaluate: Callable[[Candidate], Outcome],
    budget: Budget | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Searched:
    """Evaluate candidates in order until they or the budget are used up.

    At least one candidate is evaluated, however small the budget.
    """
    budget = budget or Budget()
    begin = clock()
    outcomes: list[tuple[Candidate, Outcome]] = []
    for candidate in candidates:
        late = budget.seconds is not None and clock() - begin >= budget.seconds
        full = budget.configs is not None and len(outcomes) >= budget.configs
        if outcomes and (late or full):
            return Searched(tuple(outcomes), complete=False)
        outcomes.append((candidate, evaluate(candidate)))
    return Searched(tuple(outcomes), complete=True)
