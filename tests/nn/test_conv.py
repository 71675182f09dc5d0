"""The module ``tc.nn.Conv2d`` against ``torch.nn.Conv2d``."""

from __future__ import annotations

import pytest
import torch

import tritonconv as tc

CASES = {
    "plain": {},
    "no bias": dict(bias=False),
    "stride": dict(stride=2, padding=1),
    "same": dict(padding="same", kernel_size=(2, 4)),
    "dilation": dict(dilation=(2, 1)),
    "groups": dict(groups=2),
    "reflect": dict(padding=(1, 2), padding_mode="reflect"),
    "circular": dict(padding=1, padding_mode="circular"),
    "replicate same": dict(padding="same", padding_mode="replicate", dilation=2),
    "float64": dict(dtype=torch.float64),
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_equals_torch(options: dict) -> None:
    options = {"kernel_size": 3, **options}
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(4, 6, **options)
    ours = tc.nn.Conv2d(4, 6, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 9, 8, dtype=theirs.weight.dtype, requires_grad=True)
    expected, result = theirs(x), ours(x)
    torch.testing.assert_close(result, expected)
    grads = [
        torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        for y, layer in ((expected, theirs), (result, ours))
    ]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_epilogue_and_its_operands() -> None:
    layer = tc.nn.Conv2d(3, 4, 3, padding=1, epilogue=lambda y, skip: torch.relu(y) + skip)
    x, skip = torch.randn(1, 3, 5, 5), torch.randn(1, 4, 5, 5)
    plain = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x, skip), plain.relu() + skip)
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert "epilogue" in repr(layer)


def test_unknown_precision_is_refused() -> None:
    layer = tc.nn.Conv2d(1, 1, 1, precision="tf16")
    with pytest.raises(ValueError, match=r"precision: expected ieee .* got 'tf16'"):
        layer(torch.randn(1, 1, 2, 2))
