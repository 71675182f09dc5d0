"""Prepared calls with an epilogue and gradients compute what the operators and PyTorch compute."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tritonconv as tc
from tritonconv.conv import prepared_products, training_epilogues
from tritonconv.runtime import tables
from tritonconv.runtime.accuracy import check

from .test_training_bias import KINDS, assert_equal, by_operators, operands
from .test_training_calls import BOTH_CHOICES, _chosen, _no_tf32, assert_same, leaf, theirs

__all__ = ["_chosen", "_no_tf32"]  # fixtures of this file too

pytestmark = pytest.mark.interpreter
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Fused:
    """A function and, from the result's shape, the shapes of what it reads besides."""

    function: Callable[..., Tensor]
    shapes: Callable[[Shape], tuple[Shape, ...]] = lambda y: ()
    bias: bool = True


EPILOGUES = {
    "relu": Fused(torch.relu),
    "silu": Fused(functional.silu, bias=False),
    "sum": Fused(lambda y, r: y + r, lambda y: (y,)),
    "norm and residual": Fused(
        lambda y, s, b, r: torch.tanh(y * s + b) + r,
        lambda y: ((y[1], *[1] * (len(y) - 2)), (1, y[1], *[1] * (len(y) - 2)), y),
        bias=False,
    ),
    "of every pixel": Fused(lambda y, p: y * p, lambda y: ((1, 1, *y[2:]),)),
    "one number": Fused(lambda y, a: functional.leaky_relu(y) * a, lambda y: ((),)),
    "coordinate": Fused(lambda y, *, c: y * c),
    "unread": Fused(lambda y, r: r * r, lambda y: (y,)),
}
SOME = ["relu", "norm and residual", "of every pixel"]


