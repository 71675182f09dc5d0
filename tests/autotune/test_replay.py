from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from landscapes import BESTS, PROBLEM, Landscape, operator_of, recorded, space_of

from tritonconv.autotune.measure import CandidateError, Policy, summarize
from tritonconv.autotune.replay import (
    COMPILE_SECONDS,
    ReplayLab,
    VirtualClock,
    compare_strategies,
    mean_regret,
    play,
    recorded_space,
    recorded_trials,
)
from tritonconv.autotune.search import Budget, Effort, StrategyName
from tritonconv.autotune.tune import Options, Result, tune
from tritonconv.runtime import operators
from tritonconv.runtime.errors import TritonConvError
from tritonconv.runtime.tables import Entry, Trial

LANDSCAPE = Landscape(BESTS[0])
ENTRY = recorded(LANDSCAPE, broken=0.1)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operators._OPERATORS, "fake.scale", operator_of(LANDSCAPE))


def test_the_tuner_finds_the_recorded_best_on_a_replayed_table(cache: Path) -> None:
    lab = ReplayLab([ENTRY])
    options = Options(effort=Effort.FULL)
    (report,) = tune(operator_of(LANDSCAPE), [PROBLEM], lab=lab, options=options)
    assert report.result is Result.TUNED and report.entry is not None
    assert len(report.entry.trials) == len(ENTRY.trials)
    assert ENTRY.best.timing is not None and report.entry.best.timing is not None
    assert report.entry.best.timing.p50 <= 1.02 * ENTRY.best.timing.p50
    assert lab.clock() > 0.9 * COMPILE_SECONDS * len(ENTRY.trials)
    (report,) = tune(
        operator_of(LANDSCAPE), [PROBLEM], lab=lab, options=Options(Effort.QUICK, force=True)
    )
    assert report.measured <= 64 and report.entry is not None
    assert report.entry.best.timing is not None
    assert report.entry.best.timing.p50 <= 1.1 * ENTRY.best.timing.p50


def test_samples_and_failures_are_those_that_were_recorded() -> None:
    lab = ReplayLab([ENTRY])
    operator = operator_of(LANDSCAPE)
    timer = lab.timer(operator, PROBLEM, Policy.GRAPH_COLD, 0)
    trials = recorded_trials(ENTRY)
    seen = set()
    for candidate in space_of(LANDSCAPE).candidates:
        trial = trials[candidate.as_key()]
        seen.add(trial.status)
        if trial.timing is None:
            with pytest.raises(CandidateError, match="compile: no"):
                timer.prepare(candidate)
            continue
        found = summarize(timer.sample(timer.prepare(candidate), 0.01))
        assert found.p50 == pytest.approx(trial.timing.p50)
        assert found.p20 == pytest.approx(trial.timing.p20)
        assert found.p80 == pytest.approx(trial.timing.p80)
    assert seen == {"ok", "compile"}
    check = lab.checker(operator, PROBLEM, 0)
    assert check(space_of(LANDSCAPE).default).ok
    with pytest.raises(TritonConvError, match="a recorded problem"):
        lab.timer(operator, dataclasses.replace(PROBLEM, size=7), Policy.GRAPH_COLD, 0)


def test_wrong_kernels_are_wrong_again(cache: Path) -> None:
    best = ENTRY.best
    key = next(key for key, trial in recorded_trials(ENTRY).items() if trial == best)
    wrong = Trial(best.algorithm, best.config, "numeric", "error 1 exceeds budget 0.1", None, 1.0)
    entry = recorded(LANDSCAPE, broken=0.1, more={key: wrong})
    lab = ReplayLab([entry])
    candidate = next(c for c in space_of(LANDSCAPE).candidates if c.as_key() == key)
    assert not lab.checker(operator_of(LANDSCAPE), PROBLEM, 0)(candidate).ok
    (report,) = tune(
        operator_of(LANDSCAPE), [PROBLEM], lab=lab, options=Options(effort=Effort.FULL)
    )
    assert report.entry is not None and report.entry.best.config != best.config


def test_a_partly_recorded_table_is_searched_where_it_was_recorded() -> None:
    part = dataclasses.replace(ENTRY, trials=ENTRY.trials[:100])
    found = recorded_space(part)
    assert len(found.candidates) == 100 and found.default == space_of(LANDSCAPE).default
    with pytest.raises(TritonConvError, match="default"):
        recorded_space(dataclasses.replace(ENTRY, trials=ENTRY.trials[1:]))


def test_best_so_far_falls_to_the_optimum_on_the_virtual_clock() -> None:
    curve = play(ENTRY, StrategyName.EXHAUSTIVE)
    assert ENTRY.best.timing is not None and curve.optimum_us == ENTRY.best.timing.p50
    times = [point.best_us for point in curve.points]
    assert times == sorted(times, reverse=True) and times[-1] == curve.optimum_us
    seconds = [point.seconds for point in curve.points]
    assert seconds == sorted(seconds)
    assert curve.points[-1].configs == len(ENTRY.trials)
    assert curve.regret() == 1.0 and curve.regret(seconds=0) == math.inf
    assert curve.regret(configs=1) > 1
    quicker = play(ENTRY, StrategyName.EXHAUSTIVE, jobs=8)
    assert quicker.points[-1].seconds < curve.points[-1].seconds / 5
    short = play(ENTRY, StrategyName.RANDOM, budget=Budget(seconds=10.0))
    assert short.points[-1].configs < 20


def test_recorded_compile_times_move_the_clock() -> None:
    slow = [dataclasses.replace(trial) for trial in ENTRY.trials]
    for trial in slow:
        object.__setattr__(trial, "compile_s", 3.0)  # a field of later schemas
    entry = dataclasses.replace(ENTRY, trials=tuple(slow))
    curve = play(entry, StrategyName.MODEL, effort=Effort.NONE)
    assert curve.points[-1].seconds == pytest.approx(2 * 3.0 + 2 * 0.03, rel=0.1)


def test_strategies_are_compared_on_equal_terms() -> None:
    entries: list[Entry] = []
    empty = dataclasses.replace(
        ENTRY, trials=tuple(dataclasses.replace(t, timing=None) for t in ENTRY.trials)
    )
    entries = [ENTRY, empty]
    curves = compare_strategies(
        entries,
        (StrategyName.RANDOM, StrategyName.DESCENT),
        effort=Effort.QUICK,
        seeds=range(4),
        jobs=4,
    )
    assert len(curves) == 2 * 4
    means = mean_regret(curves, configs=64)
    assert 1.0 <= means[StrategyName.DESCENT] < means[StrategyName.RANDOM]
    assert curves == compare_strategies(
        entries,
        (StrategyName.RANDOM, StrategyName.DESCENT),
        effort=Effort.QUICK,
        seeds=range(4),
        jobs=4,
    )
    best = next(k for k, t in recorded_trials(ENTRY).items() if t == ENTRY.best)
    (near,) = compare_strategies(
        [ENTRY], (StrategyName.RANDOM,), nearest=lambda _: [best], seeds=[0], effort=Effort.QUICK
    )
    assert near.regret(configs=3) == 1.0


def test_a_lab_wants_entries_of_one_device() -> None:
    with pytest.raises(TritonConvError, match="one device"):
        ReplayLab([])
    clock = VirtualClock()
    clock.advance(2.5)
    assert clock() == 2.5
