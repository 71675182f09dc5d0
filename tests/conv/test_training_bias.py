"""Prepared calls with a bias and gradients compute what the operators and PyTorch compute."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tritonconv as tc
from tritonconv.conv import prepared_products
from tritonconv.conv.training_calls import Products
from tritonconv.runtime import tables
from tritonconv.runtime.accuracy import check

from .test_training_calls import BOTH_CHOICES, CASES, _chosen, _no_tf32, assert_same, leaf, theirs

__all__ = ["_chosen", "_no_tf32"]  # fixtures of this file too

pytestmark = pytest.mark.interpreter
KINDS: dict[str, Any] = {
    **CASES,
    "one filter": ("conv2d", (2, 3, 5, 4), (1, 3, 3, 3), {}),
    "one pixel": ("conv2d", (1, 4, 3, 3), (6, 4, 3, 3), {}),
    "one row of pixels": ("conv2d", (1, 4, 3, 9), (6, 4, 3, 3), {}),
    "depthwise": ("conv2d", (2, 4, 6, 5), (4, 1, 3, 3), {"padding": 1, "groups": 4}),
    "transposed groups": (
        "conv_transpose3d",
        (1, 4, 2, 3, 2),
        (4, 2, 2, 2, 2),
        {"stride": 2, "groups": 2},
    ),
}


def operands(
    case: str, device: torch.device, last: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]:
    """The function, input, weight, bias and arguments of a case."""
    name, x_shape, w_shape, kwargs = KINDS[case]
    filters = w_shape[1] * kwargs.get("groups", 1) if "transpose" in name else w_shape[0]
    tensors = leaf(x_shape, device, last), leaf(w_shape, device, last), leaf((filters,), device)
    x, w, bias = (t.detach().to(dtype).requires_grad_() for t in tensors)
    return getattr(tc, name), x, w, bias, kwargs


def by_operators(function: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The same call as one with a forward-mode level takes it."""
    with torch.autograd.forward_ad.dual_level():
        y: Tensor = function(*args, **kwargs)
    assert "_Product" not in type(y.grad_fn).__name__
    return y


def assert_equal(got: Any, expected: Any) -> None:
    for mine, want in zip(got, expected, strict=True):
        assert mine.dtype is want.dtype and torch.equal(mine, want)
        hops = zip(mine.shape, mine.stride(), want.stride(), strict=True)
        assert all(size == 1 or a == b for size, a, b in hops)


@BOTH_CHOICES
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", KINDS)
def test_every_call_equals_pytorchs_and_the_operators(
    case: str, last: bool, device: torch.device
) -> None:
    function, x, w, bias, kwargs = operands(case, device, last)
    expected = theirs(KINDS[case][0], x, w, bias, **kwargs)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, w, bias), cotangent)
    y = by_operators(function, x, w, bias, precision="ieee", **kwargs)
    generic = (y, *torch.autograd.grad(y, (x, w, bias), cotangent))
    assert_same(generic, (expected, *wanted))
    for _ in range(2):
        y = function(x, w, bias, precision="ieee", **kwargs)
        assert "_Product" in type(y.grad_fn).__name__
        assert_equal((y, *torch.autograd.grad(y, (x, w, bias), cotangent)), generic)


@pytest.mark.parametrize("case", ["1x1", "row", "transposed"])
def test_against_float64(case: str, device: torch.device) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        function, x, w, bias, kwargs = operands(case, device, dtype=dtype)
        exact = [t.detach().double().requires_grad_() for t in (x, w, bias)]
        oracle = theirs(KINDS[case][0], *exact, **kwargs)
        cotangent = torch.randn_like(oracle).to(dtype)
        wanted = torch.autograd.grad(oracle, exact, cotangent.double())
        plain = theirs(KINDS[case][0], x, w, bias, **kwargs)
        reference = torch.autograd.grad(plain, (x, w, bias), cotangent)
        for _ in range(2):
            y = function(x, w, bias, precision="ieee", **kwargs)
            found = torch.autograd.grad(y, (x, w, bias), cotangent)
        columns = zip((y, *found), (oracle, *wanted), (plain, *reference), strict=True)
        assert all(check(got, want, simple, dtype=dtype).ok for got, want, simple in columns)


