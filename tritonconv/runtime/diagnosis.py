"""Why a call has no tuned entry: which fields of the key differ from the nearest entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .entries import Entry, distance
from .environment import Environment
from .operators import Field, Operator, Problem
from .sources import Source

Value = Field | None
_SOURCE = "source."


@dataclass(frozen=True)
class Difference:
    """One field of the key in which a stored entry is not what a call needs."""

    field: str
    wanted: Value
    found: Value

    def __str__(self) -> str:
        if self.stale_algorithm:
            now = self.wanted or "gone"
            tuned = _shown(self.found)
            return f"the source of {self.stale_algorithm} (stale: tuned with {tuned}, now {now})"
        return f"{self.field} (wanted {_shown(self.wanted)}, found {_shown(self.found)})"

    @property
    def stale_algorithm(self) -> str:
        """The entry's winner, where what differs is its source."""
        return self.field.removeprefix(_SOURCE) if self.field.startswith(_SOURCE) else ""


@dataclass(frozen=True)
class NearMiss:
    """The entry of a source that is nearest to what a call needs; no difference is a hit."""

    source: str
    entry: Entry
    path: Path
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        what = "; ".join(map(str, self.differences)) or "nothing"
        return f"{self.source}: the nearest entry differs in {what}"


def _shown(value: Value) -> str:
    return "none" if value is None or value == "" else str(value)


def near_misses(
    env: Environment, sources: Sequence[Source], operator: Operator, problem: Problem
) -> tuple[NearMiss, ...]:
    """The nearest entry of every source that has one of the operator, of any environment.

    Near is who differs in the fewest fields, the device counting as one; then whose sizes do least.
    """
    wanted = key_fields(env.as_dict(), problem.fields())
    current = operator.source_hashes()
    found = []
    for source in sources:
        environments = (env, *source.environments())
        located = [
            row
            for place in dict.fromkeys(environments)
            for row in source.entries(place, operator.name)
        ]
        ranked = [(*_compare(wanted, current, row.entry), row.path, row.entry) for row in located]
        if ranked:
            (_, differences, path, entry) = min(ranked, key=lambda row: (row[0], str(row[2])))
            found.append(NearMiss(source.name, entry, path, differences))
    return tuple(found)


def key_fields(environment: Mapping[str, Any], problem: Mapping[str, Field]) -> dict[str, Value]:
    """What a lookup asks for, by names such as ``device.name``."""
    fields: dict[str, Value] = {}
    for name, value in environment.items():
        if isinstance(value, Mapping):
            fields.update({f"{name}.{part}": item for part, item in value.items()})
        else:
            fields[name] = value
    return {**fields, **problem}


def _compare(
    asked: Mapping[str, Value], current: Mapping[str, str], entry: Entry
) -> tuple[tuple[int, float], tuple[Difference, ...]]:
    """Of the sources only the winner's counts: no entry stops serving for what else changes."""
    winner = entry.best.algorithm
    wanted = {**asked, _SOURCE + winner: current.get(winner)}
    have: dict[str, Value] = key_fields(entry.environment, entry.problem)
    have[_SOURCE + winner] = entry.sources.get(winner)
    differences = tuple(
        Difference(name, wanted.get(name), have.get(name))
        for name in dict.fromkeys((*wanted, *have))
        if wanted.get(name) != have.get(name)
    )
    sizes = [
        (d.wanted, d.found)
        for d in differences
        if type(d.wanted) is int and type(d.found) is int and "." not in d.field
    ]
    groups = {d.field.partition(".")[0] for d in differences}
    apart = distance([a for a, _ in sizes], [b for _, b in sizes])
    return (len(groups), apart), differences


def describe_miss(
    env: Environment, sources: Sequence[Source], operator: Operator, problem: Problem
) -> str:
    """What is missing, how the nearest entries differ, and how to mend it."""
    lines = [f"{problem} has no tuned entry for {env.device.name}"]
    misses = near_misses(env, sources, operator, problem)
    lines += [f"  {miss}" for miss in misses]
    if not misses:
        lines.append(f"  no table has an entry of {operator.name}")
    known = {miss.source for miss in misses}
    empty = [source.name for source in sources if source.name not in known]
    if misses and empty:
        lines.append(f"  nothing of {operator.name} in: {', '.join(empty)}")
    lines.append(
        "  tune it (`autotune tune`, see docs/tuning.md) or unset TRITONCONV_REQUIRE_TUNED, which "
        "demands exact or bucketed entries"
    )
    return "\n".join(lines)


__all__ = ["Difference", "NearMiss", "describe_miss", "key_fields", "near_misses"]
