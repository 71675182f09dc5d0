"""Inference modules of float8 convolutions."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import tritonconv as tc
from tritonconv.conv.scaled_ops import NoGradientError

FLOAT8 = torch.float8_e4m3fn
MODULES = {
    1: (torch.nn.Conv1d, tc.nn.ScaledConv1d),
    2: (tc.nn.Conv2d, tc.nn.ScaledConv2d),
    3: (torch.nn.Conv3d, tc.nn.ScaledConv3d),
}


@pytest.mark.parametrize("rank", MODULES)
def test_close_to_the_module_that_it_is_made_of(rank: int) -> None:
    torch.manual_seed(0)
    plain, quantised = MODULES[rank]
    conv = plain(16, 8, 3, stride=2, padding=1, groups=2)
    x = torch.randn(2, 16, *(9, 8, 7)[:rank])
    small = quantised.from_float(conv, x.abs().max() / 448, epilogue=torch.relu)
    wanted = F.relu(conv(x))
    found = small(x)
    assert found.dtype is torch.bfloat16
    assert (found - wanted).norm() < 0.05 * wanted.norm()
    assert small.state_dict().keys() == {"weight", "bias", "scale_weight", "scale_input"}


def test_a_chain_stays_in_float8() -> None:
    torch.manual_seed(0)
    first, second = torch.nn.Conv2d(16, 32, 3, padding=1), tc.nn.Conv2d(32, 8, 1, bias=False)
    x = torch.randn(2, 16, 7, 6)
    with torch.no_grad():
        middle = F.gelu(first(x))
        wanted = second(middle)
    scale = float(middle.abs().max() / 448)
    one = tc.nn.ScaledConv2d.from_float(
        first, float(x.abs().max() / 448), scale_output=scale, epilogue=F.gelu
    )
    two = tc.nn.ScaledConv2d.from_float(second, scale, out_dtype=torch.float32)
    assert one(x).dtype is FLOAT8
    found = two(one(x))
    assert found.dtype is torch.float32
    assert (found - wanted).norm() < 0.08 * wanted.norm()
    chain = copy.deepcopy(torch.nn.Sequential(one, two)).to(torch.float64).bfloat16()
    assert torch.equal(chain(x), found)
    loaded = torch.nn.Sequential(copy.deepcopy(one), two)
    loaded[0].scale_input.zero_()
    loaded.load_state_dict(chain.state_dict())
    assert torch.equal(loaded(x), found)
    assert "out_dtype=torch.float32" in repr(two) and "epilogue=gelu" in repr(one)


def test_refused() -> None:
    with pytest.raises(TypeError, match="conv: expected a Conv2d, got Conv1d"):
        tc.nn.ScaledConv2d.from_float(torch.nn.Conv1d(4, 4, 3), 1.0)
    reflecting = torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    with pytest.raises(ValueError, match="padding_mode 'zeros', got 'reflect'"):
        tc.nn.ScaledConv2d.from_float(reflecting, 1.0)
    small = tc.nn.ScaledConv2d.from_float(torch.nn.Conv2d(4, 4, 3), 1.0)
    with pytest.raises(NoGradientError):
        small(torch.randn(1, 4, 5, 5, requires_grad=True))
