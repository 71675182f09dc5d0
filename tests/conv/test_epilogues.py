"""Fused epilogues: values, first and second gradients of everything they read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tritonconv as tc

from .oracle import assert_accurate, assert_gradients, plain_conv

pytestmark = pytest.mark.interpreter

N, C, M, H, W = 2, 3, 4, 5, 4  # input channels, output channels, map (kernel 3, padding 1)

# name: (epilogue, shapes of its operands)
EPILOGUES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "relu": (torch.relu, []),
    "silu": (torch.nn.functional.silu, []),
    "gelu": (torch.nn.functional.gelu, []),
    "square": (lambda y: y * y, []),
    "residual": (lambda y, r: torch.tanh(y + r), [(N, M, H, W)]),
    "gate": (lambda y, g: y * torch.sigmoid(g), [(N, M, H, W)]),
    "scale and shift": (lambda y, s, t: y * s + t, [(M, 1, 1), (M, 1, 1)]),
    "per image": (lambda y, s: torch.sin(y * s), [(N, 1, 1, 1)]),
    "per row and column": (lambda y, r, c: y * r + torch.exp(c), [(H, 1), (W,)]),
    "one number": (lambda y, s: torch.nn.functional.softplus(y) * s, [()]),
    "mixed": (
        lambda y, a, b: torch.where(y > 0, y * a, torch.expm1(y) * b),
        [(1, M, 1, 1), (N, 1, H, W)],
    ),
    "unread operand": (lambda y, r: y.sigmoid(), [(N, M, H, W)]),
    "constant": (lambda y: torch.zeros_like(y) + 2.0, []),
    "coordinates": (lambda y, *, n, c, h, w: y * (1.0 + 0.5 * c) + 0.1 * (n + h * w), []),
    "some coordinates": (lambda y, *, w, c: torch.where((w + c) % 2 == 0, y, -2 * y * y), []),
}


def tensors(
    device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    x, w, b = torch.randn(N, C, H, W), torch.randn(M, C, 3, 3) / 5, torch.randn(M)
    return x.to(device, dtype), w.to(device, dtype), b.to(device, dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", EPILOGUES)
def test_value_first_and_second_gradients(name: str, bias: bool, device: torch.device) -> None:
    epilogue, shapes = EPILOGUES[name]
    x, w, b = tensors(device)
    operands = [torch.randn(shape).to(device) for shape in shapes]

    def call(conv: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
            b, operands = (rest[0], rest[1:]) if bias else (None, rest)
            y = conv(x, w, b, padding=1, epilogue=epilogue, epilogue_args=operands)
            # Every leaf takes part, so that unread operands have a gradient: zero.
            return y + sum(0 * t.sum() for t in (x, w, *rest))

        return run

    inputs = [x, w, *([b] if bias else []), *operands]
    names = ["x", "w", *(["bias"] if bias else []), *(f"operand {k}" for k in range(len(shapes)))]
    assert_gradients(call(tc.conv2d), call(plain_conv), inputs, names=names)


def capturing(kind: str) -> tuple[list[tuple[int, ...]], Callable[..., Callable[..., Tensor]]]:
    """Shapes of the captured tensors, and the epilogue built over them."""
    if kind == "channel":
        return [(M,)], lambda slope: lambda y, *, c: torch.where(y > 0, y, y * slope[c])
    if kind == "number":
        return [()], lambda scale: lambda y: torch.sin(y * scale)
    if kind == "map":
        return [(H, W)], lambda table: lambda y, *, h, w: y * table[h, w]
    if kind == "transposed axes":
        return [(W, N)], lambda table: lambda y, *, n, w: y * y * table[w, n]
    if kind == "larger than the map":
        return [(M + 3,)], lambda table: lambda y, *, c: y * table[c]
    if kind == "computed index":
        return [(H + W - 1,)], lambda table: lambda y, *, h, w: y * table[h - w + W - 1]
    if kind == "computed index, twice":
        return (
            [(7,)],
            lambda table: (
                lambda y, *, n, c, h, w: y * table[(h * w + c) % 7] + torch.cos(table[(n + w) % 7])
            ),
        )
    assert kind == "two tensors"
    return [(M,), (5,)], lambda a, b: lambda y, *, c, w: torch.tanh(y * a[c]) * b[(w * w) % 5]


CAPTURES = (
    "channel",
    "number",
    "map",
    "transposed axes",
    "larger than the map",
    "computed index",
    "computed index, twice",
    "two tensors",
)


@pytest.mark.parametrize("kind", CAPTURES)
def test_captured_tensors(kind: str, device: torch.device) -> None:
    shapes, build = capturing(kind)
    x, w, b = tensors(device)
    captured = [torch.randn(shape).to(device) for shape in shapes]

    def call(conv: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, b, *c: conv(x, w, b, padding=1, epilogue=build(*c))

    names = ["x", "w", "bias", *(f"capture {k}" for k in range(len(shapes)))]
    assert_gradients(call(tc.conv2d), call(plain_conv), [x, w, b, *captured], names=names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    x, w, b = tensors(device, dtype)
    r = torch.randn(N, M, H, W).to(device, dtype)
    slope = torch.rand(M).to(device, dtype)

    def call(conv: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, w: Tensor, b: Tensor, r: Tensor, s: Tensor) -> Tensor:
            return conv(
                x,
                w,
                b,
                padding=1,
                epilogue_args=(r,),
                epilogue=lambda y, r, *, c: torch.where(y + r > 0, y + r, (y + r) * s[c]),
            )

        return run

    # Half precision rounds the saved accumulator and every gradient once, as PyTorch does; where
    # a sum decides about a branch the two may differ, so that only the value has a budget.
    order = 2 if dtype is torch.float64 else 0
    if order:
        assert_gradients(call(tc.conv2d), call(plain_conv), [x, w, b, r, slope], order)
        return
    inputs = (x, w, b, r, slope)
    result, plain = call(tc.conv2d)(*inputs), call(plain_conv)(*inputs)
    assert_accurate(result, call(plain_conv)(*[t.double() for t in inputs]), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gradients_of_a_smooth_epilogue(
    dtype: torch.dtype, device: torch.device
) -> None:
    x, w, b = tensors(device, dtype)

    def call(conv: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, b: conv(x, w, b, padding=1, epilogue=torch.tanh)

    assert_gradients(call(tc.conv2d), call(plain_conv), [x, w, b], order=1, names="xwb")


KINDS = {
    "few channels": ((2, 3, 5, 4), (4, 3, 3, 3), dict(padding=1)),
    "dense": ((2, 9, 5, 4), (4, 9, 3, 3), dict(padding=1, stride=2)),
    "1x1": ((2, 9, 5, 4), (4, 9, 1, 1), {}),
    "patches": ((2, 3, 6, 4), (4, 3, 2, 2), dict(stride=2)),
    "groups": ((2, 4, 5, 4), (4, 2, 3, 3), dict(padding=1, groups=2)),
    "depthwise": ((2, 4, 5, 4), (8, 1, 3, 3), dict(padding=1, groups=4)),
}


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_convolution(
    kind: str, form: torch.memory_format, device: torch.device
) -> None:
    x_shape, w_shape, options = KINDS[kind]
    x = torch.randn(x_shape, device=device).contiguous(memory_format=form)
    w, b = torch.randn(w_shape, device=device) / 5, torch.randn(w_shape[0], device=device)
    r = torch.randn(plain_conv(x, w, **options).shape, device=device)
    slope = torch.randn(w_shape[0], device=device)

    def call(conv: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, b, r, s: conv(
            x,
            w,
            b,
            epilogue=lambda y, r, *, c, h, w: torch.tanh(y * s[c] + 0.1 * h) * r + w,
            epilogue_args=(r,),
            **options,
        )

    assert_gradients(
        call(tc.conv2d), call(plain_conv), [x, w, b, r, slope], names=["x", "w", "b", "r", "slope"]
    )


def test_non_contiguous_operands(device: torch.device) -> None:
    x, w, b = tensors(device)
    wide = torch.randn(N, 2 * M, W, H, device=device)
    operands = (wide[:, ::2].transpose(2, 3), torch.randn(1, device=device).expand(N, M, H, W))
    options = dict(padding=1, epilogue=lambda y, r, s: y * r + s, epilogue_args=operands)
    result = tc.conv2d(x, w, b, **options)
    plain = plain_conv(x, w, b, **options)
    exact = plain_conv(
        x.double(),
        w.double(),
        b.double(),
        padding=1,
        epilogue=options["epilogue"],
        epilogue_args=[t.double() for t in operands],
    )
    assert_accurate(result, exact, plain)


def test_operands_of_other_dtypes(device: torch.device) -> None:
    x, w, b = tensors(device, torch.bfloat16)
    scale = torch.randn(M, 1, 1, device=device)
    mask = torch.randint(0, 2, (N, 1, H, W), device=device).bool()
    options = dict(padding=1, epilogue=lambda y, s, m: torch.where(m, y * s, 0.0))
    result = tc.conv2d(x, w, b, epilogue_args=(scale, mask), **options)
    plain = plain_conv(x, w, b, epilogue_args=(scale, mask), **options)
    exact = plain_conv(
        x.double(), w.double(), b.double(), epilogue_args=(scale.double(), mask), **options
    )
    assert_accurate(result, exact, plain)


def test_fresh_lambdas_and_changed_numbers(device: torch.device) -> None:
    """A function written anew at every call is the same function; a changed number is not."""
    x, w, b = tensors(device)
    y = plain_conv(x, w, b, padding=1)
    for factor in (1.5, 2.5, 1.5):
        for _ in range(2):
            result = tc.conv2d(x, w, b, padding=1, epilogue=lambda y: y * factor)  # noqa: B023
            torch.testing.assert_close(result, y * factor, rtol=1e-4, atol=1e-4)


def test_a_captured_tensor_is_read_anew_and_may_be_replaced(device: torch.device) -> None:
    x, w, b = tensors(device)
    y = plain_conv(x, w, b, padding=1)
    slope = torch.ones(M, device=device)
    for value in (1.0, 2.0):
        slope.fill_(value)
        result = tc.conv2d(x, w, b, padding=1, epilogue=lambda y, *, c: y * slope[c])
        torch.testing.assert_close(result, y * value, rtol=1e-4, atol=1e-4)
    other = torch.full((M,), 3.0, device=device)
    for slope in (other, torch.full((M + 4,), 5.0, device=device)[::2]):
        value = float(slope[0])
        result = tc.conv2d(x, w, b, padding=1, epilogue=lambda y, *, c: y * slope[c])  # noqa: B023
        torch.testing.assert_close(result, y * value, rtol=1e-4, atol=1e-4)


def test_empty_batch(device: torch.device) -> None:
    x, w, b = tensors(device)
    inputs = [t.clone().requires_grad_() for t in (x[:0], w, b)]
    y = tc.conv2d(*inputs, padding=1, epilogue=torch.tanh)
    assert y.shape == (0, M, H, W)
    grads = torch.autograd.grad(y.sum(), inputs)
    assert grads[0].shape == (0, C, H, W)
    assert not grads[1].any() and not grads[2].any()


def test_unbatched(device: torch.device) -> None:
    x, w, b = tensors(device)
    r = torch.randn(M, H, W, device=device)
    result = tc.conv2d(x[0], w, b, padding=1, epilogue=torch.add, epilogue_args=(r,))
    torch.testing.assert_close(result, plain_conv(x[0], w, b, padding=1) + r, rtol=1e-4, atol=1e-4)


@pytest.mark.interpreter
def test_a_second_derivative_after_a_plain_backward(device: torch.device) -> None:
    """The first derivative was made where gradients are off, and is kept."""
    x = torch.randn(1, 2, 4, 4, device=device, requires_grad=True)
    w = torch.randn(2, 2, 3, 3, device=device, requires_grad=True)
    tc.conv2d(x, w, padding=1, epilogue=F.silu).sum().backward()
    found = []
    for y in (
        tc.conv2d(x, w, padding=1, epilogue=F.silu, precision="ieee"),
        F.silu(F.conv2d(x.double(), w.double(), padding=1)),
    ):
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), w)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
