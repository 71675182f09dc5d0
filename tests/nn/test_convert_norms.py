"""Conversion of batch norms: what is swapped, which activations they take over, the way back."""

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

X = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(1))


class BatchNormAct2d(nn.BatchNorm2d):
    """What timm's class of this name does."""

    def __init__(self, channels: int, act: nn.Module, drop: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop, self.act = drop or nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4
        return self.act(self.drop(super().forward(x)))


BatchNormAct2d.__module__ = "timm.layers.norm_act"


class Block(nn.Module):
    """The norms of a residual block: an activation module, a sum, a function behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.act1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU()
        self.drop = nn.Identity()
        self.bn2, self.bn3 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.drop(self.bn1(self.conv(x))))
        return F.hardswish(self.bn3(self.act2(self.bn2(y) + x)))


class Changing(nn.Module):
    """In training something else reads the norm's result too."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return self.act(y) + y if self.training else self.act(y)


class Sharing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.act = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.two(self.act(self.one(x))))


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda m, args, out: out + 1)
    return module


def steps(model: nn.Module, count: int = 2) -> list[Tensor]:
    """Results, gradients and buffers of training steps, and a result in eval mode."""
    found = []
    model.train()
    for step in range(count):
        x = (X * (step + 1)).requires_grad_()
        y = model(x)
        grads = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
        found += [y, *grads]
    found += list(model.buffers())
    model.eval()
    with torch.no_grad():
        found.append(model(X))
    model.train()
    return found


def rows(model: nn.Module, **options: bool) -> dict[str, tuple[tuple[str, ...], str]]:
    return {
        row.name: (row.folded, row.reason)
        for row in convert(model, **{"batch_norm": True, **options}).converted
        if row.kind.startswith("BatchNorm")
    }


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[tuple[str, ...], str]]]] = {
    "block": (
        Block,
        {
            "bn1": (("act1",), ""),
            "bn2": ((), "its result is read by add"),
            "bn3": ((), "its result is read by hardswish"),
        },
    ),
    "modes": (Changing, {"bn": ((), "its result is read 2 times")}),
    "shared activation": (
        Sharing,
        {"one": ((), "act is called 2 times"), "two": ((), "act is called 2 times")},
    ),
    "sequence": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.GELU(), nn.BatchNorm2d(4), nn.Dropout2d(0.0)),
        {"0": (("1",), ""), "2": ((), "followed by Dropout2d 3")},
    ),
    "hooks": (
        lambda: nn.Sequential(
            hooked(nn.BatchNorm2d(4)), nn.ReLU(), nn.BatchNorm2d(4), hooked(nn.ReLU())
        ),
        {"0": ((), "has hooks"), "2": ((), "3 has hooks")},
    ),
    "timm": (
        lambda: nn.Sequential(
            BatchNormAct2d(4, nn.SiLU()), BatchNormAct2d(4, nn.Identity()), nn.ReLU()
        ),
        {"0": ((), ""), "1": (("2",), "")},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_training_and_evaluation_stay_the_same(name: str) -> None:
    torch.manual_seed(0)
    make, expected = MODELS[name]
    model = make()
    plain = copy.deepcopy(model)
    state = dict(model.state_dict(keep_vars=True))
    assert rows(model) == expected
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state) and all(after[key] is state[key] for key in state)
    torch.testing.assert_close(steps(model), steps(plain), rtol=2e-4, atol=2e-4)
    assert revert(model) is model
    for path, module in plain.named_modules():
        assert type(model.get_submodule(path)) is type(module)
        assert set(model.get_submodule(path).__dict__) == set(module.__dict__)
    torch.testing.assert_close(steps(model), steps(plain), rtol=1e-3, atol=1e-3)


def test_what_is_kept() -> None:
    class Other(nn.BatchNorm2d):
        pass

    replaced = nn.BatchNorm2d(4)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    parametrized = nn.BatchNorm2d(4)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    layers = {
        "sync": nn.SyncBatchNorm(4),
        "lazy": nn.LazyBatchNorm2d(),
        "other": Other(4),
        "replaced": replaced,
        "parametrized": parametrized,
        "dropping": BatchNormAct2d(4, nn.ReLU(), nn.Dropout(0.1)),
        "unknown": BatchNormAct2d(4, nn.Hardshrink()),
        "hooked": BatchNormAct2d(4, hooked(nn.ReLU())),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    kinds = {name: type(layer) for name, layer in layers.items()}
    report = convert(model, batch_norm=True)
    assert not report.converted
    assert {row.name: row.reason.split(":")[0].split(",")[0] for row in report.kept} == {
        "sync": "its statistics are of several processes",
        "lazy": "lazy",
        "other": "subclass of a batch norm",
        "replaced": "its forward was replaced on the instance",
        "parametrized": "its parameters are parametrized",
        "dropping": "has Dropout in it",
        "unknown": "has Hardshrink in it",
        "hooked": "has ReLU in it",
    }
    assert {name: type(layer) for name, layer in model.named_children()} == kinds


def test_norms_are_left_alone_unless_asked_for() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    (row,) = convert(model).converted
    assert row.kind == "Conv2d" and type(model[1]) is nn.BatchNorm2d


def test_folding_after_converting() -> None:
    """What a first call made of the norms does not stand in the way of folding them."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    plain = copy.deepcopy(model)
    convert(model, batch_norm=True)
    model.eval(), plain.eval()
    report = convert(model, fold=True)
    assert [row.folded for row in report.converted] == [("1", "2")]
    torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-5)
    revert(model)
    assert [type(m) for m in model] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


def test_our_own_norms_take_activations_and_give_them_back() -> None:
    model = nn.Sequential(tc.nn.BatchNorm2d(4), nn.ReLU(), tc.nn.BatchNorm2d(4, activation=F.silu))
    plain = copy.deepcopy(model)
    assert rows(model) == {"0": (("1",), "")}
    assert rows(model) == {}
    torch.testing.assert_close(steps(model), steps(plain))
    revert(model)
    assert model[0].activation is None and type(model[1]) is nn.ReLU
    assert model[2].activation is F.silu


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_converted_models_can_be_copied(
    clone: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("timm", "timm.layers", "timm.layers.norm_act"):
        module = ModuleType(name)
        module.BatchNormAct2d = BatchNormAct2d  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), BatchNormAct2d(4, nn.SiLU()))
    convert(model, batch_norm=True)
    other = clone(model)
    torch.testing.assert_close(steps(other), steps(copy.deepcopy(model)))
    revert(other)
    assert [type(m) for m in other] == [nn.BatchNorm2d, nn.ReLU, BatchNormAct2d]
    assert type(model[1]) is not nn.ReLU  # the copy was reverted alone
