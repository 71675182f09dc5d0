from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from autotune_entries import DEVICE, ENV, winner
from autotune_fakes import Scale, ScaleProblem

from tritonconv.autotune.store import Store
from tritonconv.runtime import entries, missed, tables
from tritonconv.runtime.operators import get_operator
from tritonconv.runtime.settings import settings


@pytest.fixture(autouse=True)
def nothing_noted() -> None:
    missed.forget()


def sizes(pairs: list[tuple[object, object]]) -> list[int]:
    return [problem.size for _, problem in pairs]  # type: ignore[attr-defined]


def test_misses_are_saved_merged_loaded_and_cleared(cache: Path, scale: Scale) -> None:
    assert missed.load(ENV) == []
    missed.save(ENV, [(scale, ScaleProblem(n)) for n in (1, 2)])
    missed.save(ENV, [(scale, ScaleProblem(n)) for n in (2, 3)])
    missed.save(ENV, [(scale, ScaleProblem(1))])
    assert missed.load(ENV) == [(scale, ScaleProblem(n)) for n in (2, 3, 1)]
    missed.save(ENV, [(scale, ScaleProblem(n)) for n in (2, 3)])
    assert missed.load(ENV) == [(scale, ScaleProblem(n)) for n in (1, 2, 3)]
    value = json.loads(missed.path(ENV).read_text())
    assert missed.path(ENV) == cache / "missed" / f"{ENV.hash}.json"
    assert value["environment"] == ENV.as_dict()
    assert value["problems"][0] == {
        "operator": "fake.scale",
        "problem": {"size": 1, "dtype": "float32"},
    }
    missed.clear(ENV, [(scale, ScaleProblem(2)), (scale, ScaleProblem(77))])
    assert sizes(missed.load(ENV)) == [1, 3]
    missed.clear(ENV)
    assert missed.load(ENV) == [] and not missed.path(ENV).exists()


def test_no_more_than_the_limit_is_kept(
    cache: Path, scale: Scale, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert missed.LIMIT == 4096
    monkeypatch.setattr(missed, "LIMIT", 10)
    for size in range(1, 30):
        missed.record(ENV, scale, ScaleProblem(size))
    assert len(missed.noted()) == 10
    missed.save(ENV, [(scale, ScaleProblem(n)) for n in range(1, 30)])
    assert sizes(missed.load(ENV)) == list(range(20, 30))
    missed.save(ENV, [(scale, ScaleProblem(n)) for n in (20, 77)])  # met again: 20 is new
    assert sizes(missed.load(ENV)) == [*range(22, 30), 20, 77]


def test_what_is_not_known_here_is_left_out_with_a_warning(cache: Path, scale: Scale) -> None:
    missed.save(ENV, [(scale, ScaleProblem(1))])
    path = missed.path(ENV)
    value = json.loads(path.read_text())
    value["problems"] += [
        {"operator": "kernel.mine", "problem": {"size": 1}},
        {"operator": "fake.scale", "problem": {"width": 1}},
    ]
    path.write_text(json.dumps(value))
    entries.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"2 missed problem"):
        assert sizes(missed.load(ENV)) == [1]
    missed.save(ENV, [(scale, ScaleProblem(2))])
    assert len(json.loads(path.read_text())["problems"]) == 4  # another process may know them


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 9}', '{"problems": 3}'])
def test_a_bad_file_is_empty_and_one_warning(cache: Path, scale: Scale, text: str) -> None:
    missed.path(ENV).parent.mkdir(parents=True)
    missed.path(ENV).write_text(text)
    entries.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="missed problems in .* are ignored"):
        assert missed.load(ENV) == []
    missed.save(ENV, [(scale, ScaleProblem(2))])
    assert sizes(missed.load(ENV)) == [2]


def test_at_exit_the_problems_that_are_still_missed_are_saved(
    cache: Path, scale: Scale, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for size in (10, 2000):
        tables.choose(scale, ScaleProblem(size), DEVICE)
    Store().save(ENV, winner(1, size=10))  # tuned since
    tables.invalidate()
    tables._report_misses()
    assert missed.load(ENV) == [] and capsys.readouterr().err == ""  # there is no GPU
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    settings.reset("report_misses")  # the command line switches it off
    with settings.override(report_misses=False):
        tables._report_misses()
    assert missed.load(ENV) == []
    tables._report_misses()
    assert sizes(missed.load(ENV)) == [2000]
    assert "1 problem(s) ran untuned on this GPU; `autotune tune --missed`" in (
        capsys.readouterr().err
    )
    missed.forget()


_PROGRAM = """
import sys
import torch
import tritonconv as tc
from tritonconv.runtime import tables
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.operators import get_operator

torch.cuda.is_available = lambda: True
operator = get_operator("conv2d.wgrad")
problem = operator.parse({"N": 8, "C": 64, "M": 64, "H": 56, "K": 3, "P": 1})
tables.choose(operator, problem, nominal_device("sm_90"))
"""


def test_a_program_leaves_its_misses_behind(cache: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        capture_output=True,
        text=True,
        env={"PATH": "", "HOME": str(tmp_path), "TRITONCONV_CACHE_DIR": str(cache)},
        timeout=120,
        check=True,
    )
    assert "1 problem(s) ran untuned" in done.stderr and done.stdout == ""
    ((operator, problem),) = missed.load(ENV)
    assert operator is get_operator("conv2d.wgrad")
    assert problem.fields()["height"] == 56
