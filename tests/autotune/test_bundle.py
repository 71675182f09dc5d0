from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis.strategies as st
import pytest
from autotune_entries import ENV, SISTER, entry_of, trial, winner
from autotune_fakes import Scale
from hypothesis import given, settings

from tritonconv.autotune.bundle import (
    Bundle,
    compact,
    export,
    load_tables,
    merge,
    outdated,
    stale,
    take_in,
    write,
)
from tritonconv.autotune.choose import choose
from tritonconv.autotune.compare import Verdict, compare, judge
from tritonconv.autotune.store import Store
from tritonconv.runtime import operators
from tritonconv.runtime.entries import InvalidEntryError, Resources, Timing, load_bundle
from tritonconv.runtime.operators import register

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def bundle_of(*entries: object, env: object = ENV) -> Bundle:
    return Bundle(env.as_dict(), entries)  # type: ignore[attr-defined, arg-type]


def test_a_bundle_is_read_back(tmp_path: Path) -> None:
    rich = replace(
        trial(3, 10.0), resources=Resources(128, 0, 65536), compile_s=1.5, reason="cold L2"
    )
    made = bundle_of(winner(1), entry_of(trial(0, 10.0), rich, size=9))
    write(made, tmp_path / "a.json")
    assert load_bundle(tmp_path / "a.json") == made
    assert next(iter(json.loads((tmp_path / "a.json").read_text()))) == "schema_version"
    empty = bundle_of()
    write(empty, tmp_path / "b.json")
    assert load_bundle(tmp_path / "b.json") == empty


def test_one_changed_entry_is_one_changed_line() -> None:
    before = bundle_of(*(winner(1, size=n) for n in range(1, 9))).to_text().splitlines()
    after = bundle_of(*(winner(1 + (n == 5), size=n) for n in range(1, 9))).to_text().splitlines()
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def test_a_compact_entry_explains_its_choice() -> None:
    full = entry_of(
        trial(0, 12.0),
        trial(1, 10.1),
        trial(2, 99.0),
        trial(3, 10.0),
        trial(4, 1.0, "numeric"),
    )
    small = compact(full)
    assert [t.config["variant"] for t in small.trials] == [0, 1, 3]
    assert small.tied == (1, 2) and small.best == full.best and small.default == full.default
    chosen = choose([t.timing for t in small.trials])
    assert chosen is not None and small.trials[chosen.winner] == small.best
    assert small.key() == full.key() and compact(small) == small


def test_export_takes_what_lookups_take(tmp_path: Path, scale: Scale) -> None:
    store = Store(tmp_path)
    store.save(ENV, winner(1, created="2026-01-01", policy="eager"))
    store.save(ENV, winner(2, created="2026-02-01"))
    store.save(ENV, winner(1, created="2026-03-01", policy="graph-hot", source="source-0"))
    store.save(ENV, winner(3, size=9, time=9.9))  # as fast as the default
    store.save(ENV, winner(3, size=10, source="source-0"))
    store.save(SISTER, winner(1, env=SISTER, size=11))
    made = export(store, ENV)
    assert [(e.problem["size"], e.best.config["variant"]) for e in made.entries] == [
        (64, 2),
        (9, 0),
    ]
    kept = export(store, ENV, keep_stale=True)
    assert [(e.problem["size"], e.best.config["variant"]) for e in kept.entries] == [
        (10, 3),
        (64, 2),
        (9, 0),
    ]
    assert [e.problem["size"] for e in export(store, ENV, min_speedup=1.05).entries] == [64]
    assert export(store, ENV, operators=["conv2d.forward"]).entries == ()


def test_stale_entries(scale: Scale) -> None:
    old = winner(1, source="source-0")
    unknown = replace(winner(1), operator="kernel.mine", sources={"triton": "anything"})
    since = winner(1, changed={"aten": "source-0"})
    removed = replace(old, best=trial(1, 5.0, algorithm="removed"))
    bundle = bundle_of(winner(1), old, unknown, since, removed)
    assert stale(bundle) == (old, removed)
    assert outdated(bundle) == (since,)


def test_what_is_imported_is_the_lower_median_and_imports_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "user")
    slow, fast = winner(1, 6.0, size=1), winner(2, 5.0, size=2)
    store.save(ENV, winner(3, 5.5, size=1))
    store.save(ENV, winner(3, 5.5, size=2))
    found = take_in(bundle_of(slow, fast, winner(1, size=3)), store)
    assert ([e.problem["size"] for e in found.written], len(found.kept)) == ([2, 3], 1)
    again = take_in(bundle_of(slow, fast, winner(1, size=3)), store)
    assert (len(again.written), len(again.kept)) == (0, 3)
    best = {s.entry.problem["size"]: s.entry.best.config["variant"] for s in store.entries()}
    assert best == {1: 3, 2: 2, 3: 1}
    # Out and in again, elsewhere: the same answers.
    other = Store(tmp_path / "other")
    take_in(export(store, ENV), other)
    assert export(other, ENV) == export(store, ENV)


