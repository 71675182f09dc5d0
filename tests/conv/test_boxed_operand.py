"""Products over boxes whose epilogue reads a residual."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tritonconv.conv.algorithms.boxed_operand import BoxedOperand, OperandConfig
from tritonconv.conv.dispatch import OPERATORS
from tritonconv.conv.epilogue import build_epilogue
from tritonconv.conv.problem import ConvProblem, Direction, EpilogueSpec, dense_strides
from tritonconv.runtime.device import nominal_device

from .cases import Fields, rank_of
from .test_algorithms import run_problem
from .test_boxed import PROBLEMS

H100 = nominal_device("sm_90")
NAMES = {Direction.FORWARD: "fused+operand", Direction.DGRAD: "transposed+operand"}
CONFIGS = [
    OperandConfig(16, 16, 16, 4, 2, fetch=fetch, engine_store=store)
    for fetch, store in ((0, 0), (1, 1), (2, 0), (3, 1))
] + [OperandConfig(32, 32, 32, 4, 3, group_m=1, box=1, fetch=3, engine_store=1)]


def parse(case: Fields, direction: Direction, **more: Any) -> ConvProblem:
    half = {"layout": "channels_last", "dtype": "bfloat16"}
    return OPERATORS[direction, rank_of(case)].parse({**half, **case, **more})


def with_operands(
    problem: ConvProblem, function: Any, strides: list[Any], dtypes: list[torch.dtype], **more: Any
) -> ConvProblem:
    rank = len(problem.in_size)
    epilogue = build_epilogue(function, False, tuple(dtypes), problem.dtype, rank)
    spec = EpilogueSpec(epilogue.key, tuple(dtypes), tuple(strides), **more)
    return dataclasses.replace(problem, epilogue=spec)


@pytest.mark.interpreter
@pytest.mark.parametrize("direction", NAMES, ids=str)
@pytest.mark.parametrize("case", PROBLEMS)
def test_products(case: str, direction: Direction, device: torch.device) -> None:
    problem = parse(PROBLEMS[case], direction, epilogue=NAMES[direction])
    assert BoxedOperand().supports(problem) is None
    for config in CONFIGS:
        run_problem(problem, "boxed_operand", device, config)


@pytest.mark.interpreter
@pytest.mark.parametrize("direction", NAMES, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_operands_of_every_kind(
    direction: Direction,
    config: OperandConfig,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A residual in float32, a scale behind it, a map without channels, another layout; wide."""
    problem = parse(PROBLEMS["3x3"], direction, dtype="float16")
    shape, result = problem.result_shape, problem.result_memory
    plane = (shape[2] * shape[3], 0, shape[3], 1)
    problem = with_operands(
        problem,
        lambda y, r, s, m, t: torch.tanh(y * s + r) * m + t,
        [result, (0, 1, 0, 0), plane, dense_strides(shape, False)],
        [torch.float32, torch.float16, torch.float16, torch.float32],
        save_acc=True,
    )
    assert BoxedOperand().supports(problem) is None
    run_problem(problem, "boxed_operand", device, config)
    monkeypatch.setattr(ConvProblem, "wide", property(lambda self: True))
    run_problem(problem, "boxed_operand", device, config)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", ["1x1", "3-D"])
def test_coordinates_and_two_residuals(case: str, device: torch.device) -> None:
    problem = parse(PROBLEMS[case], Direction.FORWARD)
    result = problem.result_memory

    def function(y: Any, a: Any, b: Any, *, n: Any, c: Any, h: Any, w: Any) -> Any:
        return F.gelu(y + a) * b + n + 2 * c + 3 * h - w

    problem = with_operands(problem, function, [result] * 2, [problem.dtype] * 2)
    for config in CONFIGS:
        run_problem(problem, "boxed_operand", device, config)


@pytest.mark.interpreter
def test_maps_with_gaps(device: torch.device) -> None:
    problem = parse(PROBLEMS["3x3"], Direction.FORWARD)
    n, _, h, w = problem.y_strides
    problem = dataclasses.replace(problem, y_strides=(4 * n, 1, 4 * h, 2 * w))
    problem = with_operands(
        problem, lambda y, r: torch.relu(y - r), [problem.y_strides], [problem.dtype]
    )
    for config in CONFIGS:
        run_problem(problem, "boxed_operand", device, config)


def test_what_is_left_to_others() -> None:
    algorithm = BoxedOperand()
    case = PROBLEMS["3x3"]
    for problem, words in (
        (parse(case, Direction.FORWARD), "operand"),
        (parse(case, Direction.FORWARD, epilogue="fused"), "operand"),
        (parse(case, Direction.WGRAD), "operand"),
        (parse({**case, "S": 2}, Direction.FORWARD, epilogue="fused+operand"), "stride"),
        (parse({**case, "dtype": "float32"}, Direction.FORWARD, epilogue="fused+operand"), "dtype"),
        (
            parse(
                {**case, "weight_layout": "contiguous"},
                Direction.FORWARD,
                **{"epilogue": "fused+operand"},
            ),
            "weight",
        ),
    ):
        reason = algorithm.supports(problem)
        assert reason is not None and words in reason


def test_a_residual_is_a_problem_of_its_own_and_runs_on_the_engine_untuned() -> None:
    operator = OPERATORS[Direction.FORWARD, 2]
    case: Fields = {"N": 64, "C": 64, "M": 64, "H": 56, "K": 3, "P": 1}
    residual = parse(case, Direction.FORWARD, epilogue="fused+operand+acc")
    assert residual.fields()["epilogue"] == "fused+operand+acc"
    assert operator.parse(residual.fields()) == residual
    assert parse(case, Direction.FORWARD, epilogue="fused").fields()["epilogue"] == "fused"
    assert operator.default_algorithm(residual, H100).name == "boxed_operand"
    assert operator.default_algorithm(residual, nominal_device("sm_80")).name == "dense"
    small = parse({**case, "N": 1, "H": 7}, Direction.FORWARD, epilogue="fused+operand")
    assert operator.default_algorithm(small, H100).name == "dense"
    space = BoxedOperand().space(residual, H100)
    assert space.default in list(space) and len(set(space)) == len(space) >= 8
