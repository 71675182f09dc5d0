"""Prepared calls with gradients compute what first calls and PyTorch compute, always."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tritonconv as tc
from tritonconv.conv import dispatch, prepared_products
from tritonconv.runtime import tables
from tritonconv.runtime.errors import ArgumentTypeError

pytestmark = pytest.mark.interpreter
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """What is compared with here is not of TF32, which a GPU's cuDNN takes by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(params=["kernels", "pytorch"])
def _chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every product by kernels of the library, or by PyTorch's."""
    if request.param == "pytorch":
        monkeypatch.setattr(
            dispatch.ConvOperator, "default_algorithm", lambda self, problem, facts: dispatch.ATEN
        )
    tables.invalidate()
    yield
    tables.invalidate()


BOTH_CHOICES = pytest.mark.usefixtures("_chosen")

CASES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ("conv2d", (2, 4, 7, 5), (6, 4, 3, 3), {"padding": 1}),
    "1x1": ("conv2d", (2, 4, 5, 5), (6, 4, 1, 1), {}),
    "strided groups": ("conv2d", (2, 4, 7, 5), (6, 2, 3, 3), {"stride": 2, "groups": 2}),
    "same, one-sided": ("conv2d", (1, 3, 6, 5), (4, 3, 4, 2), {"padding": "same"}),
    "row": ("conv1d", (2, 4, 9), (6, 4, 3), {"padding": 1}),
    "causal": ("conv1d", (2, 4, 9), (6, 4, 3), {"padding": "causal", "dilation": 2}),
    "volume": ("conv3d", (1, 2, 4, 5, 3), (4, 2, 2, 3, 1), {"stride": (1, 2, 1)}),
    "transposed": (
        "conv_transpose2d",
        (2, 4, 4, 3),
        (4, 3, 3, 3),
        {"stride": 2, "padding": 1, "output_padding": 1},
    ),
    "transposed row": ("conv_transpose1d", (2, 4, 5), (4, 3, 4), {"stride": 3}),
}


def theirs(name: str, x: Tensor, w: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
    if kwargs.get("padding") == "causal":
        before = kwargs["dilation"] * (w.shape[2] - 1)
        x, kwargs = torch.nn.functional.pad(x, (before, 0)), {**kwargs, "padding": 0}
    return getattr(torch.nn.functional, name)(x, w, bias, **kwargs)  # type: ignore[no-any-return]


def leaf(shape: tuple[int, ...], device: torch.device, last: bool = False) -> Tensor:
    t = torch.randn(shape, device=device)
    if last and len(shape) in FORMATS:
        t = t.contiguous(memory_format=FORMATS[len(shape)])
    return t.requires_grad_()


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


@BOTH_CHOICES
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_later_calls_equal_pytorchs_and_the_operators(
    case: str, last: bool, device: torch.device
) -> None:
    name, x_shape, w_shape, kwargs = CASES[case]
    x, w = leaf(x_shape, device, last), leaf(w_shape, device, last)
    expected = theirs(name, x, w, **kwargs)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, w), cotangent)
    function = getattr(tc, name)
    found = []
    for _ in range(3):
        y = function(x, w, precision="ieee", **kwargs)
        found.append((y, *torch.autograd.grad(y, (x, w), cotangent)))
        assert_same(found[-1], (expected, *wanted))
    assert "_Product" in type(y.grad_fn).__name__
    # By the operators, as a call with a forward-mode level takes them.
    with torch.autograd.forward_ad.dual_level():
        y = function(x, w, precision="ieee", **kwargs)
        assert "_Product" not in type(y.grad_fn).__name__
        generic = (y, *torch.autograd.grad(y, (x, w), cotangent))
    for result in found:
        for got, want in zip(result, generic, strict=True):
            assert torch.equal(got, want)
            hops = zip(got.shape, got.stride(), want.stride(), strict=True)
            assert all(size == 1 or a == b for size, a, b in hops)


