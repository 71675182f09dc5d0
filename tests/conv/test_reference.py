"""The specification itself: right values, and right derivatives of first and second order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tritonconv as tc
from tritonconv.conv import reference

from .oracle import plain_conv

# name: (input, weight, stride, (low, high) per axis, dilation, groups)
GEOMETRIES = {
    "stride and padding": ((1, 2, 5, 4), (2, 2, 3, 2), (2, 1), ((1, 1), (0, 0)), (1, 1), 1),
    "one-sided padding": ((1, 2, 3, 4), (2, 2, 2, 2), (1, 1), ((0, 1), (0, 1)), (1, 1), 1),
    "dilation and groups": ((2, 4, 4, 4), (2, 2, 2, 2), (1, 2), ((1, 1), (1, 1)), (2, 1), 2),
    "1 axis": ((2, 2, 6), (3, 2, 3), (2,), ((1, 1),), (1,), 1),
    "3 axes": ((1, 2, 3, 2, 3), (2, 1, 2, 1, 2), (1, 1, 2), ((1, 0), (0, 0), (0, 1)), (1, 1, 1), 2),
}


@pytest.mark.parametrize("case", GEOMETRIES.values(), ids=GEOMETRIES)
def test_gradcheck(case: tuple) -> None:
    x_shape, w_shape, *geometry = case
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (x_shape, w_shape)]
    inputs.append(torch.randn(w_shape[0], dtype=torch.float64, requires_grad=True))

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return reference.conv(x, w, b, *geometry)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("function", [reference.conv, None], ids=["reference", "conv2d"])
def test_gradcheck_with_an_epilogue(function: object) -> None:
    shapes = [(1, 2, 3, 3), (2, 2, 2, 2), (2,), (1, 2, 2, 2), (2,)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def run(x: Tensor, w: Tensor, b: Tensor, r: Tensor, slope: Tensor) -> Tensor:
        def epilogue(y: Tensor, r: Tensor, *, c: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(y * slope[c]) * r + slope[(c + h) % 2] * y

        if function is None:
            return tc.conv2d(x, w, b, epilogue=epilogue, epilogue_args=(r,))
        geometry = ((1, 1), ((0, 0), (0, 0)), (1, 1), 1)
        return reference.conv(x, w, b, *geometry, epilogue, (r,))

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_equals_pytorch() -> None:
    x, w, b = (torch.randn(s, dtype=torch.float64) for s in ((2, 4, 6, 5), (6, 2, 3, 2), (6,)))
    result = reference.conv(x, w, b, (2, 1), ((1, 1), (2, 2)), (1, 2), 2, torch.relu)
    expected = plain_conv(
        x, w, b, torch.relu, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2
    )
    torch.testing.assert_close(result, expected)
