"""The experiments on the tuner itself, played back on a CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from autotune_fakes import Aten, Fine, PlaybackLab, Scale, ScaleProblem
from synthetic import fill, pairs, playback_lab, record
from typer.testing import CliRunner

from tritonconv.autotune import fresh, selfcheck
from tritonconv.autotune.cli import app
from tritonconv.autotune.fresh import Done, FreshProcessError, Job
from tritonconv.autotune.report import Options
from tritonconv.autotune.search import Effort
from tritonconv.autotune.space import Candidate, space
from tritonconv.autotune.triton_autotune import launches, tune_like_triton
from tritonconv.runtime import operators
from tritonconv.runtime.device import device_facts, nominal_device
from tritonconv.runtime.errors import ArgumentValueError
from tritonconv.runtime.operators import get_operator
from tritonconv.runtime.tables import Tier

LAB = "synthetic:playback_lab"
FOLDER = Path(__file__).parent
H100 = nominal_device("sm_90")


@pytest.fixture
def scales() -> Iterator[list[tuple[Any, Any]]]:
    """Three problems of the fake operator."""
    playback_lab()
    operator = get_operator("fake.scale")
    yield [(operator, ScaleProblem(size)) for size in (64, 100, 5000)]
    operators._OPERATORS.pop("fake.scale")


def here(job: Job) -> Done:
    """Do a job in this process, from the JSON that another would get."""
    return fresh.do(json.loads(json.dumps(job.to_json())))


def test_a_fresh_process_tunes_into_its_own_folder(
    scales: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FOLDER))
    job = Job(scales[:2], tmp_path / "cache", tmp_path / "kernels", lab=LAB)
    done = fresh.in_fresh_process(job)
    assert done.results == {"tuned": 2} and done.configs == 10 and done.seconds > 0
    assert len(list((tmp_path / "cache" / "tuned").rglob("fake.scale/*.json"))) == 2
    with pytest.raises(FreshProcessError, match="exit code 1"):
        fresh.in_fresh_process(Job(scales, tmp_path, options={"no_such": 1}, lab=LAB))


def test_options_travel_by_name() -> None:
    options = fresh.options_of({"effort": "full", "max_configs": 3, "policy": "eager"})
    assert options.effort is Effort.FULL and options.max_configs == 3
    assert options.policy == "eager" and isinstance(options.policy, type(Options().policy))
    with pytest.raises(ArgumentValueError, match="no_such"):
        fresh.options_of({"no_such": 1})


def test_stability_compares_fresh_tunes(scales: Any, tmp_path: Path) -> None:
    said: list[str] = []
    found = selfcheck.stability(scales, tmp_path, runs=3, launch=here, lab=LAB, say=said.append)
    assert found.agreement.runs == 3 and len(found.agreement.rows) == 3
    assert found.agreement.unanimous == 1.0 and len(said) == 3
    assert [folder.name for folder in found.folders] == ["run01", "run02", "run03"]


def test_regret_of_problems_never_tuned(scales: Any, tmp_path: Path) -> None:
    operator = Scale(Fine(), Aten())

    def times(candidate: Candidate) -> float:
        return {"fine": 5.0 + next(iter(candidate.config.as_dict().values())), "aten": 4.0}[
            candidate.algorithm
        ]

    base = [(operator, ScaleProblem(64)), (operator, ScaleProblem(5000))]
    others = [(operator, ScaleProblem(5001)), (operator, ScaleProblem(80, "bfloat16"))]
    found = selfcheck.regret(base, others, tmp_path, lab=PlaybackLab(times))
    bucketed, unlike = found.rows
    assert bucketed.tier is Tier.BUCKET and bucketed.ratio == 1.0
    assert unlike.tier is Tier.DEFAULT and unlike.ratio == pytest.approx(5 / 4)
    assert found.worst == pytest.approx(1.25) and found.geomean == pytest.approx(1.25**0.5)
    assert found.base == 2 and found.by_tier == {"bucket": 1, "default": 1}


def test_unseen_problems_differ_from_those_tuned() -> None:
    base = list(pairs("resnet50"))
    others = selfcheck.unseen_pairs(base, 40)
    known = {(o.name, p) for o, p in base}
    assert len(others) == 40 and len({p for _, p in others}) == 40
    assert not known & {(o.name, p) for o, p in others}
    assert {o.name for o, _ in others} == {"conv2d.forward", "conv2d.dgrad", "conv2d.wgrad"}
    assert others == selfcheck.unseen_pairs(base, 40)
    with pytest.raises(ArgumentValueError, match="at most"):
        selfcheck.unseen_pairs(base[:1], 1000)
    with pytest.raises(ArgumentValueError, match="batch"):
        selfcheck.unseen_pairs([(Scale(), ScaleProblem(3))], 1)


def test_wall_time_of_the_arms(scales: Any, tmp_path: Path) -> None:
    jobs: list[Job] = []

    def launch(job: Job) -> Done:
        jobs.append(job)
        if job.triton is not None:
            return Done(8.0, sum(map(len, job.triton)), {"tuned": 3})
        done = here(job)
        return Done(2.0 if job.jobs is None else 6.0, done.configs, done.results)

    found = selfcheck.wall_time(scales, tmp_path / "wall", launch=launch, lab=LAB)
    assert found.speedups() == {"parallel": 1.0, "serial": 3.0, "triton.autotune": 4.0}
    assert [job.jobs for job in jobs] == [None, 0, None]
    caches = [job.kernel_cache for job in jobs]
    assert len(set(caches)) == 3 and not any(c and c.exists() for c in caches)
    # Triton is given what it could try: nothing of these, which all call PyTorch.
    assert jobs[2].triton == [[], [], []]
    with pytest.raises(ArgumentValueError, match="empty"):
        selfcheck.wall_time(scales, tmp_path / "wall", launch=launch, lab=LAB)
    with pytest.raises(ArgumentValueError, match="arms"):
        selfcheck.wall_time(scales, tmp_path / "x", arms=["serial"], launch=launch, lab=LAB)


def test_triton_gets_the_configs_that_the_tuner_met(tmp_path: Path) -> None:
    (operator, problem), *_ = pairs("resnet50", "n1 64-64")
    recorded = record(operator, problem)
    assert "aten" in {trial.algorithm for trial in recorded.trials}
    fill(tmp_path, [recorded])
    (met,) = selfcheck._met([(operator, problem)], tmp_path)
    assert "aten" not in {c.algorithm for c in met}
    assert len(met) == sum(trial.algorithm != "aten" for trial in recorded.trials)


def test_a_lookup_of_a_problem_seen_before_is_timed_without_a_gpu(scales: Any) -> None:
    taken = selfcheck.lookup_time(scales[0], H100, calls=100, repeats=2)
    assert 0 < taken < 1000


def test_an_even_spread() -> None:
    numbers: Any = list(range(7))
    assert selfcheck.spread(numbers, 3) == [0, 2, 4]
    assert selfcheck.spread(numbers, 9) == numbers


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
@pytest.mark.parametrize("name", ["stability", "lookup", "regret", "wall"])
def test_without_a_gpu_it_is_exit_6(name: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["selfcheck", name, "--work", str(tmp_path)])
    assert done.exit_code == 6 and "GPU" in done.stderr


def test_the_command_prints_tables_and_json(
    scales: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("tritonconv.autotune.cli.selfcheck.pairs_of", lambda *a, **k: scales)
    stability, wall_time = selfcheck.stability, selfcheck.wall_time

    def played(*args: Any, **options: Any) -> Any:
        return stability(*args, **options, launch=here, lab=LAB)

    def walled(*args: Any, **options: Any) -> Any:
        return wall_time(*args, **options, launch=here, lab=LAB)

    monkeypatch.setattr(selfcheck, "stability", played)
    monkeypatch.setattr(selfcheck, "wall_time", walled)
    run = CliRunner().invoke
    common = ("--work", str(tmp_path), "--runs", "2")
    text = run(app, ["selfcheck", "stability", *common])
    assert "2 tunes of 3 problems: all agree on 100.0 %" in text.stdout
    assert "autotune plot agreement --tables" in text.stderr.replace("\n", " ")
    value = json.loads(run(app, ["selfcheck", "stability", *common, "--json"]).stdout)
    assert value["unanimous"] == 1.0 and len(value["folders"]) == 2
    arms = ("--arm", "parallel", "--arm", "serial")
    value = json.loads(run(app, ["selfcheck", "wall", *common, *arms, "--json"]).stdout)
    assert [arm["name"] for arm in value["arms"]] == ["parallel", "serial"]
    assert value["arms"][0]["times_the_first"] == 1.0


@pytest.mark.gpu
def test_what_triton_autotune_would_do() -> None:
    operator = get_operator("conv2d.forward")
    problem = operator.parse({"batch": 2, "in_channels": 32, "out_channels": 32, "height": 16})
    candidates = space(operator, problem, device_facts()).candidates[:3]
    timed = tune_like_triton(operator, problem, candidates)
    assert len(timed) >= 2 and any(us is not None and us > 0 for us in timed.values())


@pytest.mark.gpu
def test_the_hit_path_of_triton_autotune() -> None:
    for call in launches(torch.device("cuda", 0)).values():
        call()
    torch.cuda.synchronize()
    operator = get_operator("conv2d.forward")
    problem = operator.parse({"batch": 2, "in_channels": 8, "out_channels": 8, "height": 8})
    times = {t.call: t.microseconds for t in selfcheck.lookup_times((operator, problem), calls=50)}
    assert times["launch through triton.autotune"] > times["bare launch"] > 0


@pytest.mark.gpu
def test_wall_time_on_a_gpu(tmp_path: Path) -> None:
    operator = get_operator("conv2d.forward")
    problem = operator.parse(
        {"batch": 2, "in_channels": 32, "out_channels": 32, "height": 16, "dtype": "bfloat16"}
    )
    found = selfcheck.wall_time(
        [(operator, problem)], tmp_path / "wall", options={"max_configs": 6}
    )
    assert all(arm.done.configs for arm in found.arms)
    assert set(found.speedups()) == {"parallel", "serial", "triton.autotune"}
