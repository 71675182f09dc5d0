"""Conversion of timm's models: the same outputs, and how much of them is folded.

On a machine without a GPU both sides run PyTorch's kernels, which checks the conversion; with one
the library's run, within the budget of the dtype.
"""

from __future__ import annotations

import copy
import pickle
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonconv as tc

# name: (input size, least number of convolutions with something folded into them)
MODELS = {
    "resnet50": (64, 52),
    "convnext_tiny": (64, 0),
    "mobilenetv3_large_100": (64, 60),
    "efficientnet_b0": (64, 80),
}


def timm() -> Any:
    try:
        return __import__("timm")
    except Exception as error:  # a torchvision of another build fails in ways of its own
        pytest.skip(f"timm cannot be imported: {error}")


def trained(model: nn.Module) -> nn.Module:
    """Statistics that are not the identity and do not blow up over fifty layers."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.8, 1.2, generator=generator)
    return model.eval()


def assert_same_outputs(name: str, device: str, dtype: torch.dtype, fold: bool) -> None:
    size, least = MODELS[name]
    torch.manual_seed(0)
    model = trained(timm().create_model(name)).to(device, dtype)
    x = torch.randn(2, 3, size, size, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        wanted, plain = exact(x.double()), model(x)
        report = tc.nn.convert(model, fold=fold)
        assert not report.kept
        assert sum(bool(row.folded) for row in report.converted) >= (least if fold else 0)
        found = model(x)
    scale = wanted.abs().max()
    error, plain_error = ((t.double() - wanted).abs().max() / scale for t in (found, plain))
    assert error <= 4 * plain_error + 4 * torch.finfo(dtype).eps, (error, plain_error)
    tc.nn.revert(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain)


@pytest.mark.parametrize("fold", [False, True], ids=["swap", "fold"])
@pytest.mark.parametrize("name", MODELS)
def test_same_outputs(name: str, fold: bool) -> None:
    assert_same_outputs(name, "cpu", torch.float32, fold)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_same_outputs_on_the_kernels(name: str, dtype: torch.dtype) -> None:
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert_same_outputs(name, "cuda", dtype, fold=True)


class BatchNormAct2d(nn.BatchNorm2d):
    """What timm's class of this name does."""

    def __init__(self, channels: int, act: nn.Module, drop: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop, self.act = drop or nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4
        return self.act(self.drop(super().forward(x)))


BatchNormAct2d.__module__ = "timm.layers.norm_act"


def network(act: nn.Module, drop: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act, drop), nn.Identity(), nn.ReLU()
    return trained(nn.Sequential(*layers))


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timm that has the class where pickle looks for it."""
    for name in ("timm", "timm.layers", "timm.layers.norm_act"):
        module = ModuleType(name)
        module.BatchNormAct2d = BatchNormAct2d  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize(
    ("act", "folded"), [(nn.SiLU(), ("1",)), (nn.Identity(), ("1", "3"))], ids=str
)
def test_norms_with_an_activation_in_them(act: nn.Module, folded: tuple[str, ...]) -> None:
    model, x = network(act), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        expected = model(x)
        (row,) = tc.nn.convert(model, fold=True).converted
        assert row.folded == folded
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), model(x))
        model.train()
        with pytest.raises(tc.TritonConvError, match="revert"):
            model(x)
        model.eval()
        assert torch.equal(tc.nn.revert(model)(x), expected)
    assert type(model[1]) is BatchNormAct2d


@pytest.mark.parametrize(
    ("act", "drop", "reason"),
    [
        (nn.ReLU(), nn.Dropout(), "1 has Dropout in it"),
        (nn.Softmax(1), None, "1 has Softmax in it"),
    ],
    ids=["drop", "act"],
)
def test_what_is_not_known_inside_a_norm(act: nn.Module, drop: Any, reason: str) -> None:
    model, x = network(act, drop), torch.randn(2, 3, 6, 6)
    expected = model(x)
    (row,) = tc.nn.convert(model, fold=True).converted
    assert row.folded == () and reason in row.reason
    torch.testing.assert_close(model(x), expected)


def test_a_hooked_identity_is_not_passed_over() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.ReLU()))
    model[1].register_forward_hook(lambda module, args, output: None)
    (row,) = tc.nn.convert(model, fold=True).converted
    assert row.folded == () and "Identity 1" in row.reason
