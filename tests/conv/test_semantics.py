"""``tc.conv2d`` means what ``F.conv2d`` means: values, shapes, dtypes, memory formats."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import tritonconv as tc
from tritonconv.conv import dispatch
from tritonconv.conv.dispatch import as_tf32
from tritonconv.runtime.launch import Executable

from .oracle import assert_accurate, plain_conv

pytestmark = pytest.mark.interpreter

# name: (input shape, weight shape, options)
CASES = {
    "plain": ((2, 3, 7, 6), (4, 3, 3, 3), {}),
    "bias": ((2, 3, 7, 6), (4, 3, 3, 3), dict(bias=True)),
    "stride": ((2, 3, 7, 6), (4, 3, 3, 3), dict(stride=2)),
    "strides": ((1, 3, 7, 6), (4, 3, 2, 3), dict(stride=(3, 1))),
    "stride of one number": ((1, 3, 7, 6), (4, 3, 2, 3), dict(stride=(2,))),
    "padding": ((1, 3, 5, 4), (4, 3, 3, 3), dict(padding=2)),
    "paddings": ((1, 3, 5, 4), (4, 3, 3, 3), dict(padding=[0, 3])),
    "valid": ((1, 3, 5, 4), (4, 3, 3, 3), dict(padding="valid", stride=2)),
    "same": ((1, 3, 5, 4), (4, 3, 3, 5), dict(padding="same")),
    "same, even kernel": ((1, 3, 5, 4), (4, 3, 2, 4), dict(padding="same")),
    "same, even kernel, dilated": (
        (1, 3, 6, 7),
        (4, 3, 4, 2),
        dict(padding="same", dilation=(1, 3)),
    ),
    "dilation": ((1, 3, 7, 8), (4, 3, 3, 3), dict(dilation=2, padding=1)),
    "dilations": ((1, 3, 7, 8), (4, 3, 3, 2), dict(dilation=(1, 4), padding=(0, 2), stride=2)),
    "groups": ((2, 6, 5, 5), (4, 3, 3, 3), dict(groups=2, padding=1, bias=True)),
    "depthwise": ((2, 5, 5, 6), (5, 1, 3, 3), dict(groups=5, padding=1, bias=True)),
    "depthwise, multiplier": ((1, 3, 5, 6), (9, 1, 3, 3), dict(groups=3, padding=1)),
    "1x1": ((2, 9, 5, 5), (7, 9, 1, 1), dict(bias=True)),
    "1x1, stride": ((2, 9, 5, 5), (7, 9, 1, 1), dict(stride=2)),
    "1x1, padding": ((1, 9, 3, 4), (7, 9, 1, 1), dict(padding=1, bias=True)),
    "patches": ((2, 3, 8, 8), (6, 3, 4, 4), dict(stride=4, bias=True)),
    "unbatched": ((3, 7, 6), (4, 3, 3, 3), dict(padding=1, bias=True)),
    "unbatched, groups": ((4, 5, 5), (4, 1, 3, 3), dict(groups=4)),
    "size 1": ((1, 1, 1, 1), (1, 1, 1, 1), dict(bias=True)),
    "one output": ((2, 3, 3, 3), (4, 3, 3, 3), {}),
    "size 63": ((1, 2, 1, 63), (2, 2, 1, 7), dict(padding=(0, 3))),
    "kernel larger than the map": ((1, 2, 2, 2), (3, 2, 5, 5), dict(padding=2)),
    "empty batch": ((0, 3, 5, 5), (4, 3, 3, 3), dict(padding=1, bias=True)),
}
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def operands(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor | None]:
    x, w = torch.randn(x_shape), torch.randn(w_shape)
    b = torch.randn(w_shape[0]) if bias else None
    return tuple(t if t is None else t.to(device, dtype) for t in (x, w, b))  # type: ignore[return-value]


def compare(x: Tensor, w: Tensor, b: Tensor | None, **options: object) -> Tensor:
    result = tc.conv2d(x, w, b, **options)
    wide = [t if t is None else t.double() for t in (x, w, b)]
    exact, plain = plain_conv(*wide, **options), plain_conv(x, w, b, **options)
    assert_accurate(result, exact, plain)
    return result


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_equals_pytorch(case: str, form: str, device: torch.device) -> None:
    x_shape, w_shape, options = CASES[case]
    options = dict(options)
    x, w, b = operands(x_shape, w_shape, options.pop("bias", False), torch.float32, device)
    if x.dim() == 4:
        x = x.contiguous(memory_format=FORMATS[form])
    elif form == "nhwc":
        x = x.transpose(0, 2).contiguous().transpose(0, 2)
    result = compare(x, w, b, **options)
    if result.dim() == 4 and result.numel() and x.shape[1] > 1:
        assert result.is_contiguous(memory_format=FORMATS[form])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["bias", "same, even kernel", "groups", "depthwise", "patches"])
def test_dtypes(case: str, dtype: torch.dtype, device: torch.device) -> None:
    x_shape, w_shape, options = CASES[case]
    options = dict(options)
    compare(*operands(x_shape, w_shape, options.pop("bias", False), dtype, device), **options)


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_precisions(precision: str, device: torch.device) -> None:
    x, w, b = operands((1, 5, 6, 6), (4, 5, 3, 3), True, torch.float32, device)
    result = tc.conv2d(x, w, b, precision=precision)
    exact = plain_conv(x.double(), w.double(), b.double())  # type: ignore[union-attr]
    with torch.backends.cudnn.flags(allow_tf32=False):
        read = as_tf32 if precision == "tf32" else torch.clone
        plain = plain_conv(read(x), read(w), b)
    assert_accurate(result, exact, plain)


STRIDED = {
    "transposed map": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second pixel": lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)[
        ..., ::2, ::2
    ],
    "part of a larger map": lambda x: torch.nn.functional.pad(x, (2, 1, 1, 3))[..., 1:-3, 2:-1],
    "part of more channels": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "channels_last part": lambda x: torch.cat([x, x], 1).contiguous(
        memory_format=torch.channels_last
    )[:, : x.shape[1]],
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded batch": lambda x: x[:1].expand_as(x),
    "expanded channels": lambda x: x[:, :1].expand_as(x),
    "one value": lambda x: x[:1, :1, :1, :1].expand_as(x),
    "offset of one element": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}
KINDS = {
    "dense": ((2, 9, 6, 5), (4, 9, 3, 3), dict(padding=1)),
    "few channels": ((2, 3, 6, 5), (4, 3, 3, 3), dict(padding=1)),
    "1x1": ((2, 9, 6, 5), (4, 9, 1, 1), {}),
    "patches": ((2, 3, 6, 4), (4, 3, 2, 2), dict(stride=2)),
    "groups": ((2, 4, 6, 5), (4, 2, 3, 3), dict(padding=1, groups=2)),
    "depthwise": ((2, 4, 6, 5), (4, 1, 3, 3), dict(padding=1, groups=4)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("view", STRIDED)
def test_any_strides(view: str, kind: str, device: torch.device) -> None:
    x_shape, w_shape, options = KINDS[kind]
    x, w, b = operands(x_shape, w_shape, True, torch.float32, device)
    x = STRIDED[view](x)
    assert x.shape == x_shape
    compare(x, w, b, **options)
    if kind in ("dense", "groups"):
        compare(
            x.contiguous(),
            STRIDED[view](w),
            STRIDED[view](b[None, :, None, None])[0, :, 0, 0],
            **options,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_zero_stride_gradients(kind: str, device: torch.device) -> None:
    x_shape, w_shape, options = KINDS[kind]
    found = []
    for fn, dtype in (
        (tc.conv2d, torch.float32),
        (plain_conv, torch.float64),
        (plain_conv, torch.float32),
    ):
        torch.manual_seed(0)
        x, w, b = operands(x_shape, w_shape, True, torch.float32, device)
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
        y = fn(*leaves, **options)
        one = torch.ones((), dtype=dtype, device=device).expand_as(y)
        found.append(torch.autograd.grad(y, leaves, one))
    for name, result, exact, plain in zip("xwb", *found, strict=True):
        assert_accurate(result, exact, plain, name)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_random_problems_with_their_gradients(data: st.DataObject) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    few = st.integers(1, 3)
    groups = data.draw(few, "groups")
    per_group, filters = data.draw(st.integers(1, 5), "channels"), data.draw(few, "filters")
    kernel = [data.draw(st.integers(1, 4), "kernel") for _ in range(2)]
    dilation = [data.draw(few, "dilation") for _ in range(2)]
    same = data.draw(st.booleans(), "same")
    stride = [1, 1] if same else [data.draw(few, "stride") for _ in range(2)]
    padding = "same" if same else [data.draw(st.integers(0, 3), "padding") for _ in range(2)]
    least = [
        max(1, d * (k - 1) + 1 - (0 if same else 2 * p))
        for k, d, p in zip(kernel, dilation, padding, strict=False)
    ]
    if same:
        least = [1, 1]
    size = [low + data.draw(st.integers(0, 6), "size") for low in least]
    form = data.draw(st.sampled_from(list(FORMATS.values())), "format")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    shapes = (
        (data.draw(few, "batch"), groups * per_group, *size),
        (groups * filters, per_group, *kernel),
    )
    x, w = (torch.randn(s, generator=generator).to(device) for s in shapes)
    b = torch.randn(groups * filters, generator=generator).to(device)
    x = x.contiguous(memory_format=form)
    options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    found = []
    for fn, dtype in (
        (tc.conv2d, torch.float32),
        (plain_conv, torch.float64),
        (plain_conv, torch.float32),
    ):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w, b)]
        y = fn(*leaves, **options)
        seeded = torch.Generator().manual_seed(5)
        v = torch.randn(y.shape, generator=seeded).to(device, dtype)
        found.append((y, *torch.autograd.grad(y, leaves, v)))
    for name, result, exact, plain in zip(("y", "x", "w", "b"), *found, strict=True):
        assert_accurate(result, exact, plain, name)


def test_without_channels_or_filters(device: torch.device) -> None:
    """PyTorch refuses these or returns a wrong shape; a sum over nothing is zero."""
    b = torch.randn(4, device=device)
    y = tc.conv2d(torch.ones(2, 0, 5, 5, device=device), torch.ones(4, 0, 3, 3, device=device), b)
    assert torch.equal(y, b[:, None, None].expand(2, 4, 3, 3))
    x, w = torch.ones(2, 3, 5, 5, device=device), torch.ones(0, 3, 3, 3, device=device)
    x.requires_grad_(), w.requires_grad_()
    y = tc.conv2d(x, w)
    assert y.shape == (2, 0, 3, 3)
    grad_x, grad_w = torch.autograd.grad(y.sum(), (x, w))
    assert not grad_x.any() and grad_w.shape == w.shape


def test_the_cpu_path_keeps_the_memory_format_too() -> None:
    with tc.backend("torch"):
        x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
        w = torch.randn(3, 4, 3, 3)
        for y in (tc.conv2d(x, w), tc.conv2d(x, w, epilogue=torch.relu)):
            assert y.is_contiguous(memory_format=torch.channels_last)
        assert tc.conv2d(x.contiguous(), w).is_contiguous()


@pytest.mark.parametrize("epilogue", [None, torch.relu], ids=["plain", "epilogue"])
def test_the_backend_is_chosen_at_every_call(
    epilogue: object, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = torch.randn(1, 9, 5, 5, device=device), torch.randn(4, 9, 3, 3, device=device)
    expected = tc.conv2d(x, w, epilogue=epilogue)  # prepared by now

    def launch(*args: object) -> None:
        raise AssertionError("a kernel ran under backend('torch')")

    monkeypatch.setattr(dispatch.Runner, "__call__", launch)
    monkeypatch.setattr(Executable, "__call__", launch)
    with tc.backend("torch"):
        torch.testing.assert_close(tc.conv2d(x, w, epilogue=epilogue), expected)
    with pytest.raises(AssertionError, match="a kernel ran"):
        tc.conv2d(x, w, epilogue=epilogue)