@BOTH_CHOICES
@pytest.mark.parametrize("case", ["1x1", "row", "transposed row"])
def test_gradients_of_some_operands(case: str, device: torch.device) -> None:
    function, *leaves, kwargs = operands(case, device)
    y = by_operators(function, *leaves, precision="ieee", **kwargs)
    cotangent = torch.randn_like(y)
    wanted = torch.autograd.grad(y, leaves, cotangent)
    for needs in itertools.product([True, False], repeat=3):
        if not any(needs):
            continue
        given = [t if need else t.detach() for t, need in zip(leaves, needs, strict=True)]
        expected = [t for t, need in zip(wanted, needs, strict=True) if need]
        for _ in range(2):
            y = function(*given, precision="ieee", **kwargs)
            # Input and weight are kept for each other's gradients, and no others.
            kept = [t is not None for t in y.grad_fn.saved_tensors]
            assert kept == [needs[1], needs[0]]
            found = torch.autograd.grad(y, [t for t in given if t.requires_grad], cotangent)
            assert_equal(found, expected)
    # Recorded for all, asked for one.
    for leaf_, want in zip(leaves, wanted, strict=True):
        y = function(*leaves, precision="ieee", **kwargs)
        assert_equal(torch.autograd.grad(y, leaf_, cotangent), (want,))


def test_a_frozen_bias_is_never_summed_for(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, x, w, bias, kwargs = operands("3x3", device)
    function(x, w, bias.detach(), precision="ieee", **kwargs)
    monkeypatch.delattr(Products, "bias_gradient")
    function(x, w, bias.detach(), precision="ieee", **kwargs).sum().backward()
    assert x.grad is not None and w.grad is not None


@BOTH_CHOICES
def test_gradients_of_other_layouts_and_biases_of_other_strides(device: torch.device) -> None:
    function, x, w, _, _ = operands("1x1", device)
    parameters = torch.randn(6, 3, device=device)
    whole = torch.randn(2, 12, 5, 10, device=device)
    for bias in (parameters[:, 1], parameters[:1, 0].expand(6), parameters[3, 2:].expand(6)):
        bias = bias.detach().requires_grad_()
        y = by_operators(function, x, w, bias, precision="ieee")
        for cotangent in (
            torch.randn_like(y).contiguous(memory_format=torch.channels_last),
            whole[:, ::2, :, ::2],
            torch.ones((), device=device).expand(y.shape),
        ):
            leaves = (x, w, bias)
            wanted = torch.autograd.grad(y, leaves, cotangent, retain_graph=True)
            mine = function(*leaves, precision="ieee")
            assert_equal((mine, *torch.autograd.grad(mine, leaves, cotangent)), (y, *wanted))


@BOTH_CHOICES
@pytest.mark.parametrize("case", ["1x1", "row", "transposed"])
def test_second_order(case: str, device: torch.device) -> None:
    function, *leaves, kwargs = operands(case, device)

    def second(function: Any, **more: Any) -> tuple[Tensor, ...]:
        y = function(*leaves, **kwargs, **more)
        found = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(t.pow(2).sum() for t in found), leaves)  # type: ignore[arg-type]

    for _ in range(2):
        function(*leaves, precision="ieee", **kwargs).sum().backward()
    expected = second(lambda *args, **more: theirs(KINDS[case][0], *args, **more))
    for got, want in zip(second(function, precision="ieee"), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_and_changed_tensors(reentrant: bool, device: torch.device) -> None:
    function, x, w, bias, kwargs = operands("1x1", device)
    tables.invalidate()  # so that the first run of the checkpoint is the first call of its kind
    wanted = torch.autograd.grad(theirs("conv2d", x, w, bias).sum(), (x, w, bias))
    for _ in range(2):
        x.grad = w.grad = bias.grad = None

        def layer(x: Tensor) -> Tensor:
            return function(x, w, bias, precision="ieee", **kwargs)  # type: ignore[no-any-return]

        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        assert_same((x.grad, w.grad, bias.grad), wanted)
    y = layer(x)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@BOTH_CHOICES
def test_hooks_transforms_and_tables(device: torch.device) -> None:
    function, x, w, bias, kwargs = operands("3x3", device, True)
    leaves = (x, w, bias)
    y = by_operators(function, *leaves, precision="ieee", **kwargs)
    wanted = torch.autograd.grad(y.square().sum(), leaves)

    def loss(*tensors: Tensor) -> Tensor:
        return function(*tensors, precision="ieee", **kwargs).square().sum()  # type: ignore[no-any-return]

    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.detach().contiguous().clone(), lambda t: t
        ):
            value = loss(*leaves)
        assert_same(torch.autograd.grad(value, leaves), wanted)
        assert_equal(torch.autograd.grad(loss(*leaves), leaves), wanted)
    assert_same(torch.func.grad(loss, argnums=(0, 1, 2))(*leaves), wanted)
    value = loss(*leaves)
    with tables.recording() as met:  # a change between forward and backward
        assert_same(torch.autograd.grad(value, leaves), wanted)
        assert {operator.name for operator, _ in met} == {"conv2d.dgrad", "conv2d.wgrad"}
        assert_same(torch.autograd.grad(loss(*leaves), leaves), wanted)
    (fused,) = [problem for operator, problem in met if operator.name == "conv2d.forward"]
    assert fused.epilogue is not None  # type: ignore[attr-defined]


