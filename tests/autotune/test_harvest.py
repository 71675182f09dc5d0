"""Models by name, and the problems they meet."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import tritonconv as tc
from tritonconv.autotune import harvest
from tritonconv.autotune.cli import app
from tritonconv.autotune.extras import MissingExtraError
from tritonconv.autotune.harvest import build_model, harvest_named, input_channels, resolve
from tritonconv.runtime.errors import ArgumentValueError

ROOT = Path(__file__).parents[2]
ME = __name__


class Plain(nn.Module):
    """A network that knows nothing of this library."""

    def __init__(self, in_chans: int = 3, width: int = 8, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_chans, width, 3, padding=1, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


def passes_on(**options: Any) -> Plain:
    return Plain(**options)


def fails(width: int = 8) -> Plain:
    raise TypeError("a mistake inside")


@pytest.fixture(autouse=True)
def torch_backend() -> Any:
    """Harvesting needs problems, not kernels."""
    with tc.backend("torch"):
        yield


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package that registers a name."""
    points = (
        EntryPoint("plain", f"{ME}:Plain", harvest.MODEL_GROUP),
        EntryPoint("gone", "no_such_package.nets:build", harvest.MODEL_GROUP),
    )
    monkeypatch.setattr(harvest, "entry_points", lambda group: points)


def test_our_models_are_registered_and_lead_somewhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = project["entry-points"][harvest.MODEL_GROUP]
    assert "attention_unet" in ours
    for target in ours.values():
        assert callable(resolve(target))
    found = {model.name: model.target for model in harvest.model_names()}
    assert ours.items() <= found.items(), "installed before the name was added: pip install -e ."


def test_other_packages_can_register_names(registered: None) -> None:
    assert [model.name for model in harvest.model_names()] == ["gone", "plain"]
    assert resolve("plain") is Plain
    assert isinstance(build_model("plain", {"width": 4}), Plain)
    with pytest.raises(ArgumentValueError, match="no_such_package"):
        resolve("gone")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("plane", r"gone \| plain \| package.module:callable \| timm:NAME, got 'plane'; did you"),
        ("nothing_like_it", "'nothing_like_it'$"),
        ("no_such_module:build", "importable module"),
        ("math:no_such_thing", "attribute of math"),
        (":x", "package.module:callable"),
        ("math:", "package.module:callable"),
    ],
)
def test_unknown_names_say_what_there_is(registered: None, name: str, said: str) -> None:
    with pytest.raises(ArgumentValueError, match=said):
        resolve(name)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        (f"{ME}:Plain", {"depth": 3}, "depth"),
        (f"{ME}:passes_on", {"depth": 3}, "depth"),
        ("torch.nn:Conv2d", {}, "in_channels"),
        ("math:gcd", {}, "nn.Module"),
        ("math:pi", {}, "callable"),
    ],
)
def test_wrong_arguments_are_named(name: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentValueError, match=said):
        build_model(name, arguments)


def test_a_mistake_inside_a_model_is_not_taken_for_a_wrong_argument() -> None:
    with pytest.raises(TypeError, match="a mistake inside") as caught:
        build_model(f"{ME}:fails")
    assert not isinstance(caught.value, ArgumentValueError)


def test_channels_of_the_input() -> None:
    assert input_channels(build_model("attention_unet", {"widths": (2, 4)})) == 1
    assert input_channels(Plain(5)) == 5
    assert input_channels(Plain(4, groups=2)) == 4
    assert input_channels(nn.Linear(2, 2)) == 3
    assert build_model(f"{ME}:Plain", channels=6).first.in_channels == 6  # type: ignore[union-attr]
    given = build_model(f"{ME}:Plain", {"in_chans": 2}, channels=6)
    assert input_channels(given) == 2


def test_a_model_of_ours_by_its_short_name() -> None:
    arguments = {"widths": (2, 4, 8), "num_classes": 3}
    pairs = harvest_named("attention_unet", arguments, batch=2, size=(16, 24), dtypes=("float32",))
    operators = {operator.name for operator, _ in pairs}
    assert operators == {"conv2d.forward", "conv2d.dgrad", "conv2d.wgrad", "conv2d.fused"}
    first = pairs[0][1].fields()
    assert (first["batch"], first["in_channels"], first["height"], first["width"]) == (2, 1, 16, 24)
    assert first["layout"] == "channels_last" and first["dtype"] == "float32"
    three = harvest_named("attention_unet", arguments, size=(16, 16), channels=3)
    assert three[0][1].fields()["in_channels"] == 3


def test_a_model_without_our_layers_is_converted() -> None:
    pairs = harvest_named(
        f"{ME}:Plain",
        batch=1,
        size=(8, 8),
        dtypes=("bfloat16", "float32"),
        layouts=("channels_last", "contiguous"),
    )
    rows = [problem.fields() for operator, problem in pairs if operator.name == "conv2d.forward"]
    kinds = {(row["dtype"], row["layout"], row["epilogue"]) for row in rows}
    assert kinds == {
        (dtype, layout, "fused")
        for dtype in ("bfloat16", "float32")
        for layout in ("channels_last", "contiguous")
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [({"dtypes": ("int8",)}, "int8"), ({"layouts": ("rows",)}, "rows")],
)
def test_wrong_dtypes_and_layouts(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentValueError, match=said):
        harvest_named("attention_unet", **options)


def test_a_model_without_convolutions_is_refused() -> None:
    with pytest.raises(ArgumentValueError, match="none"):
        harvest_named("torch.nn:ReLU", batch=1, size=(4, 4))


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match="timm:resnet18 needs the package timm: pip"):
        resolve("timm:resnet18")


def test_models_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["resnet18", "resnet50", "vit_base"]

    def create(name: str, in_chans: int = 3, **options: Any) -> Plain:
        assert name in names
        return Plain(in_chans, **options)

    timm = SimpleNamespace(
        is_model=names.__contains__, list_models=lambda: names, create_model=create
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    model = build_model("timm:resnet18", {"width": 2}, channels=4)
    assert input_channels(model) == 4
    with pytest.raises(ArgumentValueError, match=r"close are .*resnet18"):
        resolve("timm:resnet19")
    with pytest.raises(ArgumentValueError, match="hight"):
        build_model("timm:resnet18", {"hight": 2})


def test_the_command_knows_the_names(cache: Path) -> None:
    listed = CliRunner().invoke(app, ["list", "--models", "--json"])
    assert '"attention_unet"' in listed.stdout
    arguments = ["tune", "--model", "attention_unet", "--batch", "1", "--size", "32", "--dry-run"]
    done = CliRunner().invoke(app, [*arguments, "--cache-dir", str(cache)])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "C1 32x32 M16" in done.stdout
    wrong = CliRunner().invoke(app, ["tune", "--model", "attention_unt", "--dry-run"])
    assert wrong.exit_code == 2 and "did you mean 'attention_unet'" in wrong.stderr


def test_gradients_and_random_numbers_are_as_before() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Dropout())
    tc.nn.convert(model)
    x = torch.randn(1, 2, 5, 5)
    model(x).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert harvest.harvest(model, x)
    assert torch.equal(torch.rand(3), expected)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, gradient)
