"""Timings that outlive a change of the files of their kernels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from autotune_entries import ENV
from typer.testing import CliRunner

from tritonconv.autotune.bundle import Bundle, write
from tritonconv.autotune.cli import app
from tritonconv.autotune.renew import plan_digest, renew, trial_plan
from tritonconv.autotune.replay import ReplayLab
from tritonconv.autotune.search import Effort
from tritonconv.autotune.space import space
from tritonconv.autotune.store import Store
from tritonconv.autotune.tune import Options, tune
from tritonconv.runtime import operators, tables
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.entries import Entry, Timing, Trial, load_bundle
from tritonconv.runtime.environment import Environment
from tritonconv.runtime.operators import get_operator
from tritonconv.runtime.plan import KernelCall, LaunchPlan, Slot, Workspace

OPERATOR = get_operator("conv2d.forward")
FIELDS = {"N": 8, "C": 64, "M": 64, "H": 56, "K": 1, "dtype": "bfloat16"}
PROBLEM = OPERATOR.parse(FIELDS)
H100 = nominal_device("sm_90")


def trial(algorithm: str, place: int, time: float, plan: str | None = None) -> Trial:
    config = list(OPERATOR.algorithm(algorithm).configs(PROBLEM, H100))[place]
    made = Trial(algorithm, config.as_dict(), "ok", "", Timing(time, time, time, 9), 1e-9)
    return replace(made, plan=trial_plan(OPERATOR, PROBLEM, made) if plan is None else plan)


def entry(*trials: Trial, changed: Mapping[str, str] | None = None) -> Entry:
    best = min(trials, key=lambda t: t.timing.p50 if t.timing is not None else 1e9)
    return Entry(
        operator=OPERATOR.name,
        problem=dict(PROBLEM.fields()),
        sources={**OPERATOR.source_hashes(), **(changed or {})},
        policy="graph-cold",
        environment=ENV.as_dict(),
        default=trials[0],
        best=best,
        trials=trials,
        recorded={"created": "2026-01-01T00:00:00+00:00"},
    )


BOTH = trial("pointwise", 0, 10.0), trial("pointwise", 1, 8.0), trial("dense", 0, 9.0)
OLD = {"pointwise": "a file of before"}


def invoke(cache: Path, *arguments: Any) -> dict[str, Any]:
    result = CliRunner().invoke(
        app, ["renew", *map(str, arguments), "--json", "--cache-dir", cache]
    )
    assert result.exit_code == 0, (result.output, result.exception)
    return dict(json.loads(result.stdout))


def test_digests_tell_every_config_apart_and_nothing_else() -> None:
    dense = OPERATOR.algorithm("dense")
    configs = list(dense.space(PROBLEM, H100))[:40]
    digests = [plan_digest(dense.plan(PROBLEM, config)) for config in configs]
    assert len(set(digests)) == len(digests)
    again = OPERATOR.parse(FIELDS)
    assert digests == [plan_digest(dense.plan(again, config)) for config in configs]
    wider = OPERATOR.parse({**FIELDS, "N": 9})
    assert digests[0] != plan_digest(dense.plan(wider, configs[0]))


@triton.jit
def _helper(x):
    return x + 1


@triton.jit
def _other_helper(x):
    return x - 1


@triton.jit
def _kernel(ptr, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(ptr, FUNCTION(n) * BLOCK)


@triton.jit
def _other_kernel(ptr, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(ptr, FUNCTION(n) / BLOCK)


CALL = KernelCall(_kernel, (2, 1, 1), (Slot("y"), 3), {"FUNCTION": _helper, "BLOCK": 8}, 4, 3)
SPACE = Workspace("parts", (4, 2), torch.float32)
PLAN = LaunchPlan((CALL,), {"y": torch.float16}, (SPACE,), ())


@pytest.mark.parametrize(
    "other",
    [
        replace(PLAN, calls=(replace(CALL, **change),))
        for change in (
            {"kernel": _other_kernel},
            {"grid": (1, 2, 1)},
            {"args": (Slot("y"), 4)},
            {"args": (Slot("parts"), 3)},
            {"constexprs": {"FUNCTION": _other_helper, "BLOCK": 8}},
            {"constexprs": {"FUNCTION": _helper, "BLOCK": 16}},
            {"num_warps": 8},
            {"num_stages": 2},
        )
    ]
    + [replace(PLAN, calls=(CALL, CALL)), replace(PLAN, dtypes={"y": torch.bfloat16})]
    + [replace(PLAN, workspaces=()), replace(PLAN, zeroed=("y",))]
    + [
        replace(PLAN, workspaces=(replace(SPACE, **change),))
        for change in (
            {"name": "sums"},
            {"shape": (2, 4)},
            {"dtype": torch.float64},
            {"counters": True},
        )
    ],
)
def test_digests_tell_all_that_is_launched(other: LaunchPlan) -> None:
    same = replace(PLAN, calls=(replace(CALL, constexprs=dict(CALL.constexprs)),))
    assert plan_digest(PLAN) == plan_digest(same) != plan_digest(other)


def test_digests_know_what_is_fused() -> None:
    dense = OPERATOR.algorithm("dense")
    problems = [PROBLEM] + [
        OPERATOR.parse({**FIELDS, "epilogue": name}) for name in ("fused", "fused+operand")
    ]
    configs = [next(iter(dense.space(problem, H100))) for problem in problems]
    digests = [plan_digest(dense.plan(p, c)) for p, c in zip(problems, configs, strict=True)]
    assert len(set(digests)) == 3 and all(digests)


def test_pytorch_has_no_plan() -> None:
    assert trial_plan(OPERATOR, PROBLEM, Trial("aten", {}, "ok")) == ""
    assert trial_plan(OPERATOR, PROBLEM, Trial("gone", {}, "ok")) == ""


def test_an_entry_whose_launches_are_the_same_is_renewed() -> None:
    old = entry(*BOTH, changed=OLD)
    looked = renew(old)
    assert looked.algorithms == ("pointwise",) and not looked.stale and looked.noted == 0
    assert looked.entry == entry(*BOTH)


@pytest.mark.parametrize("plan", ["", "another launch"])
def test_one_trial_that_is_not_the_same_keeps_it_stale(plan: str) -> None:
    """A loser too: whether it loses today is not known."""
    other = replace(BOTH[0], plan=plan)
    old = entry(other, *BOTH[1:], changed=OLD)
    assert renew(old).entry is old and renew(old).stale


def test_plans_are_noted_only_where_the_source_is_the_one_that_was_timed() -> None:
    bare = tuple(replace(t, plan="") for t in BOTH)
    looked = renew(entry(*bare))
    assert looked.noted == 3 and looked.entry == entry(*BOTH)
    assert looked.entry.best in looked.entry.trials
    looked = renew(entry(*bare, changed=OLD))
    assert looked.noted == 1 and looked.stale
    assert [bool(t.plan) for t in looked.entry.trials] == [False, False, True]


def test_trials_that_failed_are_tried_again() -> None:
    failed = Trial("pointwise", trial("pointwise", 2, 1.0).config, "numeric", "wrong")
    other = replace(failed, algorithm="dense", config=trial("dense", 1, 1.0).config)
    done = {"recorded": {"completed": "all", "spaces": {}}}
    looked = renew(replace(entry(*BOTH, failed, other, changed=OLD), **done))
    assert looked.algorithms == ("pointwise",) and looked.entry.trials == (*BOTH, other)
    assert looked.entry.recorded == {"spaces": {}}
    assert (
        renew(replace(entry(*BOTH, other, changed=OLD), **done)).entry.recorded == done["recorded"]
    )


def test_another_space_is_told() -> None:
    assert not renew(entry(*BOTH, changed=OLD)).other_space  # it does not say which was searched
    facts = Environment.from_dict(ENV.as_dict()).device
    for hash_, other in ((space(OPERATOR, PROBLEM, facts).hash, False), ("of a smaller", True)):
        looked = renew(replace(entry(*BOTH, changed=OLD), space_hash=hash_))
        assert looked.other_space == other and looked.entry.space_hash == hash_
        assert not renew(replace(entry(*BOTH), space_hash=hash_)).other_space


def test_generated_functions_are_noted_only_by_the_versions_that_were_timed() -> None:
    fields = dict(OPERATOR.parse({**FIELDS, "epilogue": "fused"}).fields())
    bare = entry(*(replace(t, plan="") for t in BOTH))
    older = replace(ENV, triton="3.5.0").as_dict()
    assert renew(replace(bare, problem=fields)).noted == 3
    assert renew(replace(bare, problem=fields, environment=older)).noted == 0
    assert renew(replace(bare, environment=older)).noted == 3


def test_a_change_of_a_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only of its file: one that launches something else is not renewed."""
    old = entry(*BOTH, changed=OLD)
    pointwise = type(OPERATOR.algorithm("pointwise"))
    plan = pointwise.plan

    def elsewhere(self: Any, problem: Any, config: Any) -> Any:
        found = plan(self, problem, config)
        assert found is not None
        call = replace(found.calls[0], num_warps=2 * found.calls[0].num_warps)
        return replace(found, calls=(call, *found.calls[1:]))

    monkeypatch.setattr(pointwise, "plan", elsewhere)
    assert renew(old).stale and renew(old).algorithms == ()


