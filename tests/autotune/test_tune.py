from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from autotune_entries import SISTER, winner
from autotune_fakes import BROKEN, Aten, Fine, PlaybackLab, Scale, ScaleProblem, Wrong, table_of

from tritonconv.autotune.measure import DeviceLostError
from tritonconv.autotune.search import Effort, Failure, Outcome, Status
from tritonconv.autotune.space import Candidate
from tritonconv.autotune.store import Store
from tritonconv.autotune.tune import (
    Check,
    Options,
    Progress,
    Result,
    TuningInterrupted,
    TuningStoppedError,
    tune,
)
from tritonconv.runtime import tables
from tritonconv.runtime.tables import Tier, tuned_table

PROBLEM = ScaleProblem(1000)


def test_the_fastest_config_is_stored_and_found(cache: Path) -> None:
    operator = Scale(Fine(), Aten())
    lab = PlaybackLab(table_of({("fine", 2): 5.0, ("aten", 0): 9.0}), noise=0.001)
    (report,) = tune(operator, [PROBLEM], lab=lab)
    assert report.result is Result.TUNED and report.complete
    assert report.entry is not None and report.path is not None and report.path.exists()
    assert (report.entry.best.algorithm, dict(report.entry.best.config)) == ("fine", {"variant": 2})
    assert report.entry.best.max_error is not None
    assert report.speedup() == pytest.approx(10, rel=0.1)
    choice = tuned_table(lab.facts).lookup(operator, PROBLEM)
    assert (choice.tier, choice.algorithm, choice.source) == (Tier.EXACT, "fine", "user")


def test_pytorch_wins_where_it_is_faster(cache: Path) -> None:
    lab = PlaybackLab(table_of({("aten", 0): 9.0}))
    (report,) = tune(Scale(Fine(), Aten()), [PROBLEM], lab=lab)
    assert report.entry is not None and report.entry.best.algorithm == "aten"


def test_a_wrong_kernel_never_wins(cache: Path) -> None:
    """The wrong variants are the fastest by far, and more of them than there are finalists."""
    times = {("wrong", i): 1.0 + i for i in range(3)} | {("fine", 3): 8.0}
    for check in Check:
        (report,) = tune(
            Scale(Fine(), Wrong(), Aten()),
            [PROBLEM],
            lab=PlaybackLab(table_of(times)),
            options=Options(check=check, force=True),
        )
        assert report.entry is not None and report.entry.best.config == {"variant": 3}
        assert report.entry.best.algorithm == "fine"
        rejected = {t.config["variant"]: t for t in report.rejected}
        assert set(rejected) == {0, 1, 2}
        assert all(t.status == Status.NUMERIC and t.timing is None for t in report.rejected)
        assert "exceeds budget" in rejected[0].reason
        assert report.failures() == {"numeric": 3}


def test_without_a_right_candidate_nothing_is_stored(cache: Path) -> None:
    (report,) = tune(Scale(Wrong()), [PROBLEM], lab=PlaybackLab())
    assert report.result is Result.FAILED and report.entry is None
    assert list(Store().entries()) == []


def test_a_wrong_default_gives_way(cache: Path) -> None:
    (report,) = tune(Scale(Wrong(), Aten()), [PROBLEM], lab=PlaybackLab())
    assert report.entry is not None
    assert report.entry.default.status == "numeric" and report.entry.best.algorithm == "aten"
    assert report.speedup() is None


def test_failures_are_recorded_by_class(cache: Path) -> None:
    times: dict[tuple[str, int], float | Failure] = {
        ("fine", 1): BROKEN,
        ("fine", 2): Failure(Status.LAUNCH, "out of resource: shared memory"),
    }
    (report,) = tune(Scale(Fine(), Aten()), [PROBLEM], lab=PlaybackLab(table_of(times)))
    assert report.failures() == {"compile": 1, "launch": 1}
    assert report.entry is not None
    assert {t.status for t in report.entry.trials} == {"ok", "compile", "launch"}


