"""Banded products: every box, odd maps, windows that leave the map on any side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tritonconv.conv.algorithms.banded import Banded, is_clearly_better
from tritonconv.conv.algorithms.banded_geometry import BandedConfig, boxes, roles_of
from tritonconv.conv.dispatch import OPERATORS
from tritonconv.conv.epilogue import build_epilogue
from tritonconv.conv.problem import ConvProblem, Direction, EpilogueSpec, dense_strides
from tritonconv.runtime.device import device_facts, nominal_device

from .cases import rank_of
from .test_algorithms import EPILOGUES, run_and_check, run_problem

ALGORITHM = Banded()
H100 = nominal_device("sm_90")
CASES: dict[str, dict[str, Any]] = {
    "3x3": {"N": 2, "C": 16, "M": 8, "H": 7, "W": 9, "K": 3, "P": 1},
    "no padding": {"N": 1, "C": 8, "M": 16, "H": 6, "W": 11, "K": 3},
    "much padding": {"N": 1, "C": 8, "M": 8, "H": 3, "W": 4, "K": 3, "P": "5x4"},
    "dilated": {
        "N": 1,
        "C": 16,
        "M": 8,
        "H": 8,
        "W": 13,
        "K": "3x2",
        "P": "2x3",
        "dilation": "2x3",
    },
    "24 channels": {"N": 1, "C": 24, "M": 24, "H": 4, "W": 7, "K": 3, "P": 1},
    "three filters": {"N": 1, "C": 8, "M": 3, "H": 5, "W": 8, "K": "1x3", "P": "0x1"},
    "three channels": {"N": 1, "C": 3, "M": 8, "H": 5, "W": 8, "K": "3x2", "P": "1x0"},
    "a column": {"N": 1, "C": 8, "M": 8, "H": 9, "W": 1, "K": "3x1", "P": "1x0"},
    "a row": {"N": 3, "C": 16, "M": 16, "H": 1, "W": 45, "K": "1x5", "P": "0x2"},
    "3x3x3": {"N": 2, "C": 8, "M": 16, "D": 3, "H": 5, "W": 7, "K": 3, "P": 1},
    "3-D, an axis each": {
        **{"N": 1, "C": 16, "M": 8, "D": 6, "H": 5, "W": 7},
        **{"K": "2x3x1", "P": "1x0x2", "dilation": "2x1x1"},
    },
}


def problem_of(fields: dict[str, Any], direction: Direction) -> ConvProblem:
    fields = {"dtype": "float16", "layout": "channels_last", **fields}
    return OPERATORS[direction, rank_of(fields)].parse(fields)


def small(problem: ConvProblem, run: tuple[int, int, int], units: tuple[int, int]) -> BandedConfig:
    # The interpreter takes its time for every program and step: wide ones.
    block_k = 256 if problem.direction is Direction.WGRAD else 64
    return BandedConfig(*run, *units, block_k, 4, 2, split=2)


SERVED = [
    (case, direction)
    for case, fields in CASES.items()
    for direction in Direction
    if ALGORITHM.supports(problem_of(fields, direction)) is None
]


def test_windows_need_whole_vectors_of_channels() -> None:
    missing = {(case, d) for case in CASES for d in Direction} - set(SERVED)
    assert missing == {
        ("three filters", Direction.DGRAD),
        ("three channels", Direction.FORWARD),
    }
    swapped = roles_of(problem_of(CASES["three channels"], Direction.WGRAD))
    assert (swapped.source, swapped.units, swapped.flipped) == ("grad_output", "input", True)


@pytest.mark.parametrize(("case", "direction"), SERVED)
def test_default(case: str, direction: Direction, device: torch.device) -> None:
    run_problem(problem_of(CASES[case], direction), "banded", device)


@pytest.mark.parametrize("run", [(1, 1, 1), (2, 1, 3), (1, 2, 2)])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("case", ["3x3", "dilated", "3-D, an axis each"])
def test_boxes(
    case: str, direction: Direction, run: tuple[int, int, int], device: torch.device
) -> None:
    """Boxes that divide the map and those that do not, whether they make sense or not."""
    problem = problem_of(CASES[case], direction)
    config = small(problem, run, (4, 8))
    run_problem(problem, "banded", device, config)
    other = replace(config, units_h=16, units_w=2, block_k=config.block_k // 2, cached=1, split=1)
    run_problem(problem, "banded", device, other)


@pytest.mark.parametrize("direction", Direction)
def test_the_same_bits_twice(direction: Direction, device: torch.device) -> None:
    problem = problem_of(CASES["3x3"], direction)
    config = small(problem, (1, 2, 2), (2, 4))
    first, second = (run_problem(problem, "banded", device, config) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.DGRAD])
@pytest.mark.parametrize("case", ["3x3", "3-D, an axis each"])
def test_an_epilogue_sees_the_coordinates_of_each_element(
    case: str, direction: Direction, device: torch.device
) -> None:
    problem = problem_of(CASES[case], direction)
    rank = len(problem.in_size)
    epilogue = build_epilogue(EPILOGUES[rank], False, (torch.float32,), problem.dtype, rank)
    strides = dense_strides(problem.result_shape, False)
    spec = EpilogueSpec(epilogue.key, (torch.float32,), (strides,), save_acc=True)
    problem = replace(problem, epilogue=spec)
    run_problem(problem, "banded", device, small(problem, (1, 2, 3), (2, 4)))


@pytest.mark.parametrize("direction", Direction)
def test_offsets_of_64_bits(
    direction: Direction, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ConvProblem, "wide", property(lambda self: True))
    problem = problem_of(CASES["3x3x3"], direction)
    run_problem(problem, "banded", device, small(problem, (1, 2, 2), (2, 4)))


@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("direction", Direction)
def test_any_layout_of_the_weight(
    direction: Direction, weight_layout: str, device: torch.device
) -> None:
    fields = {**CASES["3x3"], "dtype": "bfloat16", "weight_layout": weight_layout}
    run_and_check({**fields, "layout": "channels_last"}, direction, "banded", device)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"layout": "contiguous"}, "the input is not dense channels_last"),
        ({"output_layout": "contiguous"}, "the output is not dense channels_last"),
        ({"dtype": "float32"}, "dtype"),
        ({"S": 2}, "stride"),
        ({"G": 2}, "groups"),
        ({"C": 12}, "12 channels"),
        ({"M": 72}, "more than 64"),
        ({"K": 1, "P": 0}, "one tap"),
    ],
)
def test_what_is_not_served_is_refused_with_a_reason(more: dict[str, Any], reason: str) -> None:
    why = ALGORITHM.supports(problem_of({**CASES["3x3"], **more}, Direction.FORWARD))
    assert why is not None and reason in why


LARGE = {"N": 2, "D": 160, "H": 160, "W": 96, "K": 3, "P": 1}


@pytest.mark.parametrize("direction", Direction)
def test_untuned_calls_on_large_maps_of_few_channels(direction: Direction) -> None:
    problem = problem_of({**LARGE, "C": 16, "M": 16}, direction)
    assert OPERATORS[direction, 3].default_algorithm(problem, H100).name == "banded"
    for other in ({"C": 16, "M": 16, "D": 8, "H": 16, "W": 16}, {"C": 48, "M": 48}):
        problem = problem_of({**LARGE, **other}, direction)
        assert not is_clearly_better(problem)
        assert OPERATORS[direction, 3].default_algorithm(problem, H100).name != "banded"


def test_spaces_are_of_boxes_that_fill_a_tile() -> None:
    problem = problem_of({**LARGE, "C": 16, "M": 16}, Direction.FORWARD)
    found = boxes(problem, 128)
    assert {(1, 2, 2), (2, 2, 2), (1, 1, 4)} <= set(found) and (1, 1, 5) not in found
    for direction in Direction:
        for fields in (CASES["a column"], CASES["24 channels"], CASES["three channels"]):
            problem = problem_of(fields, direction)
            if ALGORITHM.supports(problem) is None:
                configs = ALGORITHM.configs(problem, device_facts())
                assert 2 <= len(configs) <= 900
