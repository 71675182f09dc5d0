"""Classes of convolutions, and generated kernels beside PyTorch's by class."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import entry, fill, trial
from typer.testing import CliRunner

import tritonconv  # noqa: F401  # registers the operators
from tritonconv.autotune.bundle import compact
from tritonconv.autotune.classes import CLASSES, class_of, is_compact, rivals, summarize_classes
from tritonconv.autotune.cli import app
from tritonconv.autotune.search import Status
from tritonconv.runtime.entries import Entry
from tritonconv.runtime.operators import get_operator

Row = dict[str, Any]


def fields(operator: str = "conv2d.forward", **row: Any) -> Row:
    """Fields of a problem, as its entry has them."""
    base: Row = {"N": 8, "C": 64, "M": 64, "H": 56, "W": 56, "K": 3, "S": 1, "P": 1}
    if operator.startswith("conv3d"):
        base["D"] = 8
    return dict(get_operator(operator).parse({**base, "dtype": "bfloat16", **row}).fields())


@pytest.mark.parametrize(
    ("operator", "row", "expected"),
    [
        ("conv2d.forward", {"C": 3, "K": 7, "S": 2, "P": 3}, "first layers, 2-D"),
        ("conv2d.wgrad", {"C": 4}, "first layers, 2-D"),
        ("conv2d.wgrad", {"C": 5}, "k×k"),
        ("conv3d.forward", {"C": 1}, "first layers, 3-D"),
        ("conv2d.forward", {"C": 3, "K": 4, "S": 4, "P": 0}, "patches"),
        ("conv3d.dgrad", {"C": 3, "K": (2, 8, 8), "S": (2, 8, 8), "P": 0}, "patches"),
        ("conv2d.dgrad", {"K": 2, "S": 2, "P": 0}, "transposed, 2×2/2"),
        ("conv3d.wgrad", {"K": 2, "S": 2, "P": 0}, "transposed, 2×2/2"),
        ("conv2d.dgrad", {"K": 4, "S": 2}, "transposed, 2×2/2"),
        ("conv2d.forward", {"S": 2}, "strided"),
        ("conv2d.dgrad", {"K": 1, "S": 2, "P": 0}, "strided"),
        ("conv2d.forward", {"groups": 64}, "depthwise"),
        ("conv2d.forward", {"groups": 64, "S": 2}, "depthwise"),
        ("conv3d.wgrad", {"groups": 64}, "depthwise"),
        ("conv2d.wgrad", {"groups": 32}, "grouped"),
        ("conv2d.forward", {"H": 1, "W": 4096, "K": (1, 3), "P": (0, 1)}, "1-D"),
        ("conv2d.forward", {"H": 1, "W": 4096, "K": (1, 7), "P": (0, 3), "groups": 64}, "1-D"),
        ("conv2d.forward", {"H": 1, "W": 1, "K": 1, "P": 0}, "1×1, one pixel"),
        ("conv2d.dgrad", {"C": 4, "H": 1, "W": 1, "K": 1, "P": 0}, "1×1, one pixel"),
        ("conv3d.forward", {}, "3-D k×k×k"),
        ("conv3d.forward", {"K": 1, "P": 0}, "3-D 1×1×1"),
        ("conv2d.forward", {"K": 5, "P": 2}, "k×k"),
        ("conv2d.forward", {"H": 14, "W": 14}, "k×k, small maps"),
        ("conv2d.forward", {"H": 15, "W": 14}, "k×k"),
        ("conv2d.forward", {"K": 1, "P": 0}, "1×1"),
        ("conv2d.wgrad", {"K": 1, "P": 0, "H": 7, "W": 7}, "1×1, small maps"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_class_of_a_problem(operator: str, row: Row, expected: str) -> None:
    assert class_of(operator, fields(operator, **row)) == expected
    assert expected in CLASSES


def test_what_is_no_plain_convolution_has_no_class() -> None:
    assert class_of("conv2d.fused", fields()) is None
    assert class_of("conv2d.forward", {**fields(), "epilogue": "fused"}) is None
    assert class_of("fake.scale", {"size": 64}) is None


def tuned(problem: Row, *times: float | None, aten: float | None) -> Entry:
    """An entry of generated kernels and PyTorch's, with what the tuner records."""
    trials = [trial("dense", {"split_k": i}, t) for i, t in enumerate(times)]
    if aten is not None:
        trials.append(trial("aten", {}, aten))
    made = entry(trials, operator="conv2d.forward", problem=problem)
    return replace(made, recorded={**made.recorded, "effort": "full"})


