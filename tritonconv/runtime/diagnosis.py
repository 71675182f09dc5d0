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


@dataclass(frozen=True)
class Difference:
    """One field of the key in which a stored entry is not what a call needs."""

    field: str
    wanted: Value
    found: Value

    def __str__(self) -> str:
        if self.field == "source_hash":
            return f"kernel sources (stale: tuned with {self.found}, now {self.wanted})"
        return f"{self.field} (wanted {_shown(self.wanted)}, found {_shown(self.found)})"


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
    wanted = key_fields(env.as_dict(), operator.source_hash(), problem.fields())
    found = []
    for source in sources:
        environments = (env, *source.environments())
        located = [
            row
            for place in dict.fromkeys(environments)
            for row in source.entries(place, operator.name)
        ]
        ranked = [(*_compare(wanted, row.entry), row.path, row.entry) for row in located]
        if ranked:
            (_, differences, path, entry) = min(ranked, key=lambda row: (row[0], str(row[2])))
            found.append(NearMiss(source.name, entry, path, differences))
    return tuple(found)


def key_fields(
    environment: Mapping[str, Any], source_hash: str, problem: Mapping[str, Field]
) -> dict[str, Value]:
    """All that identifies an entry for a lookup, by names such as ``device.name``."""
    fields: dict[str, Value] = {}
    for name, value in environment.items():
        if isinstance(value, Mapping):
            fields.update({f"{name}.{part}": item for part, item in value.items()})
        else:
            fields[name] = value
    return {**fields, "source_hash": source_hash, **problem}


def _compare(
    wanted: Mapping[str, Value], entry: Entry
) -> tuple[tuple[int, float], tuple[Difference, ...]]:
    have = key_fields(entry.environment, entry.source_hash, entry.problem)
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
