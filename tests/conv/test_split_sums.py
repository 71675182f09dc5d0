"""Split sums in one launch: poisoned workspaces, counters that return to zero, any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tritonconv.conv.algorithms.common import TileConfig
from tritonconv.conv.algorithms.split import splits_of
from tritonconv.conv.dispatch import OPERATORS, make_runner
from tritonconv.conv.problem import ConvProblem, Direction
from tritonconv.runtime import launch
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.tables import Choice, Tier

from .cases import PROBLEMS, rank_of
from .oracle import assert_accurate

CASES = ("3x3", "groups, stride 2", "kernel below stride")


class Arrivals:
    """One set of counters for all runs, as a stream has, and what the kernels leave in it."""

    def __init__(self) -> None:
        self.counters: torch.Tensor | None = None

    def __call__(self, count: int, device: torch.device) -> torch.Tensor:
        if self.counters is None:
            self.counters = torch.zeros(4096, dtype=torch.int32, device=device)
        assert count <= self.counters.numel()
        return self.counters


class Poisoned:
    """``torch`` whose fresh memory is full of NaN."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*args: Any, **options: Any) -> torch.Tensor:
        fresh = torch.empty(*args, **options)
        return fresh.fill_(float("nan") if fresh.dtype.is_floating_point else 77)


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> Arrivals:
    """Counters that outlive a run, and workspaces of NaN."""
    found = Arrivals()
    monkeypatch.setattr(launch, "arrival_counters", found)
    monkeypatch.setattr(launch, "torch", Poisoned())
    return found


def run(problem: ConvProblem, config: TileConfig, device: torch.device) -> torch.Tensor:
    """The product by our kernels, checked against float64."""
    operator = OPERATORS[problem.direction, len(problem.in_size)]
    tensors = operator.make_tensors(problem, device, torch.Generator(device).manual_seed(4))
    name = "dense" if problem.groups == 1 else "grouped"
    runner = make_runner(problem, Choice(name, config, Tier.DEFAULT))
    runner(*(tensors[slot] for slot in runner.slots))
    (out,) = operator.outputs(problem)
    exact = operator.reference(problem, tensors, torch.float64)[out]
    plain = operator.reference(problem, tensors, problem.dtype)[out]
    assert_accurate(tensors[out], exact, plain, (problem, config))
    return tensors[out]


@pytest.mark.parametrize(("split", "dtype"), [(2, "float16"), (999, "float32")])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.DGRAD])
def test_parts_and_counters(
    direction: Direction,
    case: str,
    dtype: str,
    split: int,
    arrivals: Arrivals,
    device: torch.device,
) -> None:
    """Every part is written before it is read, and the counters are zero again afterwards."""
    fields = {**PROBLEMS[case], "dtype": dtype}
    problem = OPERATORS[direction, rank_of(fields)].parse(fields)
    config = TileConfig(16, 16, 16, 4, 3, split_k=split, one_launch=1)
    first, second = (run(problem, config, device) for _ in range(2))
    assert torch.equal(first, second)
    if splits_of(problem, config) > 1:
        assert arrivals.counters is not None and not arrivals.counters.any()


def test_both_forms_add_in_the_same_order(device: torch.device) -> None:
    problem = OPERATORS[Direction.FORWARD, 2].parse({"C": 48, "M": 17, "H": 4, "K": 3, "P": 1})
    one, two = (
        run(problem, TileConfig(16, 32, 16, 4, 3, split_k=5, one_launch=one_launch), device)
        for one_launch in (1, 0)
    )
    assert torch.equal(one, two)


def test_a_split_sum_in_one_launch_is_one_kernel() -> None:
    problem = OPERATORS[Direction.FORWARD, 2].parse({"C": 512, "M": 512, "H": 7, "K": 3, "P": 1})
    operator = OPERATORS[Direction.FORWARD, 2]
    dense = operator.algorithm("dense")
    space = dense.space(problem, nominal_device("sm_90"))
    default = space.default
    assert default.split_k > 1 and default.one_launch == 1
    plan = dense.plan(problem, default)
    assert plan is not None and len(plan.calls) == 1
    (counters,) = (space for space in plan.workspaces if space.counters)
    (parts,) = (space for space in plan.workspaces if not space.counters)
    grid = plan.calls[0].grid
    assert counters.shape == (grid[0] * grid[1],) and parts.shape[:2] == (grid[0], grid[2])
    forms = {config.one_launch for config in space if config.split_k == default.split_k}
    assert forms == {0, 1}
    assert all(config.one_launch == 0 for config in space if config.split_k == 1)


SMALL = [
    ({"C": 512, "M": 512, "H": 7, "K": 3, "P": 1}, 64),
    ({"C": 256, "M": 256, "H": 14, "K": 3, "P": 1}, 64),
    ({"C": 64, "M": 64, "H": 56, "K": 3, "P": 1}, 48),
    ({"C": 512, "M": 512, "H": 7, "K": 5, "P": 2}, 64),
]


@pytest.mark.parametrize(("fields", "programs"), SMALL)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_defaults_of_small_maps_fill_the_gpu(
    fields: dict[str, Any], programs: int, dtype: str
) -> None:
    device = nominal_device("sm_90")
    problem = OPERATORS[Direction.FORWARD, 2].parse({**fields, "dtype": dtype})
    dense = OPERATORS[Direction.FORWARD, 2].algorithm("dense")
    default = dense.space(problem, device).default
    asked = dense.footprint(problem, default, device)
    assert asked is not None
    assert programs <= asked.programs <= 2 * device.sm_count
