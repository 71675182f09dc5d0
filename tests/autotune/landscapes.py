"""Problems whose times are formulas over a typed space: tables for strategies to search."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from autotune_fakes import Aten, OnTorch, Scale, ScaleProblem

from tritonconv.autotune.search import Failure, Outcome, Status
from tritonconv.autotune.space import Candidate, CandidateKey, Space, space
from tritonconv.runtime.device import DeviceFacts, nominal_device
from tritonconv.runtime.operators import Config
from tritonconv.runtime.space import Choice, ConfigSpace, Constraint, Footprint, Int, PowerOfTwo
from tritonconv.runtime.tables import Entry, Timing, Trial, environment

DEVICE = nominal_device("sm_90")
PROBLEM = ScaleProblem(1000)


@dataclass(frozen=True)
class TileLike(Config):
    """A tile with warps, stages and an order."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    order: int


class Landscape(OnTorch):
    """600 configs and a smooth formula of their times, with a little ruggedness."""

    name: ClassVar[str] = "landscape"
    config_type = TileLike

    def __init__(self, best: TileLike, rough: float = 0.03, footprints: bool = True) -> None:
        self.best = best
        self.rough = rough
        self.footprints = footprints

    def space(self, problem: ScaleProblem, device: DeviceFacts) -> ConfigSpace[TileLike]:
        return ConfigSpace(
            TileLike,
            (
                Int("num_stages", 2, 4),
                PowerOfTwo("num_warps", 2, 8),
                PowerOfTwo("block_m", 32, 256),
                PowerOfTwo("block_n", 16, 256),
                PowerOfTwo("block_k", 16, 64),
                Choice("order", (8, 1)),
            ),
            (
                Constraint(
                    "accumulator",
                    "too large a tile",
                    lambda num_warps, block_m, block_n: block_m * block_n <= 4096 * num_warps,
                ),
            ),
            TileLike(64, 64, 32, 4, 3, 8),
        )

    def configs(self, problem: ScaleProblem, device: DeviceFacts) -> ConfigSpace[TileLike]:  # type: ignore[override]
        return self.space(problem, device)

    def footprint(self, problem: Any, config: TileLike, device: DeviceFacts) -> Footprint | None:
        """Right about the tile, ignorant of everything else."""
        if not self.footprints:
            return None
        tile = config.block_m * config.block_n
        return Footprint(
            programs=(1 << 24) // tile,
            threads=32 * config.num_warps,
            shared_bytes=(config.block_m + config.block_n) * config.block_k * 2 * config.num_stages,
            accumulators=tile // (32 * config.num_warps),
            bytes_loaded=(1 << 24) // tile * (config.block_m + config.block_n) * 1024,
            bytes_stored=1 << 25,
            flops=1 << 34,
            steps=1024 // config.block_k,
            in_flight=config.num_stages - 1,
        )

    def time(self, config: TileLike) -> float:
        """Microseconds: a bowl around the best in log space, and a reproducible jitter."""
        distance = 0.0
        weights = {"block_m": 0.1, "block_n": 0.1, "block_k": 0.05, "num_warps": 0.08}
        best = self.best.as_dict()
        for name, value in config.as_dict().items():
            weight = weights.get(name, 0.02)
            distance += weight * abs(math.log2(value) - math.log2(best[name]))
        # Trading height for width matters less than the area: a diagonal valley.
        area = math.log2(config.block_m * config.block_n)
        distance += 0.1 * abs(area - math.log2(self.best.block_m * self.best.block_n))
        jitter = random.Random(str(config)).uniform(0, self.rough)
        return 100.0 * (1 + distance) * (1 + jitter)


BESTS = (
    TileLike(128, 128, 64, 8, 3, 8),
    TileLike(32, 256, 32, 4, 4, 1),
    TileLike(256, 32, 64, 8, 2, 8),
    TileLike(64, 64, 16, 2, 4, 1),
)


def times_of(landscape: Landscape, *, broken: float = 0.0) -> Callable[[Candidate], Outcome]:
    """Outcomes of all candidates; a share of the landscape's configs does not compile."""

    def outcome(candidate: Candidate) -> Outcome:
        if candidate.algorithm != landscape.name:
            return timing(150.0)
        if random.Random(f"broken {candidate}").random() < broken:
            return Failure(Status.COMPILE, "no")
        return timing(landscape.time(candidate.config))  # type: ignore[arg-type]

    return outcome


def timing(p50: float) -> Timing:
    return Timing(round(p50, 4), round(p50 * 0.995, 4), round(p50 * 1.005, 4), 30)


def operator_of(landscape: Landscape) -> Scale:
    return Scale(landscape, Aten())


def space_of(landscape: Landscape) -> Space:
    return space(operator_of(landscape), PROBLEM, DEVICE)


def recorded(
    landscape: Landscape, *, broken: float = 0.0, more: Mapping[CandidateKey, Trial] | None = None
) -> Entry:
    """An entry with the trials of all candidates, as a full tuning run writes it."""
    outcome = times_of(landscape, broken=broken)
    trials = []
    for candidate in space_of(landscape).candidates:
        found = outcome(candidate)
        config = candidate.config.as_dict()
        trial = Trial(candidate.algorithm, config, "timed", timing=None)
        if isinstance(found, Failure):
            trial = Trial(candidate.algorithm, config, found.status, found.reason)
        else:
            trial = Trial(candidate.algorithm, config, "ok", timing=found)
        trials.append((more or {}).get(candidate.as_key(), trial))
    best = min((t for t in trials if t.timing), key=lambda t: t.timing.p50)  # type: ignore[union-attr]
    return Entry(
        operator="fake.scale",
        problem=dict(PROBLEM.fields()),
        sources={"landscape": "source-1", "aten": "source-1"},
        policy="graph-cold",
        environment=environment(DEVICE).as_dict(),
        default=trials[0],
        best=best,
        trials=tuple(trials),
    )
