from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tritonconv  # noqa: F401  # registers the operators
from tritonconv.autotune.bench import contenders
from tritonconv.autotune.cli.common import pairs_of
from tritonconv.autotune.measure import NumericCheck
from tritonconv.autotune.space import Candidate
from tritonconv.autotune.suites import load_shapes, load_suite, parse_shape, suite_names
from tritonconv.runtime.accuracy import check
from tritonconv.runtime.device import device_facts, nominal_device
from tritonconv.runtime.errors import ArgumentValueError
from tritonconv.runtime.operators import get_operator


@pytest.mark.parametrize("name", suite_names())
def test_every_row_of_a_packaged_suite_is_a_problem_of_its_operators(name: str) -> None:
    suite = load_suite(name)
    assert suite.problems and suite.operators and suite.description
    labels = [row["name"] for row in suite.problems]
    assert len(set(labels)) == len(labels)
    for operator in map(get_operator, suite.operators):
        rows = list(suite.rows(operator=operator.name))
        assert rows
        for row in rows:
            problem = operator.parse(row)
            assert problem.fields()["dtype"] == suite.choices["dtype"][0]
            assert problem.fields()["batch"] == row["batch"]


def test_chosen_values_multiply_a_suite_and_win_over_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text(
        json.dumps(
            {
                "problems": [{"size": 1}, {"size": 2, "dtype": "float16"}],
                "choices": {"dtype": ["float32", "float16"]},
            }
        )
    )
    suite = load_suite(str(file))
    assert [row["dtype"] for row in suite.rows()] == ["float32", "float16"]
    both = list(suite.rows({"dtype": ["bfloat16", "float32"]}))
    assert [row["dtype"] for row in both] == ["bfloat16", "bfloat16", "float32", "float32"]


def test_a_row_for_one_operator_is_left_out_for_others(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    rows = [{"size": 1, "operators": ["a"]}, {"size": 2}, {"size": 3, "operators": ["b", "a"]}]
    file.write_text(json.dumps({"operators": ["b"], "problems": rows}))
    suite = load_suite(str(file))
    assert suite.operators == ("b", "a")
    assert list(suite.rows(operator="a")) == [{"size": 1}, {"size": 3}]
    assert list(suite.rows(operator="b")) == [{"size": 2}, {"size": 3}]
    assert list(suite.rows(operator="another")) == [{"size": 2}]
    assert list(suite.rows()) == [{"size": 1}, {"size": 2}, {"size": 3}]


def test_fused_problems_are_judged_by_pytorchs_operators_one_after_the_other() -> None:
    pairs = pairs_of(None, "fused")
    names = [operator.name for operator, _ in pairs]
    assert names == ["conv2d.forward"] * 4 + ["conv2d.fused"] * 5
    lab: Any = SimpleNamespace(facts=nominal_device("sm_90"))
    for operator, problem in pairs:
        _, rows = contenders(operator, problem, lab)
        assert [name for name, _ in rows] == ["tuned", "default", "generated", "torch"]
        assert dict(rows)["torch"].algorithm == "aten"
        assert dict(rows)["default"].algorithm != "aten"


def test_a_residual_is_added_before_the_gelu_in_either_layout() -> None:
    operator = get_operator("conv2d.forward")
    fields = {"N": 2, "C": 3, "M": 4, "H": 5, "epilogue": "fused+operand", "dtype": "float32"}
    problem = operator.parse(fields)
    for asked in (problem, *operator.elsewhere(problem)):
        tensors = operator.make_tensors(asked, torch.device("cpu"), torch.Generator())
        x, w, bias, residual = (tensors[k] for k in ("input", "weight", "element0", "element1"))
        assert residual.stride() == tensors["output"].stride()
        y = operator.reference(asked, tensors, torch.float64)["output"]
        sums = torch.nn.functional.conv2d(x.double(), w.double()) + bias + residual
        torch.testing.assert_close(y, torch.nn.functional.gelu(sums), rtol=1e-4, atol=1e-5)
    assert problem.fields()["epilogue"] == "fused+operand"  # not the entry of a bias alone


def test_float8_problems_are_judged_by_bfloat16() -> None:
    for operator, problem in pairs_of(None, "float8"):
        rivals = operator.elsewhere(problem)
        assert {rival.fields()["dtype"] for rival in rivals} == {"bfloat16"}
        assert all(operator.algorithm("aten").supports(rival) is None for rival in rivals)


def test_a_shape_on_the_command_line() -> None:
    assert parse_shape("N=8,layout=contiguous, K=3x3") == {
        "N": 8,
        "layout": "contiguous",
        "K": "3x3",
    }
    assert load_shapes("N=8").problems == ({"N": 8},)


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1]", '{"schema_version": 9, "problems": []}'])
def test_bad_suite_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(ArgumentValueError, match="suite bad"):
        load_suite(str(file))
    with pytest.raises(ArgumentValueError, match="suite"):
        load_suite("no-such-suite")


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_check_of_tuning_knows_what_rounding_does_to_statistics(
    dtype: str, device: torch.device
) -> None:
    """They are float32 numbers of stored values, which half precision rounds."""
    operator = get_operator("conv2d.fused")
    fields = {"N": 8, "C": 16, "M": 16, "H": 12, "K": 3, "P": 1, "stats": True, "dtype": dtype}
    problem = operator.parse(fields)
    checked = NumericCheck(operator, problem, device, 0)
    for algorithm in operator.candidates(problem):
        config = operator.space(algorithm, problem, device_facts())[0]
        verdict = checked(Candidate(algorithm.name, config))
        assert verdict.ok, (algorithm.name, str(verdict))
    tensors = checked._tensors()
    expected = checked.expected
    assert expected is not None
    exact, plain = expected["mean"]
    moved = exact + 0.05  # of a standard deviation
    assert not check(moved, exact, plain, dtype=tensors["mean"].dtype).ok
