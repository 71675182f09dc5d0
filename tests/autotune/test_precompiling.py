"""Compiling ahead of a program: what it is about to run, in parallel, into Triton's disk cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from autotune_fakes import Aten, Scale, ScaleProblem, Vector
from torch import nn
from typer.testing import CliRunner
from worker_fakes import Refusing

import tritonconv as tc
from tritonconv.autotune import precompile, precompiling
from tritonconv.autotune.cli import app
from tritonconv.autotune.compiling import CompilePool
from tritonconv.autotune.measure import NoDeviceError
from tritonconv.autotune.precompiling import (
    Precompiled,
    PrecompileInterrupted,
    State,
    precompile_pairs,
)
from tritonconv.runtime.device import DeviceFacts, device_facts, nominal_device
from tritonconv.runtime.errors import ArgumentTypeError, ArgumentValueError
from tritonconv.runtime.operators import Algorithm

H100 = nominal_device("sm_90")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")


@pytest.fixture(autouse=True)
def triton_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty disk cache of Triton's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path / "triton"


def cubins(cache: Path) -> int:
    return len(list(cache.glob("*/*.cubin")))


class TwoEpilogues(nn.Module):
    """Two layers of one tuned entry, and two kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, function in ((self.first, torch.tanh), (self.second, torch.sigmoid)):
            padded = nn.functional.pad(x, (1, 1, 1, 1))
            x = tc.conv2d(padded, layer.weight, layer.bias, epilogue=function)
        y: torch.Tensor = self.norm(x)
        return y


def test_a_model_is_compiled_for_and_stays_as_it_is(triton_cache: Path) -> None:
    model, images = TwoEpilogues(), torch.randn(1, 16, 9, 9)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    told: list[Precompiled] = []
    report = precompile(model, images, backward=False, jobs=2, target="sm_90", progress=told.append)
    assert [row.state for row in report.rows] == [State.COMPILED] * 2, str(report)
    assert report.compiled == report.rows == tuple(told) and report.asked == 2
    assert {row.operator for row in report.rows} == {"conv2d.forward"}
    assert len({tuple(row.problem.fields().items()) for row in report.rows}) == 1, "one entry"
    assert all(row.seconds > 0 for row in report.rows) and report.seconds > 0
    assert cubins(triton_cache) == 2
    for tensor, value in zip(model.state_dict().values(), before, strict=True):
        torch.testing.assert_close(tensor, value)
    again = precompile(model, images, backward=False, jobs=1, target="sm_90")
    assert [row.state for row in again.rows] == [State.PRESENT] * 2
    assert str(again).startswith("2 problems: 0 compiled, 2 already there, 0 on PyTorch's kernels;")
    assert cubins(triton_cache) == 2


class Preferring(Scale):
    """Its untuned choice depends on the size."""

    def default_algorithm(self, problem: ScaleProblem, device: DeviceFacts) -> Algorithm:
        names = {64: "vector", 65: "aten", 66: "refusing"}
        return self.algorithm(names[problem.size])


def test_every_problem_says_what_became_of_it(triton_cache: Path) -> None:
    operator = Preferring(Vector(), Aten(), Refusing())
    pairs = [(operator, ScaleProblem(size)) for size in (66, 64, 65, 64)]
    report = precompile_pairs(pairs, H100, jobs=1)
    states = [State.FAILED, State.COMPILED, State.PYTORCH]
    assert [row.state for row in report.rows] == states
    (failed,) = report.failed
    assert failed.choice.algorithm == "refusing" and failed.reason
    assert [len(rows) for rows in (report.compiled, report.present, report.pytorch)] == [1, 0, 1]
    assert str(report).startswith(
        "3 problems: 1 compiled, 0 already there, 1 on PyTorch's kernels, 1 failed;"
    )
    assert cubins(triton_cache) == 1


def test_no_process_is_started_for_pytorchs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("nothing is to be compiled")

    monkeypatch.setattr(precompiling, "CompilePool", refuse)
    report = precompile_pairs([(Scale(Aten()), ScaleProblem(64))], H100)
    assert [row.state for row in report.rows] == [State.PYTORCH]
    assert precompile_pairs([], H100).rows == ()


