"""What lookups answer, as data; and the winners that a search begins with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from autotune_entries import DEVICE, ENV, winner
from autotune_fakes import Scale, ScaleProblem

from tritonconv.autotune import foreign_tuning, seeds
from tritonconv.autotune.answers import answers, known_operators, sources
from tritonconv.autotune.store import Store
from tritonconv.runtime import tables
from tritonconv.runtime.settings import settings
from tritonconv.runtime.tables import tuned_table


def test_answers_are_what_lookups_take(cache: Path, tmp_path: Path, scale: Scale) -> None:
    for variant, policy in enumerate(("eager", "graph-hot", "graph-cold", "d")):
        Store().save(ENV, winner(variant, created=f"2026-0{4 - variant}-01", policy=policy))
        Store().save(ENV, winner(variant, created=f"2026-0{1 + variant}-01", policy=policy, size=9))
    Store(tmp_path / "team").save(ENV, winner(2, created="2027-01-01"))
    tables.invalidate()
    with settings.override(cache_path=(tmp_path / "team",)):
        told = answers([scale], DEVICE)
        for size in (64, 9):
            choice = tuned_table(DEVICE).lookup(scale, ScaleProblem(size))
            (text,) = [text for name, text in told.items() if f'"size": {size}}}' in name]
            assert text == f"fine(variant={choice.config.as_dict()['variant']})"
    assert len(told) == 2


def test_kernels_of_one_name_are_all_compared_in_whatever_order(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Scale(source="source-1"), Scale(source="source-2")
    Store().save(ENV, winner(1, size=64))
    Store().save(ENV, winner(2, size=9, source="source-2"))
    Store().save(ENV, winner(3, size=9, source="source-1", policy="eager"))
    told = []
    for called in ([first, second], [second, first], [second, Scale(source="source-1"), first]):
        monkeypatch.setattr(foreign_tuning, "decorated_operators", lambda called=called: called)
        known = [op for op in known_operators() if op.name == "fake.scale"]
        mark = tables.fingerprint(called[:2], DEVICE)
        told.append((answers(known, DEVICE), mark, sources(known)))
        assert len(known) == 2
    assert told[0] == told[1] == told[2]
    assert sorted(told[0][0].values()) == [
        "fine(variant=1)", "fine(variant=2)", "fine(variant=3)", "stale",
    ]  # fmt: skip
    assert told[0][2]["source of fake.scale fine"] == "source-1, source-2"
    assert sources([first])["source of fake.scale fine"] == "source-1"


def test_seeds_parse_an_entry_once_until_its_file_changes(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store()
    for size in (8, 64):
        store.save(ENV, winner(1, size=size))
    read: list[str] = []
    parse = seeds.read_located
    monkeypatch.setattr(
        seeds, "read_located", lambda path: (read.append(path.name), parse(path))[1]
    )

    def nearest() -> list[int]:
        found = seeds.nearest_winners(store, ENV, "fake.scale", ScaleProblem(60).fields())
        return [dict(config)["variant"] for _, config in found]

    assert nearest() == nearest() == [1]
    assert len(read) == 2
    changed = store.save(ENV, winner(2, 4.0, size=64)).path
    assert nearest() == [2, 1] and read[2:] == [changed.name]
    os.unlink(changed)
    assert nearest() == [1]
    monkeypatch.setattr(seeds, "_LIMIT", 1)
    store.save(ENV, winner(3, size=9))
    assert set(nearest()) == {1, 3} and len(seeds._parsed) == 1
