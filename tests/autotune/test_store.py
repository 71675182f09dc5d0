from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from autotune_fakes import Scale, ScaleProblem

from tritonconv.autotune.store import Store, elect, merge
from tritonconv.runtime import entries, tables
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.tables import Entry, Tier, Timing, Trial, environment, tuned_table

DEVICE = nominal_device("sm_90")
ENV = environment(DEVICE)


def trial(variant: int, time: float, status: str = "ok", algorithm: str = "fine") -> Trial:
    return Trial(algorithm, {"variant": variant}, status, "", Timing(time, time, time, 9), 1e-9)


def entry_of(*trials: Trial, size: int = 64, source: str = "source-1") -> Entry:
    fields = dict(ScaleProblem(size).fields())
    draft = Entry(
        "fake.scale",
        fields,
        source,
        "graph-cold",
        ENV.as_dict(),
        trials[0],
        trials[0],
        (),
        trials,
        {"seed": 0},
    )
    elected = elect(draft)
    assert elected is not None
    return elected


def test_an_entry_is_read_back_and_its_environment_lies_beside_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "tuned")
    entry = entry_of(trial(0, 10.0), trial(1, 5.0))
    stored = store.save(ENV, entry)
    assert tables.read_entry(stored.path) == entry == stored.entry
    assert json.loads(stored.path.read_text())["schema_version"] == 1
    assert next(iter(json.loads(stored.path.read_text()))) == "schema_version"
    described = json.loads((stored.path.parents[1] / "environment.json").read_text())
    assert described["device"]["name"] == DEVICE.name
    assert [s.entry for s in store.entries()] == [entry]
    assert stat.S_IMODE(stored.path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "tuned").stat().st_mode) == 0o700


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


_WRITER = """
import sys
from pathlib import Path
from test_store import ENV, entry_of, trial
from tritonconv.autotune.store import Store

store, worker, count = Store(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
for index in range(count):
    number = 1 + worker * count + index
    store.save(ENV, entry_of(trial(0, 10.0), trial(number, 10.0 + number)))
"""


def _writer(root: Path, worker: int, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(root), str(worker), str(count)],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_writers_lose_nothing_and_readers_see_whole_files(tmp_path: Path) -> None:
    count = 40
    writers = [_writer(tmp_path, worker, count) for worker in range(2)]
    path = Store(tmp_path).path(ENV, "fake.scale", entry_of(trial(0, 1.0)).key())
    reads = 0
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            Entry.from_json(json.loads(path.read_text()))
            reads += 1
        time.sleep(0.001)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert reads
    final = Entry.from_json(json.loads(path.read_text()))
    assert {t.config["variant"] for t in final.trials} == set(range(2 * count + 1))


def test_a_killed_writer_leaves_a_whole_entry_and_no_lock(tmp_path: Path) -> None:
    path = Store(tmp_path).path(ENV, "fake.scale", entry_of(trial(0, 1.0)).key())
    writers = [_writer(tmp_path, worker, 100_000) for worker in range(2)]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        time.sleep(0.4)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    Entry.from_json(json.loads(path.read_text()))
    Store(tmp_path).save(ENV, entry_of(trial(0, 10.0)))  # would hang on a lock left behind
    assert len(list(Store(tmp_path).entries())) == 1


def test_a_lookup_serves_exact_bucket_nearest_default_in_this_order(cache: Path) -> None:
    operator, store = Scale(), Store()
    table = tuned_table(DEVICE)
    assert table.lookup(operator, ScaleProblem(64)).tier is Tier.DEFAULT
    store.save(ENV, entry_of(trial(0, 10.0), trial(1, 5.0), size=97))
    store.save(ENV, entry_of(trial(0, 10.0), trial(3, 5.0), size=4096))
    assert table.lookup(operator, ScaleProblem(97)).tier is Tier.DEFAULT  # read once per process
    tables.invalidate("fake.scale")

    found = {}
    for size in (97, 100, 200, 3000):
        choice = table.lookup(operator, ScaleProblem(size))
        found[size] = (choice.tier, choice.config.as_dict()["variant"])
    assert found == {
        97: (Tier.EXACT, 1),
        100: (Tier.BUCKET, 1),
        200: (Tier.NEAREST, 1),
        3000: (Tier.NEAREST, 3),
    }
    assert table.lookup(operator, ScaleProblem(97, "bfloat16")).tier is Tier.DEFAULT


def test_an_entry_of_other_sources_is_stale(cache: Path) -> None:
    Store().save(ENV, entry_of(trial(0, 10.0), trial(1, 5.0)))
    tables.invalidate()
    table = tuned_table(DEVICE)
    assert table.lookup(Scale(), ScaleProblem(64)).tier is Tier.EXACT
    tables.invalidate()
    changed = Scale(source="source-2")
    assert table.lookup(changed, ScaleProblem(64)).tier is Tier.DEFAULT


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": 99}', "[]", "null", '{"a": 1}'])
def test_a_bad_file_is_a_miss_and_one_warning(cache: Path, text: str) -> None:
    stored = Store().save(ENV, entry_of(trial(0, 10.0)))
    stored.path.with_name(f"{abs(hash(text))}.json").write_text(text)
    stored.path.write_text(text)
    table = tuned_table(DEVICE)
    entries.warn_once.cache_clear()
    for _ in range(2):
        tables.invalidate()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert table.lookup(Scale(), ScaleProblem(64)).tier is Tier.DEFAULT
            assert list(Store().entries()) == []
        assert len(caught) == (2 if _ == 0 else 0)  # one for each of the two files
        assert all("is ignored" in str(w.message) for w in caught)


def test_settings_and_tuning_change_the_epoch(cache: Path) -> None:
    from tritonconv.runtime.settings import settings

    before = tables.epoch()
    with settings.override(autotune="off"):
        inside = tables.epoch()
    assert before != inside != tables.epoch()
    with tables.recording() as met:
        tables.choose(Scale(), ScaleProblem(5), DEVICE)
        tables.note(Scale(), ScaleProblem(6))
    tables.choose(Scale(), ScaleProblem(7), DEVICE)
    assert [problem for _, problem in met] == [ScaleProblem(5), ScaleProblem(6)]
