"""What one problem's tuning keeps, withdraws and never leaves out, whatever comes first."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
import torch
from autotune_fakes import Aten, Fine, PlaybackLab, Scale, ScaleProblem, Wrong, table_of

from tritonconv.autotune.compiling import CompileResult
from tritonconv.autotune.report import Check, Options, Progress, Report, Result, TuningInterrupted
from tritonconv.autotune.search import Failure, Outcome, Status
from tritonconv.autotune.space import Candidate
from tritonconv.autotune.store import Store
from tritonconv.autotune.tune import tune
from tritonconv.runtime.entries import Resources
from tritonconv.runtime.files import locked, replace_text
from tritonconv.runtime.tables import Tier, Trial, environment, tuned_table

PROBLEM = ScaleProblem(1000)


class LastFirst:
    """A compiler that finishes in the reverse order, and says what a candidate needs."""

    timeout = 60.0

    def __init__(
        self, resources: Resources | None = None, fails: str = "", seconds: float = 0.0
    ) -> None:
        self.seconds = seconds
        self.resources = resources or Resources()
        self.fails = fails
        self.dropped = 0

    def submit(self, operator: Any, problem: Any, candidates: Iterable[Candidate]) -> None:
        list(candidates)

    def results(
        self, operator: Any, problem: Any, candidates: Iterable[Candidate]
    ) -> Iterator[tuple[Candidate, CompileResult | Failure]]:
        for candidate in reversed(list(candidates)):
            time.sleep(self.seconds)
            if candidate.algorithm == self.fails:
                reason = f"did not compile within {self.timeout:g} s"
                yield candidate, Failure(Status.COMPILE_TIMEOUT, reason)
            else:
                yield candidate, CompileResult(self.resources, 0.1)

    def drop_pending(self) -> None:
        self.dropped += 1


def test_the_default_is_measured_however_small_the_budget(cache: Path) -> None:
    lab = PlaybackLab(table_of({("fine", 0): 1.0, ("aten", 0): 9.0}))
    compiler = LastFirst(seconds=0.4)
    (report,) = tune(Scale(Fine(), Aten()), [PROBLEM], lab=lab, compiler=compiler, budget_s=0.3)
    assert report.entry is not None and not report.complete
    assert (report.entry.default.config, report.entry.best.config) == ({"variant": 0},) * 2
    assert report.entry.default.timing is not None and report.entry.default.timing.p50 == 1.0
    assert compiler.dropped == 1


def test_spillers_are_dropped_unless_they_are_the_default(cache: Path) -> None:
    spilling = LastFirst(Resources(255, 4096, 1024))
    lab = PlaybackLab()
    (report,) = tune(Scale(Fine()), [PROBLEM], lab=lab, compiler=spilling)
    assert report.entry is not None and report.failures() == {"constraint": 3}
    assert "spills 4096 bytes" in report.rejected[0].reason
    assert report.entry.best.config == {"variant": 0}
    assert report.entry.best.resources == Resources(255, 4096, 1024)


class Interrupting(Progress):
    def __init__(self, after: int) -> None:
        self.left = after

    def candidate(self, candidate: Candidate, outcome: Outcome) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_an_interrupted_search_keeps_its_timings(cache: Path) -> None:
    operator = Scale(Fine(), Aten())
    with pytest.raises(TuningInterrupted):
        tune(operator, [PROBLEM], lab=PlaybackLab(), progress=Interrupting(4))
    assert list(Store().entries()) == []  # no lookup sees what has no winner
    assert tuned_table(PlaybackLab().facts).lookup(operator, PROBLEM).tier is Tier.DEFAULT
    lab = PlaybackLab()
    (report,) = tune(operator, [PROBLEM], lab=lab)
    assert (report.result, report.measured) == (Result.TUNED, 1)
    assert report.entry is not None and len(report.entry.trials) == 5
    assert not list(cache.rglob("partial/*.json"))


def test_what_failed_is_not_measured_again(cache: Path) -> None:
    for measured in (3, 0):
        (report,) = tune(Scale(Wrong()), [PROBLEM], lab=PlaybackLab())
        assert (report.result, report.measured) == (Result.FAILED, measured)
    (report,) = tune(Scale(Wrong()), [PROBLEM], lab=PlaybackLab(), options=Options(force=True))
    assert report.measured == 3


def test_more_time_tries_again_what_ran_out_of_it(cache: Path) -> None:
    operator = Scale(Fine(), Aten())
    slow = LastFirst(fails="aten")
    (report,) = tune(operator, [PROBLEM], lab=PlaybackLab(), compiler=slow)
    assert report.failures() == {"compile_timeout": 1}
    (report,) = tune(operator, [PROBLEM], lab=PlaybackLab(), compiler=slow)
    assert report.result is Result.KEPT
    patient = LastFirst()
    patient.timeout = 300.0
    (report,) = tune(
        operator, [PROBLEM], lab=PlaybackLab(), compiler=patient, options=Options(seed=1)
    )
    assert (report.result, report.measured, report.failures()) == (Result.TUNED, 1, {})


OUT_OF_MEMORY = Failure(Status.LAUNCH, "out of GPU memory: 1 GiB")
OUT_OF_TIME = Failure(Status.RUN_TIMEOUT, "ran longer than 1 s")


@pytest.mark.parametrize("changed", [{}, {"aten": "source-2"}], ids=["nothing", "another"])
@pytest.mark.parametrize("failure", [OUT_OF_MEMORY, OUT_OF_TIME], ids=["memory", "time"])
def test_what_may_pass_by_now_is_tried_again_although_all_was_done(
    cache: Path, failure: Failure, changed: dict[str, str]
) -> None:
    lab = PlaybackLab(table_of({("fine", 2): failure}))
    lab.run_timeout = 1.0  # type: ignore[attr-defined]
    (report,) = tune(Scale(Fine(), Aten()), [PROBLEM], lab=lab)
    assert report.complete and report.failures() == {failure.status: 1}
    lab = PlaybackLab(table_of({("fine", 2): 1.0}))
    lab.run_timeout = 100.0  # type: ignore[attr-defined]
    operator = Scale(Fine(), Aten(), changed=changed)
    (report,) = tune(operator, [PROBLEM], lab=lab)
    assert (report.result, report.measured) == (Result.TUNED, 1 + len(changed))
    assert report.entry is not None and report.entry.best.config == {"variant": 2}
    (report,) = tune(operator, [PROBLEM], lab=lab)
    assert report.result is Result.KEPT


def test_what_runs_out_of_the_same_time_is_not_tried_again(cache: Path) -> None:
    lab = PlaybackLab(table_of({("fine", 2): OUT_OF_TIME}))
    lab.run_timeout = 1.0  # type: ignore[attr-defined]
    for result in (Result.TUNED, Result.KEPT):
        (report,) = tune(Scale(Fine(), Aten()), [PROBLEM], lab=lab)
        assert report.result is result


class FourTimes(Fine):
    """What ``fine`` was, now wrong."""

    name: ClassVar[str] = "fine"

    def launch(self, problem: Any, config: Any, tensors: Any) -> None:
        torch.mul(tensors["x"], 4, out=tensors["y"])


def test_a_winner_that_turns_out_wrong_is_withdrawn(cache: Path) -> None:
    (report,) = tune(Scale(Fine()), [PROBLEM], lab=PlaybackLab())
    assert report.result is Result.TUNED
    operator = Scale(FourTimes())
    table = tuned_table(PlaybackLab().facts)
    assert table.lookup(operator, PROBLEM).tier is Tier.EXACT
    (report,) = tune(operator, [PROBLEM], lab=PlaybackLab(), options=Options(force=True))
    assert report.result is Result.FAILED
    assert table.lookup(operator, PROBLEM).tier is Tier.DEFAULT


def test_a_better_entry_written_meanwhile_is_not_withdrawn(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process replaces the wrong winner while this one is about to delete it."""
    (report,) = tune(Scale(Fine()), [PROBLEM], lab=PlaybackLab())
    assert report.entry is not None and report.path is not None
    store, wrong = Store(), report.entry.best
    good = replace(report.entry, best=replace(wrong, config={"variant": 3}))

    def writes() -> None:
        with locked(report.path.parent):
            replace_text(report.path, json.dumps(good.to_json()))

    other = Thread(target=writes)

    def is_wrong(best: Trial) -> bool:
        other.start()
        other.join(0.2)  # it waits for its turn
        return best == wrong

    store.withdraw(environment(PlaybackLab().facts), report.entry, is_wrong)
    other.join()
    assert [stored.entry for stored in store.entries()] == [good]