def test_ctrl_c_keeps_what_is_compiled(triton_cache: Path) -> None:
    def interrupt(row: Precompiled) -> None:
        raise KeyboardInterrupt

    pairs = [(Scale(Vector()), ScaleProblem(size)) for size in (64, 1000)]
    with pytest.raises(PrecompileInterrupted) as caught:
        precompile_pairs(pairs, H100, jobs=1, progress=interrupt)
    report = caught.value.report
    assert len(report.compiled) == 1 and report.asked == 2 and "1 not reached" in str(report)
    assert cubins(triton_cache) >= 1


def test_arguments_are_checked_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(precompiling, "harvest", refuse)
    model, images = TwoEpilogues(), torch.randn(1, 16, 9, 9)
    for jobs in (0, True, "2"):
        with pytest.raises(ArgumentValueError, match="jobs: expected a number of processes"):
            precompile(model, images, jobs=jobs, target="sm_90")  # type: ignore[arg-type]
    with pytest.raises(ArgumentValueError, match="target"):
        precompile(model, images, target="h100")
    with pytest.raises(ArgumentTypeError, match="model"):
        precompile(images, images, target="sm_90")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="inputs"):
        precompile(model, [images], target="sm_90")  # type: ignore[arg-type]
    with pytest.raises(NoDeviceError, match="CUDA GPU"):
        precompile(model, images)


def invoke(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["compile", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_the_command_compiles_shapes_and_models(cache: Path, triton_cache: Path) -> None:
    common = ("--arch", "sm_90", "--jobs", "2", "--cache-dir", str(cache), "--json")
    shape = ("conv2d.forward", "--shapes", "N=1,C=16,M=16,H=9,K=3,P=1")
    result = invoke(*shape, *common)
    value = json.loads(result.stdout)
    (row,) = value["results"]
    assert (value["asked"], value["compiled"], value["failed"]) == (1, 1, 0)
    assert (value["nominal"], value["cache"]) == (True, str(triton_cache))
    assert (row["operator"], row["state"], row["tier"]) == ("conv2d.forward", "compiled", "default")
    assert "H100" in result.stderr and "[1/1] conv2d.forward" in result.stderr
    assert json.loads(invoke(*shape, *common).stdout)["present"] == 1
    model = ("--model", "test_precompiling:TwoEpilogues", "--size", "9", "--batch", "1")
    options = ("conv2d.forward", "--dtype", "float32", "--layout", "contiguous")
    value = json.loads(invoke(*options, *model, *common).stdout)
    assert (value["asked"], value["compiled"]) == (2, 2)


def test_the_command_says_what_it_cannot_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch, scale: Scale
) -> None:
    shape = ("--shapes", "size=64", "--arch", "sm_90", "--cache-dir", str(cache))
    assert "one of --shapes, --suite, --model" in invoke("--arch", "sm_90", code=2).stderr
    assert "--precision" in invoke(
        "--model", "attention_unet", "--precision", "tf32", "--arch", "sm_90", code=2
    ).stderr  # fmt: skip
    assert "target: expected" in invoke("fake", "--shapes", "size=64", "--arch", "x", code=2).stderr
    monkeypatch.setattr(Scale, "algorithms", property(lambda self: (Refusing(),)))
    assert "1 failed" in invoke("fake", *shape, code=3).stdout

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CompilePool, "results", interrupted)
    assert "1 not reached" in invoke("fake", *shape, code=130).stdout


@no_gpu
def test_without_a_gpu_the_command_asks_for_another(cache: Path) -> None:
    result = invoke("conv2d.forward", "--suite", "first_layers", code=6)
    assert "--arch" in result.stderr


class Layers(nn.Module):
    """What a step on the GPU runs: a stem, a depthwise and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.Conv2d(32, 64, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_the_first_step_compiles_nothing(amp: torch.dtype | None, triton_cache: Path) -> None:
    model = Layers().cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    tc.nn.convert(model)
    images = torch.randn(4, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    report = precompile(model, images, amp=amp, jobs=4)
    assert report.device == device_facts() and not report.failed and report.compiled
    before, misses = cubins(triton_cache), []

    def listen(*, src: Any, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            misses.append(src.name)

    listener = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = listen
    try:
        with torch.autocast("cuda", dtype=amp or torch.bfloat16, enabled=amp is not None):
            output = model(images)
        output.float().square().mean().backward()
        torch.cuda.synchronize()
    finally:
        triton.knobs.compilation.listener = listener
    assert misses == [] and cubins(triton_cache) == before > 0
