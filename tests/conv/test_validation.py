"""Bad arguments: refused before any launch, with the argument, what was expected, what came."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

import tritonconv as tc

X, K, B = torch.randn(1, 4, 6, 6), torch.randn(6, 4, 3, 3), torch.randn(6)

# name: (changed arguments, error, message)
CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input, no tensor": (dict(input=1.0), TypeError, "input: expected a tensor, got float"),
    "input, a list of something else": (
        dict(input=[1.0]),
        TypeError,
        "input: expected a tensor or two, got float",
    ),
    "input, dimensions": (
        dict(input=torch.randn(4, 6)),
        ValueError,
        r"input: expected 4 dimensions .*, got \(4, 6\)",
    ),
    "input, channels": (
        dict(input=torch.randn(1, 3, 6, 6)),
        ValueError,
        r"input: expected 4 channels .*, got 3 channels",
    ),
    "input, dtype": (
        dict(input=X.int(), weight=K.int(), bias=None),
        TypeError,
        "input: expected float16, bfloat16, float32 or float64, got torch.int32",
    ),
    "input, complex": (
        dict(input=X.cfloat(), weight=K.cfloat(), bias=None),
        TypeError,
        "input: expected float16, .*got torch.complex64",
    ),
    "input, float8": (
        dict(input=X.to(torch.float8_e4m3fn), weight=K.to(torch.float8_e4m3fn), bias=None),
        TypeError,
        "input: expected float16, .*got torch.float8_e4m3fn",
    ),
    "input, too small": (
        dict(input=torch.randn(1, 4, 2, 6)),
        ValueError,
        r"input: expected a padded map at least as large as the dilated kernel .*\(1, 4, 2, 6\)",
    ),
    "weight, no tensor": (dict(weight=3), TypeError, "weight: expected a tensor, got int"),
    "weight, dimensions": (
        dict(weight=K[0]),
        ValueError,
        r"weight: expected 4 dimensions .*, got \(4, 3, 3\)",
    ),
    "weight, dtype": (
        dict(weight=K.half()),
        TypeError,
        "weight: expected the input's dtype torch.float32, got torch.float16",
    ),
    "weight, device": (
        dict(weight=K.to("meta")),
        ValueError,
        "weight: expected the input's device cpu, got meta",
    ),
    "bias, no tensor": (dict(bias=1.0), TypeError, "bias: expected .*, got float"),
    "bias, shape": (dict(bias=B[:5]), ValueError, r"bias: expected shape \(6,\), got \(5,\)"),
    "bias, dtype": (dict(bias=B.double()), TypeError, "bias: expected .*float32, got .*float64"),
    "bias, device": (dict(bias=B.to("meta")), ValueError, "bias: expected .* cpu, got meta"),
    "stride, zero": (dict(stride=0), ValueError, "stride: expected integers >= 1, got 0"),
    "stride, count": (
        dict(stride=(1, 1, 1)),
        ValueError,
        r"stride: expected an integer or 2 integers, got \(1, 1, 1\)",
    ),
    "stride, type": (dict(stride=1.5), TypeError, "stride: expected .*integers, got float"),
    "stride, item type": (dict(stride=(1, "2")), TypeError, "stride: expected .*integers"),
    "padding, negative": (
        dict(padding=(0, -1)),
        ValueError,
        r"padding: expected .*>= 0, got \(0, -1\)",
    ),
    "padding, word": (
        dict(padding="full"),
        ValueError,
        "padding: expected integers, 'same' or 'valid', got 'full'",
    ),
    "padding, same with stride": (
        dict(padding="same", stride=2),
        ValueError,
        r"padding: expected stride 1 with 'same', got stride \(2, 2\)",
    ),
    "dilation, zero": (dict(dilation=(1, 0)), ValueError, r"dilation: expected integers >= 1, got"),
    "groups, zero": (dict(groups=0), ValueError, "groups: expected a positive divisor .*, got 0"),
    "groups, no divisor": (
        dict(groups=4),
        ValueError,
        "groups: expected .*out_channels = 6, got 4",
    ),
    "groups, type": (dict(groups=1.0), TypeError, "groups: expected an integer, got float"),
    "epilogue, type": (dict(epilogue=3), TypeError, "epilogue: expected a function .*, got int"),
    "epilogue_args, no epilogue": (
        dict(epilogue_args=(B,), bias=None),
        ValueError,
        "epilogue_args: expected none without an epilogue, got 1",
    ),
    "epilogue_args, no epilogue but a bias": (
        dict(epilogue_args=(B,)),
        ValueError,
        "epilogue_args: expected none without an epilogue, got 1",
    ),
    "epilogue_args, a number": (
        dict(epilogue=torch.add, epilogue_args=(1.0,)),
        TypeError,
        r"epilogue_args\[0\]: expected a tensor",
    ),
    "epilogue_args, shape": (
        dict(epilogue=lambda y, a, b: y, epilogue_args=(B[:1], torch.randn(5, 1, 1))),
        ValueError,
        r"epilogue_args\[1\]: expected a shape broadcastable to \(1, 6, 4, 4\), got \(5, 1, 1\)",
    ),
    "epilogue_args, dimensions": (
        dict(epilogue=torch.add, epilogue_args=(torch.randn(1, 1, 1, 1, 1),)),
        ValueError,
        r"epilogue_args\[0\]: expected a shape broadcastable",
    ),
    "epilogue_args, device": (
        dict(epilogue=torch.add, epilogue_args=(torch.ones(1, device="meta"),)),
        ValueError,
        r"epilogue_args\[0\]: expected the input's device cpu, got meta",
    ),
    "precision": (
        dict(precision="fp8"),
        ValueError,
        "precision: expected ieee | tf32x3 | tf32, got 'fp8'",
    ),
    "prologue": (dict(prologue=3), TypeError, "prologue: expected"),
    "prologue_args, without": (
        dict(prologue_args=(X,)),
        ValueError,
        "prologue_args: expected none without a prologue",
    ),
    "prologue_args, no sequence": (
        dict(prologue=torch.mul, prologue_args=X),
        TypeError,
        "prologue_args: expected a sequence of tensors, got Tensor",
    ),
    "precision, half": (
        dict(input=X.half(), weight=K.half(), bias=B.half(), precision="x"),
        ValueError,
        "precision: expected",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_refused(case: tuple[dict[str, Any], type[Exception], str]) -> None:
    changed, error, message = case
    arguments = {"input": X, "weight": K, "bias": B, **changed}
    with pytest.raises(error, match=message) as info:
        tc.conv2d(**arguments)
    assert isinstance(info.value, tc.TritonConvError)


def test_every_argument_has_a_case() -> None:
    tested = {re.split(r"[,\[]", name)[0] for name in CASES}
    assert set(inspect.signature(tc.conv2d).parameters) == tested


def test_epilogues_that_cannot_be_generated() -> None:
    # Their own tests are codegen's; here, that the error reaches the caller by its kind.
    with pytest.raises(tc.TritonConvError, match="where"):
        tc.conv2d(X, K, epilogue=lambda y: y if y > 0 else -y)
    with pytest.raises(tc.TritonConvError):
        tc.conv2d(X, K, epilogue=lambda y: (y, y))
    with pytest.raises(tc.TritonConvError):
        tc.conv2d(X, K, epilogue=lambda y, missing: y)
    with pytest.raises(tc.TritonConvError, match="sort"):
        tc.conv2d(X, K, epilogue=lambda y: torch.sort(y).values)


def test_a_captured_tensor_on_another_device() -> None:
    table = torch.ones(6, device="meta")
    with pytest.raises(ValueError, match="captured tensor 0: expected the input's device cpu"):
        tc.conv2d(X, K, epilogue=lambda y, *, c: y * table[c])


# name: (function, changed arguments, error, message)
OTHERS: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "conv1d, input": (
        "conv1d",
        dict(input=torch.randn(6)),
        ValueError,
        r"input: expected 3 dimensions \(batch, channels, \*spatial\), got \(6,\)",
    ),
    "conv1d, weight": (
        "conv1d",
        dict(weight=K),
        ValueError,
        r"weight: expected 3 dimensions \(out_channels, in_channels / groups, \*kernel\)",
    ),
    "conv1d, stride": (
        "conv1d",
        dict(stride=(1, 1)),
        ValueError,
        r"stride: expected an integer, got \(1, 1\)",
    ),
    "conv1d, padding": (
        "conv1d",
        dict(padding="full"),
        ValueError,
        "padding: expected integers, 'same', 'valid' or 'causal', got 'full'",
    ),
    "conv1d, same": (
        "conv1d",
        dict(padding="same", stride=2),
        ValueError,
        r"padding: expected stride 1 with 'same', got stride \(2,\)",
    ),
    "conv1d, too short": (
        "conv1d",
        dict(input=torch.randn(1, 4, 2)),
        ValueError,
        r"input: expected a padded map at least as large as the dilated kernel \(3,\)",
    ),
    "conv1d, epilogue_args": (
        "conv1d",
        dict(epilogue=torch.add, epilogue_args=(torch.randn(6, 1, 1),)),
        ValueError,
        r"epilogue_args\[0\]: expected a shape broadcastable to \(1, 6, 4\), got \(6, 1, 1\)",
    ),
    "conv2d, causal": (
        "conv2d",
        dict(padding="causal"),
        ValueError,
        "padding: expected integers, 'same' or 'valid', got 'causal'",
    ),
    "conv3d, input": (
        "conv3d",
        dict(input=torch.randn(4, 6)),
        ValueError,
        "input: expected 5 dimensions",
    ),
    "conv3d, dilation": (
        "conv3d",
        dict(dilation=(1, 1)),
        ValueError,
        r"dilation: expected an integer or 3 integers, got \(1, 1\)",
    ),
    "conv_transpose2d, weight": (
        "conv_transpose2d",
        dict(weight=torch.randn(4, 6, 3)),
        ValueError,
        r"weight: expected 4 dimensions \(in_channels, out_channels / groups, \*kernel\)",
    ),
    "conv_transpose2d, channels": (
        "conv_transpose2d",
        dict(weight=torch.randn(3, 6, 3, 3)),
        ValueError,
        r"input: expected 3 channels .*, got 4 channels",
    ),
    "conv_transpose2d, groups": (
        "conv_transpose2d",
        dict(groups=3),
        ValueError,
        "groups: expected a positive divisor of in_channels = 4, got 3",
    ),
    "conv_transpose2d, bias": (
        "conv_transpose2d",
        dict(groups=2),
        ValueError,
        r"bias: expected shape \(12,\), got \(6,\)",
    ),
    "conv_transpose2d, padding": (
        "conv_transpose2d",
        dict(padding="same"),
        ValueError,
        "padding: expected integers for a transposed convolution, got 'same'",
    ),
    "conv_transpose2d, all padded away": (
        "conv_transpose2d",
        dict(padding=4),
        ValueError,
        r"input: expected a map .* got \(1, 4, 6, 6\)",
    ),
    "conv_transpose2d, empty map": (
        "conv_transpose2d",
        dict(input=torch.randn(1, 4, 0, 6)),
        ValueError,
        r"input: expected a map .* got \(1, 4, 0, 6\)",
    ),
    "conv_transpose2d, output_padding": (
        "conv_transpose2d",
        dict(stride=(2, 1), output_padding=(1, 1)),
        ValueError,
        r"output_padding: expected less than the stride \(2, 1\) or the dilation \(1, 1\)",
    ),
    "conv_transpose2d, output_padding, negative": (
        "conv_transpose2d",
        dict(output_padding=-1),
        ValueError,
        "output_padding: expected integers >= 0, got -1",
    ),
    "conv_transpose2d, output_padding, type": (
        "conv_transpose2d",
        dict(output_padding="1"),
        TypeError,
        "output_padding: expected an integer or 2 integers, got str",
    ),
    "conv_transpose2d, epilogue_args": (
        "conv_transpose2d",
        dict(stride=2, epilogue=torch.add, epilogue_args=(torch.randn(6, 6),)),
        ValueError,
        r"epilogue_args\[0\]: expected a shape broadcastable to \(1, 6, 13, 13\), got \(6, 6\)",
    ),
    "conv_transpose3d, precision": (
        "conv_transpose3d",
        dict(precision="fp8"),
        ValueError,
        "precision: expected ieee",
    ),
}


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_the_others_refuse_too(case: tuple[str, dict[str, Any], type[Exception], str]) -> None:
    name, changed, error, message = case
    rank = int(name[-2])
    weight = (4, 6, *[3] * rank) if "transpose" in name else (6, 4, *[3] * rank)
    x = torch.randn(1, 4, *[6] * rank)
    arguments = {"input": x, "weight": torch.randn(weight), "bias": B, **changed}
    with pytest.raises(error, match=message) as info:
        getattr(tc, name)(**arguments)
    assert isinstance(info.value, tc.TritonConvError)


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_signatures_are_pytorchs_and_ours(transposed: bool) -> None:
    names = ["input", "weight", "bias", "stride", "padding"]
    names += ["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"]
    for rank in (1, 2, 3):
        function = getattr(tc, f"conv{'_transpose' if transposed else ''}{rank}d")
        parameters = inspect.signature(function).parameters
        own = ["epilogue", "epilogue_args", "precision"]
        own += [] if transposed else ["prologue", "prologue_args"]
        assert list(parameters) == [*names, *own]
        assert [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY] == own