def made(
    case: str, epilogue: str, device: torch.device, last: bool = False, dtype: Any = torch.float32
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """Ours and PyTorch's function of (input, weight, bias, operands), and these tensors."""
    ours, x, w, bias, kwargs = operands(case, device, last, dtype)
    fused = EPILOGUES[epilogue]
    with torch.no_grad():
        shape = tuple(theirs(KINDS[case][0], x, w, bias, **kwargs).shape)
    read = [leaf(s, device, last).detach().to(dtype).requires_grad_() for s in fused.shapes(shape)]
    count = 2 + fused.bias

    def call(*tensors: Tensor) -> Tensor:
        first, more = tensors[:count], tensors[count:]
        y: Tensor = ours(
            *first, precision="ieee", epilogue=fused.function, epilogue_args=more, **kwargs
        )
        return y

    def expected(*tensors: Tensor) -> Tensor:
        first, more = tensors[:count], tensors[count:]
        y = theirs(KINDS[case][0], *first, **kwargs)
        if epilogue == "coordinate":
            c = torch.arange(y.shape[1], device=device).reshape(-1, *[1] * (y.dim() - 2))
            return y * c
        return fused.function(y, *more)

    return call, expected, [x, w, *([bias] if fused.bias else []), *read]


def gradients(y: Tensor, tensors: list[Tensor], cotangent: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(y, tensors, cotangent, allow_unused=True)


def is_prepared(y: Tensor) -> bool:
    return "_FusedProduct" in type(y.grad_fn).__name__


def equal(got: Any, expected: Any) -> None:
    """The same bits; a gradient that is no gradient or zeros counts as none."""
    pairs = [(a, b) for a, b in zip(got, expected, strict=True) if b is not None]
    assert_equal(*zip(*pairs, strict=True))
    assert all(a is None or not a.any() for a, b in zip(got, expected, strict=True) if b is None)


@BOTH_CHOICES
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("case", "epilogue"),
    [*(("3x3", name) for name in EPILOGUES)]
    + [(case, name) for case in ("row", "transposed row", "volume") for name in SOME]
    + [("transposed", "relu"), ("one pixel", "relu"), ("strided groups", "silu")],
)
def test_every_call_equals_pytorchs_and_the_operators(
    case: str, epilogue: str, last: bool, device: torch.device
) -> None:
    ours, pytorchs, tensors = made(case, epilogue, device, last)
    expected = pytorchs(*tensors)
    cotangent = torch.randn_like(expected)
    wanted = gradients(expected, tensors, cotangent)
    with torch.autograd.forward_ad.dual_level():
        y = ours(*tensors)
    assert not is_prepared(y)
    generic = (y, *gradients(y, tensors, cotangent))
    for got, want in zip(generic, (expected, *wanted), strict=True):
        if want is not None:
            assert_same(got, want)
    for _ in range(2):
        y = ours(*tensors)
        assert is_prepared(y)
        equal((y, *gradients(y, tensors, cotangent)), generic)


@pytest.mark.parametrize(("case", "epilogue"), [("1x1", "norm and residual"), ("row", "relu")])
def test_against_float64(case: str, epilogue: str, device: torch.device) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        ours, pytorchs, tensors = made(case, epilogue, device, dtype=dtype)
        exact = [t.detach().double().requires_grad_() for t in tensors]
        oracle = pytorchs(*exact)
        cotangent = torch.randn_like(oracle).to(dtype)
        wanted = gradients(oracle, exact, cotangent.double())
        plain = pytorchs(*tensors)
        reference = gradients(plain, tensors, cotangent)
        for _ in range(2):
            y = ours(*tensors)
            found = gradients(y, tensors, cotangent)
        columns = zip((y, *found), (oracle, *wanted), (plain, *reference), strict=True)
        assert all(check(got, want, simple, dtype=dtype).ok for got, want, simple in columns)


@BOTH_CHOICES
@pytest.mark.parametrize(("case", "epilogue"), [("1x1", "norm and residual"), ("row", "relu")])
def test_gradients_of_some_operands(case: str, epilogue: str, device: torch.device) -> None:
    ours, _, tensors = made(case, epilogue, device)
    y = by_operators(ours, *tensors)
    cotangent = torch.randn_like(y)
    wanted = torch.autograd.grad(y, tensors, cotangent)
    patterns = list(itertools.product([True, False], repeat=len(tensors)))
    for needs in patterns[:-1]:
        given = [t if need else t.detach() for t, need in zip(tensors, needs, strict=True)]
        for _ in range(2):
            y = ours(*given)
            assert is_prepared(y)
            kept = [t is not None for t in y.grad_fn.saved_tensors]
            assert kept[:2] == [needs[1], needs[0]]
            found = torch.autograd.grad(y, [t for t in given if t.requires_grad], cotangent)
            assert_equal(found, [t for t, need in zip(wanted, needs, strict=True) if need])
    for tensor, want in zip(tensors, wanted, strict=True):  # recorded for all, asked for one
        assert_equal(torch.autograd.grad(ours(*tensors), tensor, cotangent), (want,))


@pytest.mark.parametrize("epilogue", ["relu", "sum"])
def test_an_accumulator_is_saved_where_it_is_read(epilogue: str, device: torch.device) -> None:
    ours, _, tensors = made("3x3", epilogue, device)
    for _ in range(2):
        y = ours(*tensors)
        acc = y.grad_fn.saved_tensors[2]
        assert (acc is not None) == (epilogue == "relu")


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("case", ["1x1", "row", "one pixel"])
def test_gradients_that_pass_through_share_no_memory(
    case: str, prepared: bool, device: torch.device
) -> None:
    """Autograd adds later gradients into what it is given, if nobody else seems to hold it."""
    ours, x, w, bias, kwargs = operands(case, device)
    y = ours(x, w, bias, **kwargs)
    shapes = [y.shape, *([y.shape[1:]] if y.shape[0] == 1 else [])]
    for shape in shapes:
        leaves = [leaf(shape, device), leaf(shape, device)]

        def call(*tensors: Tensor) -> Tensor:
            result: Tensor = ours(
                x,
                w,
                bias,
                epilogue=lambda y, p, q: y + p + q,
                epilogue_args=tensors,
                precision="ieee",
                **kwargs,
            )
            return result

        given = torch.ones_like(y)
        bias.grad = None
        for _ in range(3):
            result = call(*leaves) if prepared else by_operators(call, *leaves)
            assert is_prepared(result) == prepared
            result.backward(given)
        assert torch.equal(given, torch.ones_like(y))
        for t in leaves:
            assert t.grad is not None
            assert torch.equal(t.grad, torch.full_like(t, 3.0))
        assert torch.equal(bias.grad, torch.full_like(bias, 3.0 * y.numel() / bias.numel()))


def test_sums_of_what_passes_through_are_in_the_operands_precision(device: torch.device) -> None:
    shapes = (2, 4, 32, 32), (6, 4, 1, 1)
    x, w = (leaf(s, device).detach().bfloat16().requires_grad_() for s in shapes)
    shift = leaf((6, 1, 1), device)
    cotangent = torch.randn(2, 6, 32, 32, device=device).bfloat16()
    wanted = cotangent.double().sum((0, 2, 3)).reshape(6, 1, 1)
    for prepared in (True, False):
        args = x, w, None
        more: Any = {"epilogue": lambda y, r: y + r, "epilogue_args": (shift,)}
        y = tc.conv2d(*args, **more) if prepared else by_operators(tc.conv2d, *args, **more)
        (found,) = torch.autograd.grad(y, shift, cotangent)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


@BOTH_CHOICES
@pytest.mark.parametrize("prepared", [True, False])
def test_operands_that_no_gradient_reads_are_not_kept(prepared: bool, device: torch.device) -> None:
    ours, pytorchs, tensors = made("row", "sum", device)
    residual = tensors[-1]
    expected = torch.autograd.grad(pytorchs(*tensors).square().sum(), tensors)
    for _ in range(2):
        y = ours(*tensors) if prepared else by_operators(ours, *tensors)
        assert is_prepared(y) == prepared
        node = y.grad_fn if prepared else y.grad_fn.next_functions[0][0]  # behind the lost axis
        assert len(node.saved_tensors) == 5 and node.saved_tensors[4] is None
        with torch.no_grad():
            residual.mul_(1)  # a change, to autograd
        assert_same(torch.autograd.grad(y.square().sum(), tensors), expected)
    y = ours(*tensors) if prepared else by_operators(ours, *tensors)
    first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
    again = torch.autograd.grad(pytorchs(*tensors).square().sum(), tensors, create_graph=True)
    second = [
        torch.autograd.grad(sum(t.square().sum() for t in some), tensors)  # type: ignore[arg-type]
        for some in (first, again)
    ]
    for got, want in zip(*second, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@BOTH_CHOICES
def test_gradients_of_other_layouts(device: torch.device) -> None:
    ours, _, tensors = made("1x1", "norm and residual", device)
    y = by_operators(ours, *tensors)
    whole = torch.randn(2, 12, 5, 10, device=device)
    for cotangent in (
        torch.randn_like(y).contiguous(memory_format=torch.channels_last),
        whole[:, ::2, :, ::2],
        torch.ones((), device=device).expand(y.shape),
    ):
        wanted = torch.autograd.grad(y, tensors, cotangent, retain_graph=True)
        for _ in range(2):
            mine = ours(*tensors)
            assert_equal((mine, *torch.autograd.grad(mine, tensors, cotangent)), (y, *wanted))


@BOTH_CHOICES
@pytest.mark.parametrize(
    ("case", "epilogue"), [("1x1", "norm and residual"), ("row", "silu"), ("transposed", "sum")]
)
def test_second_order(case: str, epilogue: str, device: torch.device) -> None:
    ours, pytorchs, tensors = made(case, epilogue, device)

    def second(function: Any) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(function(*tensors).pow(3).sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(t.pow(2).sum() for t in found), tensors)  # type: ignore[arg-type]

    for _ in range(2):
        ours(*tensors).sum().backward()
    for got, want in zip(second(ours), second(pytorchs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_and_changed_tensors(reentrant: bool, device: torch.device) -> None:
    ours, pytorchs, tensors = made("1x1", "norm and residual", device)
    tables.invalidate()  # so that the first run of the checkpoint is the first call of its kind
    wanted = torch.autograd.grad(pytorchs(*tensors).sum(), tensors)
    for _ in range(2):
        for t in tensors:
            t.grad = None
        checkpoint(ours, *tensors, use_reentrant=reentrant).sum().backward()
        assert_same([t.grad for t in tensors], list(wanted))
    y = ours(*tensors)
    with torch.no_grad():
        tensors[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@BOTH_CHOICES
def test_hooks_transforms_and_tables(device: torch.device) -> None:
    ours, _, tensors = made("3x3", "norm and residual", device, True)
    wanted = torch.autograd.grad(by_operators(ours, *tensors).square().sum(), tensors)

    def loss(*tensors: Tensor) -> Tensor:
        return ours(*tensors).square().sum()

    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.detach().contiguous().clone(), lambda t: t
        ):
            value = loss(*tensors)
        assert_same(torch.autograd.grad(value, tensors), wanted)
        assert_equal(torch.autograd.grad(loss(*tensors), tensors), wanted)
    places = tuple(range(len(tensors)))
    assert_same(torch.func.grad(loss, argnums=places)(*tensors), wanted)
    value = loss(*tensors)
    with tables.recording() as met:  # a change between forward and backward
        assert_same(torch.autograd.grad(value, tensors), wanted)
        assert {operator.name for operator, _ in met} == {"conv2d.dgrad", "conv2d.wgrad"}
        assert_same(torch.autograd.grad(loss(*tensors), tensors), wanted)


@BOTH_CHOICES
@pytest.mark.parametrize(("case", "epilogue"), [("1x1", "norm and residual"), ("row", "relu")])
def test_autocast_around_forward_and_backward(
    case: str, epilogue: str, device: torch.device
) -> None:
    ours, _, tensors = made(case, epilogue, device)
    count = 2 + EPILOGUES[epilogue].bias  # what the region casts
    narrow = [t.detach().bfloat16().requires_grad_() for t in tensors[:count]] + tensors[count:]
    y = by_operators(ours, *narrow)
    cotangent = torch.randn_like(y)
    wanted = torch.autograd.grad(y, narrow, cotangent)
    for inside in (False, True):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            mine = ours(*tensors)
            assert is_prepared(mine) and mine.dtype is torch.bfloat16
            if inside:
                found = torch.autograd.grad(mine, tensors, cotangent)
        if not inside:
            found = torch.autograd.grad(mine, tensors, cotangent)
        assert_equal((mine,), (y,))
        for got, want, source in zip(found, wanted, tensors, strict=True):
            assert got.dtype is source.dtype
            assert_same(got, want.to(source.dtype))


@BOTH_CHOICES
def test_later_backwards_take_no_operator(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    ours, _, tensors = made("3x3", "norm and residual", device)
    ours(*tensors).sum().backward()
    calls = []
    real = prepared_products._convolution_backward

    def counted(*args: Any) -> Any:
        calls.append(args[-1])
        return real(*args)

    monkeypatch.setattr(prepared_products, "_convolution_backward", counted)
    monkeypatch.delattr(training_epilogues, "pull_back")
    monkeypatch.delattr(training_epilogues, "prepared_pull_back")
    ours(*tensors).sum().backward()
    assert len(calls) == ("pytorch" in request.node.callspec.id)  # both gradients at once


def test_no_elements_and_results_changed_in_place(device: torch.device) -> None:
    x, w = leaf((0, 4, 6, 5), device), leaf((6, 4, 3, 3), device)
    for _ in range(2):
        y = tc.conv2d(x, w, epilogue=torch.relu)
        found = torch.autograd.grad(y.sum(), (x, w))
        assert found[0].shape == x.shape and not found[1].any()
    for case, epilogue in (("row", "relu"), ("3x3", "norm and residual")):
        ours, pytorchs, tensors = made(case, epilogue, device)
        wanted = torch.autograd.grad(pytorchs(*tensors).tanh().square().sum(), tensors)
        for _ in range(2):
            y = ours(*tensors).tanh_()
            assert_same(torch.autograd.grad(y.square().sum(), tensors), wanted)


def test_captured_tensors_take_the_operators(device: torch.device) -> None:
    x, w = leaf((2, 4, 7, 5), device), leaf((6, 4, 3, 3), device)
    slopes = leaf((6,), device)

    def slope(y: Tensor, *, c: Tensor) -> Tensor:
        return torch.where(y > 0, y, slopes[c] * y)

    for _ in range(2):
        y = tc.conv2d(x, w, epilogue=slope, precision="ieee")
        assert not is_prepared(y)
        found = torch.autograd.grad(y.sum(), (x, w, slopes))
        z = functional.prelu(functional.conv2d(x, w), slopes)
        assert_same(found, torch.autograd.grad(z.sum(), (x, w, slopes)))
