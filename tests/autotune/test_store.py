from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from autotune_entries import DEVICE, ENV, entry_of, trial, winner
from autotune_fakes import Scale

from tritonconv.autotune.store import Store, merge
from tritonconv.runtime import tables
from tritonconv.runtime.tables import Entry


def test_an_entry_is_read_back_and_its_environment_lies_beside_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "tuned")
    entry = entry_of(trial(0, 10.0), trial(1, 5.0))
    stored = store.save(ENV, entry)
    assert tables.read_entry(stored.path) == entry == stored.entry
    assert json.loads(stored.path.read_text())["schema_version"] == 2
    assert next(iter(json.loads(stored.path.read_text()))) == "schema_version"
    described = json.loads((stored.path.parents[1] / "environment.json").read_text())
    assert described["device"]["name"] == DEVICE.name
    assert [s.entry for s in store.entries()] == [entry]


def test_saving_again_keeps_timings_and_chooses_anew() -> None:
    old = entry_of(trial(0, 10.0), trial(1, 5.0))
    new = entry_of(trial(0, 10.0), trial(2, 7.0))
    merged = merge(new, old)
    assert [t.config["variant"] for t in merged.trials] == [0, 2, 1]
    assert merged.best.config == {"variant": 1}


@pytest.mark.parametrize(
    "old",
    [
        entry_of(trial(0, 10.0), trial(1, 5.0), source="older source"),
        replace(entry_of(trial(0, 10.0), trial(1, 5.0)), policy="eager"),
        entry_of(trial(0, 10.0), trial(1, 5.0), size=65),
        None,
    ],
    ids=["source", "policy", "problem", "nothing"],
)
def test_what_cannot_be_compared_is_not_merged(old: Entry | None) -> None:
    new = entry_of(trial(0, 10.0), trial(2, 7.0))
    assert merge(new, old) == new


def test_an_unchecked_trial_cannot_be_elected() -> None:
    assert entry_of(trial(0, 10.0), trial(1, 1.0, "timed")).best.config == {"variant": 0}


def test_a_problem_and_a_policy_have_one_entry_whatever_sources_and_space(tmp_path: Path) -> None:
    store = Store(tmp_path)
    identity = ("fake.scale", entry_of(trial(0, 1.0)).problem)
    assert store.load(ENV, *identity, "graph-cold") is None
    older = winner(1, created="2026-01-01", space_hash="space-1", source="source-0")
    newer = winner(2, created="2026-02-01", space_hash="space-2")
    for entry in (older, newer, winner(3, created="2026-03-01", policy="eager")):
        store.save(ENV, entry)
    assert store.load(ENV, *identity, "graph-cold") == newer
    assert store.load(ENV, *identity, "graph-hot") is None
    assert len(list(store.entries())) == 2


