"""Choose a winner from timings so that repeated tuning chooses the same one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tritonconv.runtime.tables import Timing

TIE_FRACTION = 0.02
_NORMAL_P80 = 0.8416  # standard normal quantile of 0.8
_MEDIAN_FACTOR = 1.2533  # standard error of a median over that of a mean
_CONFIDENCE_95 = 1.96


def half_width(timing: Timing) -> float:
    """Half of the 95 % confidence interval of the median, from the spread of p20 to p80."""
    deviation = (timing.p80 - timing.p20) / (2 * _NORMAL_P80)
    return _CONFIDENCE_95 * _MEDIAN_FACTOR * deviation / math.sqrt(max(timing.count, 1))


def is_tied(timing: Timing, best: Timing) -> bool:
    """Whether a timing cannot be told from the best: within 2 % or the combined confidence."""
    margin = math.hypot(half_width(timing), half_width(best))
    return timing.p50 - best.p50 <= max(TIE_FRACTION * best.p50, margin)


@dataclass(frozen=True)
class Chosen:
    """The winner and all that are tied with the fastest, as positions in the given sequence."""

    winner: int
    tied: tuple[int, ...]


def choose(timings: Sequence[Timing | None]) -> Chosen | None:
    """Pick the first of those tied with the fastest.

    Args:
        timings: in the fixed order in which ties are broken, the default first; None for
            candidates that must not win.

    Returns:
        None when no candidate may win.

    Example:
        >>> from tritonconv.runtime.tables import Timing
        >>> choose([Timing(10.1, 10.0, 10.2, 50), None, Timing(10.0, 9.9, 10.1, 50)])
        Chosen(winner=0, tied=(0, 2))
    """
    eligible = [(t.p50, index) for index, t in enumerate(timings) if t is not None]
    if not eligible:
        return None
    best = timings[min(eligible)[1]]
    assert best is not None
    tied = tuple(i for i, t in enumerate(timings) if t is not None and is_tied(t, best))
    return Chosen(tied[0], tied)
