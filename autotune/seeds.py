"""Where a search in a large space begins: what won for problems like this one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tritonconv.runtime.operators import Field
from tritonconv.runtime.tables import Environment

from .space import CandidateKey
from .store import Store, trial_key

_MOST = 8


def nearest_winners(
    store: Store, env: Environment, operator: str, fields: Mapping[str, Field]
) -> tuple[CandidateKey, ...]:
    """Winners of the stored problems most like this one: seeds of a search in a large space.

    Problems are ranked by the number of differing strings, then by log distance of their sizes.
    """
    rows = []
    for stored in store.entries(env, operator):
        other = stored.entry.problem
        differing, distance = 0, 0.0
        for name in fields.keys() | other.keys():
            mine, theirs = fields.get(name), other.get(name)
            if type(mine) is int and type(theirs) is int:
                distance += (math.log2(max(mine, 1)) - math.log2(max(theirs, 1))) ** 2
            elif mine != theirs:
                differing += 1
        rows.append((differing, distance, stored.path.name, trial_key(stored.entry.best)))
    rows.sort(key=lambda row: row[:3])
    return tuple(dict.fromkeys(key for *_, key in rows))[:_MOST]
