"""Faults that reviews found: each was wrong once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tritonconv as tc
from tritonconv.conv.algorithms import depthwise, depthwise_model
from tritonconv.conv.algorithms.common import MAX_GRID_Z, TileConfig
from tritonconv.conv.algorithms.product_dgrad import every_phase_has_taps
from tritonconv.conv.algorithms.split import splits_of
from tritonconv.conv.dispatch import OPERATORS, ConvOperator, make_runner
from tritonconv.conv.problem import Direction
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.tables import Choice, Tier

H100 = nominal_device("sm_90")


def test_lazily_negated_views(device: torch.device) -> None:
    x = torch.randn(1, 2, 5, 5, dtype=torch.cfloat, device=device).conj().imag
    w = torch.randn(3, 2, 3, 3, device=device)
    b = torch.randn(3, dtype=torch.cfloat, device=device).conj().imag
    assert x.is_neg() and b.is_neg()
    for _ in range(3):  # the first calls prepare what later ones run
        torch.testing.assert_close(tc.conv2d(x, w), F.conv2d(x, w))
        torch.testing.assert_close(tc.conv2d(x, w, b), F.conv2d(x, w, b))
        torch.testing.assert_close(tc.conv2d(x.resolve_neg(), w, b), F.conv2d(x, w, b))


def test_gradients_that_arrive_negated(device: torch.device) -> None:
    x = torch.randn(1, 2, 5, 5, device=device)
    w = torch.randn(3, 2, 3, 3, device=device, requires_grad=True)
    c = torch.randn(1, 3, 3, 3, dtype=torch.cfloat, device=device)
    found = []
    for conv in (tc.conv2d, F.conv2d):
        y = conv(x, w)
        value = (torch.complex(torch.zeros_like(y), y).conj() * c).real.sum()
        found += torch.autograd.grad(value, w)
    torch.testing.assert_close(found[0], found[1])


def test_no_problem_is_left_without_a_kernel(device: torch.device) -> None:
    x, w, b = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 4, 4), torch.randn(4)
    x, w, b = x.to(device), w.to(device), b.to(device)
    y = tc.conv_transpose2d(x, w, b, stride=2, groups=4, precision="tf32x3")
    torch.testing.assert_close(y, F.conv_transpose2d(x, w, b, stride=2, groups=4))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("direction", Direction)
def test_depthwise_kernels_that_cannot_be_written_out_are_refused(
    direction: Direction, layout: str
) -> None:
    """What is left compiles in seconds and stays in registers."""
    algorithm = depthwise.Depthwise()
    served = 0
    for fields in (
        *({"H": 56, "K": k, "P": k // 2} for k in (3, 7, 21, 31)),
        *({"H": 1, "W": 512, "K": f"1x{k}"} for k in (7, 128, 512)),
        *({"H": 64, "K": 2 * s, "S": s, "P": s // 2} for s in (2, 8, 16, 32)),
    ):
        problem = OPERATORS[direction, 2].parse(
            {"N": 2, "C": 48, "M": 48, "G": 48, "dtype": "float16", "layout": layout, **fields}
        )
        if algorithm.supports(problem) is not None:
            continue
        served += 1
        config = algorithm.space(problem, H100).default
        stencil = depthwise.stencil_of(problem, config)
        assert depthwise_model.compiling(stencil) < 700_000, fields
        assert served and algorithm.plan(problem, config).calls
    assert served >= 2


def test_results_keep_the_format_of_one_channel(device: torch.device) -> None:
    a, w = torch.randn(2, 1, 4, 5, device=device), torch.randn(3, 1, 1, 1, device=device)
    assert tc.conv2d(a, w).is_contiguous()
    assert tc.conv1d(a[:, :, 0], w[..., 0]).is_contiguous()
    assert tc.conv_transpose2d(
        a[:, :, :1, :1], torch.randn(1, 3, 3, 3, device=device)
    ).is_contiguous()
    last = a.to(memory_format=torch.channels_last)
    last = torch.empty_strided(a.shape, (20, 1, 5, 1), device=device).copy_(a)
    assert tc.conv2d(last, w).is_contiguous(memory_format=torch.channels_last)


def test_integers_of_other_libraries(device: torch.device) -> None:
    x, w = torch.randn(1, 4, 8, 8, device=device), torch.randn(8, 2, 3, 3, device=device)
    y = tc.conv2d(x, w, stride=(np.int64(2), 2), padding=np.int32(1), groups=np.int64(2))
    torch.testing.assert_close(y, F.conv2d(x, w, stride=2, padding=1, groups=2))
    for bad in (1.0, (1, 2.0), torch.tensor(1)):
        with pytest.raises(tc.runtime.errors.ArgumentTypeError, match="stride"):
            tc.conv2d(x, w, stride=bad, groups=2)  # type: ignore[arg-type]


def test_grids_have_room_for_the_phases_of_a_stride() -> None:
    for rank, stride in ((2, 256), (3, 41), (2, 200), (3, 30)):
        fields = {"C": 16, "M": 16, "H": 512, "D": 64, "K": 3, "S": stride}
        if rank == 2:
            del fields["D"]
        else:
            fields["H"] = 64
        operator = ConvOperator(Direction.DGRAD, rank)
        problem = operator.parse(fields)
        names = [a.name for a in operator.candidates(problem)]
        assert ("dense" in names) == (math.prod(problem.stride) <= MAX_GRID_Z)
        for algorithm in operator.candidates(problem):
            for config in list(algorithm.configs(problem, H100))[:20]:
                plan = algorithm.plan(problem, config)
                assert plan is None or all(max(c.grid[1:]) <= MAX_GRID_Z for c in plan.calls)


@pytest.mark.parametrize("one_launch", [1, 0], ids=["one launch", "two"])
@pytest.mark.parametrize("split", [1, 2, 3, 999])
@pytest.mark.parametrize(
    "fields",
    [
        {"K": 1, "S": 2},  # three of four phases meet no tap
        {"K": 3, "S": 2, "P": 2, "dilation": 2},  # taps meet even phases only
        {"K": "2x3", "S": "3x2"},
        {"D": 5, "K": "2x3x1", "S": "2x1x3", "P": "1x0x2", "dilation": "1x2x1"},
        {"D": 4, "K": 1, "S": 2},
    ],
    ids=str,
)
def test_split_gradients_of_phases_without_taps(
    fields: dict[str, Any], split: int, one_launch: int, device: torch.device
) -> None:
    """Dividing by the number of taps let the compiler take it for the one that is not zero."""
    operator = OPERATORS[Direction.DGRAD, 3 if "D" in fields else 2]
    problem = operator.parse({"C": 9, "M": 37, "H": 6, "W": 7, **fields})
    assert not every_phase_has_taps(problem)
    config = TileConfig(16, 16, 16, 4, 2, split_k=split, one_launch=one_launch)
    assert splits_of(problem, config) >= min(split, 3)
    tensors = operator.make_tensors(problem, device, torch.Generator(device).manual_seed(1))
    found = make_runner(problem, Choice("dense", config, Tier.DEFAULT))
    found(*(tensors[name] for name in found.slots))
    exact = operator.reference(problem, tensors, torch.float64)["grad_input"]
    torch.testing.assert_close(tensors["grad_input"].double(), exact, atol=1e-4, rtol=1e-4)
