"""Bundles of narrow groups: every bundle gives what the groups give, and no group sees another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tritonconv.conv.algorithms.bundled import Bundled, bundles
from tritonconv.conv.algorithms.bundled_weights import BundledWeights
from tritonconv.conv.dispatch import OPERATORS
from tritonconv.conv.problem import ConvProblem, Direction
from tritonconv.runtime.device import device_facts

from .test_algorithms import run_and_check

ALGORITHM = Bundled()
GROUPS = {
    "8 of 4 by 8": {"N": 2, "C": 32, "M": 64, "H": 6, "K": 3, "P": 1, "G": 8},
    "6 of 4, strided": {"N": 1, "C": 24, "M": 24, "H": 7, "K": 3, "S": 2, "P": 1, "G": 6},
    "8 of 2, dilated": {"N": 2, "C": 16, "M": 16, "H": 7, "K": 3, "P": 1, "dilation": 2, "G": 8},
    "4 of 8, 4x2, strided": {"N": 1, "C": 32, "M": 32, "H": 8, "K": "4x2", "S": 2, "P": 1, "G": 4},
    "12 of 2, dilated": {"N": 1, "C": 24, "M": 36, "H": 6, "K": 2, "dilation": 2, "G": 12},
}


def problem_of(case: str, direction: Direction, **more: object) -> ConvProblem:
    return OPERATORS[direction, 2].parse({**GROUPS[case], **more})


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("case", GROUPS)
def test_every_bundle(case: str, direction: Direction, layout: str, device: torch.device) -> None:
    problem = problem_of(case, direction)
    fields = {**GROUPS[case], "layout": layout}
    if direction is Direction.WGRAD:
        space = BundledWeights().space(problem, device_facts())
        for bundle in bundles(problem):
            for config in [config for config in space if config.bundle == bundle][::24]:
                run_and_check(fields, direction, "bundled_weights", device, config)
        return
    default = ALGORITHM.space(problem, device_facts()).default
    assert len(bundles(problem)) >= 1 and default.bundle in bundles(problem)
    for bundle in bundles(problem):
        config = replace(default, bundle=bundle)
        run_and_check(fields, direction, "bundled", device, config)


def test_a_bundle_divides_the_groups_and_fills_a_matrix_instruction() -> None:
    assert bundles(problem_of("8 of 4 by 8", Direction.FORWARD)) == (4, 8)
    assert bundles(problem_of("6 of 4, strided", Direction.FORWARD)) == (6,)
    assert bundles(problem_of("12 of 2, dilated", Direction.WGRAD)) == (12,)
    for fields in ({"C": 96, "M": 96, "G": 3}, {"C": 10, "M": 10, "G": 5}):
        problem = OPERATORS[Direction.FORWARD, 2].parse({"H": 5, "K": 3, **fields})
        assert not bundles(problem) and ALGORITHM.supports(problem) is not None


@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.DGRAD])
def test_fused(direction: Direction, device: torch.device) -> None:
    fused = "fused" if direction is Direction.FORWARD else "transposed"
    run_and_check({**GROUPS["8 of 4 by 8"], "epilogue": fused}, direction, "bundled", device)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.DGRAD])
@pytest.mark.parametrize("case", ["8 of 4 by 8", "8 of 2, dilated", "4 of 8, 4x2, strided"])
def test_channels_of_a_bundle_in_one_step(
    case: str, direction: Direction, layout: str, device: torch.device
) -> None:
    configs = [c for c in ALGORITHM.space(problem_of(case, direction), device_facts()) if c.direct]
    assert not ALGORITHM.space(problem_of(case, direction), device_facts()).default.direct
    strided = "strided" in case and direction is Direction.DGRAD
    assert bool(configs) != strided
    for config in configs[:: max(1, len(configs) // 2)]:
        fields = {**GROUPS[case], "layout": layout}
        run_and_check(fields, direction, "bundled", device, replace(config, block_m=32))
