"""Problems that ran untuned: noted while a program runs, kept in a file for the tuner.

``autotune tune --missed`` tunes exactly what the user's own programs ran. The file of an
environment is ``<cache_dir>/missed/<environment hash>.json``; processes merge what they met.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .entries import SCHEMA_VERSION, canonical, warn_once
from .environment import Environment
from .files import locked, make_folder, replace_text
from .operators import Field, Operator, Problem, get_operator, operator_names
from .settings import settings

LIMIT = 4096
"""At most so many problems are kept, in a process and in a file."""

_Key = tuple[str, str]


@dataclass(frozen=True)
class Miss:
    """One problem that ran untuned, and where."""

    environment: Environment
    operator: Operator
    problem: Problem


_missed: dict[tuple[str, str, str], Miss] = {}


def record(env: Environment, operator: Operator, problem: Problem) -> None:
    """Note a problem that ran without an exact or bucketed entry."""
    if len(_missed) < LIMIT:
        key = (env.hash, operator.name, canonical(problem.fields()))
        _missed.setdefault(key, Miss(env, operator, problem))


def noted() -> tuple[Miss, ...]:
    """What this process has met, in order."""
    return tuple(_missed.values())


def forget() -> None:
    """Drop what this process has noted."""
    _missed.clear()


def path(env: Environment) -> Path:
    """The file of an environment."""
    return Path(settings.cache_dir) / "missed" / f"{env.hash}.json"


def load(env: Environment) -> list[tuple[Operator, Problem]]:
    """Problems that programs ran untuned in an environment, in the order in which they came up.

    A problem of an operator that is not registered in this process, or whose fields the operator
    cannot make the same problem of, is left out with one warning.
    """
    pairs = []
    lost = 0
    for (name, _), fields in _read(path(env)).items():
        pair = _rebuild(name, fields)
        if pair is None:
            lost += 1
        else:
            pairs.append(pair)
    if lost:
        warn_once(f"{lost} missed problem(s) of unknown operators or fields are left out")
    return pairs


def save(env: Environment, pairs: Iterable[tuple[Operator, Problem]]) -> Path:
    """Add problems to the file of an environment; the newest 4096 stay."""

    def add(known: dict[_Key, Mapping[str, Field]]) -> dict[_Key, Mapping[str, Field]]:
        for operator, problem in pairs:
            fields = problem.fields()
            key = (operator.name, canonical(fields))
            known.pop(key, None)  # met again: it is among the newest
            known[key] = fields
        return known

    return _update(env, add)


def clear(env: Environment, pairs: Iterable[tuple[Operator, Problem]] | None = None) -> None:
    """Remove problems from the file of an environment: those that are tuned now, or all."""
    if not path(env).exists():
        return
    if pairs is None:
        path(env).unlink(missing_ok=True)
        return
    gone = {(operator.name, canonical(problem.fields())) for operator, problem in pairs}
    _update(env, lambda known: {key: known[key] for key in known if key not in gone})


def _update(env: Environment, change: Any) -> Path:
    target = path(env)
    make_folder(target.parent)
    with locked(target.parent):
        known = change(_read(target))
        rows = [
            {"operator": name, "problem": dict(fields)}
            for (name, _), fields in list(known.items())[-LIMIT:]
        ]
        head = {"schema_version": SCHEMA_VERSION, "environment": env.as_dict()}
        replace_text(target, json.dumps({**head, "problems": rows}, indent=1) + "\n")
    return target


def _read(file: Path) -> dict[_Key, Mapping[str, Field]]:
    try:
        value = json.loads(file.read_bytes())
        if value["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version {value['schema_version']!r}")
        rows = [(str(row["operator"]), dict(row["problem"])) for row in value["problems"]]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        warn_once(f"missed problems in {file.name} cannot be read and are ignored: {error}")
        return {}
    return {(name, canonical(fields)): fields for name, fields in rows}


def _rebuild(name: str, fields: Mapping[str, Field]) -> tuple[Operator, Problem] | None:
    if name not in operator_names():
        return None
    operator = get_operator(name)
    try:
        problem = operator.parse(fields)
    except (ValueError, TypeError):
        return None
    return (operator, problem) if canonical(problem.fields()) == canonical(fields) else None


__all__ = ["LIMIT", "Miss", "clear", "forget", "load", "noted", "path", "record", "save"]
