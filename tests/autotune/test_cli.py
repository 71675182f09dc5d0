from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from autotune_entries import ENV, winner
from autotune_fakes import PlaybackLab, Scale, ScaleProblem, Wrong, table_of
from torch import nn
from typer.testing import CliRunner

from tritonconv.autotune.bench import contenders
from tritonconv.autotune.cli import app
from tritonconv.autotune.laboratory import Setup
from tritonconv.autotune.store import Store
from tritonconv.autotune.tune import TuningStoppedError, tune
from tritonconv.runtime import tables
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.operators import get_operator

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")


def invoke(cache: Path, *arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--cache-dir", str(cache)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def as_json(cache: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    value = json.loads(invoke(cache, *arguments, "--json", code=code).stdout)
    assert next(iter(value)) == "schema_version" and value["schema_version"] == 1
    return value


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> PlaybackLab:
    """A laboratory in place of the GPU."""
    lab = PlaybackLab(table_of({("fine", 2): 5.0, ("vector", 256): 8.0, ("aten", 0): 9.0}))
    monkeypatch.setattr("tritonconv.autotune.cli.bench.CudaLab", lambda: lab)
    monkeypatch.setattr("tritonconv.autotune.cli.tune.require_gpu", lambda: None)
    monkeypatch.setattr(Setup, "lab", lambda self, device=None: lab)
    monkeypatch.setattr(Setup, "pool", lambda self, facts, shared_by=1: None)
    # On a CPU the Triton kernel cannot run, so its result cannot be checked either.
    monkeypatch.setattr(Scale, "algorithms", property(lambda self: self._algorithms[1:]))
    return lab


def test_help_names_every_verb(cache: Path) -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    for verb in ("devices", "list", "tune", "show", "bench", "quickstart"):
        assert verb in text


@no_gpu
def test_devices_without_a_gpu(cache: Path) -> None:
    value = as_json(cache, "devices")
    assert value["devices"] == [] and "sm_90" in value["compile_targets"]
    assert value["tables"]["user"] == str(cache / "tuned")
    assert "no CUDA GPU" in invoke(cache, "devices").stdout


def test_list_shows_operators_suites_and_entries(cache: Path, scale: Scale) -> None:
    value = as_json(cache, "list")
    assert {"name": scale.name, "algorithms": ["vector", "fine", "aten", "picky"]} in value[
        "operators"
    ]
    assert {"resnet50", "unet2d", "single_channel", "multi_channel"} <= {
        suite["name"] for suite in value["suites"]
    }
    assert value["entries"] == []
    tune(Scale(*scale.algorithms[1:]), [ScaleProblem(64)], lab=PlaybackLab())
    value = as_json(cache, "list", "--cached", "--op", scale.name)
    assert [entry["problem"]["size"] for entry in value["entries"]] == [64]
    assert "fake.scale" in invoke(cache, "list").stdout


def test_list_knows_stored_operators_that_are_not_registered(cache: Path, scale: Scale) -> None:
    Store().save(ENV, winner(1, operator="kernel.mine.twice"))
    Store().save(ENV, winner(1, source="source-0"))
    rows = as_json(cache, "list", "--cached")["entries"]
    assert {row["operator"]: row["stale"] for row in rows} == {
        "fake.scale": True,
        "kernel.mine.twice": False,
    }
    for name in ("kernel.mine.twice", "kernel.mine", "kernel"):
        value = as_json(cache, "list", "--op", name)
        assert [row["operator"] for row in value["entries"]] == ["kernel.mine.twice"]
        assert value["operators"] == []
    result = invoke(cache, "list", "--op", "kernel.yours", code=2)
    assert "kernel.mine.twice" in result.stderr


@no_gpu
def test_a_dry_run_needs_no_gpu_and_says_what_is_left_out(cache: Path, scale: Scale) -> None:
    value = as_json(cache, "tune", scale.name, "--shapes", "size=64", "--dry-run")
    (row,) = value["problems"]
    assert (row["space"], row["planned"]) == (8, 8)
    assert row["by_algorithm"] == {"vector": 3, "fine": 4, "aten": 1}
    assert row["unsupported"] == {"picky": "size is not a multiple of 1000003"}
    value = as_json(
        cache, "tune", "fake", "--shapes", "size=64", "--dry-run", "--effort", "none",
        "--target", "sm_80", "--dtype", "float32", "--dtype", "bfloat16",
    )  # fmt: skip
    assert [row["planned"] for row in value["problems"]] == [3, 3]
    assert "A100" in value["device"]["name"]
    text = invoke(cache, "tune", scale.name, "--shapes", "size=64", "--dry-run").stdout
    assert "size is not a multiple" in text


def test_missing_is_refused_where_it_would_mislead(
    cache: Path, scale: Scale, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model is run or a table is read."""
    told = invoke(cache, "tune", "--missed", "--missing", code=2)
    assert "--missing: expected" in told.stderr and "--missed" in told.stderr
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = invoke(cache, "tune", scale.name, "--shapes", "size=64", "--missing", code=2)
    assert "--missing: expected one process" in told.stderr


@no_gpu
def test_missing_leaves_out_what_is_tuned(cache: Path, scale: Scale) -> None:
    words = ("tune", scale.name, "--shapes", "size=64", "--shapes", "size=9", "--missing")

    def sizes() -> list[int]:
        tables.invalidate()
        rows = as_json(cache, *words, "--dry-run")["problems"]
        return [row["problem"]["size"] for row in rows]

    assert sizes() == [64, 9]
    Store().save(ENV, winner(1))
    assert sizes() == [9], "the nearest entry serves, but is not of the problem"
    Store().save(ENV, winner(1, size=9, source="source-0"))
    assert sizes() == [9], "a stale one is none"
    Store().save(ENV, winner(1, size=9))
    assert sizes() == []
    assert "2 of 2 problems are tuned already" in invoke(cache, *words, "--dry-run").stderr


@no_gpu
def test_the_precision_of_a_suite_is_chosen(cache: Path) -> None:
    arguments = ("tune", "--shapes", "multi_channel", "--dry-run", "--effort", "none")
    value = as_json(cache, *arguments, "--precision", "tf32", "--precision", "tf32x3")
    rows = [row["problem"] for row in value["problems"]]
    assert [row["precision"] for row in rows] == ["tf32"] * 27 + ["tf32x3"] * 27
    result = invoke(cache, "tune", "--model", "resnet50", "--precision", "tf32", code=2)
    assert "--precision" in result.stderr


def test_pytorchs_float32_is_the_rival_of_three_tf32_products() -> None:
    operator = get_operator("conv2d.forward")
    problem = operator.parse({"C": 64, "M": 64, "H": 8, "K": 3, "precision": "tf32x3"})
    _, rows = contenders(operator, problem, PlaybackLab())
    assert [candidate.algorithm for name, candidate in rows if name == "torch"] == ["aten"]
    assert all(candidate.algorithm != "aten" for name, candidate in rows if name != "torch")


def test_tune_then_show_then_tune_again(cache: Path, scale: Scale, lab: PlaybackLab) -> None:
    arguments = ("tune", scale.name, "--shapes", "size=64")
    value = as_json(cache, *arguments)
    (report,) = value["reports"]
    assert report["result"] == "tuned" and report["entry"]["best"]["config"] == {"variant": 2}
    assert Path(report["path"]).is_relative_to(cache)
    assert as_json(cache, *arguments)["reports"][0]["result"] == "kept"

    shown = as_json(cache, "show", scale.name, "size=64")
    assert shown["choice"]["tier"] == "exact" and shown["entry"] == report["entry"]
    shown = as_json(cache, "show", scale.name, "size=70")
    assert shown["choice"]["tier"] == "nearest" and shown["entry"] is None
    text = invoke(cache, "show", scale.name, "size=64", "--all-configs").stdout
    assert "this very problem is tuned" in text and "variant=2" in text
    result = invoke(cache, *arguments, "--force", "-v")
    assert "fine" in result.stdout and "[1/1]" in result.stderr


def test_a_file_of_shapes(cache: Path, scale: Scale, lab: PlaybackLab, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([{"size": 10, "name": "a"}, {"size": 20}]))
    value = as_json(cache, "tune", scale.name, "--shapes", str(file), "-q")
    assert [row["problem"]["size"] for row in value["reports"]] == [10, 20]


def test_several_shapes_are_tuned_at_once_and_each_problem_once(
    cache: Path, scale: Scale, lab: PlaybackLab
) -> None:
    shapes = ("--shapes", "size=64", "--shapes", "size=32", "--shapes", "size=64")
    value = as_json(cache, "tune", scale.name, *shapes, "-q")
    assert [row["problem"]["size"] for row in value["reports"]] == [64, 32]


def test_bench_compares_tuned_default_and_torch(
    cache: Path, scale: Scale, lab: PlaybackLab
) -> None:
    invoke(cache, "tune", scale.name, "--shapes", "size=64")
    value = as_json(cache, "bench", scale.name, "--shapes", "size=64")
    (row,) = value["results"]
    assert row["tier"] == "exact"
    assert {name: c["p50_us"] for name, c in row["contenders"].items()} == {
        "tuned": 5.0,
        "default": 50.0,
        "generated": 5.0,
        "torch": 9.0,
    }
    assert row["vs_default"] == pytest.approx(10)
    assert value["geomean"]["vs_default"] == pytest.approx(10)
    assert 0 < row["of_floor"] < 1
    assert "geometric mean" in invoke(cache, "bench", scale.name, "--shapes", "size=64").stdout


def test_bench_against_pytorch_at_its_best_judges_what_we_generate(
    cache: Path, scale: Scale, lab: PlaybackLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch won the tune, in this layout and even more so in another."""
    here, there = ScaleProblem(64), ScaleProblem(65)
    monkeypatch.setattr(Scale, "elsewhere", lambda self, problem: (there,), raising=False)
    lab.times = table_of({("fine", 2): 8.0, ("fine", 0): 12.0, ("aten", 0): 4.0})
    in_other_layout = PlaybackLab(table_of({("aten", 0): 2.0}))

    def timer(self: PlaybackLab, operator: Any, problem: Any, *rest: Any) -> Any:
        return own_timer(in_other_layout if problem == there else self, operator, problem, *rest)

    own_timer = PlaybackLab.timer
    monkeypatch.setattr(PlaybackLab, "timer", timer)
    invoke(cache, "tune", scale.name, "--shapes", "size=64")
    value = as_json(cache, "bench", scale.name, "--suite", "size=64", "--vs", "torch")
    (row,) = value["results"]
    assert row["problem"]["size"] == here.size
    assert {name: (c["algorithm"], c["p50_us"]) for name, c in row["contenders"].items()} == {
        "tuned": ("aten", 4.0),
        "default": ("fine", 12.0),
        "generated": ("fine", 8.0),
        "torch": ("aten", 4.0),
        "torch elsewhere": ("aten", 2.0),
    }
    assert row["generated_vs_best_torch"] == pytest.approx(2.0 / 8.0)
    assert value["geomean"]["tuned_vs_best_torch"] == pytest.approx(0.5)
    shown = invoke(cache, "bench", scale.name, "--suite", "size=64", "--vs", "torch").stdout
    assert "0.25x" in shown and "0 of 1 at 1.0 or more" in " ".join(shown.split())
    for options in ((), ("--suite", "size=64", "--shapes", "size=64")):
        assert "--suite" in invoke(cache, "bench", scale.name, *options, code=2).stderr


@no_gpu
@pytest.mark.parametrize("verb", ["tune", "bench"])
def test_measuring_without_a_gpu_is_exit_6(cache: Path, scale: Scale, verb: str) -> None:
    result = invoke(cache, verb, scale.name, "--shapes", "size=64", code=6)
    assert "GPU" in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("tune", "--dry-run"),
        ("tune", "nothing.like.it", "--shapes", "size=64", "--dry-run"),
        ("tune", "fake.scale", "--shapes", "no-such-suite", "--dry-run"),
        ("tune", "fake.scale", "--shapes", "width=64", "--dry-run"),
        ("tune", "--shapes", "size=64", "--dry-run"),
        ("tune", "fake.scale", "--shapes", "size=64", "--budget", "soon", "--dry-run"),
        ("tune", "--model", "no_such_module:build", "--dry-run"),
        ("tune", "--model", "torch.nn:Conv2d", "--dry-run"),
        ("tune", "--bogus"),
        ("show", "fake.scale"),
        ("show", "fake.scale", "size"),
        ("show", "fake.scale", "size=64", "--target", "sm_1"),
        ("nonsense",),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_2_and_says_why(
    cache: Path, scale: Scale, arguments: tuple[str, ...]
) -> None:
    if torch.cuda.is_available() and "sm_1" in arguments:
        pytest.skip("the target stands in only where there is no GPU")
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    assert result.stderr.strip() and "Traceback" not in result.stderr


def test_nothing_passing_is_exit_3(
    cache: Path, scale: Scale, lab: PlaybackLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scale, "algorithms", property(lambda self: (Wrong(),)))
    value = as_json(cache, "tune", scale.name, "--shapes", "size=64", code=3)
    (report,) = value["reports"]
    assert report["result"] == "failed" and report["failures"] == {"numeric": 3}


def test_an_interrupt_is_exit_130_with_the_results(
    cache: Path, scale: Scale, lab: PlaybackLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = PlaybackLab.timer

    def timer(self: PlaybackLab, operator: Any, problem: Any, policy: Any, seed: int) -> Any:
        if problem.dtype == "bfloat16":
            raise KeyboardInterrupt
        return make(self, operator, problem, policy, seed)

    monkeypatch.setattr(PlaybackLab, "timer", timer)
    arguments = ("tune", scale.name, "--shapes", "size=64", "--dtype", "float32")
    value = as_json(cache, *arguments, "--dtype", "bfloat16", code=130)
    assert value["interrupted"] and len(value["reports"]) == 1
    assert len(list((cache / "tuned").rglob("fake.scale/*.json"))) == 1


def test_an_unexpected_error_is_exit_1(
    cache: Path, scale: Scale, lab: PlaybackLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise TuningStoppedError([], RuntimeError("the GPU is gone"))

    monkeypatch.setattr("tritonconv.autotune.cli.tune.tune_pairs", stop)
    result = invoke(cache, "tune", scale.name, "--shapes", "size=64", code=1)
    assert "the GPU is gone" in result.stderr


class Net(nn.Module):
    """A user's network over the fake operator."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from tritonconv.runtime.operators import get_operator

        for size in (x.numel(), x.numel(), self.weight.numel()):
            tables.choose(get_operator("fake.scale"), ScaleProblem(size), nominal_device("sm_90"))
        return x.mean() * self.weight


def test_the_problems_of_a_users_model(cache: Path, scale: Scale) -> None:
    name = f"{Net.__module__}:{Net.__name__}"
    value = as_json(
        cache, "tune", "--model", name, "--model-args", "width=5", "--batch", "2", "--size", "4x3",
        "--channels", "1", "--dry-run", "--dtype", "float32",
    )  # fmt: skip
    assert [row["problem"]["size"] for row in value["problems"]] == [24, 5]


def test_the_installed_command_starts(tmp_path: Path) -> None:
    script = "from tritonconv.autotune.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "list", "--json", "--no-color"],
        capture_output=True,
        text=True,
        env={"PATH": "", "HOME": str(tmp_path), "TRITONCONV_CACHE_DIR": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema_version"] == 1
