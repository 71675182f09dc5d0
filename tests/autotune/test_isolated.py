"""Measuring in a process of its own: hangs, crashes and broken contexts cost one candidate."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from autotune_fakes import Aten, Scale, ScaleProblem, Vector, Wrong
from worker_fakes import BAD, Endless, Hanging, Moody, Stray, VariantConfig, candidates

from tritonconv.autotune.gpu_lock import GpuLock, gpu_lock
from tritonconv.autotune.isolated import WorkerLab
from tritonconv.autotune.measure import (
    CandidateError,
    DeviceLostError,
    NoDeviceError,
    Policy,
    first_round,
    take_turns,
)
from tritonconv.autotune.search import Failure, Status
from tritonconv.autotune.space import Candidate
from tritonconv.autotune.tune import Result, tune
from tritonconv.autotune.workers import RemoteError
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.tables import Timing

MOODY = "worker_fakes:MoodyLab"
PROBLEM = ScaleProblem(100)
OPERATOR = Scale(Moody())


def moody_lab(
    moods: dict[int, str] | None = None, identity: str | None = None, run_timeout: float = 2.0
) -> WorkerLab:
    return WorkerLab(
        run_timeout=run_timeout,
        compile_timeout=1.0,
        lab=MOODY,
        lab_arguments=(BAD if moods is None else moods, identity),
    )


def moody(variant: int) -> Candidate:
    return Candidate("moody", VariantConfig(variant))


EXPECTED = {
    1: (Status.RUN_TIMEOUT, "did not finish within 2 s"),
    2: (Status.RUN_TIMEOUT, "did not finish within 2 s"),
    3: (Status.CRASH, "while running, the process ended with exit code 7"),
    4: (Status.CRASH, "illegal memory access"),
    5: (Status.LAUNCH, "not on this device"),
    6: (Status.COMPILE_TIMEOUT, "did not compile within 1 s"),
}


@pytest.mark.parametrize("quick", [False, True], ids=["protocol", "one request"])
def test_every_way_to_fail_costs_that_candidate_only(quick: bool) -> None:
    outcomes: dict[int, Timing | Failure] = {}
    with moody_lab() as lab:
        assert lab.facts == nominal_device("sm_90")
        timer = lab.timer(OPERATOR, PROBLEM, Policy.GRAPH_COLD, 0)
        for variant in range(9):
            try:
                if quick:
                    outcomes[variant], _ = timer.first_round(moody(variant))
                else:
                    outcomes[variant] = first_round(timer, timer.prepare(moody(variant)))
            except CandidateError as error:
                outcomes[variant] = error.failure
        generation = lab.generation
        assert generation == 1 + 5  # every replaced process, and none more
        for variant, (status, _) in EXPECTED.items():
            if status is Status.LAUNCH:
                continue
            begin = time.monotonic()
            with pytest.raises(CandidateError, match=status):
                timer.prepare(moody(variant))
            assert time.monotonic() - begin < 1.0
        assert lab.generation == generation
        timer.close()
    for variant in (0, 7, 8):
        timing = outcomes[variant]
        assert isinstance(timing, Timing) and timing.p50 == 10.0 + variant
    for variant, (status, reason) in EXPECTED.items():
        failure = outcomes[variant]
        assert isinstance(failure, Failure)
        assert failure.status is status and reason in failure.reason, failure


def test_handles_of_an_earlier_process_are_prepared_again() -> None:
    with moody_lab() as lab:
        timer = lab.timer(OPERATOR, PROBLEM, Policy.GRAPH_COLD, 0)
        handles = [timer.prepare(moody(variant)) for variant in (0, 8)]
        note = timer.note(handles[0])
        with pytest.raises(CandidateError):
            timer.prepare(moody(3))
        assert timer.sample(handles[1], 0.01) == [18.0] * 5
        assert [timing.p50 for timing in take_turns(timer, handles, turns=2)] == [10.0, 18.0]
        assert timer.note(handles[0]) != note  # it names the process
        timer.close()


def test_turns_inside_the_process_go_on_without_those_that_fail() -> None:
    with moody_lab({2: "hang in sample", 4: "late", 5: ""}, run_timeout=1.0) as lab:
        timer = lab.timer(OPERATOR, PROBLEM, Policy.GRAPH_COLD, 0)
        handles = [timer.prepare(moody(variant)) for variant in (0, 2, 4, 5)]
        found = timer.take_turns(handles, turns=3, seconds=0.01)
        assert [type(outcome) for outcome in found] == [Timing, Failure, Failure, Timing]
        assert [getattr(outcome, "p50", None) for outcome in found] == [10.0, None, None, 15.0]
        statuses = [outcome.status for outcome in found if isinstance(outcome, Failure)]
        assert statuses == [Status.RUN_TIMEOUT, Status.CRASH]
        assert timer.take_turns([]) == []
        timer.close()


def test_checks_are_made_there_too() -> None:
    operator = Scale(Moody(), Wrong())
    with moody_lab({3: "exit in check"}) as lab:
        check = lab.checker(operator, PROBLEM, 0)
        assert check(moody(0)).ok
        with pytest.raises(CandidateError, match="exit code 5"):
            check(moody(3))
        assert check(moody(1)).ok
        assert not check(Candidate("wrong", VariantConfig(1))).ok
        del check
        lab.checker(operator, PROBLEM, 0)
        assert lab.abandoned == []


def test_a_check_has_the_time_to_compile_that_a_timing_has() -> None:
    """What was timed in an earlier run is checked first, and may not be compiled in this one."""
    moods = {7: "slow to compile"}
    with WorkerLab(
        run_timeout=1.0, compile_timeout=60.0, lab=MOODY, lab_arguments=(moods, None)
    ) as lab:
        checker = lab.checker(OPERATOR, PROBLEM, 0)
        assert checker(moody(7)).ok


def test_tuning_ends_normally_with_the_results_of_the_others(cache: Path) -> None:
    with moody_lab() as lab:
        (report,) = tune(OPERATOR, [PROBLEM], lab=lab)
        assert lab.generation == 1 + 5
    assert report.result is Result.TUNED and report.entry is not None
    assert report.entry.best.config == {"variant": 0}
    assert {trial.config["variant"]: trial.status for trial in report.rejected} == {
        variant: status for variant, (status, _) in EXPECTED.items()
    }


def test_a_process_that_dies_between_calls_is_replaced() -> None:
    with moody_lab({}) as lab:
        timer = lab.timer(OPERATOR, PROBLEM, Policy.GRAPH_COLD, 0)
        handle = timer.prepare(moody(1))
        os.kill(int(timer.note(handle).split()[1]), signal.SIGKILL)
        time.sleep(0.3)
        assert timer.sample(handle, 0.01) == [11.0] * 5
        assert lab.quarantined == {}
        timer.close()


def test_what_cannot_be_set_up_is_no_candidates_fault() -> None:
    with WorkerLab(lab="worker_fakes:NoLab") as lab, pytest.raises(DeviceLostError, match="NoLab"):
        _ = lab.facts
    with moody_lab({}) as lab:
        with pytest.raises(RemoteError, match="AttributeError"):
            check = lab.checker(Scale(), None, 0)  # type: ignore[arg-type]
            check(moody(0))
        assert lab.generation == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(NoDeviceError, match="PyTorch sees none"):
        WorkerLab()


HOLDER = """
import sys
from pathlib import Path
from tritonconv.autotune.gpu_lock import gpu_lock
from tritonconv.runtime.settings import settings
settings.cache_dir = Path(sys.argv[1])
lock = gpu_lock("board-1")
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_one_process_measures_on_a_gpu_at_a_time(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(cache)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdin is not None
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(GpuLock.acquire, "__defaults__", (0.1,))
    with moody_lab({}, "board-1") as lab, moody_lab({}, "board-2") as other:
        other.timer(OPERATOR, PROBLEM, Policy.GRAPH_COLD, 0).close()
        _ = lab.facts
        threading.Timer(0.6, holder.stdin.close).start()
        begin = time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            timer = lab.timer(OPERATOR, PROBLEM, Policy.GRAPH_COLD, 0)
        assert time.monotonic() - begin > 0.3
        assert any("waiting for another process" in str(w.message) for w in caught)
        lab.timer(OPERATOR, PROBLEM, Policy.GRAPH_COLD, 0).close()  # nested
        timer.close()
    assert holder.wait(30) == 0
    holder.stdout.close()
    lock = gpu_lock("board-1")
    lock.acquire()
    lock.release()


gpu = pytest.mark.gpu


@gpu
def test_hanging_straying_and_endless_kernels_do_not_stop_tuning(cache: Path) -> None:
    problem = ScaleProblem(1 << 20)
    operator = Scale(Vector(), Hanging(), Stray(), Endless(), Aten())
    with WorkerLab(run_timeout=5.0, compile_timeout=15.0) as lab:
        (report,) = tune(operator, [problem], lab=lab)
        following = tune(Scale(Vector(), Aten()), [ScaleProblem(1 << 16)], lab=lab)
    assert report.result is Result.TUNED and report.entry is not None
    assert report.entry.best.algorithm in ("vector", "aten")
    assert {trial.algorithm: trial.status for trial in report.rejected} == {
        "hanging": Status.RUN_TIMEOUT,
        "stray": Status.CRASH,
        "endless": Status.COMPILE_TIMEOUT,
    }
    assert following[0].result is Result.TUNED


@gpu
def test_timings_in_the_process_are_those_of_this_one() -> None:
    from tritonconv.autotune.measure import CudaLab

    problem, operator = ScaleProblem(1 << 24), Scale(Vector(), Aten())
    medians = []
    lab = WorkerLab()
    for where in (CudaLab(), lab):
        timer = where.timer(operator, problem, Policy.GRAPH_COLD, 0)
        handles = [timer.prepare(c) for c in candidates(operator, problem)]
        medians.append([timing.p50 for timing in take_turns(timer, handles)])
        timer.close()
    timer = lab.timer(operator, problem, Policy.GRAPH_COLD, 0)
    inside = timer.take_turns([timer.prepare(c) for c in candidates(operator, problem)])
    medians.append([timing.p50 for timing in inside if isinstance(timing, Timing)])
    timer.close()
    lab.close()
    for here, there, within in zip(*medians, strict=True):
        assert there == pytest.approx(here, rel=0.1) and within == pytest.approx(here, rel=0.1)


@gpu
def test_the_gpu_lab_names_its_board() -> None:
    with WorkerLab() as lab:
        assert lab.facts.name in torch.cuda.get_device_name()
        described = lab._describe()[1]
        assert described is not None and described.path.name.startswith("gpu-")
        assert lab.checker(Scale(Vector()), PROBLEM, 0)(candidates(Scale(Vector()), PROBLEM)[0]).ok
