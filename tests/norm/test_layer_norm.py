"""Layer normalisation: kernels and modules against PyTorch in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tritonconv as tc
from tritonconv.norm import layer_calls
from tritonconv.norm.layer_ops import LAYER_NORM, LAYER_NORM_BACKWARD
from tritonconv.norm.layer_problem import LayerNormProblem, forward_tile, gradient_split
from tritonconv.runtime import recording
from tritonconv.runtime.accuracy import check
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.errors import ArgumentTypeError, ArgumentValueError

pytestmark = pytest.mark.interpreter

# (shape, normalised axes): odd widths, one row, ConvNeXt's widths, several axes, a whole input.
SHAPES = {
    "7x1": ((7, 1), 1),
    "197x7": ((197, 7), 1),
    "2x5x63": ((2, 5, 63), 1),
    "67x96": ((67, 96), 1),
    "9x384": ((9, 384), 1),
    "5x768": ((5, 768), 1),
    "2x3x197": ((2, 3, 197), 1),
    "3x1000": ((3, 1000), 1),
    "2x1032": ((2, 1032), 1),
    "one-row": ((64,), 1),
    "axes": ((4, 6, 7, 5), 2),
    "whole": ((3, 4, 5), 3),
}


def sample(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows far from zero for their spread."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) + 3).to(device, dtype)


def vectors(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Weight and bias."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(shape, generator=generator) + 1).to(device, dtype) for _ in "12"]


def compare(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    parameters: torch.dtype = torch.float32,
    x: Tensor | None = None,
) -> None:
    """Result and first-order gradients of two calls, all within the budget of the dtype."""
    shape, dims = SHAPES[name]
    x = sample(shape, dtype, device) if x is None else x
    normalised = shape[len(shape) - dims :]
    tensors = [x, *vectors(normalised, parameters, device)]
    v = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    results = []
    for wide in (None, None, torch.float64, dtype):
        leaves = [t.detach().to(wide or t.dtype).requires_grad_() for t in tensors]
        fn = tc.layer_norm if wide is None else F.layer_norm
        y = fn(leaves[0], normalised, leaves[1], leaves[2], 1e-5)
        results.append([y, *torch.autograd.grad(y, leaves, v.to(y.dtype))])
    first, later, exact, other = results
    for what, a, again, b, c in zip(
        ("y", "x", "weight", "bias"), first, later, exact, other, strict=True
    ):
        assert a.shape == b.shape and a.is_contiguous(), (name, what)
        assert torch.equal(a, again), (name, what)  # prepared, and added in the same order
        verdict = check(a, b, c.to(a.dtype), dtype=a.dtype)
        assert verdict.ok, (name, what, verdict)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(name: str, device: torch.device) -> None:
    compare(name, torch.float32, device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("half", [False, True], ids=["float32-weights", "half-weights"])
def test_half_precision(dtype: torch.dtype, half: bool, device: torch.device) -> None:
    for name in ("67x96", "2x3x197"):
        compare(name, dtype, device, dtype if half else torch.float32)


@pytest.mark.parametrize("form", ["turned", "sliced", "expanded"])
def test_inputs_and_gradients_that_are_not_contiguous(form: str, device: torch.device) -> None:
    base = sample((6, 4, 63), torch.float32, device)
    views = {
        "turned": lambda t: t.transpose(0, 1),
        "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
        "expanded": lambda t: t[:, :1].expand(6, 4, 63),
    }
    weight, bias = vectors((63,), torch.float32, device)
    results = []
    for fn, dtype in ((tc.layer_norm, torch.float32), (F.layer_norm, torch.float64)):
        x = base.to(dtype).requires_grad_()
        y = fn(views[form](x), (63,), weight.to(dtype), bias.to(dtype))
        v = torch.ones((), device=device, dtype=dtype).expand_as(y)
        results.append([y.detach(), *torch.autograd.grad((y * y).sum() + (y * v).sum(), x)])
    for found, exact in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 5)])
def test_no_rows(shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    norm = tc.nn.LayerNorm(shape[-1]).to(device)
    y = norm(x)
    y.sum().backward()
    assert y.shape == shape == x.grad.shape
    assert not norm.weight.grad.any() and not norm.bias.grad.any()


@pytest.mark.parametrize("which", ["weight", "bias", "neither"])
def test_missing_parameters(which: str, device: torch.device) -> None:
    x = sample((5, 63), torch.float32, device)
    weight, bias = vectors((63,), x.dtype, device)
    given = {n: t for n, t in {"weight": weight, "bias": bias}.items() if n == which}
    results = []
    for fn in (tc.layer_norm, F.layer_norm):
        leaves = [t.clone().requires_grad_() for t in (x, *given.values())]
        y = fn(leaves[0], (63,), **dict(zip(given, leaves[1:], strict=True)))
        results.append([y.detach(), *torch.autograd.grad(y.pow(3).sum(), leaves)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [("x",), ("weight",), ("bias",), ("weight", "bias")])
def test_gradients_that_are_not_wanted(frozen: tuple[str, ...], device: torch.device) -> None:
    names = ("x", "weight", "bias")
    tensors = [sample((5, 63), torch.float32, device), *vectors((63,), torch.float32, device)]
    results = []
    for fn in (tc.layer_norm, F.layer_norm):
        leaves = {
            n: t.clone().requires_grad_(n not in frozen)
            for n, t in zip(names, tensors, strict=True)
        }
        fn(leaves["x"], (63,), leaves["weight"], leaves["bias"]).pow(3).sum().backward()
        assert [n for n, t in leaves.items() if t.grad is None] == list(frozen)
        results.append([t.grad for t in leaves.values() if t.grad is not None])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_rows_far_from_zero(device: torch.device) -> None:
    """A mean of 10,000 spreads of the values; a constant row; a NaN stays in its row."""
    x = torch.randn(4, 197, generator=torch.Generator().manual_seed(0)).to(device) + 1e4
    x[2], x[3, 5] = 7.0, float("nan")
    y = tc.layer_norm(x, (197,))
    exact = F.layer_norm(x.double(), (197,))
    torch.testing.assert_close(y[:3].double(), exact[:3], rtol=1e-3, atol=2e-3)
    assert y[3].isnan().all() and not y[:3].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
    """The result has autocast's dtype; gradients have those of the inputs."""
    norm = tc.nn.LayerNorm(96).to(device)
    x = sample((5, 96), dtype, device).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        results = [norm(x), checkpoint(norm, x, use_reentrant=False)]
    exact = F.layer_norm(x.detach().double(), (96,))
    for y in results:
        assert y.dtype is torch.bfloat16
        torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)
        grads = torch.autograd.grad(y.float().pow(3).sum(), [x, norm.weight])
        assert [g.dtype for g in grads] == [dtype, torch.float32]
    with torch.autocast(device.type, torch.bfloat16):
        assert norm.double()(x.detach().double()).dtype is torch.float64