@BOTH_CHOICES
@pytest.mark.parametrize("case", ["3x3", "row", "transposed", "transposed row"])
def test_second_order_after_prepared_calls(case: str, device: torch.device) -> None:
    name, x_shape, w_shape, kwargs = CASES[case]
    x, w = leaf(x_shape, device), leaf(w_shape, device)

    def second(function: Any, **more: Any) -> tuple[Tensor, ...]:
        y = function(x, w, **kwargs, **more)
        by_x, by_w = torch.autograd.grad(y.pow(3).sum(), (x, w), create_graph=True)
        return torch.autograd.grad(by_x.pow(2).sum() + by_w.pow(2).sum(), (x, w))

    function = getattr(tc, name)
    for _ in range(2):
        function(x, w, precision="ieee", **kwargs).sum().backward()
    expected = second(lambda *args, **more: theirs(name, *args, **more))
    for got, want in zip(second(function, precision="ieee"), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@BOTH_CHOICES
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ["3x3", "row"])
def test_checkpoints(case: str, reentrant: bool, device: torch.device) -> None:
    name, x_shape, w_shape, kwargs = CASES[case]
    x, w = leaf(x_shape, device), leaf(w_shape, device)
    function = getattr(tc, name)
    wanted = torch.autograd.grad(theirs(name, x, w, **kwargs).sum(), (x, w))
    for _ in range(2):  # the first run records the first call of its kind
        x.grad = w.grad = None

        def layer(x: Tensor) -> Tensor:
            return function(x, w, precision="ieee", **kwargs)  # type: ignore[no-any-return]

        y = checkpoint(layer, x, use_reentrant=reentrant)
        y.sum().backward()
        assert_same((x.grad, w.grad), wanted)


@BOTH_CHOICES
def test_tensors_saved_elsewhere_may_come_back_in_another_layout(device: torch.device) -> None:
    x, w = leaf((2, 4, 6, 5), device, True), leaf((6, 4, 3, 3), device, True)
    wanted = torch.autograd.grad(theirs("conv2d", x, w).sum(), (x, w))

    def pack(t: Tensor) -> Tensor:
        return t.detach().contiguous().clone()

    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = tc.conv2d(x, w, precision="ieee")
        assert_same(torch.autograd.grad(y.sum(), (x, w)), wanted)
        y = tc.conv2d(x, w, precision="ieee")
        assert_same(torch.autograd.grad(y.sum(), (x, w)), wanted)


