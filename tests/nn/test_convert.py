"""Conversion of models: what is swapped and folded, that results stay, that revert is exact."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import Tensor, nn

import tritonconv as tc
from tritonconv.nn import ConversionReport, convert, revert


class Block(nn.Module):
    """A residual block: the first norm has a ReLU module, the second is followed by a sum."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2 * channels, 2 * channels, 3, 1, 1, groups=2)
        self.bn2 = nn.BatchNorm2d(2 * channels)
        self.down = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1, stride), nn.BatchNorm2d(2 * channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.down(x))


class ResNet(nn.Module):
    """Small, with every ingredient of the large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU())
        self.layers = nn.Sequential(Block(4), Block(8, stride=2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


class Branching(ResNet):
    """Its own forward cannot be traced; its blocks can."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 1e9 else x.clone())


class Shared(nn.Module):
    """One convolution called twice, one activation called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 3, padding=1)
        self.alias = self.twice
        self.once = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.alias(self.twice(x)))
        return self.act(self.bn(self.once(x)))


class Tapped(nn.Module):
    """The convolution's own result leaves the model too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y, self.bn(y)


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms with statistics and parameters that are not the identity; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in module.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


def sequence(*layers: nn.Module) -> nn.Module:
    return trained(nn.Sequential(nn.Conv2d(3, 6, 3), *layers))


def folded(report: ConversionReport) -> dict[str, tuple[str, ...]]:
    return {row.name: row.folded for row in report.converted}


def reasons(report: ConversionReport) -> dict[str, str]:
    return {row.name: row.reason for row in (*report.converted, *report.kept)}


X = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model_type", [ResNet, Branching, Shared])
@pytest.mark.parametrize("fold", [False, True], ids=["swap", "fold"])
def test_results_gradients_and_state_stay(model_type: type[nn.Module], fold: bool) -> None:
    model = trained(model_type())
    plain = copy.deepcopy(model)
    state = dict(model.state_dict(keep_vars=True).items())
    parameters = list(model.parameters())
    modules = dict(model.named_modules())
    report = convert(model, fold=fold)
    assert len(report.converted) == sum(isinstance(m, nn.Conv2d) for m in plain.modules())
    assert all(isinstance(m, tc.nn.Conv2d) for m in model.modules() if isinstance(m, nn.Conv2d))
    assert any(folded(report).values()) == fold
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state) and all(after[name] is state[name] for name in state)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not model.training

    expected, result = plain(X), model(X)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), list(plain.parameters()))
    found = torch.autograd.grad(result.square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=1e-4)

    assert revert(model) is model
    assert dict(model.named_modules()) == modules
    for name, module in plain.named_modules():
        assert type(model.get_submodule(name)) is type(module)
        assert set(model.get_submodule(name).__dict__) == set(module.__dict__)
    assert torch.equal(model(X), expected)


def test_what_is_folded_in_a_residual_network() -> None:
    report = convert(trained(ResNet()), fold=True)
    assert folded(report) == {
        "stem.0": ("stem.1", "stem.2"),
        **{
            f"layers.{i}.{conv}": tuple(f"layers.{i}.{name}" for name in names)
            for i in range(2)
            for conv, names in {
                "conv1": ("bn1", "act1"),
                "conv2": ("bn2",),
                "down.0": ("down.1",),
            }.items()
        },
    }
    assert "read by add" in reasons(report)["layers.0.conv2"]


def test_where_the_model_cannot_be_traced_its_parts_are() -> None:
    report = convert(trained(Branching()), fold=True)
    assert folded(report)["stem.0"] == ("stem.1", "stem.2")
    assert folded(report)["layers.1.conv1"] == ("layers.1.bn1", "layers.1.act1")


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) if y.max() > -1e9 else y


def hooked(at: int) -> nn.Module:
    model = sequence(nn.BatchNorm2d(6), nn.ReLU())
    model[at].register_forward_hook(lambda module, args, output: None)
    return model


def training_norm() -> nn.Module:
    model = sequence(nn.BatchNorm2d(6))
    model[1].train()
    return model