def test_merging_keeps_the_lower_median(tmp_path: Path) -> None:
    first = bundle_of(winner(1, 5.0, size=1), winner(1, 6.0, size=2))
    second = bundle_of(winner(2, 5.5, size=1), winner(2, 5.5, size=2), winner(2, size=3))
    merged = merge([first, second])
    assert [(e.problem["size"], e.best.config["variant"]) for e in merged.entries] == [
        (1, 1),
        (2, 2),
        (3, 2),
    ]
    assert merge([second, first]) == merged == merge([merged, first])
    with pytest.raises(ValueError, match=r"one environment, got .*H100.* and .*H200"):
        merge([first, bundle_of(winner(1, env=SISTER), env=SISTER)])
    with pytest.raises(ValueError, match="got none"):
        merge([])


@few
@given(st.lists(st.tuples(*[st.booleans()] * 3), min_size=2, max_size=4))
def test_merging_and_importing_prefer_what_serves(rows: list[tuple[bool, bool, bool]]) -> None:
    """One entry of a problem per table: stale or not, new or old, fast or slow."""
    made = [
        winner(
            1 + index,
            (2.0 if fast else 6.0) + index / 100,
            source="source-0" if old else "source-1",
            created="2027-01-01" if new else "2026-01-01",
        )
        for index, (old, new, fast) in enumerate(rows)
    ]
    serving = [entry for entry, (old, *_) in zip(made, rows, strict=True) if not old]
    wanted = min(serving or made, key=lambda e: e.best.timing.p50 if e.best.timing else 0.0)
    register(Scale())
    try:
        (entry,) = merge([bundle_of(entry) for entry in made]).entries
        assert entry.best == wanted.best and entry.sources == wanted.sources
        with TemporaryDirectory() as folder:
            store = Store(Path(folder))
            for one in made:
                take_in(bundle_of(one), store)
            (stored,) = store.entries()
            assert stored.entry.best == wanted.best and stored.entry.sources == wanted.sources
    finally:
        operators._OPERATORS.pop(Scale.name)


def test_tables_are_read_from_files_and_folders(tmp_path: Path) -> None:
    Store(tmp_path / "tuned").save(ENV, winner(1))
    Store(tmp_path / "tuned").save(SISTER, winner(1, env=SISTER))
    assert [len(b.entries) for b in load_tables(tmp_path)] == [1, 1]
    assert load_tables(tmp_path) == load_tables(tmp_path / "tuned")
    write(bundle_of(winner(1)), tmp_path / "one.json")
    assert load_tables(tmp_path / "one.json") == [bundle_of(winner(1))]
    (tmp_path / "bad.json").write_text('{"schema_version": 2, "environment": {}, "entries": []}')
    for name in ("bad.json", "absent.json"):
        with pytest.raises(ValueError, match="bundle"):
            load_tables(tmp_path / name)
    with pytest.raises(InvalidEntryError):
        Bundle.from_json({"schema_version": 2, "environment": {}, "entries": [{"default": 3}]})


def timing(p50: float, spread: float = 0.001) -> Timing:
    return Timing(p50, p50 * (1 - spread), p50 * (1 + spread), 25)


def test_verdicts() -> None:
    assert judge(timing(10), timing(10.1)) is Verdict.SAME
    assert judge(timing(10), timing(11)) is Verdict.SLOW
    assert judge(timing(10), timing(9)) is Verdict.FAST
    assert judge(timing(10, 0.5), timing(11, 0.5)) is Verdict.AMBIGUOUS
    assert judge(timing(10, 0.5), timing(10, 0.5)) is Verdict.AMBIGUOUS


def test_tables_are_compared_by_problem() -> None:
    before = bundle_of(winner(1, 5.0, size=1), winner(1, 5.0, size=2), winner(1, size=3))
    after = bundle_of(
        *(winner(2, 6.0, size=n, env=SISTER) for n in (2, 4)),
        winner(1, 5.0, size=1, env=SISTER),
        env=SISTER,
    )
    found = compare([before], [after])
    rows = [(c.before.problem["size"], c.verdict, c.same_config) for c in found.changes]
    assert rows == [(1, Verdict.SAME, True), (2, Verdict.SLOW, False)]
    assert [e.problem["size"] for e in found.removed] == [3]
    assert [e.problem["size"] for e in found.added] == [4]
    assert found.geomean() == pytest.approx(1.2**0.5)
    assert compare([before], []).geomean() is None
