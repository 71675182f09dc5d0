"""One- and three-dimensional and transposed convolutions mean what PyTorch's mean."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

import tritonconv as tc

from .oracle import assert_accurate, assert_gradients, plain_conv

FUNCTIONS = (
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)
EVERY = pytest.mark.parametrize("name", FUNCTIONS)
TRANSPOSED = FUNCTIONS[3:]

# name: (function, input shape, weight shape, options)
CASES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1d": ("conv1d", (2, 3, 9), (4, 3, 3), dict(bias=True)),
    "1d, stride, padding": ("conv1d", (2, 3, 9), (4, 3, 4), dict(stride=2, padding=(3,))),
    "1d, valid": ("conv1d", (2, 3, 9), (4, 3, 4), dict(padding="valid", stride=3)),
    "1d, same, even": ("conv1d", (1, 3, 8), (4, 3, 4), dict(padding="same", dilation=3)),
    "1d, groups": ("conv1d", (2, 6, 7), (4, 3, 3), dict(groups=2, bias=True)),
    "1d, depthwise": ("conv1d", (2, 5, 9), (5, 1, 7), dict(groups=5, padding=3, bias=True)),
    "1d, 1 tap": ("conv1d", (2, 9, 5), (4, 9, 1), dict(bias=True)),
    "1d, patches": ("conv1d", (2, 3, 8), (4, 3, 4), dict(stride=4)),
    "1d, unbatched": ("conv1d", (3, 9), (4, 3, 3), dict(bias=True)),
    "1d, one element": ("conv1d", (1, 1, 1), (1, 1, 1), {}),
    "1d, length 63": ("conv1d", (1, 2, 63), (2, 2, 7), dict(padding=3)),
    "1d, empty batch": ("conv1d", (0, 3, 5), (4, 3, 3), dict(bias=True)),
    "3d": ("conv3d", (2, 3, 4, 5, 6), (4, 3, 2, 3, 3), dict(bias=True)),
    "3d, strides": ("conv3d", (1, 3, 4, 7, 6), (4, 3, 2, 3, 3), dict(stride=(1, 2, 3), padding=1)),
    "3d, same": ("conv3d", (1, 2, 3, 4, 5), (3, 2, 2, 3, 4), dict(padding="same")),
    "3d, dilation": ("conv3d", (1, 2, 5, 6, 5), (3, 2, 2, 2, 2), dict(dilation=(2, 1, 3))),
    "3d, groups": ("conv3d", (2, 4, 3, 4, 4), (6, 2, 3, 3, 3), dict(groups=2, padding=1)),
    "3d, depthwise": ("conv3d", (1, 3, 4, 4, 4), (3, 1, 3, 3, 3), dict(groups=3, bias=True)),
    "3d, patches": ("conv3d", (1, 2, 4, 6, 6), (4, 2, 2, 3, 3), dict(stride=(2, 3, 3))),
    "3d, unbatched": ("conv3d", (3, 4, 4, 4), (4, 3, 3, 3, 3), dict(padding=1, bias=True)),
    "3d, empty batch": ("conv3d", (0, 3, 4, 4, 4), (4, 3, 3, 3, 3), {}),
    "t1d": ("conv_transpose1d", (2, 3, 5), (3, 4, 3), dict(bias=True)),
    "t1d, doubled": (
        "conv_transpose1d",
        (2, 3, 5),
        (3, 4, 3),
        dict(stride=2, padding=1, output_padding=1),
    ),
    "t1d, groups": ("conv_transpose1d", (2, 4, 5), (4, 3, 2), dict(groups=2, stride=2, bias=True)),
    "t1d, unbatched": ("conv_transpose1d", (3, 5), (3, 4, 3), dict(stride=3, bias=True)),
    "t2d": ("conv_transpose2d", (2, 3, 4, 5), (3, 4, 3, 2), dict(bias=True)),
    "t2d, patches": ("conv_transpose2d", (2, 9, 3, 4), (9, 4, 2, 2), dict(stride=2, bias=True)),
    "t2d, 4x4/2": ("conv_transpose2d", (1, 9, 3, 4), (9, 4, 4, 4), dict(stride=2, padding=1)),
    "t2d, strides": (
        "conv_transpose2d",
        (1, 3, 4, 3),
        (3, 4, 2, 3),
        dict(stride=(3, 2), padding=(0, 2), output_padding=(2, 1), bias=True),
    ),
    "t2d, kernel below stride": ("conv_transpose2d", (1, 3, 4, 3), (3, 4, 1, 1), dict(stride=2)),
    "t2d, dilation": ("conv_transpose2d", (1, 3, 4, 5), (3, 4, 3, 2), dict(dilation=(2, 3))),
    "t2d, output padding of a dilation": (
        "conv_transpose2d",
        (1, 3, 4, 5),
        (3, 4, 3, 2),
        dict(dilation=3, padding=1, output_padding=(2, 1), bias=True),
    ),
    "t2d, output padding without padding": (
        "conv_transpose2d",
        (1, 3, 4, 5),
        (3, 4, 3, 2),
        dict(dilation=3, output_padding=2, stride=(1, 2)),
    ),
    "t2d, groups": ("conv_transpose2d", (1, 6, 4, 4), (6, 2, 3, 3), dict(groups=3, stride=2)),
    "t2d, depthwise": ("conv_transpose2d", (1, 4, 4, 4), (4, 1, 4, 4), dict(groups=4, stride=2)),
    "t2d, 1x1": ("conv_transpose2d", (2, 9, 3, 3), (9, 4, 1, 1), dict(bias=True)),
    "t2d, unbatched": ("conv_transpose2d", (3, 4, 4), (3, 4, 3, 3), dict(padding=1, bias=True)),
    "t2d, one element": ("conv_transpose2d", (1, 1, 1, 1), (1, 1, 1, 1), dict(bias=True)),
    "t2d, empty batch": ("conv_transpose2d", (0, 3, 4, 4), (3, 4, 3, 3), dict(bias=True)),
    "t3d": ("conv_transpose3d", (1, 3, 3, 2, 4), (3, 4, 2, 3, 2), dict(bias=True)),
    "t3d, patches": ("conv_transpose3d", (1, 3, 2, 3, 3), (3, 4, 2, 2, 2), dict(stride=2)),
    "t3d, output padding": (
        "conv_transpose3d",
        (1, 4, 3, 2, 2),
        (4, 2, 3, 3, 3),
        dict(stride=(1, 2, 2), padding=1, output_padding=(0, 1, 1), groups=2, bias=True),
    ),
}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(x: Tensor) -> Tensor:
    """The same map with its channels innermost in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def operands(case: str, dtype: torch.dtype, device: Any = "cpu") -> tuple[list[Tensor], Any, Any]:
    """Tensors of a case, our function and PyTorch's with its options."""
    name, x_shape, w_shape, given = CASES[case]
    options = dict(given)
    bias = options.pop("bias", False)
    filters = w_shape[1] * options.get("groups", 1) if name in TRANSPOSED else w_shape[0]
    shapes = [x_shape, w_shape, *([(filters,)] if bias else [])]
    tensors = [torch.randn(shape).to(device, dtype) for shape in shapes]
    ours = functools.partial(getattr(tc, name), **options)
    return tensors, ours, functools.partial(plain_conv, function=getattr(F, name), **options)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_equals_pytorch(case: str, last: bool, device: torch.device) -> None:
    tensors, ours, plain = operands(case, torch.float32, device)
    batched = "unbatched" not in case
    if last and batched:
        tensors[0] = channels_last(tensors[0])
    for _ in range(2):  # the second call is a prepared one
        result = ours(*tensors)
        assert_accurate(result, plain(*[t.double() for t in tensors]), plain(*tensors))
        if batched and result.numel() > 1 and result.shape[1] > 1:
            assert (result.movedim(1, -1) if last else result).is_contiguous()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", [name for name in CASES if "empty" not in name])
