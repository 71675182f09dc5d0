"""Entries of the fake operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from autotune_fakes import ScaleProblem

from tritonconv.autotune.store import elect
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.tables import Entry, Environment, Timing, Trial, environment

DEVICE = nominal_device("sm_90")
ENV = environment(DEVICE)
SISTER = replace(ENV, device=replace(DEVICE, name="NVIDIA H200", memory_gbps=4800))
OLDER = replace(ENV, triton="3.5.0")
AMPERE = environment(nominal_device("sm_80"))


def trial(variant: int, time: float, status: str = "ok", algorithm: str = "fine") -> Trial:
    return Trial(algorithm, {"variant": variant}, status, "", Timing(time, time, time, 9), 1e-9)


def entry_of(
    *trials: Trial,
    size: int = 64,
    source: str = "source-1",
    changed: Mapping[str, str] | None = None,
    dtype: str = "float32",
    env: Environment = ENV,
    created: str = "2026-01-01T00:00:00+00:00",
    **changes: Any,
) -> Entry:
    names = ("vector", "fine", "aten", "picky", *(trial.algorithm for trial in trials))
    draft = Entry(
        operator="fake.scale",
        problem=dict(ScaleProblem(size, dtype).fields()),
        sources=dict.fromkeys(names, source) | (changed or {}),
        policy="graph-cold",
        environment=env.as_dict(),
        default=trials[0],
        best=trials[0],
        trials=trials,
        recorded={"seed": 0, "created": created},
        space_hash="space-1",
    )
    elected = elect(replace(draft, **changes))
    assert elected is not None
    return elected


def winner(variant: int, time: float = 5.0, **changes: Any) -> Entry:
    """An entry whose winner is this variant, the default taking 10 µs."""
    return entry_of(trial(0, 10.0), trial(variant, time), **changes)