def test_where_it_is_allowed_the_newest_of_another_variant_gives_its_timings(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    for number, created in enumerate(("2026-02-01", "2026-03-01", "2026-01-01")):
        entry = winner(1 + number, created=created)
        store.save(ENV, replace(entry, problem={**entry.problem, "configs": str(number)}))
    wanted = {**entry.problem, "configs": "other"}
    assert store.load(ENV, "fake.scale", wanted, "graph-cold") is None
    found = store.load(ENV, "fake.scale", wanted, "graph-cold", ("configs",))
    assert found is not None and found.best.config == {"variant": 2}
    assert store.load(ENV, "fake.scale", wanted, "eager", ("configs",)) is None
    longer = {**wanted, "size": 65}
    assert store.load(ENV, "fake.scale", longer, "graph-cold", ("configs",)) is None
    own = store.load(ENV, "fake.scale", {**wanted, "configs": "2"}, "graph-cold", ("configs",))
    assert own is not None and own.best.config == {"variant": 3}


def test_unfinished_trials_of_two_processes_are_joined(tmp_path: Path) -> None:
    store = Store(tmp_path)
    aten = trial(0, 4.0, algorithm="aten")
    first = entry_of(trial(0, 10.0), trial(1, 5.0), aten, changed={"aten": "source-0"})
    store.save_partial(ENV, first)
    store.save_partial(ENV, entry_of(trial(0, 11.0), trial(2, 7.0)))
    kept = store.load_partial(ENV, first)
    assert kept is not None and kept.sources["aten"] == "source-1"
    assert [(t.config["variant"], t.timing.p50) for t in kept.trials if t.timing] == [
        (0, 11.0), (2, 7.0), (1, 5.0),
    ]  # fmt: skip
    store.drop_partial(ENV, first)
    assert store.load_partial(ENV, first) is None


def test_merging_keeps_the_trials_of_algorithms_that_have_not_changed() -> None:
    old = entry_of(trial(0, 10.0), trial(1, 5.0), trial(0, 4.0, algorithm="aten"))
    new = entry_of(trial(0, 9.0), trial(2, 7.0), changed={"fine": "source-2"})
    merged = merge(new, old)
    assert [(t.algorithm, t.config["variant"]) for t in merged.trials] == [
        ("fine", 0), ("fine", 2), ("aten", 0),
    ]  # fmt: skip
    assert merged.best.algorithm == "aten" and merged.sources == new.sources
    # One that nobody knows any more is not elected.
    gone = {k: v for k, v in new.sources.items() if k != "aten"}
    assert merge(replace(new, sources=gone), old).best.config == {"variant": 2}


def test_merging_with_a_table_from_elsewhere_prefers_todays_source_of_every_algorithm() -> None:
    today = {"fine": "source-2", "aten": "source-1"}
    here = entry_of(
        trial(0, 9.0),
        trial(2, 7.0),
        trial(0, 1.0, algorithm="aten"),
        changed={"fine": "source-2", "aten": "source-0"},
    )
    there = entry_of(trial(0, 10.0), trial(1, 5.0), trial(0, 6.0, algorithm="aten"))
    for new, old in ((here, there), (there, here)):
        merged = merge(new, old, today)
        times = {
            (t.algorithm, t.config["variant"]): t.timing.p50 for t in merged.trials if t.timing
        }
        assert times == {("fine", 0): 9.0, ("fine", 2): 7.0, ("aten", 0): 6.0}
        assert {name: merged.sources[name] for name in today} == today
        assert merged.best.algorithm == "aten" and merged.default == here.default


def test_what_takes_trials_of_an_unfinished_run_is_unfinished() -> None:
    today = {"fine": "source-2", "aten": "source-1"}
    done = {"completed": {"seed": 0}, "spaces": {"fine": "a", "aten": "b"}}
    here = entry_of(trial(0, 9.0), trial(2, 7.0), changed={"fine": "source-2"})
    there = entry_of(trial(0, 10.0), trial(0, 6.0, algorithm="aten"))
    there = replace(there, recorded={**there.recorded, **done})
    merged = merge(there, here, today)
    assert merged.sources["fine"] == "source-2"
    assert "completed" not in merged.recorded
    assert merged.recorded["spaces"] == {"aten": "b"}
    # Where all that it was finished with is kept, it stays so.
    assert merge(there, here, {**today, "fine": "source-1"}).recorded == there.recorded


@pytest.mark.parametrize(("space", "won"), [("space-1", 1), ("space-2", 2), ("", 2)])
def test_what_is_no_candidate_any_more_does_not_win(space: str, won: int) -> None:
    new = entry_of(trial(0, 10.0), trial(2, 7.0), space_hash=space)
    merged = merge(new, entry_of(trial(0, 10.0), trial(1, 5.0)))
    assert {t.config["variant"]: t.status for t in merged.trials}[1] == (
        "ok" if won == 1 else "timed"
    )
    assert merged.best.config == {"variant": won}


def test_an_import_keeps_todays_timings_where_the_default_has_moved() -> None:
    today = {"fine": "source-2", "aten": "source-1"}
    here = entry_of(
        trial(1, 9.0), trial(2, 8.0), trial(0, 12.0, algorithm="aten"), changed={"fine": "source-2"}
    )
    there = entry_of(trial(9, 10.0), trial(1, 5.5), trial(0, 5.0, algorithm="aten"))
    merged = merge(there, here, today)
    assert {name: merged.sources[name] for name in today} == today
    assert [(t.algorithm, t.config["variant"]) for t in merged.trials] == [
        ("fine", 1), ("aten", 0), ("fine", 2),
    ]  # fmt: skip
    assert merged.default == here.default and merged.best.algorithm == "aten"
    assert merged.best.timing is not None and merged.best.timing.p50 == 5.0


def test_an_entry_from_elsewhere_is_adopted_where_it_is_faster(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.adopt(ENV, winner(1, 5.0)) is not None
    assert store.adopt(ENV, winner(2, 6.0)) is None
    assert store.adopt(ENV, winner(3, 6.0, space_hash="space-2")) is None
    assert store.adopt(ENV, winner(4, 4.0, space_hash="space-3", created="2025-01-01")) is not None
    (stored,) = store.entries()
    assert stored.entry.best.config == {"variant": 4}


@pytest.mark.parametrize("created", ["2025-01-01", "2027-01-01"])
def test_an_entry_that_serves_is_adopted_for_a_stale_one_and_not_the_other_way(
    tmp_path: Path, scale: Scale, created: str
) -> None:
    store = Store(tmp_path)
    stale = winner(1, 2.0, source="source-0", created="2026-01-01")
    serving = winner(2, 6.0, created=created)
    assert store.adopt(ENV, stale) is not None  # it harms nobody
    assert store.adopt(ENV, serving) is not None
    assert store.adopt(ENV, stale) is None
    (stored,) = store.entries()
    assert stored.entry == serving


_WRITER = """
import sys
from pathlib import Path
from autotune_entries import ENV, entry_of, trial
from tritonconv.autotune.store import Store

store, worker, count, problems = Store(Path(sys.argv[1])), *map(int, sys.argv[2:])
print("ready", flush=True)
sys.stdin.readline()
for index in range(count):
    number = 1 + worker * count + index
    trials = trial(0, 10.0), trial(number, 10.0 + number)
    store.save(ENV, entry_of(*trials, size=1 + index % problems))
    print(index, flush=True)
"""


def _writer(root: Path, worker: int, count: int, problems: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, *map(str, (root, worker, count, problems))],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )


def _start(writers: list[subprocess.Popen[str]]) -> None:
    """Let them write at the same time, which begins when all have imported what they need."""
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()


def _whole(root: Path) -> dict[int, set[int]]:
    """Variants in the entries of every problem; a file that is no whole entry fails the test."""
    found = {}
    for path in root.glob("v2/*/fake.scale/*.json"):
        entry = Entry.from_json(json.loads(path.read_text()))
        assert path.stem == entry.key()
        size = entry.problem["size"]
        assert isinstance(size, int)
        found[size] = {t.config["variant"] for t in entry.trials}
    return found


def test_two_writers_lose_nothing_and_readers_see_whole_files(tmp_path: Path) -> None:
    """Two processes, 1000 writes each, to the same 200 entries."""
    count, problems = 1000, 200
    writers = [_writer(tmp_path, worker, count, problems) for worker in range(2)]
    _start(writers)
    finished = [
        threading.Thread(target=lambda w=writer: w.communicate())  # drains what it prints
        for writer in writers
    ]
    for thread in finished:
        thread.start()
    reads = 0
    while any(thread.is_alive() for thread in finished):
        reads += bool(_whole(tmp_path))
        time.sleep(0.3)
    assert [writer.wait() for writer in writers] == [0, 0]
    assert reads
    expected = {
        1 + p: {0} | {1 + w * count + i for w in range(2) for i in range(p, count, problems)}
        for p in range(problems)
    }
    assert _whole(tmp_path) == expected
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_killed_writer_loses_nothing_it_had_finished(tmp_path: Path) -> None:
    """kill -9 in the middle of 200 writes, three times."""
    count, kills = 200, (20, 60, 110)
    writers = [_writer(tmp_path / str(after), 0, count, count) for after in kills]
    for after, writer in zip(kills, writers, strict=True):
        _start([writer])
        assert writer.stdout is not None
        while int(writer.stdout.readline()) < after:
            pass
        os.kill(writer.pid, signal.SIGKILL)
        finished = max([after, *map(int, writer.stdout.read().split())])
        writer.wait()
        root = tmp_path / str(after)
        found = _whole(root)
        assert finished < count - 1, "killed too late"
        assert set(range(1, finished + 2)) <= set(found)
        assert all(found[1 + index] == {0, 1 + index} for index in range(finished + 1))
        Store(root).save(ENV, entry_of(trial(0, 10.0), size=1))  # would hang on a lock left behind
        assert len(list(Store(root).entries())) == len(found)
