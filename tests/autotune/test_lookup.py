from __future__ import annotations

import json
import shutil
import threading
import timeit
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis.strategies as st
import pytest
from autotune_entries import AMPERE, DEVICE, ENV, OLDER, SISTER, entry_of, trial, winner
from autotune_fakes import Fine, Picky, Scale, ScaleProblem
from hypothesis import given
from hypothesis import settings as examples

from tritonconv.autotune import bundle
from tritonconv.autotune.bundle import export, write
from tritonconv.autotune.store import Store
from tritonconv.runtime import entries, missed, sources, tables
from tritonconv.runtime.freshness import changes
from tritonconv.runtime.settings import settings
from tritonconv.runtime.tables import NotTunedError, Tier, tuned_table

OPERATOR = Scale()
few = examples(max_examples=40, deadline=None, derandomize=True, database=None)


def found(size: int, dtype: str = "float32", operator: Scale = OPERATOR) -> tuple[str, int]:
    choice = tuned_table(DEVICE).lookup(operator, ScaleProblem(size, dtype))
    return str(choice.tier), next(iter(choice.config.as_dict().values()))


def test_a_lookup_serves_exact_bucket_nearest_default_in_this_order(cache: Path) -> None:
    table = tuned_table(DEVICE)
    assert table.lookup(OPERATOR, ScaleProblem(64)).tier is Tier.DEFAULT
    Store().save(ENV, winner(1, size=97))
    Store().save(ENV, winner(3, size=4096))
    assert table.lookup(OPERATOR, ScaleProblem(97)).tier is Tier.DEFAULT  # read once per process
    tables.invalidate("fake.scale")
    assert {size: found(size) for size in (97, 100, 200, 3000)} == {
        97: ("exact", 1),
        100: ("bucket", 1),
        200: ("nearest", 1),
        3000: ("nearest", 3),
    }
    assert found(97, "bfloat16")[0] == "default"


def test_the_newest_of_policies_serves(cache: Path) -> None:
    Store().save(ENV, winner(1, created="2026-02-02", policy="eager"))
    Store().save(ENV, winner(2, created="2026-03-03"))
    Store().save(ENV, winner(3, created="2026-01-01", policy="graph-hot"))
    assert found(64) == ("exact", 2)
    assert found(63) == ("bucket", 2)


def test_the_users_entry_comes_before_shared_ones(cache: Path, tmp_path: Path) -> None:
    Store(tmp_path / "team").save(ENV, winner(1, created="2027-01-01"))
    Store(tmp_path / "team").save(ENV, winner(2, size=1000))
    Store().save(ENV, winner(3, created="2026-01-01"))
    with settings.override(cache_path=(tmp_path / "team",)):
        assert found(64) == ("exact", 3)
        assert found(1000) == ("exact", 2)
        choice = tuned_table(DEVICE).lookup(OPERATOR, ScaleProblem(1000))
        assert choice.source == f"shared {tmp_path / 'team'}"


def test_a_bundle_serves_where_the_users_table_has_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Store(tmp_path / "made")
    made.save(ENV, winner(1, size=64))
    made.save(ENV, winner(2, size=500))
    folder = tmp_path / "packaged"
    write(export(made, ENV), folder / "h100.json")
    monkeypatch.setattr(tables, "packaged_directory", lambda: folder)
    tables._table.cache_clear()
    Store().save(ENV, winner(3, size=64))
    assert found(64) == ("exact", 3)
    assert found(500) == ("exact", 2)
    assert tuned_table(DEVICE).lookup(OPERATOR, ScaleProblem(500)).source == "packaged"
    tables._table.cache_clear()
    with settings.override(cache_path=(folder / "h100.json",)):
        assert tuned_table(DEVICE).lookup(OPERATOR, ScaleProblem(500)).source.startswith("shared")


def test_the_same_architecture_elsewhere_serves_last(cache: Path) -> None:
    Store().save(AMPERE, winner(1, env=AMPERE))
    assert found(64)[0] == "default"  # another architecture
    Store().save(SISTER, winner(1, env=SISTER))
    tables.invalidate()
    assert found(64) == found(5000) == ("family", 1)
    Store().save(OLDER, winner(2, env=OLDER))  # the same board comes before another
    tables.invalidate()
    assert found(64) == ("family", 2)
    Store().save(ENV, winner(3, size=5000))
    tables.invalidate()
    assert found(64) == ("nearest", 3)
    assert found(64, "bfloat16")[0] == "default"


