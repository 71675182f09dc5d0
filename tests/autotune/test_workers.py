"""Child processes: deadlines, deaths, Ctrl-C, and nothing left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tritonconv.autotune import workers
from tritonconv.autotune.workers import (
    RemoteError,
    Worker,
    WorkerDiedError,
    WorkerTimeoutError,
)
from tritonconv.runtime.settings import settings

SERVANT = "worker_fakes:Servant"
SLOW = 120.0  # seconds that a loaded machine may take for what takes milliseconds


@pytest.fixture
def servant() -> Iterator[Worker]:
    with Worker(SERVANT) as worker:
        yield worker


def gone(pid: int, seconds: float = 20.0) -> bool:
    """Whether a process ends (or is a zombie that somebody else has to reap)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        if text.rpartition(")")[2].split()[0] in "ZX":
            return True
        time.sleep(0.02)
    return False


def test_values_come_back_and_state_stays(servant: Worker) -> None:
    for value in (None, 3, {"a": [1.5, "x"]}, torch.arange(5), b"x" * (1 << 20)):
        found = servant.call("echo", value, timeout=SLOW)
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
    assert servant.call("count", timeout=SLOW) == 5


def test_a_worker_has_the_surroundings_but_not_the_main_program(tmp_path: Path) -> None:
    os.environ["TRITON_INTERPRET_BEFORE"] = "yes"
    try:
        with (
            settings.override(cache_dir=tmp_path, autotune="tune"),
            Worker(SERVANT, environment={"EXTRA": "1"}) as worker,
        ):
            assert worker.call("setting", "cache_dir", timeout=SLOW) == tmp_path
            assert worker.call("setting", "autotune", timeout=SLOW) == "lookup"
            assert worker.call("environment", "EXTRA", timeout=SLOW) == "1"
            assert worker.call("environment", "TRITON_INTERPRET_BEFORE", timeout=SLOW) == "yes"
            found = worker.call("surroundings", timeout=SLOW)
    finally:
        del os.environ["TRITON_INTERPRET_BEFORE"]
    assert found["directory"] == os.getcwd()
    assert found["group"] == found["pid"] != os.getpid()
    assert found["interpret"] is None and found["main"] is None and not found["cuda"]


def test_an_exception_is_reported_and_the_worker_lives(servant: Worker) -> None:
    with pytest.raises(RemoteError, match="RuntimeError: too bad") as caught:
        servant.call("fail", "too bad", timeout=SLOW)
    assert caught.value.kind == "RuntimeError" and "worker_fakes.py" in caught.value.trace
    with pytest.raises(RemoteError, match="AttributeError"):
        servant.call("nothing", timeout=SLOW)
    with pytest.raises(RemoteError, match="pickle"):
        servant.call("odd", timeout=SLOW)
    assert servant.call("echo", 1, timeout=SLOW) == 1


def test_a_deadline_kills_the_worker_and_all_it_started(servant: Worker) -> None:
    pid = servant.call("surroundings", timeout=SLOW)["pid"]
    grandchild = servant.call("spawn", timeout=SLOW)
    begin = time.monotonic()
    with pytest.raises(WorkerTimeoutError, match=r"no answer within 0\.2 s"):
        servant.call("sleep", 600, timeout=0.2)
    assert time.monotonic() - begin < 30
    assert not servant.alive
    assert gone(pid) and gone(grandchild)


def test_notes_move_the_deadline(servant: Worker) -> None:
    seen: list[int] = []

    def heed(index: int) -> float:
        seen.append(index)
        return SLOW if index < 2 else 0.3

    assert servant.call("steps", [0.4, 0.4], timeout=SLOW, heed=heed) == "done"
    assert seen == [0, 1]
    with pytest.raises(WorkerTimeoutError, match=r"within 0\.3 s"):
        servant.call("steps", [0.0, 0.0, 600.0], timeout=SLOW, heed=heed)


@pytest.mark.parametrize(
    ("method", "arguments", "reason"),
    [
        ("leave", (3,), "ended with exit code 3"),
        ("abort", (), "was killed by SIGABRT: fatal: no way out"),
    ],
)
def test_deaths_are_explained(method: str, arguments: tuple[int, ...], reason: str) -> None:
    with Worker(SERVANT) as worker:
        grandchild = worker.call("spawn", timeout=SLOW)
        with pytest.raises(WorkerDiedError, match=reason):
            worker.call(method, *arguments, timeout=SLOW)
        assert not worker.alive
        assert gone(grandchild)
        with pytest.raises(WorkerDiedError, match=reason):
            worker.call("echo", 1, timeout=SLOW)