UNFOLDED = {
    "shared convolution": (lambda: trained(Shared()), "twice", (), "called 2 times"),
    "shared activation": (lambda: trained(Shared()), "once", ("bn",), "act is called 2 times"),
    "tapped": (lambda: trained(Tapped()), "conv", (), "read 2 times"),
    "untraced": (lambda: trained(Untraceable()), "conv", (), "not traced: TraceError"),
    "hook on the convolution": (lambda: hooked(0), "0", (), "has hooks"),
    "hook on the norm": (lambda: hooked(1), "0", (), "1 has hooks"),
    "hook on the activation": (lambda: hooked(2), "0", ("1",), "2 has hooks"),
    "norm in training": (training_norm, "0", (), "1 is in training mode"),
    "norm without statistics": (
        lambda: sequence(nn.BatchNorm2d(6, track_running_stats=False)),
        "0",
        (),
        "1 has no running statistics",
    ),
    "another layer": (lambda: sequence(nn.MaxPool2d(2)), "0", (), "followed by MaxPool2d 1"),
    "another norm": (lambda: sequence(nn.GroupNorm(2, 6)), "0", (), "followed by GroupNorm 1"),
    "alone": (lambda: sequence(), "0", (), "is returned"),
}


@pytest.mark.parametrize("case", UNFOLDED.values(), ids=UNFOLDED)
def test_what_cannot_be_folded_says_why(case: tuple) -> None:
    build, name, modules, reason = case
    model = build()
    plain = copy.deepcopy(model)
    report = convert(model, fold=True)
    assert folded(report)[name] == modules
    assert reason in reasons(report)[name]
    assert reason in str(report)
    torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-5)


ACTIVATIONS = [
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.LeakyReLU(0.3),
    nn.ELU(0.7),
    nn.SELU(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.SiLU(),
    nn.Mish(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.Softplus(beta=2.0, threshold=3.0),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.Hardtanh(-0.3, 0.6),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "bare"])
def test_activations(activation: nn.Module, norm: bool) -> None:
    model = sequence(*([nn.BatchNorm2d(6)] if norm else []), copy.deepcopy(activation))
    with torch.no_grad():
        expected = model(X)
        assert folded(convert(model, fold=True))["0"] == (("1", "2") if norm else ("1",))
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(revert(model)(X), expected)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_folding_in_other_dtypes(dtype: torch.dtype, affine: bool) -> None:
    model = sequence(nn.BatchNorm2d(6, affine=affine), nn.ReLU())
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(X.double())
        convert(model.to(dtype), fold=True)
        result = model(X.to(dtype))
    assert result.dtype is dtype
    tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-12
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def test_folded_norms_follow_their_parameters() -> None:
    model, other = sequence(nn.BatchNorm2d(6), nn.ReLU()), sequence(nn.BatchNorm2d(6), nn.ReLU())
    trained(other, seed=7)
    convert(model, fold=True)
    with torch.no_grad():
        model(X)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(X), other(X), rtol=1e-4, atol=1e-5)
        for _ in range(3):
            model[1].running_mean = other[1].running_mean = torch.rand(6)
            torch.testing.assert_close(model(X), other(X), rtol=1e-4, atol=1e-5)
        other[1].bias.add_(1)
        model[1].bias.add_(1)
        torch.testing.assert_close(model(X), other(X), rtol=1e-4, atol=1e-5)
        model.double(), other.double()
        torch.testing.assert_close(model(X.double()), other(X.double()))
    with torch.inference_mode():
        torch.testing.assert_close(model(X.double()), other(X.double()))


def test_training_a_folded_model_is_refused() -> None:
    model = sequence(nn.BatchNorm2d(6))
    convert(model, fold=True)
    model.train()
    with pytest.raises(tc.TritonConvError, match="revert"):
        model(X)
    revert(model)
    before = model[1].running_mean.clone()
    model(X)
    assert not torch.equal(model[1].running_mean, before)


def test_folding_a_model_in_training_mode_is_refused_before_any_change() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(
        ValueError, match=r"fold: expected a model in eval mode .* got training mode"
    ):
        convert(model, fold=True)
    assert type(model[0]) is nn.Conv2d


