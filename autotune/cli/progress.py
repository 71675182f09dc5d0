"""Progress of tuning on stderr: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from tritonconv.runtime.operators import Problem

from ..search import Failure, Outcome
from ..space import Candidate
from ..tune import Progress, Report, Result


def outcome_line(report: Report) -> str:
    """One finished problem in one line."""
    if report.result is Result.KEPT:
        return f"{report.problem}: already tuned"
    if report.result is Result.PENDING:
        return f"{report.problem}: not reached within the budget"
    if report.reason:
        return f"{report.problem}: failed: {report.reason}"
    failed = sum(report.failures().values())
    rejected = f", {failed} rejected" if failed else ""
    if report.entry is None or report.entry.best.timing is None:
        return f"{report.problem}: no candidate passed{rejected}; the default stays"
    best = report.entry.best
    assert best.timing is not None
    speedup = report.speedup()
    gain = "" if speedup is None else f", {speedup:.2f}x the default"
    partial = "" if report.complete else " (budget used up)"
    return (
        f"{report.problem}: {best.algorithm} {best.timing.p50:.1f} µs{gain}, "
        f"{report.measured} tried{rejected}{partial}"
    )


class PlainProgress(Progress):
    """One line per problem; with ``-v`` one per candidate too."""

    def __init__(self, console: Console, verbosity: int) -> None:
        self.console = console
        self.verbosity = verbosity
        self.total = 0
        self.done = 0

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def say(self, text: str) -> None:
        """Print a line without markup."""
        if self.verbosity >= 0:
            self.console.print(text, markup=False, soft_wrap=True)

    def begin(self, problems: int) -> None:
        """Tuning starts."""
        self.total = problems

    def candidate(self, candidate: Candidate, outcome: Outcome) -> None:
        """A candidate was timed or failed."""
        if self.verbosity >= 1:
            if isinstance(outcome, Failure):
                self.say(f"    {candidate}: {outcome.status}: {outcome.reason}")
            else:
                self.say(f"    {candidate}: {outcome.p50:.2f} µs")

    def end(self, report: Report) -> None:
        """A problem is finished."""
        self.done += 1
        self.say(f"[{self.done}/{self.total}] {outcome_line(report)}")


class LiveProgress(PlainProgress):
    """Two bars on a terminal, problems and candidates, with finished problems above them."""

    def __init__(self, console: Console, verbosity: int) -> None:
        super().__init__(console, verbosity)
        self.bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.problems = self.bars.add_task("problems", total=None)
        self.candidates = self.bars.add_task("candidates", total=None, visible=False)

    def __enter__(self) -> LiveProgress:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def begin(self, problems: int) -> None:
        """Tuning starts."""
        super().begin(problems)
        self.bars.update(self.problems, total=problems)

    def problem(self, index: int, problem: Problem, planned: int) -> None:
        """A problem starts."""
        self.bars.reset(self.candidates, total=planned, description=str(problem), visible=True)

    def candidate(self, candidate: Candidate, outcome: Outcome) -> None:
        """A candidate was timed or failed."""
        super().candidate(candidate, outcome)
        self.bars.advance(self.candidates)

    def end(self, report: Report) -> None:
        """A problem is finished."""
        super().end(report)
        self.bars.advance(self.problems)


def progress_on(console: Console, verbosity: int) -> PlainProgress:
    """The fitting display: live on a terminal, plain lines elsewhere, nothing when quiet."""
    if verbosity >= 0 and console.is_terminal:
        return LiveProgress(console, verbosity)
    return PlainProgress(console, verbosity)