def test_a_worker_killed_from_outside_is_found_dead(servant: Worker) -> None:
    pid = servant.call("surroundings", timeout=SLOW)["pid"]
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        servant.call("echo", 1, timeout=SLOW)


@pytest.mark.parametrize(
    ("factory", "arguments", "reason"),
    [
        (SERVANT, ("refuse",), "cannot start: ValueError: no greeting"),
        ("worker_fakes:Nobody", (), "cannot start: AttributeError"),
        ("no_such_module:Nobody", (), "cannot start: ModuleNotFoundError"),
        ("nonsense", (), "import path: expected package.module:name"),
    ],
)
def test_a_host_that_cannot_be_made(factory: str, arguments: tuple[str, ...], reason: str) -> None:
    with Worker(factory, arguments) as worker, pytest.raises(WorkerDiedError, match=reason):
        worker.call("echo", 1, timeout=SLOW)


def test_stray_prints_do_no_harm_and_do_not_pile_up(servant: Worker) -> None:
    for _ in range(4):
        servant.call("chatter", 700_000, timeout=SLOW)
    assert servant.tail().endswith("noise\n")
    assert os.fstat(servant._output.fileno()).st_size < 3_000_000


def test_what_is_of_the_main_program_is_refused_here(servant: Worker) -> None:
    class Local:
        pass

    Local.__module__ = "__main__"
    with pytest.raises(ValueError, match=r"importable modules .*Local of __main__"):
        servant.call("echo", Local, timeout=SLOW)
    assert servant.call("echo", 1, timeout=SLOW) == 1


def test_a_worker_in_a_fresh_interpreter() -> None:
    with Worker(SERVANT, fork=False) as worker:
        assert worker.call("echo", [1], timeout=SLOW) == [1]
        pid = worker.call("surroundings", timeout=SLOW)["pid"]
    assert gone(pid)


def test_workers_of_several_threads() -> None:
    failures: list[str] = []

    def use(index: int) -> None:
        with Worker(SERVANT) as worker:
            for number in range(20):
                if worker.call("echo", (index, number), timeout=SLOW) != (index, number):
                    failures.append(f"{index}/{number}")

    threads = [threading.Thread(target=use, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_an_abandoned_worker_is_killed() -> None:
    worker = Worker(SERVANT)
    pid = worker.call("surroundings", timeout=SLOW)["pid"]
    del worker
    assert gone(pid)


def test_the_server_can_be_shut_down_and_comes_back() -> None:
    worker = Worker(SERVANT)
    pid = worker.call("surroundings", timeout=SLOW)["pid"]
    workers.shutdown()
    assert gone(pid)
    with pytest.raises(WorkerDiedError):
        worker.call("echo", 1, timeout=SLOW)
    with Worker(SERVANT) as other:
        assert other.call("echo", 1, timeout=SLOW) == 1


PARENT = """
import sys, time
if "imported" in sys.argv:
    print("the main program ran again")
sys.argv.append("imported")
from tritonconv.autotune.workers import Worker, _running_server
workers = [Worker("worker_fakes:Servant") for _ in range(2)]
pids = [w.call("surroundings", timeout=120)["pid"] for w in workers]
grandchild = workers[0].call("spawn", timeout=120)
print("ready", _running_server().process.pid, grandchild, *pids, flush=True)
try:
    workers[1].call("sleep", 600, timeout=600)
except KeyboardInterrupt:
    assert not workers[1].alive
    assert workers[0].call("echo", "alive", timeout=120) == "alive"
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("how", ["script", "-c"])
@pytest.mark.parametrize("end", ["interrupt", "kill", "terminate"])
def test_nothing_outlives_the_parent(how: str, end: str, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    arguments = [str(script)] if how == "script" else ["-c", PARENT]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # its group is what a terminal would interrupt
    )
    assert process.stdout is not None
    words = process.stdout.readline().split()
    assert words and words[0] == "ready"
    children = [int(word) for word in words[1:]]
    time.sleep(0.2)
    if end == "interrupt":
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert process.wait(60) == 0
    else:
        process.send_signal(signal.SIGKILL if end == "kill" else signal.SIGTERM)
        process.wait(60)
    process.stdout.close()
    assert [pid for pid in children if not gone(pid)] == []