@BOTH_CHOICES
@pytest.mark.parametrize("case", ["1x1", "row"])
def test_autocast_around_forward_and_backward(case: str, device: torch.device) -> None:
    function, *leaves, kwargs = operands(case, device)
    # A bias that is of the region's dtype already is left as it is, the others are cast.
    for bias in (leaves[2], leaves[2].detach().bfloat16().requires_grad_()):
        given = (*leaves[:2], bias)
        narrow = [t.detach().bfloat16().requires_grad_() for t in given]
        y = by_operators(function, *narrow, **kwargs)
        cotangent = torch.randn_like(y)
        wanted = torch.autograd.grad(y, narrow, cotangent)
        for inside in (False, True):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                mine = function(*given, **kwargs)
                assert "_Product" in type(mine.grad_fn).__name__ and mine.dtype is torch.bfloat16
                if inside:
                    found = torch.autograd.grad(mine, given, cotangent)
            if not inside:
                found = torch.autograd.grad(mine, given, cotangent)
            assert_equal((mine,), (y,))
            for got, want, source in zip(found, wanted, given, strict=True):
                assert got.dtype is source.dtype and torch.equal(got, want.to(source.dtype))


@BOTH_CHOICES
def test_both_gradients_are_one_call_of_pytorchs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    masks: list[list[bool]] = []
    real = prepared_products._convolution_backward

    def counted(*args: Any) -> Any:
        masks.append(args[-1])
        return real(*args)

    monkeypatch.setattr(prepared_products, "_convolution_backward", counted)
    function, x, w, bias, kwargs = operands("3x3", device)
    for _ in range(2):
        function(x, w, bias, precision="ieee", **kwargs).sum().backward()
    pytorch = "pytorch" in request.node.callspec.id
    assert masks == ([[True, True, False]] * 2 if pytorch else [])


def test_no_elements_and_results_changed_in_place(device: torch.device) -> None:
    x, w, bias = leaf((0, 4, 6, 5), device), leaf((6, 4, 3, 3), device), leaf((6,), device)
    for _ in range(2):
        found = torch.autograd.grad(tc.conv2d(x, w, bias).sum(), (x, w, bias))
        assert [t.shape for t in found] == [x.shape, w.shape, bias.shape]
        assert not found[1].any() and not found[2].any()
    for case in ("row", "3x3"):
        function, *leaves, kwargs = operands(case, device)
        expected = theirs(KINDS[case][0], *leaves, **kwargs).relu().square().sum()
        wanted = torch.autograd.grad(expected, leaves)
        for _ in range(2):
            y = function(*leaves, precision="ieee", **kwargs).relu_()
            assert_same(torch.autograd.grad(y.square().sum(), leaves), wanted)
