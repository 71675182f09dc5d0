"""Which problems the calls of a program meet, and when dispatch has to look up anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .operators import Operator, Problem

_epoch = 0
RECORDINGS: list[list[tuple[Operator, Problem]]] = []
"""The active recordings, innermost last."""


def epoch() -> int:
    """Changes whenever an earlier choice may no longer hold; what dispatch caches by."""
    return _epoch


def advance() -> None:
    """Make dispatch look up again."""
    global _epoch
    _epoch += 1


def note(operator: Operator, problem: Problem) -> None:
    """Tell the active recordings of a call; dispatch does so where it does not choose."""
    for met in RECORDINGS:
        met.append((operator, problem))


@contextmanager
def recording() -> Iterator[list[tuple[Operator, Problem]]]:
    """Collect the problems met inside a ``with`` block, in order, repeats possible.

    Dispatch caches are invalidated at the start, so that problems met before are met again.
    """
    met: list[tuple[Operator, Problem]] = []
    RECORDINGS.append(met)
    advance()
    try:
        yield met
    finally:
        # By identity: two recordings of the same problems compare equal.
        RECORDINGS[:] = [other for other in RECORDINGS if other is not met]


def is_recording() -> bool:
    """Whether a :func:`recording` block is active."""
    return bool(RECORDINGS)
