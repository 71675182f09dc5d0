"""The compile pool: real compilations for an H100, deadlines, deaths, and what launches find."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
from autotune_fakes import Aten, Scale, ScaleProblem, Vector
from worker_fakes import Endless, Refusing, Unbuildable, candidates

from tritonconv.autotune.compiling import CompilePool, CompileResult, Resources, default_jobs
from tritonconv.autotune.measure import runner
from tritonconv.autotune.search import Failure, Status
from tritonconv.autotune.space import Candidate
from tritonconv.runtime.device import device_facts
from tritonconv.runtime.operators import get_operator

PROBLEM = ScaleProblem(1000)


@pytest.fixture
def triton_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty disk cache of Triton's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path / "triton"


@pytest.fixture
def pool(triton_cache: Path) -> Iterator[CompilePool]:
    with CompilePool("sm_90", jobs=2) as pool:
        yield pool


def cubins(cache: Path) -> int:
    return len(list(cache.glob("*/*.cubin")))


def test_kernels_land_in_the_cache_with_their_resources(
    pool: CompilePool, triton_cache: Path
) -> None:
    operator = Scale(Vector(), Aten())
    wanted = candidates(operator, PROBLEM)[1:]
    found = dict(pool.results(operator, PROBLEM, wanted))
    assert set(found) == set(wanted)
    for candidate, outcome in found.items():
        assert isinstance(outcome, CompileResult), outcome
        if candidate.algorithm == "aten":
            assert outcome == CompileResult(Resources(), 0.0)
        else:
            assert outcome.seconds > 0 and outcome.resources.shared_bytes == 0
            assert outcome.resources.registers is None or outcome.resources.registers > 4
    assert cubins(triton_cache) == 2
    assert dict(pool.results(operator, PROBLEM, wanted)) == found
    assert pool.outcome(operator, PROBLEM, wanted[0]) == found[wanted[0]]
    assert pool.outcome(operator, ScaleProblem(7), wanted[0]) is None
    with CompilePool("sm_90", jobs=1) as other:  # finds them on disk
        again = dict(other.results(operator, PROBLEM, wanted))
    assert cubins(triton_cache) == 2
    for candidate, outcome in again.items():
        before = found[candidate]
        assert isinstance(outcome, CompileResult) and isinstance(before, CompileResult)
        assert outcome.resources == before.resources


def test_only_the_candidates_at_fault_fail(triton_cache: Path) -> None:
    operator = Scale(Endless(), Unbuildable(), Refusing(), Vector())
    wanted = candidates(operator, PROBLEM)[:4]
    begin = time.monotonic()
    with CompilePool("sm_90", jobs=2, timeout=15) as pool:
        found = {c.algorithm: outcome for c, outcome in pool.results(operator, PROBLEM, wanted)}
    assert time.monotonic() - begin < 200
    assert isinstance(found["vector"], CompileResult)
    failures = {name: value for name, value in found.items() if isinstance(value, Failure)}
    assert {name: failure.status for name, failure in failures.items()} == {
        "endless": Status.COMPILE_TIMEOUT,
        "unbuildable": Status.CRASH,
        "refusing": Status.COMPILE,
    }
    assert failures["endless"].reason == "did not compile within 15 s"
    assert "exit code 6" in failures["unbuildable"].reason
    assert cubins(triton_cache) == 1


def test_what_waits_can_be_dropped_and_asked_for_again(pool: CompilePool) -> None:
    operator = Scale(Vector())
    first, second, third = candidates(operator, PROBLEM)
    pool.submit(operator, PROBLEM, [first, second, third])
    pool.drop_pending()
    # Before the processes are up nothing has begun; what had begun is finished nevertheless.
    left = {candidate for candidate, _ in pool.results(operator, PROBLEM, [first])}
    assert left == {first}
    assert pool.outcome(operator, PROBLEM, third) is None

    waited: list[Candidate] = []
    problem = ScaleProblem(4096)
    results = pool.results(operator, problem, [first, second, third])
    thread = threading.Thread(target=lambda: waited.extend(c for c, _ in results))
    thread.start()
    thread.join(0.01)
    pool.drop_pending()
    thread.join(60)
    assert not thread.is_alive()


def test_a_closed_pool_leaves_nobody_waiting(triton_cache: Path) -> None:
    operator = Scale(Vector())
    pool = CompilePool("sm_90", jobs=1)
    pool.submit(operator, PROBLEM, candidates(operator, PROBLEM))
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(pool.results(operator, PROBLEM, candidates(operator, PROBLEM)))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="target: expected"):
        CompilePool("h100")
    assert 1 <= default_jobs() <= 32


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["conv2d.forward", "conv2d.dgrad", "conv2d.wgrad", "fake"])
def test_a_launch_compiles_nothing_after_the_pool(name: str, triton_cache: Path) -> None:
    operator = Scale(Vector()) if name == "fake" else get_operator(name)
    fields = {"in_channels": 32, "out_channels": 48, "height": 14, "kernel": 3, "padding": 1}
    fused = {"epilogue": "fused", "dtype": "bfloat16", "batch": 2}
    problem = PROBLEM if name == "fake" else operator.parse({**fields, **fused})
    facts = device_facts()
    wanted = [
        Candidate(algorithm.name, config)
        for algorithm in operator.candidates(problem)
        for config in list(algorithm.configs(problem, facts))[:3]
        # PyTorch's kernel has no plan; its epilogue is an operator of its own, compiled at a call.
        if algorithm.plan(problem, config) is not None
    ]
    with CompilePool(facts.arch, jobs=4) as pool:
        found = dict(pool.results(operator, problem, wanted))
    assert any(isinstance(outcome, CompileResult) for outcome in found.values())
    before = cubins(triton_cache)
    libraries = len(list(triton_cache.glob("*/*launcher*.so")))
    misses: list[str] = []

    def listen(*, src: object, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            misses.append(str(src))

    device = torch.device("cuda", torch.cuda.current_device())
    tensors = operator.make_tensors(problem, device, torch.Generator(device))
    listener = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = listen
    try:
        for candidate, outcome in found.items():
            if isinstance(outcome, CompileResult):
                runner(operator, problem, candidate, tuple(tensors))(tuple(tensors.values()))
        torch.cuda.synchronize()
    finally:
        triton.knobs.compilation.listener = listener
    assert misses == []
    assert cubins(triton_cache) == before > 0
    assert len(list(triton_cache.glob("*/*launcher*.so"))) == libraries
