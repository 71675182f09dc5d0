"""The key of a tuned entry, and what is read back from its JSON."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tritonconv.runtime.compat import ptxas_version
from tritonconv.runtime.device import DeviceFacts, nominal_device
from tritonconv.runtime.entries import (
    Bundle,
    Entry,
    InvalidEntryError,
    Resources,
    Timing,
    Trial,
    entry_key,
    problem_key,
)
from tritonconv.runtime.environment import Environment, environment

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)

NAMES = st.text("abcxyz_.0123456789", min_size=1, max_size=8)
FIELDS = st.dictionaries(NAMES, st.one_of(st.integers(), st.booleans(), NAMES), max_size=5)
TIMES = st.floats(0.001, 1e7)
TRIALS = st.builds(
    Trial,
    NAMES,
    st.dictionaries(NAMES, st.integers(0, 512), max_size=3),
    NAMES,
    st.text(max_size=5),
    st.none() | st.builds(Timing, TIMES, TIMES, TIMES, st.integers(1, 99)),
    st.none() | st.floats(0, 1),
    st.none() | st.builds(Resources, *[st.none() | st.integers(0, 255)] * 3),
    st.none() | st.floats(0, 60),
)
ENV = environment(nominal_device("sm_90"))


@st.composite
def entries(draw: Any) -> Entry:
    trials = tuple(draw(st.lists(TRIALS, min_size=1, max_size=4)))
    positions = st.lists(st.integers(0, len(trials) - 1), max_size=3, unique=True)
    return Entry(
        draw(NAMES),
        draw(FIELDS),
        draw(st.dictionaries(NAMES, NAMES, max_size=3)),
        draw(NAMES),
        ENV.as_dict(),
        draw(st.sampled_from(trials)),
        draw(st.sampled_from(trials)),
        tuple(sorted(draw(positions))),
        trials,
        {"created": draw(NAMES)},
        draw(NAMES),
    )


@few
@given(entries())
def test_an_entry_survives_its_json(entry: Entry) -> None:
    assert Entry.from_json(json.loads(json.dumps(entry.to_json()))) == entry


@few
@given(st.lists(entries(), max_size=3))
def test_a_bundle_survives_its_text(found: list[Entry]) -> None:
    bundle = Bundle(ENV.as_dict(), tuple(found))
    assert Bundle.from_json(json.loads(bundle.to_text())) == bundle


@few
@given(NAMES, FIELDS, NAMES, st.data())
def test_every_field_changes_the_key(
    operator: str, problem: dict[str, Any], policy: str, data: Any
) -> None:
    key = entry_key(operator, problem, policy)
    assert key == entry_key(operator, dict(reversed(problem.items())), policy)
    assert key.startswith(problem_key(operator, problem))
    others = {
        entry_key(operator + "!", problem, policy),
        entry_key(operator, {**problem, "!": 1}, policy),
        entry_key(operator, problem, policy + "!"),
    }
    assert len(others | {key}) == 4
    if problem:
        name = data.draw(st.sampled_from(sorted(problem)))
        for value in (problem[name], str(problem[name]) + "!", 10**9):
            changed = entry_key(operator, {**problem, name: value}, policy)
            # Types count: the size 1 is neither True nor "1".
            same = json.dumps(value) == json.dumps(problem[name])
            assert (changed == key) == same


def test_every_fact_of_device_and_versions_changes_the_environment() -> None:
    device = ENV.device
    changed = []
    for row in fields(DeviceFacts):
        value = getattr(device, row.name)
        changed.append(replace(device, **{row.name: value + type(value)(1)}))
    environments = [replace(ENV, device=other) for other in changed]
    environments += [replace(ENV, **{name: "0.0"}) for name in ("triton", "torch", "ptxas")]
    assert len({env.hash for env in (ENV, *environments)}) == len(environments) + 1


def test_what_is_recorded_is_no_part_of_the_key() -> None:
    trial = Trial("aten", {}, "ok", "", Timing(1.0, 1.0, 1.0, 9))
    entry = Entry("op", {"size": 1}, {"aten": "source"}, "graph-cold", ENV.as_dict(), trial, trial)
    told = {"created": "2026-01-01", "driver": "570.1", "clocks": {"sm": 1980}, "seed": 3}
    assert replace(entry, recorded=told).key() == entry.key()
    assert replace(entry, trials=(trial,), tied=(0,)).key() == entry.key()
    assert replace(entry, sources={"aten": "other"}, space_hash="other").key() == entry.key()
    names = set(ENV.as_dict()) | set(ENV.device.as_dict())
    assert not names & {"driver", "clocks", "date", "host", "hostname", "cuda"}


def test_an_environment_survives_its_json() -> None:
    assert Environment.from_dict(json.loads(json.dumps(ENV.as_dict()))) == ENV
    with pytest.raises(InvalidEntryError, match="no environment"):
        Environment.from_dict({"device": {"name": "H100"}})


def test_ptxas_is_known_where_there_is_one() -> None:
    assert ptxas_version("gfx942") == ""
    for arch in ("sm_90", "sm_100"):
        assert ptxas_version(arch).replace(".", "").isdigit()