def test_derivatives_to_second_order(case: str) -> None:
    tensors, ours, plain = operands(case, torch.float64)
    assert_gradients(ours, plain, tensors)


@pytest.mark.parametrize("case", [name for name in CASES if "empty" in name])
def test_gradients_of_an_empty_batch(case: str) -> None:
    tensors, ours, _ = operands(case, torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    grads = torch.autograd.grad(ours(*leaves).sum(), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    assert not any(g.any() for g in grads)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["1d, groups", "3d", "t1d", "t2d, patches", "t3d"])
def test_dtypes(case: str, dtype: torch.dtype, device: torch.device) -> None:
    tensors, ours, plain = operands(case, dtype, device)
    assert_accurate(ours(*tensors), plain(*[t.double() for t in tensors]), plain(*tensors))


SMALL = {
    "conv1d": ((2, 2, 5), (4, 1, 2), dict(groups=2, padding="same", dilation=2)),
    "conv2d": ((1, 2, 3, 4), (2, 2, 2, 2), dict(stride=(1, 2), padding=1)),
    "conv3d": ((1, 1, 3, 3, 2), (2, 1, 2, 2, 1), dict(padding=(1, 0, 0), stride=2)),
    "conv_transpose1d": ((2, 2, 3), (2, 1, 3), dict(groups=2, stride=2, output_padding=1)),
    "conv_transpose2d": ((1, 2, 2, 3), (2, 2, 2, 2), dict(dilation=2, output_padding=1)),
    "conv_transpose3d": ((1, 1, 2, 2, 2), (1, 2, 2, 1, 2), dict(stride=2, padding=(1, 0, 0))),
}


def epilogue_operands(name: str, dtype: torch.dtype) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A call with a bias and an epilogue that reads all it can, and its tensors."""
    x_shape, w_shape, options = SMALL[name]
    x, w = torch.randn(x_shape, dtype=dtype), torch.randn(w_shape, dtype=dtype)
    y = getattr(F, name)(x, w, **options)
    gate = torch.randn(y.shape[2:], dtype=dtype)
    scale = torch.rand(y.shape[1], dtype=dtype) + 0.5
    bias = torch.randn(y.shape[1], dtype=dtype)

    def call(conv: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        x, w, bias, gate, scale = tensors
        return conv(
            x,
            w,
            bias,
            epilogue=lambda y, g, *, n, c, w: torch.tanh(y * scale[c] + 0.1 * n) * g + w,
            epilogue_args=(gate,),
            **options,
        )

    return call, [x, w, bias, gate, scale]


@EVERY
def test_gradcheck(name: str) -> None:
    call, tensors = epilogue_operands(name, torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    fused = functools.partial(call, getattr(tc, name))
    torch.autograd.gradcheck(fused, leaves)
    torch.autograd.gradgradcheck(fused, leaves)


@EVERY
@pytest.mark.interpreter
def test_epilogues(name: str, device: torch.device) -> None:
    call, tensors = epilogue_operands(name, torch.float32)
    ours = functools.partial(call, getattr(tc, name))
    plain = functools.partial(call, functools.partial(plain_conv, function=getattr(F, name)))
    assert_gradients(ours, plain, [t.to(device) for t in tensors])


@EVERY
@pytest.mark.interpreter
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_simple_epilogues_of_prepared_calls(name: str, last: bool, device: torch.device) -> None:
    x_shape, w_shape, options = SMALL[name]
    x, w = torch.randn(x_shape, device=device), torch.randn(w_shape, device=device)
    if last:
        x = channels_last(x)
    # In float64: a GPU's float32 is TF32 where PyTorch's switch says so.
    y = getattr(F, name)(x.double(), w.double(), **options).float()
    bias, skip = torch.randn(y.shape[1], device=device), torch.randn(y.shape[1:], device=device)
    for _ in range(2):
        result = getattr(tc, name)(
            x, w, bias, epilogue=torch.maximum, epilogue_args=(skip,), **options
        )
        expected = torch.maximum(y + bias.reshape(-1, *[1] * (y.dim() - 2)), skip)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        if x.shape[1] > 1 and y.shape[1] > 1:
            assert (result.movedim(1, -1) if last else result).is_contiguous()


def test_an_epilogue_of_one_axis_has_no_height() -> None:
    x, taps = torch.randn(1, 2, 5), torch.randn(2, 2, 3)
    for function in (tc.conv1d, tc.conv_transpose1d):
        with pytest.raises(tc.TritonConvError, match="h"):
            function(x, taps, epilogue=lambda y, *, h: y * h)


@pytest.mark.interpreter
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 3])
def test_causal_padding(stride: int, dilation: int, device: torch.device) -> None:
    x, w, b = (torch.randn(s, device=device) for s in ((2, 3, 9), (4, 3, 3), (4,)))
    options = dict(stride=stride, dilation=dilation)

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, (2 * dilation, 0)), w, b, **options)

    ours = functools.partial(tc.conv1d, padding="causal", **options)
    assert_gradients(ours, plain, [x, w, b])
    later = x.clone()
    later[..., 5:] += 1
    seen = ours(x, w, b) == ours(later, w, b)
    assert seen[..., : -(-5 // stride)].all() and not seen.all()
    (call,) = tc.explain(ours, x, w).calls
    assert call.problem.in_size == (1, 9), "the padding was materialised"
    assert call.problem.padding == (0, 2 * dilation)


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "part of more channels": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "channels_last part": lambda x: channels_last(torch.cat([x, x], 1))[:, : x.shape[1]],
    "batch innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded batch": lambda x: x[:1].expand_as(x),
    "offset of one element": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("view", STRIDED)
@pytest.mark.parametrize("case", ["1d", "t1d, groups", "t2d", "t2d, patches"])
def test_any_strides(case: str, view: str, device: torch.device) -> None:
    (x, *rest), ours, plain = operands(case, torch.float32, device)
    tensors = [STRIDED[view](x), *rest]
    assert_accurate(ours(*tensors), plain(*[t.double() for t in tensors]), plain(*tensors))
    tensors = [x, STRIDED[view](rest[0]), *rest[1:]]
    assert_accurate(ours(*tensors), plain(*[t.double() for t in tensors]), plain(*tensors))


def problem_of(function: Callable[..., Tensor], *args: Any, **options: Any) -> Any:
    (call,) = tc.explain(function, *args, **options).calls
    return call.problem


def test_one_axis_is_a_map_of_height_one_without_a_copy() -> None:
    w = torch.randn(8, 4, 3)
    rows = torch.randn(2, 16, 4).transpose(1, 2)
    problem = problem_of(tc.conv1d, rows, w)
    assert problem.operator == "conv2d.forward" and problem.in_size == (1, 16)
    assert problem.x_layout == problem.y_layout == "channels_last"
    assert problem_of(tc.conv1d, rows.contiguous(), w).x_layout == "contiguous"
    assert tc.conv1d(rows, w).transpose(1, 2).is_contiguous()
    assert problem_of(tc.conv_transpose1d, rows, w[:4]).operator == "conv2d.dgrad"


def test_a_transposed_convolution_is_the_gradients_problem() -> None:
    x, w = torch.randn(2, 3, 9, 8), torch.randn(4, 3, 3, 3)
    y = tc.conv2d(x, w, stride=2).requires_grad_()
    up = functools.partial(tc.conv_transpose2d, stride=2, output_padding=(0, 1))
    problem = problem_of(up, y, w)
    assert problem.operator == "conv2d.dgrad" and problem.in_size == (9, 8)

    def gradient() -> None:
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(tc.conv2d(leaf, w, stride=2), leaf, y.detach())

    assert problem in [call.problem for call in tc.explain(gradient).calls]


def drawn(data: st.DataObject, rank: int) -> tuple[dict[str, Any], tuple[int, ...], Any]:
    """Options, the size of a convolution's input, and the shape of its weight."""
    few = st.integers(1, 3)
    groups, per_group, filters = (data.draw(few, what) for what in ("groups", "c", "m"))
    kernel, stride, dilation = (
        [data.draw(few, what) for _ in range(rank)] for what in ("kernel", "stride", "dilation")
    )
    padding = [data.draw(st.integers(0, 3), "padding") for _ in range(rank)]
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + data.draw(st.integers(0, 4), "size")
        for d, k, p in zip(dilation, kernel, padding, strict=True)
    ]
    options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    shape = (data.draw(few, "batch"), groups * per_group, *size)
    return options, shape, (groups * filters, per_group, *kernel)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_transposed_is_adjoint(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3), "rank")
    options, shape, w_shape = drawn(data, rank)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    x, w = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, w_shape))
    with tc.backend("torch"):
        y = getattr(tc, f"conv{rank}d")(x, w, **options)
        v = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        up = getattr(tc, f"conv_transpose{rank}d")
        more = [
            size - ((out - 1) * hop - 2 * pad + step * (taps - 1) + 1)
            for size, out, taps, hop, pad, step in zip(
                shape[2:],
                y.shape[2:],
                w_shape[2:],
                *(options[name] for name in ("stride", "padding", "dilation")),
                strict=True,
            )
        ]
        back = up(v, w, output_padding=more, **options)
    assert back.shape == x.shape
    torch.testing.assert_close((y * v).sum(), (x * back).sum())