def test_checking_all_checks_what_only_finalists_had(cache: Path) -> None:
    operator = Scale(Many(), Aten())
    lab = PlaybackLab(lambda candidate: 5.0 + sum(candidate.config.as_dict().values()))

    def unchecked(report: Report) -> int:
        assert report.entry is not None
        return sum(t.timing is not None and t.max_error is None for t in report.entry.trials)

    (report,) = tune(operator, [PROBLEM], lab=lab)
    assert unchecked(report) > 0
    (report,) = tune(operator, [PROBLEM], lab=lab, options=Options(check=Check.ALL))
    assert report.result is Result.TUNED and unchecked(report) == 0


def test_a_busy_moment_does_not_cost_pytorch_its_place_in_the_final(cache: Path) -> None:
    """Its first timing is ten times too long; timed in turns it is the fastest."""
    looks: dict[str, int] = {}

    def times(candidate: Candidate) -> float:
        looks[candidate.algorithm] = looks.get(candidate.algorithm, 0) + 1
        if candidate.algorithm == "aten":
            return 400.0 if looks["aten"] <= 2 else 5.0
        return 10.0 + candidate.config.as_dict()["variant"]

    (report,) = tune(Scale(Many(), Aten()), [PROBLEM], lab=PlaybackLab(times))
    assert report.entry is not None and report.entry.best.algorithm == "aten"


class Many(Fine):
    """More configs than there are finalists."""

    variants = 20
