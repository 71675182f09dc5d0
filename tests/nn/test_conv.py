"""The modules of ``tc.nn`` against those of ``torch.nn``."""

from __future__ import annotations

import pytest
import torch

import tritonconv as tc

CASES = {
    "plain": {},
    "no bias": dict(bias=False),
    "stride": dict(stride=2, padding=1),
    "same": dict(padding="same", kernel_size=(2, 4, 3)),
    "dilation": dict(dilation=(2, 1, 2)),
    "groups": dict(groups=2),
    "reflect": dict(padding=(1, 2, 1), padding_mode="reflect"),
    "circular": dict(padding=1, padding_mode="circular"),
    "replicate same": dict(padding="same", padding_mode="replicate", dilation=2),
    "float64": dict(dtype=torch.float64),
}
TRANSPOSED = {
    "plain": {},
    "no bias": dict(bias=False),
    "doubled": dict(stride=2, padding=1, output_padding=1),
    "patches": dict(kernel_size=2, stride=2),
    "dilation": dict(dilation=(2, 1, 2), padding=(1, 0, 1), output_padding=(1, 0, 1)),
    "groups": dict(groups=2, stride=(1, 2, 3)),
    "float64": dict(dtype=torch.float64),
}
RANKS = pytest.mark.parametrize("rank", [1, 2, 3])


def cut(options: dict, rank: int) -> dict:
    """Options for three axes, those of the last ones left."""
    return {k: v[-rank:] if isinstance(v, tuple) else v for k, v in options.items()}


def assert_equals_torch(name: str, rank: int, options: dict, *args: object) -> None:
    options = cut({"kernel_size": 3, **options}, rank)
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(4, 6, **options)
    ours = getattr(tc.nn, name)(4, 6, **options)
    assert isinstance(ours, getattr(torch.nn, name))
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(theirs)
    x = torch.randn(2, 4, *(7, 6, 8)[-rank:], dtype=theirs.weight.dtype, requires_grad=True)
    expected, result = theirs(x, *args), ours(x, *args)
    torch.testing.assert_close(result, expected)
    grads = [
        torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        for y, layer in ((expected, theirs), (result, ours))
    ]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ours(x[0], *args), theirs(x[0], *args))


@RANKS
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_equals_torch(options: dict, rank: int) -> None:
    assert_equals_torch(f"Conv{rank}d", rank, options)


@RANKS
@pytest.mark.parametrize("options", TRANSPOSED.values(), ids=TRANSPOSED)
def test_transposed_equals_torch(options: dict, rank: int) -> None:
    assert_equals_torch(f"ConvTranspose{rank}d", rank, options)


@RANKS
def test_output_size(rank: int) -> None:
    options = dict(stride=2, padding=1)
    sizes = [13, 12, 15], [14, 11, 16]
    for size in sizes:
        assert_equals_torch(f"ConvTranspose{rank}d", rank, options, size[-rank:])
    layer = getattr(tc.nn, f"ConvTranspose{rank}d")(2, 2, 3, stride=2)
    with pytest.raises(ValueError, match="requested an output size"):
        layer(torch.randn(1, 2, *[4] * rank), [12] * rank)
    with pytest.raises(TypeError, match=r"output_size: expected sizes or None.*got a tensor"):
        layer(torch.randn(1, 2, *[4] * rank), torch.ones(1))


@RANKS
def test_epilogue_and_its_operands(rank: int) -> None:
    for name, before in ((f"Conv{rank}d", ()), (f"ConvTranspose{rank}d", (None,))):
        layer = getattr(tc.nn, name)(
            3, 4, 3, padding=1, epilogue=lambda y, skip: torch.relu(y) + skip
        )
        x, skip = torch.randn(1, 3, *[5] * rank), torch.randn(1, 4, *[5] * rank)
        plain = getattr(torch.nn, name)(3, 4, 3, padding=1)
        plain.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x, *before, skip), plain(x).relu() + skip)
        assert set(layer.state_dict()) == {"weight", "bias"}
        assert "epilogue" in repr(layer)


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_causal(mode: str) -> None:
    layer = tc.nn.Conv1d(2, 3, 3, padding="causal", dilation=2, padding_mode=mode)
    x = torch.randn(2, 2, 9)
    padded = torch.nn.functional.pad(x, (4, 0), mode="constant" if mode == "zeros" else mode)
    expected = torch.nn.functional.conv1d(padded, layer.weight, layer.bias, dilation=2)
    torch.testing.assert_close(layer(x), expected)
    assert "padding=causal" in repr(layer)
    with pytest.raises(ValueError, match="padding"):
        tc.nn.Conv2d(2, 3, 3, padding="causal")


def test_unknown_precision_is_refused() -> None:
    layer = tc.nn.Conv2d(1, 1, 1, precision="tf16")
    with pytest.raises(ValueError, match=r"precision: expected ieee .* got 'tf16'"):
        layer(torch.randn(1, 1, 2, 2))
