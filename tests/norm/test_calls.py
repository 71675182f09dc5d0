"""Prepared calls of batch normalisation give what first calls give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tritonconv as tc
from tritonconv.norm import calls
from tritonconv.norm.api import batch_norm
from tritonconv.runtime import recording

pytestmark = pytest.mark.interpreter


def _maps(dtype: torch.dtype, device: torch.device, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 6, 4, 4)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count)]


def _call(norm: nn.Module, x: Tensor, residual: Tensor | None, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    inputs = [x, *norm.parameters()]
    given: list[Any] = [x]
    if residual is not None:
        residual = residual.detach().requires_grad_()
        inputs.append(residual)
        given.append(residual)
    y = norm(*given)
    return [y, *torch.autograd.grad(y, inputs, grad), *norm.buffers()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"momentum": None}, {"activation": F.relu}],
    ids=["plain", "no-affine", "cumulative", "relu"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_later_calls_equal_first_calls(
    training: bool,
    options: dict[str, Any],
    residual: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    norm = tc.nn.BatchNorm2d(6, device=device, **options).train(training)
    x, other, grad = _maps(dtype, device)
    added = other if residual else None
    calls._STEPS.clear()
    results = []
    for strided in (grad, grad, grad.to(memory_format=torch.channels_last), grad):
        results.append(_call(copy.deepcopy(norm), x, added, strided))
    assert calls._STEPS
    for later in results[1:]:
        for found, expected in zip(later, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_changes_between_forward_and_backward(training: bool, device: torch.device) -> None:
    norm = tc.nn.BatchNorm2d(6, activation=F.silu, device=device).train(training)
    x, _, grad = _maps(torch.float32, device)
    x.requires_grad_()
    (first,) = torch.autograd.grad(norm(x), x, grad)
    y = norm(x)
    recording.advance()
    (second,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    norm(x)
    (third,) = torch.autograd.grad(checkpoint(norm, x, use_reentrant=False), x, grad)
    torch.testing.assert_close(third, first, rtol=0, atol=0)


def test_the_first_call_ever_may_be_in_a_checkpoint(device: torch.device) -> None:
    calls._STEPS.clear()
    norm = tc.nn.BatchNorm2d(6, activation=torch.relu, device=device)
    x, grad, _ = _maps(torch.float32, device)
    x.requires_grad_()
    y = checkpoint(norm, x, use_reentrant=False)
    assert isinstance(y, Tensor)
    (found,) = torch.autograd.grad(y, x, grad)
    (expected,) = torch.autograd.grad(norm(x), x, grad)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_second_order_of_a_prepared_call(training: bool, device: torch.device) -> None:
    norm = tc.nn.BatchNorm2d(6, activation=F.silu, device=device).train(training)
    plain = nn.BatchNorm2d(6, device=device).train(training)
    x, _, grad = _maps(torch.float32, device)
    x.requires_grad_()
    norm(x.detach())  # both have moved their statistics once
    plain(x.detach())
    results = []
    for y in (norm(x), F.silu(plain(x))):
        (dx,) = torch.autograd.grad(y, x, grad, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_saved_tensors_may_come_back_with_other_strides(
    training: bool, device: torch.device
) -> None:
    norm = tc.nn.BatchNorm2d(6, activation=torch.relu, device=device).train(training)
    x, grad, _ = _maps(torch.float32, device)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(norm(x), x, grad)

    def turned(t: Tensor) -> Tensor:
        return t.t().contiguous().t() if t.dim() == 2 else t.flip(-1).flip(-1).mT.contiguous().mT

    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: turned(t) if t.dim() > 1 else t
    ):
        y = norm(x)
    (found,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_counters_of_another_dtype(dtype: torch.dtype, device: torch.device) -> None:
    x, *_ = _maps(torch.float32, device)
    mean, var = torch.zeros(6, device=device), torch.ones(6, device=device)
    tracked = torch.zeros((), dtype=dtype, device=device)
    batch_norm(x, mean, var, training=True, num_batches_tracked=torch.zeros_like(tracked).long())
    for count in (1, 2):
        batch_norm(x, mean, var, training=True, num_batches_tracked=tracked)
        assert tracked == count