def test_means_are_geometric_and_a_tuned_call_takes_the_faster() -> None:
    wide, small = fields(), fields(H=7, W=7)
    entries = [
        tuned(wide, 50.0, 20.0, aten=80.0),  # 4
        tuned({**wide, "batch": 16}, 40.0, aten=40.0 / 4),  # 0.25: PyTorch's kernel is taken
        tuned({**wide, "batch": 32}, 10.0, aten=90.0),  # 9
        tuned(small, 10.0, aten=20.0),
        tuned({**small, "batch": 3}, 10.0, aten=None),
        tuned({**small, "epilogue": "fused"}, 10.0, aten=20.0),
    ]
    found = summarize_classes(entries)
    assert (found.compared, found.left_out) == (4, 2)
    (first, second) = found.rows
    assert (first.name, first.direction, first.problems) == ("k×k", "forward", 3)
    assert first.generated == pytest.approx(math.prod((4, 0.25, 9)) ** (1 / 3))
    assert first.dispatched == pytest.approx(math.prod((4, 1, 9)) ** (1 / 3))
    assert (second.name, second.problems) == ("k×k, small maps", 1)
    assert second.generated == second.dispatched == pytest.approx(2)


def test_a_finalist_goes_before_a_faster_first_round() -> None:
    made = entry(
        [
            trial("dense", {"split_k": 1}, 12.0),
            trial("dense", {"split_k": 2}, 11.0, Status.TIMED),
            trial("aten", {}, 30.0, Status.TIMED),
        ],
        operator="conv2d.forward",
        problem=fields(),
    )
    found = rivals(made)
    assert found is not None and (found.generated, found.aten) == (12.0, 30.0)


def test_entries_of_bundles_are_not_compared(tmp_path: Path) -> None:
    """They keep PyTorch's time only where it won or tied: their mean would be far too low."""
    full = [
        tuned(fields(), 10.0, aten=40.0),
        tuned(fields(N=16), 20.0, aten=10.0),
    ]
    small = [compact(made) for made in full]
    assert not any(map(is_compact, full)) and all(map(is_compact, small))
    arguments = ["plot", "classes", "--json", "--tables"]
    fill(tmp_path / "full", full)
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "full")])
    value = json.loads(result.stdout)
    assert value["geomean"]["forward"] == pytest.approx(math.sqrt(2))
    fill(tmp_path / "mixed", [full[0], small[1]])
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "mixed")])
    assert json.loads(result.stdout)["compared"] == 1 and "1 entries" in result.stderr
    fill(tmp_path / "bundle", small)
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "bundle")])
    assert result.exit_code == 2 and "PyTorch's kernel" in result.stderr


def test_a_roofline_by_class_places_both_rivals(tmp_path: Path) -> None:
    problem = fields()
    fill(tmp_path, [tuned(problem, 10.0, aten=40.0)])
    picture = tmp_path / "roof.svg"
    arguments = ["plot", "roofline", "--by", "class", "--json", "--tables", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--out", str(picture)])
    (point,) = json.loads(result.stdout)["points"]
    flops = 2 * 8 * 56 * 56 * 64 * 64 * 9
    assert point["generated"] == pytest.approx(flops / 10 / 1e6)
    assert point["aten"] == pytest.approx(point["generated"] / 4)
    first = picture.read_bytes()
    CliRunner().invoke(app, [*arguments, "--out", str(picture)])
    assert picture.read_bytes() == first and b"same memory format" in first