def test_a_second_start_has_nothing_to_do(cache: Path) -> None:
    operator = Scale(Fine(), Aten())
    (first,) = tune(operator, [PROBLEM], lab=PlaybackLab())
    lab = PlaybackLab()
    (second,) = tune(operator, [PROBLEM], lab=lab)
    assert second.result is Result.KEPT and lab.prepared == []
    assert second.entry == first.entry
    (third,) = tune(operator, [PROBLEM], lab=lab, options=Options(force=True))
    assert third.result is Result.TUNED and lab.prepared


def test_an_unfinished_search_is_resumed_with_its_timings(cache: Path) -> None:
    operator = Scale(Fine(), Aten())
    times = table_of({("fine", 0): 5.0, ("fine", 3): 4.0})
    tune(operator, [PROBLEM], lab=PlaybackLab(times), options=Options(max_configs=2))
    seen: list[str] = []

    class Watch(Progress):
        def candidate(self, candidate: Candidate, outcome: Outcome) -> None:
            seen.append(str(candidate))

    (report,) = tune(operator, [PROBLEM], lab=PlaybackLab(times), progress=Watch())
    assert seen == ["fine(variant=1)", "fine(variant=2)", "fine(variant=3)"]
    assert report.entry is not None and len(report.entry.trials) == 5
    assert report.entry.best.config == {"variant": 3}


def test_another_policy_times_everything_again(cache: Path) -> None:
    from tritonconv.autotune.measure import Policy

    operator = Scale(Fine(), Aten())
    tune(operator, [PROBLEM], lab=PlaybackLab())
    (report,) = tune(
        operator, [PROBLEM], lab=PlaybackLab(), options=Options(policy=Policy.GRAPH_HOT)
    )
    assert report.result is Result.TUNED and report.measured == 5
    assert report.entry is not None and report.entry.policy == "graph-hot"


def test_ctrl_c_keeps_what_is_finished(cache: Path) -> None:
    operator = Scale(Fine(), Aten())
    problems = [ScaleProblem(size) for size in (10, 20, 30)]

    class Interrupt(Progress):
        def problem(self, index: int, problem: Any, planned: int) -> None:
            if index == 2:
                raise KeyboardInterrupt

    with pytest.raises(TuningInterrupted) as caught:
        tune(operator, problems, lab=PlaybackLab(), progress=Interrupt())
    assert [report.problem for report in caught.value.reports] == problems[:2]
    assert len(list(Store().entries())) == 2
    resumed = tune(operator, problems, lab=PlaybackLab())
    assert [r.result for r in resumed] == [Result.KEPT, Result.KEPT, Result.TUNED]


def test_a_lost_device_stops_with_what_is_finished(cache: Path) -> None:
    class Fragile(PlaybackLab):
        def timer(self, operator: Any, problem: Any, policy: Any, seed: int) -> Any:
            if problem.size == 20:
                raise DeviceLostError("gone")
            return super().timer(operator, problem, policy, seed)

    with pytest.raises(TuningStoppedError, match="gone") as caught:
        tune(Scale(), [ScaleProblem(10), ScaleProblem(20)], lab=Fragile())
    assert len(caught.value.reports) == 1


def test_a_problem_that_cannot_be_set_up_is_not_all_of_them(cache: Path) -> None:
    class Small(PlaybackLab):
        def timer(self, operator: Any, problem: Any, policy: Any, seed: int) -> Any:
            if problem.size == 10:
                raise torch.OutOfMemoryError("too large")
            return super().timer(operator, problem, policy, seed)

    reports = tune(Scale(Fine()), [ScaleProblem(10), ScaleProblem(20)], lab=Small())
    assert [r.result for r in reports] == [Result.FAILED, Result.TUNED]
    assert "too large" in reports[0].reason


