"""What lookups would answer, as data: to compare the tables of several processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.operators import Operator, get_operator, operator_names
from tritonconv.runtime.tables import Entry, tuned_table

from .space import describe


def known_operators() -> list[Operator]:
    """Registered operators and the decorated kernels of this process, by name."""
    found = {name: get_operator(name) for name in operator_names()}
    tuning = sys.modules.get(f"{__package__}.foreign_tuning")
    if tuning is not None:
        found |= {operator.name: operator for operator in tuning.decorated_operators()}
    return [found[name] for name in sorted(found)]


def answers(operators: Sequence[Operator], device: DeviceFacts) -> dict[str, str]:
    """The winner of every tuned problem, by the problem in words."""
    table = tuned_table(device)
    found: dict[str, str] = {}
    for operator in operators:
        for located in table.effective(operator, table.environment):
            best = located.entry.best
            found[in_words(located.entry)] = describe(best.algorithm, best.config)
    return found


def in_words(entry: Entry) -> str:
    """An entry's problem: ``conv2d.forward {"batch": 8, ...}``."""
    return f"{entry.operator} {json.dumps(dict(entry.problem), sort_keys=True)}"


def differences(tables_of_ranks: Sequence[Mapping[str, str]]) -> list[str]:
    """One line for every problem on whose winner some tables disagree.

    Example:
        >>> differences([{"scale 7": "a"}, {"scale 7": "b"}, {"scale 7": "a"}])
        ['scale 7: a (ranks 0, 2), b (rank 1)']
    """
    lines = []
    for name in sorted(set().union(*tables_of_ranks)):
        ranks: dict[str, list[str]] = {}
        for rank, table in enumerate(tables_of_ranks):
            ranks.setdefault(table.get(name, "no entry"), []).append(str(rank))
        if len(ranks) > 1:
            said = [
                f"{answer} (rank{'s' if len(who) > 1 else ''} {', '.join(who)})"
                for answer, who in ranks.items()
            ]
            lines.append(f"{name}: {', '.join(said)}")
    return lines
