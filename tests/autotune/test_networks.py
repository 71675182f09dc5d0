"""The suites of networks: each the layers of its network, all of them and no other."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_tables import TABLES, Table
from torch import nn

import tritonconv as tc
from tritonconv.autotune.harvest import build_model, harvest
from tritonconv.autotune.suites import load_suite, suite_names
from tritonconv.runtime.operators import get_operator

NETWORKS = {
    "convnext_tiny": "convnext_tiny",
    "efficientnet_b0": "efficientnet_b0",
    "mobilenet_v2": "mobilenet_v2",
    "mobilenet_v3_large": "mobilenet_v3_large",
}
"""Packaged suites of networks that torchvision has too, and its names for them."""

SUITES = Path(importlib.import_module("tritonconv.autotune.suites").__path__[0])


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_the_suites_of_networks_are_what_the_papers_tables_give(table: Table) -> None:
    assert json.loads((SUITES / f"{table.name}.json").read_text()) == json.loads(table.text())


@pytest.mark.parametrize("name", suite_names())
def test_every_row_is_a_problem_under_every_choice(name: str) -> None:
    suite = load_suite(name)
    for values in product(*suite.choices.values()):
        chosen = {axis: (value,) for axis, value in zip(suite.choices, values, strict=True)}
        for operator in map(get_operator, suite.operators):
            for row in suite.rows(chosen, operator.name):
                fields = operator.parse(row).fields()
                assert fields["dtype"] == row["dtype"] and fields["batch"] == row["batch"]
                either = row["in_channels"] == 1 or row["height"] == 1
                assert fields["layout"] == row["layout"] or either
                groups = row.get("groups", 1)
                assert row["in_channels"] % groups == row["out_channels"] % groups == 0
                narrow = "depthwise" if groups == row["in_channels"] else "grouped"
                assert fields["kind"] == ("dense" if groups == 1 else narrow)


@pytest.mark.parametrize("name", suite_names())
def test_no_row_stands_twice(name: str) -> None:
    suite = load_suite(name)
    problems = [
        operator.parse(row)
        for operator in map(get_operator, suite.operators)
        for row in suite.rows(operator=operator.name)
    ]
    assert len(set(problems)) == len(problems)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("convnext_tiny", [96, 192, 384, 768]),
        ("mobilenet_v2", [32, 96, 144, 192, 384, 576, 960]),
        ("mobilenet_v3_large", [16, 64, 72, 120, 184, 200, 240, 480, 672, 960]),
        ("efficientnet_b0", [32, 96, 144, 240, 480, 672, 1152]),
    ],
)
def test_widths_of_the_depthwise_layers(name: str, widths: list[int]) -> None:
    rows = [row for row in load_suite(name).problems if row.get("groups", 1) > 1]
    assert all(row["groups"] == row["in_channels"] == row["out_channels"] for row in rows)
    assert sorted({row["groups"] for row in rows}) == widths


def test_vit_patches_tile_the_image() -> None:
    tokens = set()
    for row in load_suite("vit_patch").rows():
        problem = get_operator("conv2d.forward").parse(row)
        assert problem.patches  # type: ignore[attr-defined]
        tokens.add((row["out_channels"], problem.fields()["out_height"]))
    assert tokens == {(768, 14), (1024, 14), (1024, 16), (1280, 16)}


LAYOUTS = ("layout", "weight_layout", "output_layout", "second_layout")
"""What a gradient's memory format is depends on the operation that made it, not on the layer."""


def shape_of(operator: str, fields: Mapping[str, Any]) -> tuple[Any, ...]:
    kept = {k: v for k, v in fields.items() if k not in (*LAYOUTS, "batch")}
    return operator, *sorted(kept.items())


def shapes_of_suite(name: str) -> set[tuple[Any, ...]]:
    suite = load_suite(name)
    return {
        shape_of(operator, get_operator(operator).parse(row).fields())
        for operator in suite.operators
        for row in suite.rows(operator=operator)
    }


def shapes_of_model(model: nn.Module, inputs: torch.Tensor) -> set[tuple[Any, ...]]:
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with tc.backend("torch"):
        pairs = harvest(model, inputs, amp=torch.bfloat16)
    return {shape_of(operator.name, problem.fields()) for operator, problem in pairs}


def image_gradients(shapes: Iterable[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    """The gradient by the image, which training does not ask for."""
    found = set()
    for operator, *fields in shapes:
        if operator == "conv2d.dgrad" and dict(fields)["in_channels"] in (1, 3):
            found.add((operator, *fields))
    return found


def test_the_attention_unet_has_exactly_the_shapes_of_its_suite() -> None:
    (row,) = {(r["height"], r["batch"]) for r in load_suite("attention_unet").rows({}) if
              r["in_channels"] == 1 and r["out_channels"] == 16}  # fmt: skip
    assert row == (256, 8)
    wanted = shapes_of_suite("attention_unet")
    image = torch.randn(1, 1, 256, 256)
    found = shapes_of_model(build_model("tritonconv.models.vision.attention_unet:build"), image)
    assert found == wanted - image_gradients(wanted)


@pytest.mark.parametrize("name", NETWORKS)
def test_torchvisions_network_has_exactly_the_shapes_of_the_suite(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    model = getattr(models, NETWORKS[name])()
    tc.nn.convert(model)
    wanted = shapes_of_suite(name)
    found = shapes_of_model(model, torch.randn(2, 3, 224, 224))
    assert found == wanted - image_gradients(wanted)


def test_the_documentation_lists_the_suites() -> None:
    text = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text()
    listed = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", text, re.MULTILINE))
    assert listed == {name: str(len(load_suite(name).problems)) for name in suite_names()}
