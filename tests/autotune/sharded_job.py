"""What each rank of the distributed tests runs: ``sharded_job.py TASK``, one JSON line per rank."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from autotune_fakes import Fine, PlaybackLab, Scale, ScaleProblem

from tritonconv.autotune.distributed import (
    TablesDifferError,
    assert_same_tables,
    tune_sharded,
)
from tritonconv.autotune.measure import DeviceLostError
from tritonconv.autotune.store import Store
from tritonconv.autotune.tune import tune
from tritonconv.runtime import operators, tables
from tritonconv.runtime.errors import ArgumentValueError

RANK = int(os.environ["RANK"])
SIZES = (64, 128, 256, 512, 1024)


def operator() -> Scale:
    """Right in every variant; PyTorch's own is not among the candidates."""
    return Scale(Fine())


def favourite(variant: int) -> PlaybackLab:
    """A laboratory in which one variant is fastest."""
    return PlaybackLab(lambda c: 10.0 if c.config.as_dict()["variant"] == variant else 20.0)


def winners(store: Store) -> dict[str, Any]:
    return {
        str(stored.entry.problem["size"]): stored.entry.best.config["variant"]
        for stored in store.entries()
    }


def sharded(lab: PlaybackLab) -> dict[str, Any]:
    pairs = [(operator(), ScaleProblem(size)) for size in (*SIZES, 64)]
    found = tune_sharded(pairs, lab=lab)
    return {
        "tuned": [report.problem.size for report in found.reports],  # type: ignore[attr-defined]
        "table": winners(Store()),
        "fingerprint": found.fingerprint,
        "missing": found.missing,
        "lost": {str(rank): reason for rank, reason in found.lost.items()},
    }


def tune_each() -> dict[str, Any]:
    """Ranks whose favourites differ: the owner of a problem decides for all."""
    return sharded(favourite(RANK))


def tune_after_earlier_runs() -> dict[str, Any]:
    """Each rank has old entries that the others lack or have otherwise."""
    tune(operator(), [ScaleProblem(7), ScaleProblem(8 + RANK)], lab=favourite(RANK))
    return sharded(favourite(RANK))


class Dying(PlaybackLab):
    """Loses its device at the second problem."""

    def timer(self, operator: Any, problem: Any, policy: Any, seed: int) -> Any:
        if problem.size > 128:
            raise DeviceLostError("illegal access")
        return super().timer(operator, problem, policy, seed)


def one_rank_fails() -> dict[str, Any]:
    return sharded(Dying() if RANK == 1 else favourite(0))


def other_gpu() -> dict[str, Any]:
    lab = favourite(0)
    lab.facts = replace(lab.facts, name=f"GPU {RANK}")
    try:
        return sharded(lab)
    except ArgumentValueError as error:
        return {"error": str(error)}


def other_pairs() -> dict[str, Any]:
    try:
        tune_sharded([(operator(), ScaleProblem(64 + RANK))], lab=favourite(0))
    except ArgumentValueError as error:
        return {"error": str(error)}
    return {}


def same_tables() -> dict[str, Any]:
    """A job in lookup mode: equal tables, then one rank with another entry."""
    own = operator()
    operators.register(own)
    tune(own, [ScaleProblem(64), ScaleProblem(128)], lab=favourite(1))
    dist.init_process_group("gloo")
    first = assert_same_tables()
    if RANK == 1:
        tune(own, [ScaleProblem(128)], lab=favourite(2), store=Store())
        entry = next(s.entry for s in Store().entries() if s.entry.problem["size"] == 128)
        other = next(t for t in entry.trials if t.config["variant"] == 3)
        env = tables.environment(PlaybackLab().facts)
        Store().save(env, replace(entry, best=other), replace_old=True)
        tables.invalidate()
    try:
        assert_same_tables([own])
    except TablesDifferError as error:
        return {"first": first, "lines": error.lines, "text": str(error)}
    finally:
        dist.destroy_process_group()
    return {"first": first}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