NAMES = ("vector", "fine", "aten", "picky")


@few
@given(
    st.sampled_from(NAMES[:3]),
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["source-1", "source-2"])),
)
def test_an_entry_serves_while_its_winner_is_unchanged(won: str, changed: dict[str, str]) -> None:
    """Whatever becomes of the others; here and on a sister device."""
    config = {"block": 512, "num_warps": 4} if won == "vector" else {"variant": 0}
    best = replace(trial(0, 5.0, algorithm=won), config=config)
    slow = trial(1, 10.0)
    operator = Scale(changed=changed)
    holds = changed.get(won, "source-1") == "source-1"
    for env, size, tier in ((ENV, 64, "exact"), (ENV, 63, "bucket"), (SISTER, 64, "family")):
        with TemporaryDirectory() as folder, settings.override(cache_dir=Path(folder)):
            Store().save(env, entry_of(slow, best, env=env))
            choice = tuned_table(DEVICE).lookup(operator, ScaleProblem(size))
            assert str(choice.tier) == (tier if holds else "default")
            if holds:
                assert (choice.algorithm, choice.config.as_dict()) == (won, config)
            entry = next(Store().entries()).entry
            found = changes(entry, operator)
            assert found.stale == (not holds)
            assert found.outdated == (holds and "source-2" in changed.values())
            others = {name for name in changed if name != won and changed[name] == "source-2"}
            assert set(found.changed) == others
            assert all(name in str(found) for name in others)


def test_an_algorithm_that_came_since_makes_an_entry_outdated(cache: Path) -> None:
    entry = winner(1)
    older = replace(entry, sources={n: s for n, s in entry.sources.items() if n != "vector"})
    assert not changes(entry, OPERATOR).outdated
    assert changes(older, OPERATOR).added == ("vector",) and changes(older, OPERATOR).outdated
    # One that does not serve the problem is no news.
    unserved = replace(entry, sources={n: s for n, s in entry.sources.items() if n != "picky"})
    assert not changes(unserved, OPERATOR).outdated
    Store().save(ENV, older)
    assert found(64) == ("exact", 1)


def test_a_stale_entry_of_the_user_lets_a_shared_one_serve(cache: Path, tmp_path: Path) -> None:
    Store().save(ENV, winner(1, source="source-0", created="2027-01-01"))
    Store(tmp_path / "team").save(ENV, winner(2))
    with settings.override(cache_path=(tmp_path / "team",)):
        assert found(64) == ("exact", 2)
        assert found(63) == ("bucket", 2)


def test_a_farther_entry_does_not_serve_where_a_nearer_one_is_stale(cache: Path) -> None:
    """What survives a change of kernels is what others won: no sample of what is best."""
    aten = trial(0, 5.0, algorithm="aten")
    for size in (1000, 2000, 4000):
        Store().save(ENV, winner(2, size=size))
    Store().save(ENV, entry_of(trial(0, 10.0), aten, size=100_000))
    Store().save(SISTER, entry_of(trial(0, 10.0), aten, size=1_000_000, env=SISTER))
    Store().save(SISTER, entry_of(trial(0, 10.0), aten, size=2000, env=SISTER))
    changed = Scale(changed={"fine": "source-2"})
    tiers = {size: found(size, operator=changed)[0] for size in (1000, 1010, 1200, 4100)}
    assert tiers == dict.fromkeys(tiers, "default")
    # One that is no farther serves, here or on a sister device.
    assert found(2000, operator=changed) == ("family", 0)
    assert {size: found(size, operator=changed) for size in (99_999, 200_000)} == {
        99_999: ("bucket", 0),
        200_000: ("nearest", 0),
    }
    stale = tuned_table(DEVICE).find(changed, ScaleProblem(1200)).stale
    assert stale is not None and stale.entry.problem["size"] == 1000
    assert found(1200) == ("nearest", 2)
    # What is tuned again serves again, its neighbours too.
    Store().save(ENV, winner(3, size=1000, source="source-2", changed={"fine": "source-2"}))
    tables.invalidate()
    assert found(1200, operator=changed) == ("nearest", 3)


