"""What tuning is asked for, what it says while it works, and what it reports in the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tritonconv.runtime.errors import TritonConvError
from tritonconv.runtime.operators import Problem
from tritonconv.runtime.tables import Entry, Trial

from .measure import Policy
from .search import Effort, Outcome, StrategyName
from .space import Candidate


class Check(StrEnum):
    """Which candidates are compared with float64: nothing unchecked can win either way."""

    FINALISTS = "finalists"
    ALL = "all"


@dataclass(frozen=True)
class Options:
    """How to tune.

    Attributes:
        effort: how much of each space to try.
        strategy: in which order, and what follows from what was seen.
        max_configs: at most so many candidates per problem.
        policy: how candidates are timed.
        check: which candidates are checked numerically.
        seed: of the order in large spaces and of the tensors.
        force: time everything again and replace the entry.
    """

    effort: Effort = Effort.QUICK
    strategy: StrategyName = StrategyName.AUTO
    max_configs: int | None = None
    policy: Policy = Policy.GRAPH_COLD
    check: Check = Check.FINALISTS
    seed: int = 0
    force: bool = False


class Result(StrEnum):
    """What became of one problem."""

    TUNED = "tuned"
    KEPT = "kept"
    FAILED = "failed"
    PENDING = "pending"


@dataclass(frozen=True)
class Report:
    """The outcome for one problem.

    Attributes:
        operator: its name.
        problem: what was tuned.
        result: ``tuned`` now, ``kept`` because an earlier run had done it, ``failed`` because no
            candidate passed (the default stays in use), ``pending`` because the budget was used up.
        entry: what is stored now.
        path: the file.
        space_size: candidates in the space.
        measured: candidates evaluated in this run.
        complete: the plan was finished within the budget.
        rejected: candidates that failed, with status and reason.
        wall_s: seconds taken.
        reason: why the problem as a whole failed.
    """

    operator: str
    problem: Problem
    result: Result
    entry: Entry | None
    path: Path | None
    space_size: int
    measured: int
    complete: bool
    rejected: tuple[Trial, ...]
    wall_s: float
    reason: str = ""

    def speedup(self) -> float | None:
        """Time of the default over that of the winner."""
        if self.entry is None or self.entry.default.timing is None:
            return None
        assert self.entry.best.timing is not None
        return self.entry.default.timing.p50 / self.entry.best.timing.p50

    def failures(self) -> Mapping[str, int]:
        """Number of rejected candidates by failure class."""
        return dict(Counter(trial.status for trial in self.rejected))


class Progress:
    """What happens during tuning; override what you want to show."""

    def begin(self, problems: int) -> None:
        """Tuning starts."""

    def problem(self, index: int, problem: Problem, planned: int) -> None:
        """A problem starts; ``planned`` candidates are still to be evaluated."""

    def candidate(self, candidate: Candidate, outcome: Outcome) -> None:
        """A candidate was timed for the first time, or failed."""

    def finalists(self, count: int) -> None:
        """The best few are checked and timed in turns."""

    def end(self, report: Report) -> None:
        """A problem is finished and its entry written."""


class TuningInterrupted(KeyboardInterrupt):
    """Ctrl-C during tuning; ``reports`` holds the problems that were finished."""

    def __init__(self, reports: Sequence[Report]) -> None:
        super().__init__("tuning was interrupted")
        self.reports = tuple(reports)


class TuningStoppedError(TritonConvError):
    """Tuning cannot go on in this process; ``reports`` holds the problems that were finished."""

    def __init__(self, reports: Sequence[Report], cause: Exception) -> None:
        super().__init__(str(cause))
        self.reports = tuple(reports)
