"""Conversion of layer norms, PyTorch's and those that timm and torchvision derive."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonconv as tc
from tritonconv.nn import convert, revert

from .graph_cases import counts, eager_reasons

pytestmark = pytest.mark.interpreter


class LayerNorm(nn.LayerNorm):
    """What timm's class of this name does."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps=eps)
        self._fast_norm = False

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class LayerNorm2d(LayerNorm):
    """Over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


LayerNorm.__module__ = LayerNorm2d.__module__ = "timm.layers.norm"


class Block(nn.Module):
    """A block of ConvNeXt and the downsampling in front of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm0 = LayerNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = LayerNorm(channels)
        self.one, self.two = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.head = nn.LayerNorm(channels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(x)
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.two(F.gelu(self.one(y))).permute(0, 3, 1, 2)
        x = x + y * self.gamma.reshape(1, -1, 1, 1)
        return self.head(x.mean((2, 3)))


def block(channels: int = 7) -> Block:
    torch.manual_seed(0)
    model = Block(channels)
    for norm in (model.norm0, model.norm, model.head):
        nn.init.normal_(norm.weight, 1.0), nn.init.normal_(norm.bias)
    return model


def step(model: nn.Module, x: Tensor, amp: bool = False) -> list[Tensor]:
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        y = model(x)
    return [y.detach(), *torch.autograd.grad(y.float().pow(3).mean(), [x, *model.parameters()])]


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
def test_a_block_trains_as_before(
    amp: bool, form: torch.memory_format, device: torch.device
) -> None:
    model = block().to(device, memory_format=form)
    plain = copy.deepcopy(model)
    state = dict(model.state_dict(keep_vars=True))
    report = convert(model, layer_norm=True)
    kinds = {row.name: row.kind for row in report.converted}
    assert kinds == {
        "norm0": "LayerNorm2d",
        "conv": "Conv2d",
        "norm": "LayerNorm",
        "head": "LayerNorm",
    }
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state) and all(after[key] is state[key] for key in state)
    x = torch.randn(2, 7, 5, 4, generator=torch.Generator().manual_seed(1)).to(device)
    x = x.contiguous(memory_format=form)
    tolerance = dict(rtol=0.1, atol=0.1) if amp else dict(rtol=1e-3, atol=1e-4)
    found, wanted = step(model, x, amp), step(plain, x, amp)
    assert found[0].dtype is (torch.bfloat16 if amp else torch.float32)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), **tolerance)
    assert not convert(model, layer_norm=True).converted
    assert revert(model) is model
    for path, module in plain.named_modules():
        assert type(model.get_submodule(path)) is type(module)
        assert set(model.get_submodule(path).__dict__) == set(module.__dict__)
    torch.testing.assert_close(step(model, x), step(plain, x), rtol=1e-4, atol=1e-5)


def test_steps_as_cuda_graphs_are_the_eager_ones(place: str) -> None:
    eager = block(8).to(place, memory_format=torch.channels_last).train()
    ours = copy.deepcopy(eager)
    convert(eager, layer_norm=True)
    assert convert(ours, layer_norm=True, cuda_graph=True).cuda_graph
    for seed in range(3):
        x = torch.randn(2, 8, 5, 4, generator=torch.Generator().manual_seed(seed)).to(place)
        for model in (eager, ours):
            with torch.autocast(place, torch.bfloat16):
                y = model(x.contiguous(memory_format=torch.channels_last))
            assert y.dtype is torch.bfloat16
            y.float().square().mean().backward()
    for mine, theirs in zip(ours.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=3e-2, atol=3e-2)
    assert counts(ours) == (1, 3) and not eager_reasons(ours)


def test_layer_norms_are_left_alone_unless_asked_for() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), LayerNorm2d(4))
    (row,) = convert(model, batch_norm=True).converted
    assert row.kind == "Conv2d" and type(model[1]) is LayerNorm2d


def test_what_is_kept() -> None:
    class Other(nn.LayerNorm):
        pass

    class LayerNormExp2d(LayerNorm):
        pass

    LayerNormExp2d.__module__ = "timm.layers.norm"
    replaced, parametrized = nn.LayerNorm(4), nn.LayerNorm(4)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    layers = {
        "other": Other(4),
        "experiment": LayerNormExp2d(4),
        "replaced": replaced,
        "parametrized": parametrized,
    }
    model = nn.ModuleDict(layers)
    kinds = {name: type(layer) for name, layer in layers.items()}
    report = convert(model, layer_norm=True)
    assert not report.converted
    assert {row.name: row.reason.split(":")[0] for row in report.kept} == {
        "other": "subclass of a layer norm",
        "experiment": "subclass of a layer norm",
        "replaced": "its forward was replaced on the instance",
        "parametrized": "its parameters are parametrized",
    }
    assert {name: type(layer) for name, layer in model.items()} == kinds


@pytest.mark.parametrize("at_once", [False, True])
def test_what_else_is_in_the_model_is_folded(at_once: bool) -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), tc.nn.LayerNorm2d(4)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8)).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    if not at_once:
        convert(model, layer_norm=True)
    report = str(convert(model, fold=True, layer_norm=at_once))
    assert "+ 1 + 2" in report and "not traced" not in report
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_hooks_and_modes_stay() -> None:
    model = nn.Sequential(nn.LayerNorm(4)).eval()
    model[0].register_forward_hook(lambda m, args, out: out + 1)
    x = torch.randn(3, 4)
    before = model(x)
    convert(model, layer_norm=True)
    assert type(model[0]) is tc.nn.LayerNorm and not model[0].training
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_converted_models_can_be_copied(
    clone: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("timm", "timm.layers", "timm.layers.norm"):
        module = ModuleType(name)
        module.LayerNorm2d = LayerNorm2d  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    model = nn.Sequential(LayerNorm2d(4))
    convert(model, layer_norm=True)
    other = clone(model)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(other(x), model(x))
    assert type(revert(other)[0]) is LayerNorm2d and type(model[0]) is tc.nn.LayerNorm2d
