"""Where a search in a large space begins: what won for problems like this one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.operators import Field, Operator, Problem
from tritonconv.runtime.sources import operator_folder, read_located
from tritonconv.runtime.tables import Environment, Tier, tuned_table

from .space import CandidateKey, candidate_key
from .store import Store, trial_key

_MOST = 8
_LIMIT = 16384
_Parsed = tuple[Mapping[str, Field], CandidateKey]
_parsed: dict[tuple[Path, int, int], _Parsed | None] = {}
"""Problem and winner of a file by path, time and size; None when it is no entry."""


def _winner(path: Path) -> _Parsed | None:
    try:
        status = path.stat()
    except OSError:
        return None
    key = (path, status.st_mtime_ns, status.st_size)
    if key not in _parsed:
        if len(_parsed) >= _LIMIT:
            _parsed.clear()
        entry = read_located(path)
        _parsed[key] = None if entry is None else (entry.problem, trial_key(entry.best))
    return _parsed.get(key)


def nearest_winners(
    store: Store, env: Environment, operator: str, fields: Mapping[str, Field]
) -> tuple[CandidateKey, ...]:
    """Winners of the stored problems most like this one: seeds of a search in a large space.

    Problems are ranked by the number of differing strings, then by log distance of their sizes.
    """
    rows = []
    for path in sorted(operator_folder(store.root, env, operator).glob("*.json")):
        parsed = _winner(path)
        if parsed is None:
            continue
        other, winner = parsed
        differing, distance = 0, 0.0
        for name in fields.keys() | other.keys():
            mine, theirs = fields.get(name), other.get(name)
            if type(mine) is int and type(theirs) is int:
                distance += (math.log2(max(mine, 1)) - math.log2(max(theirs, 1))) ** 2
            elif mine != theirs:
                differing += 1
        rows.append((differing, distance, path.name, winner))
    rows.sort(key=lambda row: row[:3])
    return tuple(dict.fromkeys(key for *_, key in rows))[:_MOST]


def served_now(
    operator: Operator, problem: Problem, device: DeviceFacts
) -> tuple[CandidateKey, ...]:
    """What the tables would run today, the packaged ones and those of a like device included.

    It is the one to beat: on a device that was never tuned it is what won on its sibling, so that
    a short search begins where that one ended. None where it is the default anyway.
    """
    choice = tuned_table(device).lookup(operator, problem)
    if choice.tier is Tier.DEFAULT:
        return ()
    return (candidate_key(choice.algorithm, choice.config.as_dict()),)