def test_what_cannot_be_made_any_more_stays_as_it_is() -> None:
    for changes in ({"operator": "nobody.knows"}, {"problem": {"nothing": 1}}):
        odd = replace(entry(*BOTH, changed=OLD), **changes)
        assert renew(odd).entry is odd


def test_the_verb_renews_bundles_and_tables(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = entry(*BOTH, changed=OLD)
    path = tmp_path / "bundle.json"
    write(Bundle(ENV.as_dict(), (old,)), path)
    before = path.read_text()
    assert invoke(cache, path)["renewed"] == 1 and path.read_text() == before
    told = invoke(cache, path, "--yes")
    assert told["written"] and told["algorithms"] == {"pointwise": 1} and told["stale"] == 0
    (stored,) = load_bundle(path).entries
    assert stored.sources == entry(*BOTH).sources and stored.best.plan == BOTH[1].plan

    # In the user's table: written when the file was of the hash that it names.
    monkeypatch.setattr(operators, "_class_hash", lambda cls: "a file of before")
    with_old = replace(old, sources=dict.fromkeys(old.sources, "a file of before"))
    place = Store(cache / "tuned").save(ENV, with_old).path
    monkeypatch.undo()
    assert tables.read_entry(place).sources["pointwise"] == "a file of before"
    assert invoke(cache, "--yes")["renewed"] == 1
    assert tables.read_entry(place).sources["pointwise"] == entry(*BOTH).sources["pointwise"]
    assert invoke(cache, "--yes")["renewed"] == 0


def test_nothing_is_written_where_a_bundle_cannot_be_read(cache: Path, tmp_path: Path) -> None:
    good, bad, link = (tmp_path / name for name in ("good.json", "bad.json", "link.json"))
    write(Bundle(ENV.as_dict(), (entry(*BOTH, changed=OLD),)), good)
    bad.write_text("{")
    before = good.read_text()
    asked = ["renew", str(good), str(bad), "--yes", "--cache-dir", str(cache)]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 2 and good.read_text() == before
    link.symlink_to(good)
    assert invoke(cache, link, "--yes")["renewed"] == 1
    assert link.is_symlink() and good.read_text() != before


def test_an_entry_that_changed_meanwhile_is_told(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(cache / "tuned").save(ENV, entry(*(replace(t, plan="") for t in BOTH)))
    assert invoke(cache)["plans_noted"] == 3
    monkeypatch.setattr(Store, "rewrite", lambda self, path, old, new: False)
    told = invoke(cache, "--yes")
    assert (told["changed_meanwhile"], told["plans_noted"]) == (1, 0)


def test_a_changed_file_is_not_overwritten(cache: Path) -> None:
    store = Store(cache / "tuned")
    stored = store.save(ENV, entry(*BOTH))
    meanwhile = entry(*BOTH[:2])
    assert not store.rewrite(stored.path, meanwhile, entry(BOTH[0]))
    assert store.rewrite(stored.path, stored.entry, meanwhile)
    assert tables.read_entry(stored.path).trials == meanwhile.trials


def test_tuning_notes_plans(cache: Path) -> None:
    lab = ReplayLab([entry(*BOTH)])
    (report,) = tune(OPERATOR, [PROBLEM], lab=lab, options=Options(effort=Effort.FULL))
    assert report.entry is not None
    noted = {(t.algorithm, *t.config.values()): t.plan for t in report.entry.trials if t.timing}
    assert noted == {(t.algorithm, *t.config.values()): t.plan for t in BOTH}
