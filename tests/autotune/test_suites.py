from __future__ import annotations

import json
from pathlib import Path

import pytest

import tritonconv  # noqa: F401  # registers the operators
from tritonconv.autotune.suites import load_shapes, load_suite, parse_shape, suite_names
from tritonconv.runtime.errors import ArgumentValueError
from tritonconv.runtime.operators import get_operator


@pytest.mark.parametrize("name", suite_names())
def test_every_row_of_a_packaged_suite_is_a_problem_of_its_operators(name: str) -> None:
    suite = load_suite(name)
    assert suite.problems and suite.operators and suite.description
    labels = [row["name"] for row in suite.problems]
    assert len(set(labels)) == len(labels)
    for operator in map(get_operator, suite.operators):
        for row in suite.rows():
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