@pytest.mark.parametrize("affine", [True, False])
def test_second_order(affine: bool, device: torch.device) -> None:
    """The kernels' gradients of gradients, by every input and by the cotangent."""
    tensors = [sample((5, 9), torch.float32, device), *vectors((9,), torch.float32, device)]
    u = torch.randn(5, 9, generator=torch.Generator().manual_seed(3)).to(device)
    results = []
    for fn, dtype in ((tc.layer_norm, torch.float32), (F.layer_norm, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in tensors[: 3 if affine else 1]]
        v = u.to(dtype).requires_grad_()
        grads = torch.autograd.grad(fn(leaves[0], (9,), *leaves[1:]), leaves, v, create_graph=True)
        mixed = sum((g * g).sum() + g.sum() for g in grads)
        inputs = [*leaves[:2], v]  # of the bias no gradient depends
        results.append(torch.autograd.grad(mixed, inputs))
    for found, exact in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, dtype=torch.float64).requires_grad_()
    weight, bias = (torch.randn(2, 4, dtype=torch.float64).requires_grad_() for _ in "12")

    def fn(*leaves: Tensor) -> Tensor:
        return tc.layer_norm(leaves[0], (2, 4), *leaves[1:])

    assert torch.autograd.gradcheck(fn, (x, weight, bias))
    assert torch.autograd.gradgradcheck(fn, (x, weight, bias))


RANKS = {1: tc.nn.LayerNorm1d, 2: tc.nn.LayerNorm2d, 3: tc.nn.LayerNorm3d}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "contiguous"])
def test_channels(rank: int, last: bool, device: torch.device) -> None:
    norm = RANKS[rank](7).to(device)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = sample((2, 7, *range(3, 3 + rank)), torch.float32, device)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    results = []
    for ours in (True, False):
        leaf = x.detach().clone().requires_grad_()
        if ours:
            y = norm(leaf)
            assert y.movedim(1, -1).is_contiguous()
        else:
            y = F.layer_norm(leaf.movedim(1, -1), (7,), norm.weight, norm.bias, norm.eps)
            y = y.movedim(-1, 1)
        grads = torch.autograd.grad(y.pow(3).sum(), [leaf, *norm.parameters()])
        results.append([y.detach(), *grads])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    with pytest.raises(ArgumentValueError, match="dimensions"):
        norm(x[0])


def test_modules_are_pytorchs() -> None:
    for options in ({}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}):
        theirs, ours = (kind((4, 5), **options) for kind in (nn.LayerNorm, tc.nn.LayerNorm))
        ours.load_state_dict(theirs.state_dict())
        assert list(ours.state_dict()) == list(theirs.state_dict())
        x = torch.randn(3, 4, 5)
        torch.testing.assert_close(ours(x), theirs(x))
        assert repr(ours) == repr(theirs)
        torch.testing.assert_close(copy.deepcopy(ours)(x), ours(x))


