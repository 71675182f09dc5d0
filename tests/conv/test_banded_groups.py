"""Banded products over blocks of groups: every block and box, odd maps, windows beyond the map."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tritonconv as tc
from tritonconv.conv.algorithms.banded_group_plans import BandedGroupsConfig, walk_of
from tritonconv.conv.algorithms.banded_group_spaces import best_kinds, block_counts
from tritonconv.conv.algorithms.banded_groups import BandedGroups
from tritonconv.conv.dispatch import OPERATORS
from tritonconv.conv.epilogue import build_epilogue
from tritonconv.conv.problem import ConvProblem, Direction, EpilogueSpec, dense_strides
from tritonconv.runtime.device import device_facts, nominal_device

from .cases import rank_of
from .test_algorithms import EPILOGUES, run_and_check, run_problem

ALGORITHM = BandedGroups()
H100 = nominal_device("sm_90")
CASES: dict[str, dict[str, Any]] = {
    "4 of 8": {"N": 2, "C": 32, "M": 32, "H": 7, "W": 9, "K": 3, "P": 1, "G": 4},
    "8 of 4": {"N": 3, "C": 32, "M": 32, "H": 5, "W": 6, "K": 3, "P": 1, "G": 8},
    "2 of 16, no padding": {"N": 1, "C": 32, "M": 32, "H": 6, "W": 7, "K": 3, "G": 2},
    "3 of 8 by 16": {"N": 1, "C": 24, "M": 48, "H": 5, "W": 4, "K": 3, "P": 1, "G": 3},
    "2 of 32": {"N": 1, "C": 64, "M": 64, "H": 3, "W": 5, "K": "1x3", "P": "0x1", "G": 2},
    "2 of 12": {"N": 1, "C": 24, "M": 24, "H": 4, "W": 5, "K": "2x3", "P": 1, "G": 2},
    "dilated": {
        **{"N": 1, "C": 16, "M": 16, "H": 8, "W": 13, "G": 4},
        **{"K": "3x2", "P": "2x3", "dilation": "2x3"},
    },
    "much padding": {"N": 1, "C": 16, "M": 16, "H": 3, "W": 4, "K": 3, "P": "5x4", "G": 2},
    "a row": {"N": 5, "C": 16, "M": 16, "H": 1, "W": 23, "K": "1x5", "P": "0x2", "G": 2},
    "3x3x3": {"N": 2, "C": 16, "M": 16, "D": 3, "H": 4, "W": 5, "K": 3, "P": 1, "G": 2},
}


def problem_of(fields: dict[str, Any], direction: Direction) -> ConvProblem:
    fields = {"dtype": "float16", "layout": "channels_last", **fields}
    return OPERATORS[direction, rank_of(fields)].parse(fields)


def small(
    problem: ConvProblem, run: tuple[int, int, int], bundle: int, units: int = 32
) -> BandedGroupsConfig:
    # The interpreter takes its time for every program and step: wide ones.
    block_k = 256 if problem.direction is Direction.WGRAD else 64
    return BandedGroupsConfig(*run, bundle, units, block_k, 4, 2, split=3)


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("case", CASES)
def test_default(case: str, direction: Direction, device: torch.device) -> None:
    run_problem(problem_of(CASES[case], direction), "banded_groups", device)


@pytest.mark.parametrize("run", [(1, 1, 1), (1, 3, 2)])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("case", ["4 of 8", "dilated", "3x3x3"])
def test_boxes_and_blocks(
    case: str, direction: Direction, run: tuple[int, int, int], device: torch.device
) -> None:
    """Boxes that divide the map and those that do not, blocks of one to all groups."""
    problem = problem_of(CASES[case], direction)
    counts = block_counts(problem)
    config = small(problem, run, counts[0])
    run_problem(problem, "banded_groups", device, config)
    other = replace(
        config,
        bundle=counts[-1],
        units=16,
        block_k=config.block_k // 2,
        split=1,
        images=2,
        cached=1,
    )
    run_problem(problem, "banded_groups", device, other)


@pytest.mark.parametrize("split", [1, 2, 5, 100])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_every_split_of_the_sum(images: int, split: int, device: torch.device) -> None:
    problem = problem_of(CASES["8 of 4"], Direction.WGRAD)
    config = replace(small(problem, (1, 2, 2), 4, 16), images=images, split=split)
    walk = walk_of(problem, config)
    assert walk.splits <= split
    assert (walk.splits - 1) * walk.tiles_per_split * walk.steps_per_split <= (
        walk.tiles * walk.steps
    )
    run_problem(problem, "banded_groups", device, config)


@pytest.mark.parametrize("direction", Direction)
def test_the_same_bits_twice(direction: Direction, device: torch.device) -> None:
    problem = problem_of(CASES["4 of 8"], direction)
    config = small(problem, (1, 2, 2), 2)
    first, second = (run_problem(problem, "banded_groups", device, config) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.DGRAD])
@pytest.mark.parametrize("case", ["3 of 8 by 16", "3x3x3"])
def test_an_epilogue_sees_the_coordinates_of_each_element(
    case: str, direction: Direction, device: torch.device
) -> None:
    problem = problem_of(CASES[case], direction)
    rank = len(problem.in_size)
    epilogue = build_epilogue(EPILOGUES[rank], False, (torch.float32,), problem.dtype, rank)
    strides = dense_strides(problem.result_shape, False)
    spec = EpilogueSpec(epilogue.key, (torch.float32,), (strides,), save_acc=True)
    problem = replace(problem, epilogue=spec)
    config = small(problem, (1, 2, 3), block_counts(problem)[0], 16)
    run_problem(problem, "banded_groups", device, config)


@pytest.mark.parametrize("direction", Direction)
def test_offsets_of_64_bits(
    direction: Direction, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ConvProblem, "wide", property(lambda self: True))
    problem = problem_of(CASES["3x3x3"], direction)
    run_problem(problem, "banded_groups", device, small(problem, (1, 2, 2), 2))


@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("direction", Direction)
def test_any_layout_of_the_weight(
    direction: Direction, weight_layout: str, device: torch.device
) -> None:
    fields = {**CASES["4 of 8"], "dtype": "bfloat16", "weight_layout": weight_layout}
    run_and_check({**fields, "layout": "channels_last"}, direction, "banded_groups", device)


@pytest.mark.parametrize("direction", Direction)
def test_channels_of_a_larger_tensor(direction: Direction, device: torch.device) -> None:
    """Only the channels have to be neighbours: pixels of a slice are further apart."""
    problem = problem_of(CASES["4 of 8"], direction)
    apart = [tuple(s if s == 1 else 2 * s for s in problem.x_strides)]
    apart += [tuple(s if s == 1 else 3 * s for s in problem.y_strides)]
    problem = replace(problem, x_strides=apart[0], y_strides=apart[1])
    assert ALGORITHM.supports(problem) is None
    run_problem(problem, "banded_groups", device, small(problem, (1, 2, 2), 2))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"layout": "contiguous"}, "channels of the input"),
        ({"output_layout": "contiguous"}, "channels of the output"),
        ({"dtype": "float32"}, "dtype"),
        ({"S": 2}, "stride"),
        ({"G": 1}, "groups == 1"),
        ({"G": 32}, "groups too wide, too narrow"),
        ({"C": 160, "M": 160, "G": 2}, "groups too wide"),
        ({"C": 36, "M": 36, "G": 3}, "no block of whole vectors"),
        ({"K": 1, "P": 0}, "one tap"),
    ],
)
def test_what_is_not_served_is_refused_with_a_reason(more: dict[str, Any], reason: str) -> None:
    why = ALGORITHM.supports(problem_of({**CASES["4 of 8"], **more}, Direction.FORWARD))
    assert why is not None and reason in why


RESNEXT = {"8": (256, 28), "4": (128, 56), "16": (512, 14), "32": (1024, 7)}


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("width", RESNEXT)
def test_spaces_begin_with_units_of_four_pixels(width: str, direction: Direction) -> None:
    channels, size = RESNEXT[width]
    fields = {"N": 64, "C": channels, "M": channels, "H": size, "K": 3, "P": 1, "G": 32}
    problem = problem_of({**fields, "dtype": "bfloat16"}, direction)
    default, *others = ALGORITHM.configs(problem, H100)
    assert default.bundle * int(width) in (16, 32)
    assert default.run in {(1, 2, 2), (1, 1, 2)}
    assert len({(config.bundle, config.run) for config in (default, *others[:7])}) >= 3
    assert len(others) < 600 and (default.bundle, default.run) == best_kinds(problem)[0]
    for direct in (problem_of(CASES["a row"], direction), problem_of(CASES["2 of 12"], direction)):
        assert len(ALGORITHM.configs(direct, device_facts())) >= 2


@pytest.mark.parametrize("direction", Direction)
def test_untuned_calls_take_it_where_it_was_faster_and_tuning_tries_it(
    direction: Direction,
) -> None:
    fields = {"N": 64, "C": 256, "M": 256, "H": 28, "K": 3, "P": 1, "G": 32, "dtype": "bfloat16"}
    operator = OPERATORS[direction, 2]
    found = operator.default_algorithm(problem_of(fields, direction), H100).name
    # PyTorch's gradient of the weight, its sums in a fixed order, is as fast.
    assert found == ("aten" if direction is Direction.WGRAD else ALGORITHM.name)
    slower = {"C": 512, "M": 512, "H": 14}, {"N": 8}, {"dtype": "float32"}, {"K": "1x3", "P": "0x1"}
    for changes in slower:
        problem = problem_of({**fields, **changes}, direction)
        assert operator.default_algorithm(problem, H100).name == "aten"
    wider = problem_of({**fields, **slower[0]}, direction)
    assert ALGORITHM.name in {a.name for a in operator.candidates(wider)}


@pytest.mark.interpreter
def test_second_order_through_the_operators(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All products of first and second order by this algorithm, against PyTorch in float64."""
    used = []
    for operator in OPERATORS.values():

        def chosen(problem: ConvProblem, facts: Any) -> BandedGroups:
            used.append(problem.direction)
            assert ALGORITHM.supports(problem) is None
            return ALGORITHM

        monkeypatch.setattr(operator, "default_algorithm", chosen)
    generator = torch.Generator(device).manual_seed(0)

    def fresh(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = scale * torch.randn(shape, generator=generator, device=device)
        return values.half().to(memory_format=torch.channels_last).requires_grad_()

    x, w, v = fresh(2, 16, 5, 6), fresh(16, 4, 3, 3, scale=0.2), fresh(2, 16, 5, 6)

    def second(conv: Any, x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        y = conv(x, w, padding=1, groups=4)
        first = torch.autograd.grad(y, (x, w), v, create_graph=True)
        scalar = sum((g.float() if g.dtype is torch.float16 else g).square().sum() for g in first)
        return [y, *first, *torch.autograd.grad(scalar, (x, w, v))]

    ours = second(tc.conv2d, x, w, v)
    exact = second(F.conv2d, *(t.detach().double().requires_grad_() for t in (x, w, v)))
    for got, want in zip(ours, exact, strict=True):
        error = (got.double() - want).norm() / want.norm()
        assert error < 4e-3
    assert set(used) == set(Direction)
