"""Every public convolution inside PyTorch: compile, autocast, checkpoint, functional transforms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import tritonconv as tc

FUNCTIONS = {
    "conv1d": dict(stride=2, padding=1),
    "conv3d": dict(stride=(1, 2, 1), padding=1),
    "conv_transpose1d": dict(stride=2, padding=1, output_padding=1),
    "conv_transpose2d": dict(stride=2, padding=(0, 1), output_padding=(1, 0)),
    "conv_transpose3d": dict(stride=(1, 2, 2), padding=1),
}
EVERY = pytest.mark.parametrize("name", FUNCTIONS)


def shapes(name: str, batch: int = 2, size: int = 4) -> list[tuple[int, ...]]:
    rank = int(name[-2])
    return [(batch, 3, *[size] * rank), (3, 3, *[3] * rank), (3,), (3, *[1] * rank)]


def tensors(name: str, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator) for s in shapes(name, **options)]


def ours(name: str, x: Tensor, w: Tensor, b: Tensor, s: Tensor) -> Tensor:
    """One bare call and one with everything fused, both in the result."""
    function, options = getattr(tc, name), FUNCTIONS[name]
    bare = function(x, w, **options)
    fused = function(
        x, w, b, epilogue=lambda y, s: torch.tanh(y) * s + y, epilogue_args=(s,), **options
    )
    return bare + fused


def plain(name: str, x: Tensor, w: Tensor, b: Tensor, s: Tensor) -> Tensor:
    function, options = getattr(F, name), FUNCTIONS[name]
    y = function(x, w, b, **options)
    return function(x, w, **options) + torch.tanh(y) * s + y


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@EVERY
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(name: str, dynamic: bool) -> None:
    call = functools.partial(ours, name)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, size in ((2, 4), (3, 5)):
        leaves = [t.requires_grad_() for t in tensors(name, batch=batch, size=size)]
        expected, result = plain(name, *leaves), compiled(*leaves)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        wanted = torch.autograd.grad(expected.square().sum(), leaves)
        found = torch.autograd.grad(result.square().sum(), leaves)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@EVERY
@pytest.mark.usefixtures("dynamo")
def test_one_graph_serves_all_sizes(name: str) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = functools.partial(ours, name)
    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    for batch, size in ((2, 4), (3, 6), (5, 9)):
        compiled(*tensors(name, batch=batch, size=size))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("name", ["conv1d", "conv_transpose2d"])
def test_compile_an_epilogue_made_inside(name: str) -> None:
    def call(conv: Callable[..., Tensor], x: Tensor, w: Tensor, gate: Tensor) -> Tensor:
        return conv(x, w, epilogue=lambda y, *, c, w: y * gate.sum() + c + 2 * w)

    x, w, gate, _ = tensors(name)
    eager = call(getattr(tc, name), x, w, gate.sum())
    compiled = torch.compile(functools.partial(call, getattr(tc, name)), backend="aot_eager")
    torch.testing.assert_close(compiled(x, w, gate.sum()), eager, rtol=1e-4, atol=1e-4)


@EVERY
def test_autocast(name: str) -> None:
    leaves = [t.requires_grad_() for t in tensors(name)]
    with torch.autocast("cpu", torch.bfloat16):
        result = ours(name, *leaves)
    assert result.dtype is torch.bfloat16
    torch.testing.assert_close(result.float(), plain(name, *leaves), rtol=0.1, atol=0.1)
    grads = torch.autograd.grad(result.float().sum(), leaves)
    assert all(g.dtype is torch.float32 for g in grads)


@EVERY
def test_checkpoint(name: str) -> None:
    leaves = [t.requires_grad_() for t in tensors(name)]
    expected = torch.autograd.grad(plain(name, *leaves).sin().sum(), leaves)
    y = checkpoint(functools.partial(ours, name), *leaves, use_reentrant=False)
    grads = torch.autograd.grad(y.sin().sum(), leaves)
    torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-3)


@EVERY
def test_func_grad_of_grad(name: str) -> None:
    inputs = tensors(name)

    def twice(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        def penalty(*inputs: Tensor) -> Tensor:
            first = torch.func.grad(lambda *t: function(*t).sin().sum(), (0, 1, 2, 3))(*inputs)
            return sum(g.square().sum() for g in first)  # type: ignore[return-value]

        return torch.func.grad(penalty, (0, 1, 2, 3))(*inputs)

    found = twice(functools.partial(ours, name), *inputs)
    wanted = twice(functools.partial(plain, name), *inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-2)


@EVERY
def test_vmap_warns_and_is_right(name: str) -> None:
    x, w, b, s = tensors(name)
    many = torch.stack([x, 2 * x, -x])
    with pytest.warns(UserWarning, match=r"(?s)tritonconv.*vmap|vmap.*tritonconv"):
        result = torch.func.vmap(lambda x: ours(name, x, w, b, s))(many)
    expected = torch.stack([plain(name, one, w, b, s) for one in many])
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@EVERY
def test_meta_fake_and_inference(name: str) -> None:
    inputs = tensors(name)
    expected = plain(name, *inputs)
    assert ours(name, *[t.to("meta") for t in inputs]).shape == expected.shape
    with FakeTensorMode():
        x, w, *_ = [torch.empty(shape) for shape in shapes(name)]
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        y = getattr(tc, name)(x, w, **FUNCTIONS[name])
    assert y.shape == expected.shape and y.movedim(1, -1).is_contiguous()
    with torch.inference_mode():
        result = ours(name, *inputs)
    assert result.is_inference()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@EVERY
def test_forward_mode_is_refused(name: str) -> None:
    x, w, *_ = tensors(name)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: getattr(tc, name)(x, w), (x,), (x,))
