"""Compare two tables: which problems became faster, which slower, and which cannot be told."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from tritonconv.runtime.entries import Bundle, Entry, Timing

from .bundle import winners
from .choose import TIE_FRACTION, half_width


class Verdict(StrEnum):
    """What became of a problem's time."""

    FAST = "FAST"
    SLOW = "SLOW"
    SAME = "SAME"
    AMBIGUOUS = "AMBG"
    """The medians differ, or may, by more than 2 %, and by less than the noise."""


@dataclass(frozen=True)
class Change:
    """One problem in two tables."""

    before: Entry
    after: Entry
    verdict: Verdict

    @property
    def ratio(self) -> float:
        """Time after over time before: above 1 is slower."""
        assert self.before.best.timing is not None and self.after.best.timing is not None
        return self.after.best.timing.p50 / self.before.best.timing.p50

    @property
    def same_config(self) -> bool:
        """Whether both tables run the same kernel."""
        before, after = self.before.best, self.after.best
        return (before.algorithm, before.config) == (after.algorithm, after.config)


@dataclass(frozen=True)
class Compared:
    """Two tables.

    Attributes:
        changes: problems that both have, in a fixed order.
        removed, added: problems that only the first, or only the second, has.
    """

    changes: tuple[Change, ...]
    removed: tuple[Entry, ...]
    added: tuple[Entry, ...]

    def count(self, verdict: Verdict) -> int:
        """Number of problems with a verdict."""
        return sum(change.verdict is verdict for change in self.changes)

    def geomean(self) -> float | None:
        """Geometric mean of the ratios; None when the tables share no problem."""
        if not self.changes:
            return None
        return math.exp(sum(math.log(c.ratio) for c in self.changes) / len(self.changes))


def judge(before: Timing, after: Timing) -> Verdict:
    """Compare two timings.

    Example:
        >>> judge(Timing(10.0, 9.99, 10.01, 50), Timing(12.0, 11.99, 12.01, 50))
        <Verdict.SLOW: 'SLOW'>
    """
    gap = after.p50 - before.p50
    noise = math.hypot(half_width(before), half_width(after))
    negligible = TIE_FRACTION * before.p50
    if abs(gap) > max(negligible, noise):
        return Verdict.SLOW if gap > 0 else Verdict.FAST
    return Verdict.SAME if abs(gap) <= negligible and noise <= negligible else Verdict.AMBIGUOUS


def compare(before: Iterable[Bundle], after: Iterable[Bundle]) -> Compared:
    """Match the winners of two tables by operator, problem and policy.

    Tables of one environment each are compared whatever the environments are, so that two GPUs or
    two versions can be; otherwise environments must match, too.
    """
    tables = [list(before), list(after)]
    same = all(len(bundles) == 1 for bundles in tables)
    first, second = (
        {key[1:] if same else key: entry for key, entry in winners(bundles, _is_timed).items()}
        for bundles in tables
    )
    changes = []
    for key in sorted(first.keys() & second.keys()):
        old, new = first[key], second[key]
        assert old.best.timing is not None and new.best.timing is not None
        changes.append(Change(old, new, judge(old.best.timing, new.best.timing)))
    return Compared(
        tuple(changes),
        tuple(first[key] for key in sorted(first.keys() - second.keys())),
        tuple(second[key] for key in sorted(second.keys() - first.keys())),
    )


def _is_timed(entry: Entry) -> bool:
    return entry.best.timing is not None