def test_a_winner_that_cannot_serve_is_passed_over(cache: Path) -> None:
    Store().save(ENV, entry_of(trial(0, 10.0), trial(0, 5.0, algorithm="picky")))
    Store().save(ENV, winner(2, size=63))
    assert found(64, operator=Scale(Fine(), Picky())) == ("bucket", 2)
    # There is no picky any more: the problem is tuned anew before a neighbour serves it.
    assert found(64, operator=Scale(Fine())) == ("default", 0)
    odd = replace(trial(1, 5.0), config={"length": 1})
    Store().save(ENV, entry_of(trial(0, 10.0), odd), replace_old=True)
    entries.warn_once.cache_clear()
    tables.invalidate()
    with pytest.warns(UserWarning, match=r"is ignored: config: expected integers .'variant'"):
        assert found(64, operator=Scale(Fine())) == ("bucket", 2)


def test_tables_are_off_when_asked(cache: Path) -> None:
    Store().save(ENV, winner(1))
    with settings.override(autotune="off"):
        assert found(64)[0] == "default"
    assert found(64)[0] == "exact"


BAD = {
    "empty": b"",
    "torn": b'{"schema_version": 1, "operator": "fa',
    "schema": b'{"schema_version": 99}',
    "list": b"[]",
    "null": b"null",
    "foreign": b'{"a": 1}',
    "binary": b"\xff\xfe\x00\x80garbage",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_a_miss_and_one_warning(cache: Path, name: str) -> None:
    stored = Store().save(ENV, winner(1))
    stored.path.with_name(f"foreign-{name}.json").write_bytes(BAD[name])
    stored.path.write_bytes(BAD[name])
    _is_a_miss_with_warnings(2, "cannot be read and is ignored")


def _is_a_miss_with_warnings(count: int, text: str) -> None:
    entries.warn_once.cache_clear()
    for expected in (count, 0):
        tables.invalidate()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert found(64)[0] == "default"
            assert list(Store().entries()) == []
        assert len(caught) == expected
        assert all(text in str(w.message) for w in caught)


def test_values_that_are_no_entry_are_a_miss_and_one_warning(cache: Path) -> None:
    stored = Store().save(ENV, winner(1))
    good = json.loads(stored.path.read_text())
    for change in (
        {"tied": [7]},
        {"best": {**good["best"], "p50_us": float("nan")}},
        {"best": {**good["best"], "p50_us": -1.0}},
        {"best": {**good["best"], "config": {"variant": "rm -rf"}}},
        {"problem": {"size": [1]}},
        {"trials": [{**good["best"], "resources": {"registers": "many"}}]},
        {"tied": [float("inf")]},
        {"best": {**good["best"], "count": float("inf")}},
    ):
        stored.path.write_text(json.dumps({**good, **change}))
        _is_a_miss_with_warnings(1, "cannot be read and is ignored")


def test_an_entry_in_the_wrong_place_is_a_miss_and_one_warning(cache: Path) -> None:
    """Copied to another device's folder, it would answer for a device it was not measured on."""
    stored = Store().save(SISTER, winner(1, env=SISTER))
    right = Store().save(ENV, winner(2))
    right.path.unlink()
    shutil.move(stored.path, right.path)
    _is_a_miss_with_warnings(1, "it belongs to another place")
    right.path.unlink()
    other = Store().save(ENV, winner(1, size=7))
    shutil.move(other.path, right.path)
    _is_a_miss_with_warnings(1, "it belongs to another place")


def test_a_bad_bundle_is_a_miss_and_one_warning(cache: Path, tmp_path: Path) -> None:
    for name in ("torn", "foreign", "binary"):
        (tmp_path / f"{name}.json").write_bytes(BAD[name])
    entries.warn_once.cache_clear()
    with settings.override(cache_path=tuple(tmp_path / f"{n}.json" for n in ("torn", "foreign"))):
        with pytest.warns(UserWarning, match="bundle (torn|foreign).json cannot be read") as caught:
            assert found(64)[0] == "default"
        assert len(caught) == 2


@pytest.mark.parametrize("place", ["entry", "environment"])
def test_a_bundle_with_infinite_values_is_a_miss_and_one_warning(
    cache: Path, tmp_path: Path, place: str
) -> None:
    store = Store(tmp_path / "made")
    store.save(ENV, winner(1))
    write(export(store, ENV), path := tmp_path / "bundle.json")
    value = json.loads(path.read_text())
    if place == "entry":
        value["entries"][0]["best"] = float("inf")
    else:
        value["environment"]["device"]["sm_count"] = float("inf")
    path.write_text(json.dumps(value))
    entries.warn_once.cache_clear()
    with settings.override(cache_path=(path,)):
        with pytest.warns(UserWarning, match=r"bundle bundle.json .*ignored") as caught:
            assert found(64)[0] == "default"
        assert len(caught) == 1


@pytest.mark.parametrize("step", ["listing", "entry", "environments"])
def test_a_lookup_under_way_in_another_thread_hides_no_new_entry(
    cache: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """It has read the files of before when they change, and goes on after the change is told."""
    env = SISTER if step == "environments" else ENV
    for other in (ENV, OLDER):
        Store().save(other, winner(3, size=9, env=other, dtype="bfloat16"))
    has_read, changed = threading.Event(), threading.Event()

    def paused(real: Callable[..., Any]) -> Callable[..., Any]:
        def read(*args: Any) -> Any:
            result = list(real(*args))
            if threading.current_thread().name == "reader" and not has_read.is_set():
                has_read.set()
                assert changed.wait(10)
            return result

        return read

    owner, name = {
        "listing": (sources.os, "listdir"),
        "entry": (tables.TunedTable, "known"),
        "environments": (sources.DirectorySource, "environments"),
    }[step]
    monkeypatch.setattr(owner, name, paused(getattr(owner, name)))
    reader = threading.Thread(target=lambda: found(64), name="reader")
    reader.start()
    assert has_read.wait(10)
    Store().save(env, winner(1, size=97 if step == "entry" else 64, env=env))
    tables.invalidate(OPERATOR.name)
    changed.set()
    reader.join()
    tier = {"listing": "exact", "entry": "nearest", "environments": "family"}[step]
    assert found(64) == (tier, 1)


def test_a_bundle_that_another_thread_is_reading_is_waited_for_or_read_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "made")
    store.save(ENV, winner(1))
    write(export(store, ENV), path := tmp_path / "bundle.json")
    source = sources.BundleSource("shared", path)
    real, seen = sources.read_bundle, []

    def read(path: Path) -> tables.Bundle | None:
        if not seen:
            seen.append(None)
            seen[0] = list(source.entries(ENV, "fake.scale"))
        return real(path)

    monkeypatch.setattr(sources, "read_bundle", read)
    assert list(source.entries(ENV, "fake.scale")) == seen[0] != []


def test_a_repeated_choice_is_one_dictionary_lookup(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store().save(ENV, winner(1))
    problem = ScaleProblem(64)
    choice = tables.choose(OPERATOR, problem, DEVICE)
    monkeypatch.setattr(tables.TunedTable, "find", None)  # nothing is looked up any more
    assert tables.choose(OPERATOR, problem, DEVICE) is choice
    seconds = min(timeit.repeat(lambda: tables.choose(OPERATOR, problem, DEVICE), number=10_000))
    assert seconds / 10_000 < 2e-6  # 0.3 µs where nothing else runs
    monkeypatch.undo()
    tables.invalidate()
    assert tables.choose(OPERATOR, problem, DEVICE) is not choice


def test_an_equal_problem_has_an_equal_choice_and_files_are_read_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store().save(ENV, winner(1))
    choice = tables.choose(OPERATOR, ScaleProblem(64), DEVICE)
    monkeypatch.setattr(Path, "read_bytes", None)
    assert tables.choose(OPERATOR, ScaleProblem(64), DEVICE) == choice


def test_required_entries(cache: Path, tmp_path: Path) -> None:
    Store().save(ENV, winner(1, size=64))
    Store(tmp_path / "team").save(SISTER, winner(1, env=SISTER, size=5000))
    with settings.override(require_tuned=True, cache_path=(tmp_path / "team",)):
        assert tables.choose(OPERATOR, ScaleProblem(64), DEVICE).tier is Tier.EXACT
        assert tables.choose(OPERATOR, ScaleProblem(63), DEVICE).tier is Tier.BUCKET
        for _ in range(2):
            with pytest.raises(NotTunedError) as caught:
                tables.choose(OPERATOR, ScaleProblem(5000), DEVICE)
        text = str(caught.value)
        assert "user: the nearest entry differs in size (wanted 5000, found 64)" in text
        assert "device.name (wanted NVIDIA H100 80GB HBM3, found NVIDIA H200)" in text
        assert "TRITONCONV_REQUIRE_TUNED" in text
        with pytest.raises(NotTunedError, match=r"dtype .wanted bfloat16, found float32"):
            tables.choose(OPERATOR, ScaleProblem(64, "bfloat16"), DEVICE)
        with pytest.raises(NotTunedError, match=r"the source of fine .stale: tuned with source-1"):
            tables.choose(Scale(source="source-2"), ScaleProblem(64), DEVICE)
        with settings.override(autotune="off"), pytest.raises(NotTunedError):
            tables.choose(OPERATOR, ScaleProblem(64), DEVICE)
    tables.choose(OPERATOR, ScaleProblem(5000), DEVICE)


def test_versions_are_named_where_they_differ(cache: Path) -> None:
    Store().save(OLDER, winner(1, env=OLDER))
    with settings.override(require_tuned=True), pytest.raises(NotTunedError) as caught:
        tables.choose(OPERATOR, ScaleProblem(64), DEVICE)
    assert f"differs in triton (wanted {ENV.triton}, found 3.5.0)\n" in str(caught.value)


def test_settings_and_tuning_change_the_epoch(cache: Path) -> None:
    before = tables.epoch()
    with settings.override(autotune="off"):
        inside = tables.epoch()
    assert before != inside != tables.epoch()
    with tables.recording() as met:
        tables.choose(OPERATOR, ScaleProblem(5), DEVICE)
        tables.note(OPERATOR, ScaleProblem(6))
    tables.choose(OPERATOR, ScaleProblem(7), DEVICE)
    assert [problem for _, problem in met] == [ScaleProblem(5), ScaleProblem(6)]


def test_a_repeated_choice_is_recorded_too(cache: Path) -> None:
    problem = ScaleProblem(5)
    with tables.recording() as met:
        for _ in range(3):
            tables.choose(OPERATOR, problem, DEVICE)
    assert len(met) == 3


class TestFingerprint:
    @pytest.fixture(autouse=True)
    def _registered(self, scale: Scale) -> None:
        self.operator = scale

    @staticmethod
    def of(root: Path, *stored: tuple[tables.Environment, tables.Entry]) -> str:
        for env, entry in stored:
            Store(root).save(env, entry)
        with settings.override(cache_path=(root,)):
            return tables.fingerprint(["fake.scale"], DEVICE)

    def test_equal_answers_are_equal_wherever_they_lie(self, cache: Path, tmp_path: Path) -> None:
        rows = [(ENV, winner(1)), (ENV, winner(2, size=9)), (SISTER, winner(3, env=SISTER))]
        mine = self.of(tmp_path / "a", *rows)
        # Other timings, order and dates, and the same winners.
        again = [(env, replace(e, recorded={"created": "2027"})) for env, e in rows]
        assert self.of(tmp_path / "b", *reversed(again)) == mine
        for env, entry in rows:
            Store().save(env, entry)
        tables.invalidate()
        assert tables.fingerprint(["fake.scale"], DEVICE) == mine

    def test_every_other_answer_differs(self, cache: Path, tmp_path: Path) -> None:
        base = (ENV, winner(1))
        variants = [
            (),
            (base,),
            ((ENV, winner(2)),),
            ((ENV, winner(1, size=65)),),
            ((ENV, winner(1, dtype="bfloat16")),),
            (base, (ENV, winner(1, size=65))),
            (base, (SISTER, winner(1, env=SISTER))),
            (base, (OLDER, winner(1, env=OLDER))),
            (base, (ENV, winner(1, size=65, source="source-0"))),  # what is near it is untuned
        ]
        seen = {self.of(tmp_path / str(index), *rows) for index, rows in enumerate(variants)}
        assert len(seen) == len(variants)
        assert self.of(tmp_path / "1") != tables.fingerprint(["fake.scale"], SISTER.device)
        # What no lookup takes changes nothing: another architecture, stale ones where one serves.
        stale = winner(2, source="source-0", created="2027", policy="eager")
        rows = (base, (AMPERE, winner(1, env=AMPERE)), (ENV, stale))
        assert self.of(tmp_path / "same", *rows) in seen


def test_misses_are_noted_by_calls_and_not_by_looking(cache: Path) -> None:
    missed.forget()
    Store().save(ENV, winner(1))
    for size in (64, 63, 100, 100, 4000):
        tables.choose(OPERATOR, ScaleProblem(size), DEVICE)
    tuned_table(DEVICE).lookup(OPERATOR, ScaleProblem(7))
    assert [problem.fields()["size"] for problem in tables.missed_problems()] == [100, 4000]
    missed.forget()


def test_bundle_names_are_those_of_the_devices() -> None:
    assert bundle.file_name(ENV) == "nvidia_h100_80gb_hbm3.json"
