"""Progress of tuning on stderr: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

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


@dataclass
class _Row:
    """A problem in the live table."""

    problem: str
    planned: int
    tried: int = 0
    failed: int = 0
    best: float | None = None
    winner: str = ""
    gain: str = ""
    state: str = "searching"


class LiveProgress(PlainProgress):
    """A table of the latest problems, with bars and the time that is left below it.

    Every GPU tunes from a thread of its own: a candidate belongs to the problem that its thread
    began last.
    """

    SHOWN = 10

    def __init__(self, console: Console, verbosity: int) -> None:
        super().__init__(console, verbosity)
        self.bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.problems = self.bars.add_task("problems", total=None)
        self._rows: list[_Row] = []
        self._running: dict[int, _Row] = {}
        self.live = Live(console=console, transient=True, get_renderable=self.render)

    def __enter__(self) -> LiveProgress:
        self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.live.stop()

    def render(self) -> RenderableType:
        """The table and the bars as they are now."""
        table = Table(expand=False)
        table.add_column("problem", overflow="fold")
        for name in ("tried", "failed", "best µs", "default / best"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("by", no_wrap=True)
        table.add_column("state", no_wrap=True)
        for row in list(self._rows):
            table.add_row(
                Text(row.problem),
                f"{row.tried}/{max(row.planned, row.tried)}",
                str(row.failed) if row.failed else "",
                "" if row.best is None else f"{row.best:.1f}",
                row.gain,
                row.winner,
                row.state,
            )
        return Group(table, self.bars.get_renderable())

    def begin(self, problems: int) -> None:
        """Tuning starts."""
        super().begin(problems)
        self.bars.update(self.problems, total=problems)

    def problem(self, index: int, problem: Problem, planned: int) -> None:
        """A problem starts."""
        self._add(_Row(str(problem), planned))

    def candidate(self, candidate: Candidate, outcome: Outcome) -> None:
        """A candidate was timed or failed."""
        super().candidate(candidate, outcome)
        row = self._mine()
        if row is None:
            return
        row.tried += 1
        if isinstance(outcome, Failure):
            row.failed += 1
        elif row.best is None or outcome.p50 < row.best:
            row.best, row.winner = outcome.p50, candidate.algorithm

    def finalists(self, count: int) -> None:
        """The best few are checked and timed again."""
        row = self._mine()
        if row is not None:
            row.state = f"{count} in the final"

    def end(self, report: Report) -> None:
        """A problem is finished."""
        self.done += 1
        row = self._running.pop(threading.get_ident(), None)
        if row is None:  # one that had nothing to try
            row = _Row(str(report.problem), 0)
            self._add(row, running=False)
        row.state = str(report.result) if report.complete or report.reason else "budget used up"
        if report.entry is not None and report.entry.best.timing is not None:
            row.best, row.winner = report.entry.best.timing.p50, report.entry.best.algorithm
            speedup = report.speedup()
            row.gain = "" if speedup is None else f"{speedup:.2f}x"
        if report.reason or self.verbosity >= 1:
            self.say(f"[{self.done}/{self.total}] {outcome_line(report)}")
        self.bars.advance(self.problems)

    def _mine(self) -> _Row | None:
        """The row of the problem that this thread works on."""
        row = self._running.get(threading.get_ident())
        if row is None and len(self._running) == 1:
            (row,) = self._running.values()
        return row

    def _add(self, row: _Row, *, running: bool = True) -> None:
        if running:
            self._running[threading.get_ident()] = row
        busy = list(self._running.values())
        ended = [old for old in self._rows if not any(old is one for one in busy)]
        kept = max(self.SHOWN - len(busy) - (not running), 0)
        self._rows = ended[len(ended) - min(kept, len(ended)) :] + busy + [row] * (not running)


def progress_on(console: Console, verbosity: int) -> PlainProgress:
    """The fitting display: live on a terminal, plain lines elsewhere, nothing when quiet."""
    live = console.is_terminal and not console.is_dumb_terminal
    if verbosity >= 0 and live and "RANK" not in os.environ:  # ranks share their terminal
        return LiveProgress(console, verbosity)
    return PlainProgress(console, verbosity)