class Subclass(nn.Conv2d):
    pass


class Transposed(nn.ConvTranspose1d):
    pass


def instance_forward() -> nn.Module:
    layer = nn.Conv2d(3, 4, 3)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


KEPT = {
    "lazy": (lambda: nn.LazyConv2d(4, 3), "lazy"),
    "subclass": (lambda: Subclass(3, 4, 3), "subclass of Conv2d: .*Subclass"),
    "subclass, transposed": (lambda: Transposed(3, 4, 3), "subclass of ConvTranspose1d: .*"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        "parametrized",
    ),
    "spectral norm": (lambda: nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), "weight is computed"),
    "complex": (lambda: nn.Conv2d(3, 4, 3, dtype=torch.complex64), "no kernel for dtype"),
    "instance forward": (instance_forward, "replaced on the instance"),
}


@pytest.mark.parametrize("case", KEPT.values(), ids=KEPT)
def test_what_is_kept_says_why(case: tuple) -> None:
    build, reason = case
    model = nn.Sequential(build(), nn.Conv2d(4, 4, 1))
    kind = type(model[0])
    report = convert(model)
    assert [row.name for row in report.converted] == ["1"]
    (row,) = report.kept
    assert row.name == "0" and type(model[0]) is kind
    assert re.search(reason, row.reason)
    assert row.reason in str(report) and "1 converted, 1 kept" in str(report)


def test_hooks_memory_format_and_requires_grad_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    model[0].bias.requires_grad_(False)
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    convert(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].bias.requires_grad
    assert model(X.to(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )
    assert seen == [tc.nn.Conv2d]


def test_a_bare_convolution_and_twice_converted() -> None:
    layer = nn.Conv2d(3, 4, 3)
    assert [row.name for row in convert(layer).converted] == [""]
    assert type(layer) is tc.nn.Conv2d
    assert convert(layer) == ConversionReport((), ())
    assert type(revert(layer)) is nn.Conv2d and type(revert(layer)) is nn.Conv2d


def test_our_own_layers_are_folded_too_and_keep_their_class() -> None:
    model = trained(nn.Sequential(tc.nn.Conv2d(3, 4, 3, precision="ieee"), nn.BatchNorm2d(4)))
    with torch.no_grad():
        expected = model(X)
        assert folded(convert(model, fold=True)) == {"0": ("1",)}
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
        revert(model)
        assert type(model[0]) is tc.nn.Conv2d and model[0].precision == "ieee"
        assert torch.equal(model(X), expected)
    busy = trained(nn.Sequential(tc.nn.Conv2d(3, 4, 3, epilogue=torch.relu), nn.BatchNorm2d(4)))
    assert reasons(convert(busy, fold=True)) == {"0": "has an epilogue already"}


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_converted_models_can_be_copied(clone) -> None:
    model = sequence(nn.BatchNorm2d(6), nn.LeakyReLU(0.2))
    with torch.no_grad():
        expected = model(X)
        convert(model, fold=True)
        other = clone(model)
        other[1].bias.add_(1)  # reaches the copy alone
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
        revert(model), revert(other)
        assert torch.equal(model(X), expected)
        assert not torch.equal(other(X), expected)


def test_compiled(recwarn: pytest.WarningsRecorder) -> None:
    model = trained(Block(3))
    with torch.no_grad():
        expected = model(X)
        convert(model, fold=True)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X), expected, rtol=1e-4, atol=1e-5)
        model.bn1.running_mean.add_(1)
        changed = compiled(X)
        assert not torch.allclose(changed, expected)
        torch.testing.assert_close(revert(model)(X), changed, rtol=1e-4, atol=1e-5)


@pytest.mark.interpreter
def test_folded_on_the_kernels(device: torch.device) -> None:
    model = sequence(nn.BatchNorm2d(6), nn.SiLU()).to(device)
    with torch.no_grad():
        expected = model(X.to(device))
        convert(model, fold=True)
        torch.testing.assert_close(model(X.to(device)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("function", [convert, revert])
def test_no_module(function) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        function(3)
