"""Recorded tables that nobody recorded: conv2d problems with smooth, noisy, repeatable timings."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from autotune_fakes import Aten, Fine, PlaybackLab, Scale, table_of

import tritonconv  # noqa: F401  # registers the operators
from tritonconv.autotune.roofline import floor_us
from tritonconv.autotune.search import Status
from tritonconv.autotune.space import Candidate, space
from tritonconv.autotune.store import Store, elect
from tritonconv.autotune.suites import load_suite
from tritonconv.runtime.device import DeviceFacts, nominal_device
from tritonconv.runtime.operators import Operator, Problem, get_operator, register
from tritonconv.runtime.tables import Entry, Timing, Trial, environment

H100 = nominal_device("sm_90")


def timing(p50: float, spread: float = 0.005, count: int = 100) -> Timing:
    """A timing with percentiles around its median."""
    return Timing(round(p50, 4), round(p50 * (1 - spread), 4), round(p50 * (1 + spread), 4), count)


def trial(
    algorithm: str,
    config: Mapping[str, int],
    p50: float | None,
    status: str = Status.OK,
    reason: str = "",
) -> Trial:
    """A trial, failed when it has no time."""
    return Trial(algorithm, config, status, reason, None if p50 is None else timing(p50))


def entry(
    trials: Iterable[Trial],
    *,
    operator: str = "fake.scale",
    problem: Mapping[str, Any] | None = None,
    sources: Mapping[str, str] | None = None,
    created: str = "2026-11-20T10:00:00+00:00",
    device: DeviceFacts = H100,
) -> Entry:
    """An entry whose winner is elected from its trials, the first being the default."""
    listed = tuple(trials)
    draft = Entry(
        operator=operator,
        problem=dict(problem or {"size": 64, "dtype": "float32"}),
        sources=sources or {trial.algorithm: "source-1" for trial in listed},
        policy="graph-cold",
        environment=environment(device).as_dict(),
        default=listed[0],
        best=listed[0],
        trials=listed,
        recorded={"created": created},
    )
    elected = elect(draft)
    return elected if elected is not None else draft


def _unit(*parts: Any) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    text = " ".join(map(str, parts)).encode()
    return int(hashlib.sha256(text).hexdigest()[:12], 16) / 16**12


def time_of(problem: Problem, candidate: Candidate) -> float:
    """A bowl over the logarithms of the parameters, its bottom moving with the sizes; µs."""
    floor = floor_us(problem, H100) or 10.0
    if candidate.algorithm == "aten":
        return floor * (1.4 + 0.7 * _unit("aten", problem)) + 4
    total = 0.0
    size = math.log2(problem.flops()) / 40
    for name, value in candidate.config.as_dict().items():
        level = math.log2(max(value, 1))
        bottom = (4 + 3 * size if "block" in name.lower() else 2.2) + _unit(name, problem) * 0.8
        total += 0.06 * (level - bottom) ** 2
    jitter = 0.15 * _unit(candidate, problem.fields().get("in_channels"))
    return floor * (1.25 + total + jitter) + 3


def record(
    operator: Operator, problem: Problem, *, seed: int = 0, most: int = 1000, noise: float = 0.006
) -> Entry:
    """Tune a problem on nothing: the time of every candidate with a run's noise."""
    rng = random.Random(f"{seed} {problem}")
    candidates = space(operator, problem, H100).candidates[:most]
    times = {c: time_of(problem, c) * math.exp(rng.gauss(0, noise)) for c in candidates}
    finalists = {candidates[0], *sorted(times, key=lambda c: times[c])[:5]}
    trials = []
    for candidate in candidates:
        config = candidate.config.as_dict()
        if _unit("fails", candidate, problem) < 0.04:
            trials.append(Trial(candidate.algorithm, config, Status.COMPILE, "out of resources"))
            continue
        status = Status.OK if candidate in finalists else Status.TIMED
        spread = noise if status is Status.OK else 2 * noise
        trials.append(
            Trial(candidate.algorithm, config, status, "", timing(times[candidate], spread))
        )
    return entry(
        trials,
        operator=operator.name,
        problem=problem.fields(),
        sources=operator.source_hashes(),
        created=f"2026-11-{20 + seed % 3}T10:00:00+00:00",
    )


def pairs(suite: str, part: str = "") -> Iterator[tuple[Operator, Problem]]:
    """The problems of a packaged suite whose names begin with ``part``."""
    loaded = load_suite(suite)
    for name in loaded.operators:
        operator = get_operator(name)
        for row in loaded.rows(operator=name):
            if row["name"].startswith(part):
                yield operator, operator.parse(row)


def fill(root: Path, entries: Iterable[Entry]) -> Store:
    """A store in a cache directory."""
    store = Store(root / "tuned")
    for one in entries:
        store.save(environment(H100), one)
    return store


def playback_lab() -> PlaybackLab:
    """A laboratory that plays times of the fake operator back; for processes of their own too."""
    register(Scale(Fine(), Aten()))
    return PlaybackLab(table_of({("fine", 2): 5.0, ("fine", 3): 5.02, ("aten", 0): 9.0}))
