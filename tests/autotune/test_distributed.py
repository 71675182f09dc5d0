"""Tuning over ranks and over several GPUs, with recorded times."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from autotune_fakes import BROKEN, Fine, PlaybackLab, Scale, ScaleProblem

from tritonconv.autotune.answers import differences
from tritonconv.autotune.distributed import assert_same_tables, tune_sharded
from tritonconv.autotune.gpus import tune_on_gpus
from tritonconv.autotune.measure import DeviceLostError
from tritonconv.autotune.store import Store
from tritonconv.autotune.tune import Progress, Result, TuningInterrupted, TuningStoppedError
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.errors import ArgumentValueError

SIZES = (64, 128, 256, 512, 1024)


def ranks(task: str, folder: Path, world: int = 2) -> list[dict[str, Any]]:
    """Run a task of ``sharded_job.py`` on every rank, as torchrun would, each with its cache."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = Path(__file__).with_name("sharded_job.py")
    running = []
    for rank in range(world):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "TRITONCONV_CACHE_DIR": str(folder / f"rank{rank}"),
            "TRITONCONV_BACKEND": "torch",
        }
        running.append(
            subprocess.Popen(
                [sys.executable, str(job), task],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    results = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0] * world, results
    return [json.loads(out.splitlines()[-1]) for out, _ in results]


class TestRanks:
    def test_one_table(self, tmp_path: Path) -> None:
        first, second = ranks("tune_each", tmp_path)
        assert first["tuned"] == [64, 256, 1024]
        assert second["tuned"] == [128, 512]
        assert first["table"] == {"64": 0, "128": 1, "256": 0, "512": 1, "1024": 0}
        assert second["table"] == first["table"]
        assert second["fingerprint"] == first["fingerprint"]
        assert not first["missing"]
        assert not first["lost"]

    def test_old_entries_are_shared(self, tmp_path: Path) -> None:
        first, second = ranks("tune_after_earlier_runs", tmp_path)
        assert first["table"] == second["table"]
        assert set(first["table"]) == {"7", "8", "9", *map(str, SIZES)}

    def test_a_rank_that_fails_keeps_and_gets_what_is_done(self, tmp_path: Path) -> None:
        first, second = ranks("one_rank_fails", tmp_path)
        assert second["tuned"] == [128]
        assert first["table"] == second["table"]
        assert set(first["table"]) == {"64", "128", "256", "1024"}
        assert "illegal access" in first["lost"]["1"]
        assert [name for name in first["missing"] if "512" in name] == first["missing"]

    @pytest.mark.parametrize(
        ("task", "message"), [("other_gpu", "environment"), ("other_pairs", "pairs")]
    )
    def test_ranks_that_do_not_fit(self, tmp_path: Path, task: str, message: str) -> None:
        for result in ranks(task, tmp_path):
            assert result["error"].startswith(f"{message}: expected the same on all ranks")

    def test_assert_same_tables(self, tmp_path: Path) -> None:
        first, second = ranks("same_tables", tmp_path)
        assert first["first"] == second["first"]
        for result in (first, second):
            (line,) = result["lines"]
            assert '"size": 128' in line
            assert "fine(variant=1) (rank 0), fine(variant=3) (rank 1)" in line

    def test_a_single_process_is_a_job_of_one(self) -> None:
        found = tune_sharded([(Scale(Fine()), ScaleProblem(64))], lab=PlaybackLab())
        assert [report.result for report in found.reports] == [Result.TUNED]
        assert assert_same_tables([Scale(Fine())])


def test_differences_name_only_what_differs() -> None:
    tables = [{"a": "x", "b": "y"}, {"a": "x"}, {"a": "x", "b": "z"}]
    assert differences(tables) == ["b: y (rank 0), no entry (rank 1), z (rank 2)"]


class SlowLab(PlaybackLab):
    """Takes time, so that several of them work at once; notes in which threads."""

    def __init__(self, device: int, seconds: float = 0.02, **options: Any) -> None:
        super().__init__(**options)
        self.device = device
        self.seconds = seconds
        self.threads: set[str] = set()
        self.problems: list[int] = []
        self.closed = False

    def timer(self, operator: Any, problem: Any, policy: Any, seed: int) -> Any:
        self.threads.add(threading.current_thread().name)
        self.problems.append(problem.size)
        time.sleep(self.seconds)
        return super().timer(operator, problem, policy, seed)

    def close(self) -> None:
        self.closed = True


class LostLab(SlowLab):
    """A GPU that falls off the bus."""

    def timer(self, operator: Any, problem: Any, policy: Any, seed: int) -> Any:
        super().timer(operator, problem, policy, seed)
        raise DeviceLostError("fallen off the bus")


class TestGpusOfAHost:
    PAIRS = tuple((Scale(Fine()), ScaleProblem(size)) for size in SIZES)

    def labs(self, *kinds: Callable[[int], SlowLab]) -> tuple[list[SlowLab], Callable[[int], Any]]:
        made: list[SlowLab] = []

        def make(device: int) -> SlowLab:
            made.append(kinds[device](device))
            return made[-1]

        return made, make

    def test_all_work(self) -> None:
        made, make = self.labs(SlowLab, SlowLab)
        reports = tune_on_gpus([*self.PAIRS, self.PAIRS[0]], [0, 1], make)
        assert [report.problem for report in reports] == [problem for _, problem in self.PAIRS]
        assert {report.result for report in reports} == {Result.TUNED}
        assert len(list(Store().entries())) == len(SIZES)
        for lab in made:
            assert lab.problems
            assert len(lab.threads) == 1
            assert lab.closed
        assert made[0].threads != made[1].threads

    def test_one_gpu_fails(self) -> None:
        made, make = self.labs(LostLab, SlowLab)
        reports = tune_on_gpus(self.PAIRS, [0, 1], make)
        assert {report.result for report in reports} == {Result.TUNED}
        assert len(made[0].problems) == 1
        assert sorted(made[1].problems) == list(SIZES)

    def test_the_last_problem_comes_back(self) -> None:
        made, make = self.labs(lambda d: LostLab(d, 0.3), lambda d: SlowLab(d, 0.0))
        reports = tune_on_gpus(self.PAIRS[:2], [0, 1], make)
        assert len(reports) == 2
        assert sorted(made[1].problems) == [64, 128]

    def test_a_gpu_that_cannot_be_opened(self) -> None:
        def broken(device: int) -> SlowLab:
            raise RuntimeError("busy")

        _, make = self.labs(broken, SlowLab)
        assert len(tune_on_gpus(self.PAIRS, [0, 1], make)) == len(SIZES)

    def test_all_fail(self) -> None:
        _, make = self.labs(LostLab, LostLab)
        with pytest.raises(TuningStoppedError, match="fallen off the bus"):
            tune_on_gpus(self.PAIRS, [0, 1], make)

    def test_a_problem_that_costs_two_gpus_is_given_up(self) -> None:
        class Allergic(SlowLab):
            def timer(self, operator: Any, problem: Any, policy: Any, seed: int) -> Any:
                if problem.size == 256:
                    raise DeviceLostError("256")
                return super().timer(operator, problem, policy, seed)

        _, make = self.labs(Allergic, Allergic, SlowLab)
        reports = tune_on_gpus(self.PAIRS, [0, 1, 2], make)
        failed = [r.problem.size for r in reports if r.result is Result.FAILED]  # type: ignore[attr-defined]
        assert failed in ([], [256])
        assert len(reports) == len(SIZES)

    def test_other_names_are_refused(self) -> None:
        def other(device: int) -> SlowLab:
            facts = replace(nominal_device("sm_90"), name=f"GPU {device}")
            return SlowLab(device, facts=facts)

        made, make = self.labs(other, other)
        with pytest.raises(ArgumentValueError, match="GPUs of one name"):
            tune_on_gpus(self.PAIRS, [0, 1], make)
        assert all(lab.closed for lab in made)
        with pytest.raises(ArgumentValueError, match="at least one GPU"):
            tune_on_gpus(self.PAIRS, [], make)

    def test_ctrl_c_stops_all_and_keeps_what_is_done(self, monkeypatch: Any) -> None:
        made, make = self.labs(lambda d: SlowLab(d, 0.2), lambda d: SlowLab(d, 0.2))
        join = threading.Thread.join

        def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
            join(thread, timeout)
            if timeout is not None and len(list(Store().entries())) >= 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(TuningInterrupted) as caught:
            tune_on_gpus(self.PAIRS, [0, 1], make)
        assert 1 <= len(caught.value.reports) < len(SIZES)
        assert all(lab.closed for lab in made)
        assert not [t for t in threading.enumerate() if t.name.startswith("tune-gpu")]

    def test_progress_and_failing_problems(self) -> None:
        class Watch(Progress):
            def __init__(self) -> None:
                self.seen: list[Any] = []

            def begin(self, problems: int) -> None:
                self.seen.append(problems)

            def problem(self, index: int, problem: Any, planned: int) -> None:
                self.seen.append((index, problem.size))

            def end(self, report: Any) -> None:
                self.seen.append(report.result)

        watch = Watch()
        lab = PlaybackLab(lambda candidate: BROKEN)
        reports = tune_on_gpus(self.PAIRS[:2], [0], lambda device: lab, progress=watch)
        assert {report.result for report in reports} == {Result.FAILED}
        assert watch.seen == [2, (0, 64), Result.FAILED, (1, 128), Result.FAILED]
