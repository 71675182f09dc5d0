"""Targets, facts about devices, configs and the registry of operators."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tritonconv as tc
from tritonconv.runtime.aot import SHARED_MEMORY_LIMIT, TARGETS, parse_target
from tritonconv.runtime.device import _bandwidth_class, device_facts, nominal_device
from tritonconv.runtime.operators import Config, get_operator, operator_names
from tritonconv.runtime.tables import bucket, digest


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_facts(target: str) -> None:
    facts = nominal_device(target)
    assert facts.arch == target
    assert facts.shared_bytes == SHARED_MEMORY_LIMIT[target]
    parsed = parse_target(target)
    assert parsed.backend == ("hip" if target.startswith("gfx") else "cuda")
    assert parsed.warp_size == (64 if target.startswith("gfx9") else 32)


@pytest.mark.parametrize("name", ["", "sm_", "sm_9x", "90", "cuda", "gfx", "sm_90; true"])
def test_unknown_targets(name: str) -> None:
    with pytest.raises(ValueError, match="target: expected"):
        parse_target(name)
    with pytest.raises(ValueError, match="target: expected"):
        nominal_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")
def test_without_a_gpu_facts_are_nominal_under_the_name_that_is_set() -> None:
    assert device_facts() == nominal_device("sm_90")
    with tc.settings.override(device_name="My GPU"):
        assert device_facts().name == "My GPU"
        assert device_facts().arch == "sm_90"


@pytest.mark.parametrize(
    ("name", "gbps"),
    {
        "NVIDIA GH200 480GB": 4000,
        "NVIDIA H200": 4800,
        "NVIDIA H200 NVL": 4800,
        "NVIDIA H100 80GB HBM3": 3352,
        "NVIDIA H100 PCIe": 2039,
        "NVIDIA H100 NVL": 3938,
        "NVIDIA GB200": 8000,
        "NVIDIA B200": 8000,
        "NVIDIA A100-SXM4-80GB": 2039,
        "NVIDIA A100-SXM4-40GB": 1555,
        "NVIDIA A100 80GB PCIe": 1935,
        "NVIDIA A100-PCIE-40GB": 1555,
        "NVIDIA L4": 300,
        "NVIDIA L40": 864,
        "NVIDIA L40S": 864,
        "NVIDIA A10": 600,
        "NVIDIA A10G": 600,
        "NVIDIA GeForce RTX 4090": 1008,
        "AMD Instinct MI300X OAM": 5325,
        "NVIDIA A1000": 1000,
        "My GPU": 1000,
    }.items(),
)
def test_bandwidth_class_of_a_name(name: str, gbps: int) -> None:
    assert _bandwidth_class(name) == gbps


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_nominal_bandwidths_are_those_of_the_names(target: str) -> None:
    facts = nominal_device(target)
    assert _bandwidth_class(facts.name) == facts.memory_gbps


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")
def test_another_name_brings_its_bandwidth_and_is_one_object() -> None:
    with tc.settings.override(device_name="NVIDIA H200"):
        assert device_facts().memory_gbps == 4800
        assert device_facts() is device_facts()
    with tc.settings.override(device_name="My GPU"):  # the board's own, where none is known
        assert device_facts().memory_gbps == nominal_device("sm_90").memory_gbps


@dataclass(frozen=True)
class Tile(Config):
    rows: int
    columns: int = 4


def test_configs_survive_json_and_nothing_else_does() -> None:
    tile = Tile(2, 8)
    assert Tile.from_dict(tile.as_dict()) == tile
    for bad in ({}, {"rows": 1}, {"rows": 1, "columns": "2"}, {"rows": 1, "columns": True}):
        with pytest.raises(ValueError, match=r"config: expected integers .*rows"):
            Tile.from_dict(bad)
    with pytest.raises(ValueError, match="config"):
        Tile.from_dict({**tile.as_dict(), "depth": 1})


def test_operators_are_found_by_name() -> None:
    names = operator_names()
    assert {f"conv2d.{d}" for d in ("forward", "dgrad", "wgrad")} <= set(names)
    assert all(get_operator(name).name == name for name in names)
    with pytest.raises(ValueError, match=r"operator: expected .*conv2d\.forward.*, got 'conv9d'"):
        get_operator("conv9d")


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(1, 1 << 40), st.integers(1, 1 << 40))
def test_buckets_keep_order_and_are_near(a: int, b: int) -> None:
    assert a <= bucket(a) < 2 * a or a == 1
    if a > 32:
        assert bucket(a) <= a * 9 / 8
    assert bucket(bucket(a)) == bucket(a)
    assert (bucket(a) <= bucket(b)) or a > b


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