@pytest.mark.interpreter
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_random_transposed_problems_with_their_gradients(data: st.DataObject) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rank = data.draw(st.integers(1, 2), "rank")
    options, _, w_shape = drawn(data, rank)
    size = [data.draw(st.integers(1, 4), "size") for _ in range(rank)]
    axes = zip(options["stride"], options["dilation"], strict=True)
    options["output_padding"] = [
        data.draw(st.integers(0, max(hop, step) - 1), "output padding") for hop, step in axes
    ]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    x = torch.randn((2, w_shape[0], *size), generator=generator).to(device)
    w = torch.randn(w_shape, generator=generator).to(device)
    plain = functools.partial(getattr(F, f"conv_transpose{rank}d"), **options)
    ours = functools.partial(getattr(tc, f"conv_transpose{rank}d"), **options)
    try:
        plain(x, w)
    except RuntimeError:  # nothing is left after the padding is taken away
        with pytest.raises(ValueError, match=r"input: expected|padding"):
            ours(x, w)
        return
    if data.draw(st.booleans(), "channels_last"):
        x = channels_last(x)
    assert_gradients(ours, plain, [x, w], order=1)


def test_prepared_calls_are_not_mixed_up() -> None:
    x, w = torch.randn(2, 4, 5, 5), torch.randn(4, 4, 3, 3)
    for _ in range(2):
        tc.conv2d(x, w)
        torch.testing.assert_close(tc.conv_transpose2d(x, w), F.conv_transpose2d(x, w))
    for function in (tc.conv3d, tc.conv_transpose3d, tc.conv1d):
        with pytest.raises(ValueError, match="expected"):
            function(x, w)
    rows, taps = torch.randn(4, 5, 5), torch.randn(4, 5, 3)
    tc.conv1d(rows, taps)
    with pytest.raises(ValueError, match="weight: expected 4 dimensions"):
        tc.conv2d(rows, taps)
