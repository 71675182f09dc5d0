"""What lookups would answer, as data: to compare the tables of several processes."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.operators import Operator, get_operator, operator_names
from tritonconv.runtime.tables import Entry, tuned_table

from .space import describe


def known_operators() -> list[Operator]:
    """Registered operators and the decorated kernels of this process, by name and source."""
    found = list(map(get_operator, operator_names()))
    tuning = sys.modules.get(f"{__package__}.foreign_tuning")
    if tuning is not None:
        found += tuning.decorated_operators()
    # Kernels of one name are as many as have a source of their own, in whatever order called.
    distinct = {(operator.name, operator.source_hash()): operator for operator in found}
    return [distinct[key] for key in sorted(distinct)]


def answers(operators: Sequence[Operator], device: DeviceFacts) -> dict[str, str]:
    """The winner of every tuned problem, or that it is stale, by the problem in words.

    Operators of one name are told apart by their source.
    """
    table = tuned_table(device)
    names = Counter(operator.name for operator in operators)
    found: dict[str, str] = {}
    for operator in operators:
        source = f" (source {operator.source_hash()})" if names[operator.name] > 1 else ""
        for located, serving in table.known(operator, table.environment):
            best = located.entry.best
            # Of stale ones only the problems matter: near them nothing farther serves.
            answer = describe(best.algorithm, best.config) if serving else "stale"
            found[in_words(located.entry) + source] = answer
    return found


def sources(operators: Iterable[Operator]) -> dict[str, str]:
    """The source of every algorithm, by its operator and name; of namesakes all, sorted."""
    found: dict[str, set[str]] = {}
    for operator in operators:
        for name, source in operator.source_hashes().items():
            found.setdefault(f"source of {operator.name} {name}", set()).add(source)
    return {name: ", ".join(sorted(each)) for name, each in found.items()}


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
