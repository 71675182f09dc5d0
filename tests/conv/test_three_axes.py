"""Three spatial axes: the products, their gradients and epilogues against ``F.conv3d``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

import tritonconv as tc
from tritonconv.conv.epilogue import build_epilogue
from tritonconv.conv.fused_ops import CONV_EPILOGUE
from tritonconv.conv.ops import CONV, CONV_DGRAD, CONV_WGRAD

from .oracle import assert_gradients

pytestmark = pytest.mark.interpreter

FORMATS = (torch.contiguous_format, torch.channels_last_3d)
Triple = tuple[int, int, int]


def conv(
    x: Tensor,
    w: Tensor,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> Tensor:
    """The operator as ``F.conv3d`` is called."""
    pads = [pad for pad in padding for _ in range(2)]
    return CONV(x, w, list(stride), pads, list(dilation), groups, "ieee")


def fused(
    x: Tensor,
    w: Tensor,
    operands: Sequence[Tensor],
    fn: Callable[..., Tensor],
    padding: int,
) -> Tensor:
    """The fused operator on operands of five dimensions."""
    epilogue = build_epilogue(fn, False, tuple(t.dtype for t in operands), x.dtype, 3)
    geometry = ([1] * 3, [padding] * 6, [1] * 3, 1, "ieee")
    return CONV_EPILOGUE(x, w, list(operands), list(epilogue.captures), epilogue.key, *geometry)


# (shape of the input, shape of the weight, options)
KINDS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "dense": ((1, 9, 3, 4, 5), (4, 9, 3, 2, 3), dict(padding=(1, 0, 2), stride=(1, 2, 1))),
    "few channels": ((1, 2, 3, 3, 4), (4, 2, 3, 3, 3), dict(padding=(1, 1, 1))),
    "1x1x1": ((2, 9, 2, 3, 4), (4, 9, 1, 1, 1), {}),
    "patches": ((1, 3, 4, 6, 2), (5, 3, 2, 3, 2), dict(stride=(2, 3, 2))),
    "groups": ((1, 4, 5, 3, 4), (6, 2, 3, 2, 1), dict(groups=2, dilation=(2, 1, 1))),
}


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_gradients(
    kind: str, form: torch.memory_format, device: torch.device
) -> None:
    x_shape, w_shape, options = KINDS[kind]
    x = torch.randn(x_shape, device=device).contiguous(memory_format=form)
    w = (torch.randn(w_shape, device=device) / 4).contiguous(memory_format=form)
    assert_gradients(
        lambda x, w: conv(x, w, **options),
        lambda x, w: F.conv3d(x, w, None, **options),
        [x, w],
        names=["x", "w"],
    )


@pytest.mark.parametrize("kind", ["dense", "groups"])
def test_gradcheck_and_gradgradcheck(kind: str) -> None:
    x_shape, w_shape, options = KINDS[kind]
    x = torch.randn(x_shape, dtype=torch.float64)[:, :, :3, :2, :3].clone().requires_grad_()
    w = torch.randn(w_shape, dtype=torch.float64)[:, :, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: conv(x, w, **options), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, w: conv(x, w, **options), (x, w))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_results_and_gradients_keep_the_memory_format(kernels: str, device: torch.device) -> None:
    with tc.backend(kernels):
        for form in FORMATS:
            x = torch.randn(2, 9, 3, 4, 5, device=device).contiguous(memory_format=form)
            w = torch.randn(4, 9, 3, 3, 3, device=device).contiguous(memory_format=form)
            inputs = x.requires_grad_(), w.requires_grad_()
            y = conv(*inputs, padding=(1, 1, 1))
            grad_x, grad_w = torch.autograd.grad(y, inputs, torch.ones_like(y))
            for result in (y, grad_x, grad_w):
                assert result.is_contiguous(memory_format=form)


def test_a_map_of_depth_one_is_a_map_of_two_axes(device: torch.device) -> None:
    x, w = torch.randn(2, 9, 5, 4, device=device), torch.randn(4, 9, 3, 3, device=device)
    flat = CONV(x, w, [2, 1], [1] * 4, [1, 1], 1, "ieee")
    deep = CONV(x[:, :, None], w[:, :, None], [1, 2, 1], [0, 0, 1, 1, 1, 1], [1] * 3, 1, "ieee")
    assert torch.equal(deep[:, :, 0], flat)


def test_padding_on_one_side(device: torch.device) -> None:
    x, w = torch.randn(1, 9, 3, 4, 3, device=device), torch.randn(4, 9, 2, 2, 3, device=device)
    y = CONV(x, w, [1] * 3, [1, 0, 0, 1, 2, 0], [1] * 3, 1, "ieee")
    # In float64: a GPU's float32 is TF32 where PyTorch's switch says so.
    expected = F.conv3d(F.pad(x.double(), (2, 0, 0, 1, 1, 0)), w.double())
    torch.testing.assert_close(y, expected.float(), rtol=1e-4, atol=1e-4)


few = settings(max_examples=8, deadline=None, derandomize=True, database=None)


@few
@given(
    st.tuples(*[st.integers(1, 3)] * 3),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.tuples(*[st.integers(0, 2)] * 3),
    st.tuples(*[st.integers(1, 2)] * 3),
    st.integers(1, 2),
)
def test_gradients_are_the_adjoints(
    kernel: Triple, stride: Triple, padding: Triple, dilation: Triple, groups: int
) -> None:
    """<conv(x, w), g> = <x, dgrad(g, w)> = <w, wgrad(g, x)>, exactly in integers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(sum(kernel) + 7 * sum(stride))

    def integers(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator).float().to(device)

    x, w = integers(1, 10, 5, 6, 5), integers(4, 10 // groups, *kernel)
    y = conv(x, w, stride, padding, dilation, groups)
    g = integers(*y.shape)
    geometry = (list(stride), [p for p in padding for _ in range(2)], list(dilation), groups)
    grad_x = CONV_DGRAD(g, w, list(x.shape[2:]), *geometry, "ieee")
    grad_w = CONV_WGRAD(g, x, list(kernel), *geometry, "ieee")
    products = [(a.double() * b.double()).sum() for a, b in ((y, g), (x, grad_x), (w, grad_w))]
    assert products[0] == products[1] == products[2]


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_an_epilogue_with_all_coordinates(form: torch.memory_format, device: torch.device) -> None:
    x = torch.randn(2, 3, 3, 4, 5, device=device).contiguous(memory_format=form)
    w = torch.randn(4, 3, 3, 3, 3, device=device) / 5
    full = torch.randn(2, 4, 3, 4, 5, device=device)
    per_plane = torch.randn(1, 1, 3, 1, 1, device=device)
    slope = torch.randn(4, device=device)

    def ours(x: Tensor, w: Tensor, full: Tensor, per_plane: Tensor, slope: Tensor) -> Tensor:
        def fn(
            y: Tensor, a: Tensor, b: Tensor, *, n: Tensor, c: Tensor, d: Tensor, h: Tensor,
            w: Tensor,
        ) -> Tensor:  # fmt: skip
            return torch.tanh(y * slope[c] + 0.1 * h) * a + b * (n + d * w)

        return fused(x, w, (full, per_plane), fn, 1)

    def plain(x: Tensor, w: Tensor, full: Tensor, per_plane: Tensor, slope: Tensor) -> Tensor:
        n, _, d, h, width = torch.meshgrid(
            *[torch.arange(size, device=device) for size in full.shape], indexing="ij"
        )
        y = F.conv3d(x, w, padding=1)
        return torch.tanh(y * slope.reshape(-1, 1, 1, 1) + 0.1 * h) * full + per_plane * (
            n + d * width
        )

    names = ["x", "w", "full", "per plane", "slope"]
    assert_gradients(ours, plain, [x, w, full, per_plane, slope], names=names)


def test_opcheck(device: torch.device) -> None:
    # opcheck compares with memory that other calls filled: NaN has no place in it.
    torch.use_deterministic_algorithms(False)
    x = torch.randn(1, 3, 3, 4, 3, device=device).contiguous(memory_format=torch.channels_last_3d)
    w = torch.randn(4, 3, 3, 3, 3, device=device)
    geometry = ([1] * 3, [1] * 6, [1] * 3, 1, "ieee")
    leaves = x.requires_grad_(), w.requires_grad_()
    torch.library.opcheck(torch.ops.tritonconv.conv.default, (*leaves, *geometry))


def test_empty(device: torch.device) -> None:
    x, w = torch.randn(0, 3, 3, 4, 5, device=device), torch.randn(4, 3, 3, 3, 3, device=device)
    inputs = x.requires_grad_(), w.requires_grad_()
    y = conv(*inputs)
    assert y.shape == (0, 4, 1, 2, 3)
    grad_x, grad_w = torch.autograd.grad(y.sum(), inputs)
    assert grad_x.shape == x.shape and not grad_w.any()
