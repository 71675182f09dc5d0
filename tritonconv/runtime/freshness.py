"""What still holds of a tuned entry after a change of kernels.

An entry *serves* while its winner's algorithm has the source that was timed. When another
algorithm has changed since, or there is a new one, it is *outdated*: it serves, and tuning again
times only what differs. One whose winner has changed is *stale* and serves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .entries import Entry
from .operators import Operator, get_operator, operator_names


@dataclass(frozen=True)
class Changes:
    """How an entry's algorithms differ from those of today.

    Attributes:
        winner: the winner's algorithm, if it is another one now or gone.
        changed: the others whose source is another one now.
        added: algorithms that serve the problem and were not in the search.
    """

    winner: str = ""
    changed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    @property
    def stale(self) -> bool:
        """No lookup takes the entry."""
        return bool(self.winner)

    @property
    def outdated(self) -> bool:
        """The entry serves, but something may be faster by now."""
        return not self.winner and bool(self.changed or self.added)

    def __str__(self) -> str:
        others = (*([self.winner] if self.winner else []), *self.changed)
        parts = [f"changed: {', '.join(others)}"] if others else []
        parts += [f"new: {', '.join(self.added)}"] if self.added else []
        return "; ".join(parts)


def serves(entry: Entry, sources: Mapping[str, str]) -> bool:
    """Whether the winner's source is that of today."""
    winner = entry.best.algorithm
    return winner in sources and entry.sources.get(winner) == sources[winner]


def current_sources(operator: str) -> Mapping[str, str] | None:
    """Today's hashes of an operator's algorithms; None where it is not known here."""
    return get_operator(operator).source_hashes() if operator in operator_names() else None


def is_stale(entry: Entry) -> bool:
    """Whether the winner has changed since; that of an operator not known here has not."""
    sources = current_sources(entry.operator)
    return sources is not None and not serves(entry, sources)


def is_unfinished(entry: Entry) -> bool:
    """Whether the search behind an entry was cut short: `autotune tune` goes on with it.

    Of an entry from a bundle, which records no search, nothing is known.
    """
    return "spaces" in entry.recorded and "completed" not in entry.recorded


def changes(entry: Entry, operator: Operator | None = None) -> Changes:
    """What has changed since an entry was tuned; nothing for an operator not known here.

    Args:
        entry: what was tuned.
        operator: the entry's; the registered one when None.
    """
    if operator is None:
        if entry.operator not in operator_names():
            return Changes()
        operator = get_operator(entry.operator)
    sources, winner = operator.source_hashes(), entry.best.algorithm
    others = [name for name in sources if name != winner]
    recorded = entry.sources
    return Changes(
        "" if serves(entry, sources) else winner,
        tuple(name for name in others if name in recorded and recorded[name] != sources[name]),
        tuple(name for name in _serving(operator, entry) if name not in recorded),
    )


def _serving(operator: Operator, entry: Entry) -> tuple[str, ...]:
    """Algorithms that serve the entry's problem; none where it cannot be made any more."""
    try:
        problem = operator.parse(entry.problem)
        return tuple(algorithm.name for algorithm in operator.candidates(problem))
    except (ValueError, TypeError):
        return ()


__all__ = ["Changes", "changes", "current_sources", "is_stale", "is_unfinished", "serves"]
