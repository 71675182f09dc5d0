from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tritonconv as tc
from tritonconv.runtime import tables
from tritonconv.runtime.device import device_facts
from tritonconv.runtime.operators import get_operator
from tritonconv.runtime.tables import Entry, Tier, Timing, Trial, environment

X, W = torch.randn(2, 8, 9, 9), torch.randn(8, 8, 3, 3)


@pytest.fixture(autouse=True)
def no_entries(tmp_path: Path) -> object:
    with tc.settings.override(cache_dir=tmp_path, cache_path=(), autotune="lookup"):
        tables.invalidate()
        yield
    tables.invalidate()


def step(x: torch.Tensor, w: torch.Tensor) -> None:
    y = tc.conv2d(tc.conv2d(x, w, padding=1), w, padding=1)
    y.square().sum().backward()


def test_every_product_of_a_step_is_explained() -> None:
    found = tc.explain(step, X, W.clone().requires_grad_())
    assert [(c.operator, c.count) for c in found.calls] == [
        ("conv2d.forward", 2),
        ("conv2d.dgrad", 1),
        ("conv2d.wgrad", 2),
    ]
    for call in found.calls:
        assert call.choice.tier is Tier.DEFAULT and call.is_default
        assert call.measured_us is None and call.of_floor is None
        assert call.floor_us is None or call.floor_us > 0
        assert call.predicted_us is not None and call.predicted_us > (call.floor_us or 0)
    text = str(found)
    assert text.count("\n") == 6 and "2x conv2d.forward N2" in text and "the default" in text
    assert ("no GPU" in text) == (not torch.cuda.is_available())


def test_a_tuned_call_is_explained_by_its_entry() -> None:
    from tritonconv.autotune.store import Store

    operator, env = get_operator("conv2d.forward"), environment(device_facts())
    (call,) = tc.explain(tc.conv2d, X, W).calls
    slow = Trial("dense", dict(call.choice.config.as_dict()), "ok", "", Timing(9, 9, 9, 9))
    fast = Trial("aten", {}, "ok", "", Timing(5, 5, 5, 9))
    entry = Entry(
        operator.name,
        dict(call.problem.fields()),
        operator.source_hashes(),
        "graph-cold",
        env.as_dict(),
        slow,
        fast,
        trials=(slow, fast),
        tied=(1,),
    )
    Store().save(env, replace(entry))
    tables.invalidate()
    (call,) = tc.explain(tc.conv2d, X, W).calls
    assert (call.choice.tier, call.choice.algorithm) == (Tier.EXACT, "aten")
    assert not call.is_default and (call.measured_us, call.default_us) == (5.0, 9.0)
    if call.floor_us is not None:
        assert call.of_floor == pytest.approx(call.floor_us / 5)
        assert "% of the floor" in str(call)
    assert "exact in user table, tuned, 5.0 µs" in str(call)


def test_explaining_demands_no_entries_and_keeps_errors() -> None:
    with tc.settings.override(require_tuned=True):
        assert len(tc.explain(tc.conv2d, X, W).calls) == 1
    assert "no call of a tunable operator" in str(tc.explain(lambda: None))
    with pytest.raises(ValueError, match="groups"):
        tc.explain(tc.conv2d, X, W, groups=3)
    assert not tables.is_recording()


def test_tuning_is_on_inside_its_block_only() -> None:
    epoch = tables.epoch()
    with tc.tuning():
        assert tc.settings.autotune == "tune"
        assert tables.epoch() != epoch
    assert tc.settings.autotune == "lookup"