def test_the_budget_is_shared_and_late_problems_stay_pending(cache: Path) -> None:
    problems = [ScaleProblem(10), ScaleProblem(20)]
    reports = tune(Scale(Fine()), problems, lab=PlaybackLab(), budget_s=1e-9)
    assert [r.result for r in reports] == [Result.PENDING, Result.PENDING]
    reports = tune(Scale(Fine()), problems, lab=PlaybackLab(), budget_s=60)
    assert [r.result for r in reports] == [Result.TUNED, Result.TUNED]


def test_equal_problems_are_tuned_once(cache: Path) -> None:
    reports = tune(Scale(Fine()), [PROBLEM, ScaleProblem(1000)], lab=PlaybackLab())
    assert len(reports) == 1


def test_repeated_tuning_of_near_ties_stores_the_same_config(cache: Path) -> None:
    times = table_of({("fine", i): 10.0 + 0.03 * ((i * 7) % 4) for i in range(4)}, 10.05)
    winners = set()
    for seed in range(8):
        (report,) = tune(
            Scale(Fine(), Aten()),
            [PROBLEM],
            lab=PlaybackLab(times, noise=0.005, seed=seed),
            options=Options(force=True),
        )
        assert report.entry is not None
        winners.add((report.entry.best.algorithm, tuple(report.entry.best.config.items())))
        assert len(report.entry.tied) > 1
    assert winners == {("fine", (("variant", 0),))}


def test_a_short_search_tries_what_won_on_the_sibling_device(cache: Path) -> None:
    operator = Scale(Fine(), Aten())
    lab = PlaybackLab(table_of({("fine", 3): 5.0}))
    options = Options(max_configs=3)
    (alone,) = tune(operator, [PROBLEM], lab=lab, options=options)
    assert alone.entry is not None and alone.entry.best.config != {"variant": 3}
    assert alone.path is not None
    alone.path.unlink()
    Store().save(SISTER, winner(3, env=SISTER, size=900))
    tables.invalidate()
    (report,) = tune(operator, [PROBLEM], lab=lab, options=options)
    assert report.entry is not None and report.measured == 3
    assert report.entry.best.config == {"variant": 3}


def test_efforts(cache: Path) -> None:
    (report,) = tune(
        Scale(Fine(), Aten()), [PROBLEM], lab=PlaybackLab(), options=Options(effort=Effort.NONE)
    )
    assert (report.measured, report.space_size) == (2, 5)


def test_tuning_on_the_spot_happens_once_and_failing_is_a_warning(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tritonconv.autotune import tune as module

    lab = PlaybackLab(table_of({("fine", 1): 2.0}))
    monkeypatch.setattr(module, "_equipment", lambda device: (lab, None))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    from tritonconv.runtime.settings import settings

    with settings.override(autotune="tune"):
        choice = tables.choose(Scale(Fine()), PROBLEM, lab.facts)
        assert (choice.tier, choice.config.as_dict()) == (Tier.EXACT, {"variant": 1})
        count = len(lab.prepared)
        tables.choose(Scale(Fine()), PROBLEM, lab.facts)
        assert len(lab.prepared) == count
        with pytest.warns(UserWarning, match="no candidate passed"):
            choice = tables.choose(Scale(Wrong(), source="other"), ScaleProblem(5), lab.facts)
        assert choice.tier is Tier.DEFAULT
        count = len(lab.prepared)
        tables.choose(Scale(Wrong(), source="other"), ScaleProblem(5), lab.facts)
        assert len(lab.prepared) == count
        with settings.override(deterministic=True):
            tables.choose(Scale(Fine()), ScaleProblem(77), lab.facts)
            assert len(lab.prepared) == count


def test_progress_may_come_from_another_thread(cache: Path) -> None:
    done: list[Result] = []
    thread = threading.Thread(
        target=lambda: done.extend(
            r.result for r in tune(Scale(Fine()), [PROBLEM], lab=PlaybackLab())
        )
    )
    thread.start()
    thread.join()
    assert done == [Result.TUNED]
