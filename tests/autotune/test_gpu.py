"""Measuring and tuning on a real GPU: ``pytest -m gpu``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from autotune_fakes import Aten, Fine, OnTorch, Scale, ScaleProblem, VariantConfig, Vector, Wrong

from tritonconv.autotune.bench import TORCH, TUNED, bench
from tritonconv.autotune.measure import (
    CandidateError,
    CudaLab,
    CudaTimer,
    Policy,
    first_round,
    take_turns,
)
from tritonconv.autotune.space import Candidate
from tritonconv.autotune.tune import Options, Result, tune
from tritonconv.runtime import tables
from tritonconv.runtime.settings import settings
from tritonconv.runtime.tables import Tier, tuned_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

LARGE = ScaleProblem(1 << 26)  # 256 MiB each way: beyond any L2
SMALL = ScaleProblem(1 << 10)


def _timer(problem: ScaleProblem, policy: Policy, *algorithms: object) -> CudaTimer:
    operator = Scale(*algorithms)  # type: ignore[arg-type]
    return CudaTimer(operator, problem, CudaLab().device, policy, 0)


def _candidate(algorithm: object, problem: ScaleProblem, index: int = 0) -> Candidate:
    config = algorithm.configs(problem, CudaLab().facts)[index]  # type: ignore[attr-defined]
    return Candidate(algorithm.name, config)  # type: ignore[attr-defined]


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("algorithm", [Vector(), Aten()], ids=lambda a: a.name)
def test_a_large_copy_runs_at_a_plausible_bandwidth(policy: Policy, algorithm: object) -> None:
    timer = _timer(LARGE, policy, algorithm)
    handle = timer.prepare(_candidate(algorithm, LARGE))
    timing = first_round(timer, handle)
    timer.close()
    assert timer.note(handle) == ""
    rate = LARGE.bytes_moved() / timing.p50 / 1e3  # GB/s
    ceiling = 1.2 * CudaLab().facts.memory_gbps
    assert 0.2 * ceiling < rate < ceiling, timing
    assert timing.p20 <= timing.p50 <= timing.p80 < 1.5 * timing.p50


def test_small_problems_are_timed_cold_without_host_time() -> None:
    algorithm = Vector()
    times = {}
    for policy in (Policy.GRAPH_COLD, Policy.GRAPH_HOT):
        timer = _timer(SMALL, policy, algorithm)
        (timing,) = take_turns(timer, [timer.prepare(_candidate(algorithm, SMALL))])
        times[policy] = timing.p50
        timer.close()
    assert times[Policy.GRAPH_HOT] <= times[Policy.GRAPH_COLD] < 12.0, times


class Uncapturable(OnTorch):
    """Waits for the device, which a graph capture forbids."""

    name = "uncapturable"

    def compute(self, x: torch.Tensor, variant: int) -> torch.Tensor:
        x.sum().item()
        return 3 * x


class Failing(OnTorch):
    """Raises as an unsupported configuration would."""

    name = "failing"
    variants = 2

    def launch(
        self, problem: ScaleProblem, config: VariantConfig, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        raise RuntimeError("not on this device")


class Swap(OnTorch):
    """Makes the output slot a tensor of its own, as PyTorch's convolution does."""

    name = "swap"

    def launch(
        self, problem: ScaleProblem, config: VariantConfig, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        tensors["y"].set_(3 * tensors["x"])


def test_what_cannot_be_captured_is_timed_by_events_and_spoils_nothing() -> None:
    odd, plain = Uncapturable(), Vector()
    timer = _timer(SMALL, Policy.GRAPH_COLD, odd, plain)
    handle = timer.prepare(_candidate(odd, SMALL))
    assert "capture failed" in timer.note(handle)
    other = timer.prepare(_candidate(plain, SMALL))
    assert timer.note(other) == ""
    timings = take_turns(timer, [handle, other])
    assert timings[0].p50 > timings[1].p50
    timer.close()


def test_a_swapped_output_does_not_reach_the_next_candidate() -> None:
    swap, plain = Swap(), Vector()
    timer = _timer(SMALL, Policy.GRAPH_COLD, swap, plain)
    before = [tensor.data_ptr() for tensor in timer.sets[0]]
    take_turns(timer, [timer.prepare(_candidate(a, SMALL)) for a in (swap, plain)])
    assert [tensor.data_ptr() for tensor in timer.sets[0]] == before
    assert torch.equal(timer.sets[0][1], 3 * timer.sets[0][0])
    timer.close()


def test_a_failing_candidate_is_a_failure_and_nothing_more() -> None:
    timer = _timer(SMALL, Policy.GRAPH_COLD, Failing())
    with pytest.raises(CandidateError, match="not on this device"):
        timer.prepare(_candidate(Failing(), SMALL))
    timer.close()


def test_tuning_stores_a_right_and_fast_config_and_bench_agrees(cache: Path) -> None:
    operator = Scale(Vector(), Fine(), Wrong(), Failing(), Aten())
    problems = [ScaleProblem(1 << 20), ScaleProblem(1000, "bfloat16")]
    reports = tune(operator, problems)
    for report in reports:
        assert report.result is Result.TUNED and report.entry is not None
        assert report.entry.best.algorithm not in ("wrong", "failing")
        assert report.failures()["launch"] == 2 and report.entry.best.max_error is not None
        speedup = report.speedup()
        assert speedup is not None and speedup > 0.97
    assert [r.result for r in tune(operator, problems)] == [Result.KEPT, Result.KEPT]
    table = tuned_table(CudaLab().facts)
    assert table.lookup(operator, problems[0]).tier is Tier.EXACT
    for comparison in bench([(operator, problem) for problem in problems]):
        ratio = comparison.versus(TORCH)
        assert ratio is not None and ratio > 0.9, comparison
        assert comparison.timing(TUNED) is not None


def test_repeated_tuning_agrees(cache: Path) -> None:
    operator = Scale(Vector(), Aten())
    winners = set()
    for _ in range(3):
        (report,) = tune(operator, [ScaleProblem(1 << 22)], options=Options(force=True))
        assert report.entry is not None
        winners.add((report.entry.best.algorithm, tuple(report.entry.best.config.items())))
    assert len(winners) == 1


def test_tuning_on_the_spot_under_autocast(cache: Path) -> None:
    operator, facts = Scale(Vector(), Aten()), CudaLab().facts
    with settings.override(autotune="tune"), torch.autocast("cuda", torch.bfloat16):
        choice = tables.choose(operator, SMALL, facts)
    assert choice.tier is Tier.EXACT