def test_later_calls_equal_first_calls(device: torch.device) -> None:
    layer_calls._STEPS.clear()
    norm = tc.nn.LayerNorm(63).to(device)
    x = sample((5, 63), torch.float32, device).requires_grad_()
    v = torch.randn(5, 63, device=device)
    (first,) = torch.autograd.grad(checkpoint(norm, x, use_reentrant=False), x, v)
    y = norm(x)
    assert len(layer_calls._STEPS) == 1
    recording.advance()  # what was prepared between forward and backward no longer holds
    torch.testing.assert_close(torch.autograd.grad(y, x, v)[0], first, rtol=0, atol=0)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: t.t().contiguous().t() if t.dim() == 2 else t
    ):
        y = norm(x)
    torch.testing.assert_close(torch.autograd.grad(y, x, v)[0], first, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), y.detach(), rtol=0, atol=0)


def test_compiled(device: torch.device) -> None:
    torch._dynamo.reset()
    norm = nn.Sequential(tc.nn.LayerNorm2d(7), nn.Tanh()).to(device)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    for size in (5, 6):
        leaves = [torch.randn(2, 7, size, 4, device=device).requires_grad_()]
        leaves.append(leaves[0].detach().clone().requires_grad_())
        y, z = compiled(leaves[0]), norm(leaves[1])
        torch.testing.assert_close(y, z)
        v = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(y, [leaves[0], *norm.parameters()], v),
            torch.autograd.grad(z, [leaves[1], *norm.parameters()], v),
        )
    with torch.autocast(device.type, torch.bfloat16):
        assert compiled(leaves[0]).dtype is torch.bfloat16


def test_functional_transforms(device: torch.device) -> None:
    x, weight = torch.randn(3, 7, device=device), torch.randn(7, device=device)

    def loss(x: Tensor, weight: Tensor, fn: Any) -> Tensor:
        return fn(x, (7,), weight).pow(3).sum()

    found, wanted = (
        torch.func.grad(loss, argnums=(0, 1))(x, weight, fn) for fn in (tc.layer_norm, F.layer_norm)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_operators(device: torch.device) -> None:
    x = sample((5, 9), torch.float32, device).requires_grad_()
    weight, bias = (t.requires_grad_() for t in vectors((9,), torch.float32, device))
    for given in ((weight, bias), (None, None), (weight, None)):
        for dtype in (torch.float32, torch.bfloat16):
            arguments = (x, 1, *given, 1e-5, dtype)
            torch.library.opcheck(LAYER_NORM.overload, arguments, rtol=0.02, atol=0.02)
        _, stats = LAYER_NORM(x.detach(), 1, *given, 1e-5, torch.float32)
        needed = [True, *(t is not None for t in given)]
        torch.library.opcheck(
            LAYER_NORM_BACKWARD.overload,
            (torch.randn_like(x), x, stats, 1, *given, 1e-5, needed),
        )
    mixed, turned = LAYER_NORM(x.t(), 1, None, None, 1e-5, torch.float32)
    assert mixed.is_contiguous() and turned.shape == (2, 9)


REFUSED = {
    "input: expected a tensor": lambda x: tc.layer_norm([1.0], (1,)),
    "input: expected a floating": lambda x: tc.layer_norm(x.int(), (7,)),
    "input: expected last axes": lambda x: tc.layer_norm(x, (8,)),
    "normalized_shape: expected": lambda x: tc.layer_norm(x, ()),
    "weight: expected": lambda x: tc.layer_norm(x, (7,), torch.ones(1)),
    "weight: expected a tensor": lambda x: tc.layer_norm(x, (7,), 1.0),
    "bias: expected": lambda x: tc.layer_norm(x.t().contiguous().t(), 7, None, torch.ones(7, 1)),
    "bias: expected a floating": lambda x: tc.layer_norm(x, 7, None, torch.ones(7).int()),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str) -> None:
    with pytest.raises((ArgumentValueError, ArgumentTypeError), match=message):
        REFUSED[message](torch.randn(3, 7))


def test_wide_addresses_give_the_same(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    assert LayerNormProblem(1 << 20, 1 << 10, torch.bfloat16, torch.bfloat16).wide
    assert not LayerNormProblem(401408, 96, torch.bfloat16, torch.bfloat16).wide
    monkeypatch.setattr(LayerNormProblem, "wide", property(lambda self: True))
    recording.advance()
    compare("2x3x197", torch.float32, device)
    recording.advance()


@pytest.mark.parametrize("columns", [1, 7, 96, 197, 768, 1000, 8192])
@pytest.mark.parametrize("rows", [1, 50, 401408])
def test_how_rows_are_shared_out(columns: int, rows: int) -> None:
    device = nominal_device("sm_90")
    for dtype in (torch.bfloat16, torch.float32):
        problem = LayerNormProblem(rows, columns, dtype, dtype)
        split = gradient_split(problem, device)
        assert 1 <= split.parts <= min(4 * device.sm_count, math.ceil(rows / split.tile.block_r))
        for tile in (forward_tile(problem), split.tile):
            assert columns <= tile.chunks * tile.lanes < 2 * columns
            for size in (tile.chunks, tile.block_r, tile.lanes, tile.num_warps):
                assert size & (size - 1) == 0
            assert tile.num_warps <= 16
