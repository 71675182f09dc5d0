from __future__ import annotations

import pytest
import torch

from tritonconv.runtime.accuracy import budget, check, error, within_budget
from tritonconv.runtime.errors import ArgumentValueError


def _case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 256, generator=generator).to(dtype) for _ in range(2))
    exact = a.double() @ b.double().T
    plain = a @ b.T
    blocked = sum((a[:, k : k + 32] @ b[:, k : k + 32].T for k in range(0, 256, 32)), 0 * plain)
    return exact, plain, blocked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_summation_order_is_within_budget(dtype: torch.dtype) -> None:
    exact, plain, blocked = _case(dtype)
    if dtype is torch.bfloat16:  # kernels accumulate in float32
        blocked = exact.float().to(dtype)
    verdict = check(blocked, exact, plain, dtype=dtype)
    assert verdict.ok and 0 < verdict.error <= verdict.budget, verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda y: y.mul_(1.02),
        lambda y: y[3, 5].add_(2.0),
        lambda y: y[0, 0].fill_(float("nan")),
        lambda y: y[-1, -1].fill_(float("inf")),
        lambda y: y[:, 0].zero_(),
    ],
    ids=["scaled", "one element", "unwritten", "infinite", "a column of zeros"],
)
def test_wrong_results_are_not(dtype: torch.dtype, spoil: object) -> None:
    exact, plain, _ = _case(dtype)
    result = exact.to(dtype)
    spoil(result)  # type: ignore[operator]
    assert not check(result, exact, plain, dtype=dtype).ok


def test_an_exact_plain_result_still_leaves_a_few_eps() -> None:
    exact = torch.full((8,), 1.0, dtype=torch.float64)
    result = torch.full((8,), 1.0) * (1 + 2 * torch.finfo(torch.float32).eps)
    assert check(result, exact, exact.float(), dtype=torch.float32).ok
    assert not check(result + 1e-5, exact, exact.float(), dtype=torch.float32).ok


def test_where_plain_overflows_nothing_is_compared() -> None:
    exact = torch.tensor([1.0, 1e6], dtype=torch.float64)
    plain = exact.half()
    assert torch.isinf(plain[1])
    assert check(torch.tensor([1.0, 7.0]).half(), exact, plain, dtype=torch.float16).ok
    assert not check(torch.tensor([2.0, 7.0]).half(), exact, plain, dtype=torch.float16).ok


def test_equal_infinities_zeros_and_empty_tensors_are_no_error() -> None:
    infinite = torch.tensor([float("inf"), 1.0], dtype=torch.float64)
    assert error(infinite.float(), infinite).peak == 0.0
    zeros = torch.zeros(3, dtype=torch.float64)
    assert within_budget(error(zeros.float(), zeros), budget(zeros, zeros.float(), torch.float32))
    assert not check(zeros.float() + 1, zeros, zeros.float(), dtype=torch.float32).ok
    empty = torch.zeros(0, dtype=torch.float64)
    assert check(empty.float(), empty, empty.float(), dtype=torch.float32).ok


def test_shapes_must_agree() -> None:
    with pytest.raises(ArgumentValueError, match="shape"):
        error(torch.zeros(3), torch.zeros(4))