@BOTH_CHOICES
def test_gradients_of_other_layouts_and_of_one_operand(device: torch.device) -> None:
    x, w = leaf((2, 4, 6, 5), device), leaf((6, 4, 3, 3), device)
    expected = theirs("conv2d", x, w)
    whole = torch.randn(2, 12, 4, 6, device=device)
    cotangents = [
        torch.randn_like(expected),
        torch.randn_like(expected).contiguous(memory_format=torch.channels_last),
        whole[:, ::2, :, ::2],
        torch.ones((), device=device).expand(expected.shape),
    ]
    for cotangent in cotangents * 2:
        wanted = torch.autograd.grad(expected, (x, w), cotangent, retain_graph=True)
        y = tc.conv2d(x, w, precision="ieee")
        assert_same(torch.autograd.grad(y, (x, w), cotangent, retain_graph=True), wanted)
        assert_same(torch.autograd.grad(y, x, cotangent, retain_graph=True), wanted[:1])
        assert_same(torch.autograd.grad(y, w, cotangent), wanted[1:])
        for given, want in (((x, w.detach()), wanted[0]), ((x.detach(), w), wanted[1])):
            y = tc.conv2d(*given, precision="ieee")
            kept = [t for t in y.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
            assert len(kept) == 1
            (got,) = torch.autograd.grad(y, [t for t in given if t.requires_grad], cotangent)
            assert_same(got, want)


@BOTH_CHOICES
def test_leaves_accumulate_and_changed_tensors_are_refused(device: torch.device) -> None:
    x, w = leaf((1, 4, 6, 5), device), leaf((6, 4, 3, 3), device)
    wanted = torch.autograd.grad(theirs("conv2d", 2 * x, w).sum(), (x, w))
    for _ in range(3):
        tc.conv2d(2 * x, w, precision="ieee").sum().backward()
    assert_same((x.grad, w.grad), tuple(3 * t for t in wanted))
    y = tc.conv2d(x, w, precision="ieee")
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@BOTH_CHOICES
def test_a_change_of_tables_between_forward_and_backward(device: torch.device) -> None:
    x, w = leaf((1, 4, 6, 5), device), leaf((6, 4, 3, 3), device)
    wanted = torch.autograd.grad(theirs("conv2d", x, w).sum(), (x, w))
    for _ in range(2):
        torch.autograd.grad(tc.conv2d(x, w, precision="ieee").sum(), (x, w))
    y = tc.conv2d(x, w, precision="ieee")
    with tables.recording() as met:
        assert_same(torch.autograd.grad(y.sum(), (x, w)), wanted)
    assert {operator.name for operator, _ in met} == {"conv2d.dgrad", "conv2d.wgrad"}
    with tables.recording() as met:
        assert_same(torch.autograd.grad(tc.conv2d(x, w, precision="ieee").sum(), (x, w)), wanted)
    assert len({operator.name for operator, _ in met}) == 3


@BOTH_CHOICES
@pytest.mark.parametrize("bias", [False, True])
def test_autocast(bias: bool, device: torch.device) -> None:
    x, w = leaf((2, 4, 6, 5), device), leaf((6, 4, 3, 3), device)
    b = leaf((6,), device) if bias else None
    leaves = [t for t in (x, w, b) if t is not None]
    for _ in range(3):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y, expected = tc.conv2d(x, w, b), theirs("conv2d", x, w, b)
        assert y.dtype is torch.bfloat16
        mine = torch.autograd.grad(y.float().square().sum(), leaves)
        wanted = torch.autograd.grad(expected.float().square().sum(), leaves)
        for got, want in zip(mine, wanted, strict=True):
            assert got.dtype is torch.float32
            torch.testing.assert_close(got, want, rtol=5e-2, atol=2e-2 * float(want.abs().max()))


@pytest.mark.parametrize("last", [False, True])
def test_both_gradients_are_one_call_of_pytorchs(
    last: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        dispatch.ConvOperator, "default_algorithm", lambda self, problem, facts: dispatch.ATEN
    )
    tables.invalidate()
    masks: list[list[bool]] = []
    real = prepared_products._convolution_backward

    def counted(*args: Any) -> Any:
        masks.append(args[-1])
        return real(*args)

    monkeypatch.setattr(prepared_products, "_convolution_backward", counted)
    for taps in (1, 3):
        x, w = leaf((2, 4, 6, 5), device, last), leaf((6, 4, taps, taps), device, last)
        for _ in range(2):
            torch.autograd.grad(tc.conv2d(x, w).square().sum(), (x, w))
    assert masks == [[True, True, False]] * 4
    tables.invalidate()


@BOTH_CHOICES
@pytest.mark.parametrize("case", ["row", "causal", "transposed row"])
def test_results_of_one_axis_may_be_changed_in_place(case: str, device: torch.device) -> None:
    name, x_shape, w_shape, kwargs = CASES[case]
    x, w = leaf(x_shape, device), leaf(w_shape, device)
    wanted = torch.autograd.grad(theirs(name, x, w, **kwargs).relu().square().sum(), (x, w))
    for _ in range(2):
        y = getattr(tc, name)(x, w, precision="ieee", **kwargs)
        found = torch.autograd.grad(y.relu_().square().sum(), (x, w))
        for got, want in zip(found, wanted, strict=True):
            assert_same(got, want)


def test_saved_tensors_of_another_dtype_are_refused(device: torch.device) -> None:
    x, w = leaf((2, 4, 6, 5), device), leaf((6, 4, 3, 3), device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.half()):
        y = tc.conv2d(x, w, precision="ieee")
    with pytest.raises(ArgumentTypeError, match="saved input"):
        y.sum().backward()
