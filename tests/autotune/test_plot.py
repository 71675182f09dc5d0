"""``autotune plot``: pictures and their numbers, from tables that nobody measured."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import H100, fill, pairs, record, trial
from typer.testing import CliRunner

from tritonconv.autotune import plots
from tritonconv.autotune.cli import app
from tritonconv.autotune.cli.plot import Kind
from tritonconv.autotune.search import Status
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.tables import environment

pytest.importorskip("matplotlib")

PROBLEMS = list(pairs("resnet50", "n8"))[::5]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Cache directories of two tunes of the same problems."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        entries = [record(o, p, seed=seed, most=30) for o, p in PROBLEMS]
        # PyTorch's kernel as the slowest, and more recorded than the date, as a tuner does.
        slow = trial("aten", {}, 1e4, Status.TIMED)
        entries = [
            replace(e, trials=(*e.trials, slow), recorded={**e.recorded, "effort": "full"})
            for e in entries
        ]
        fill(folder / str(seed), entries)
    return folder / "0", folder / "1"


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["plot", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def tables_of(kind: str, runs: tuple[Path, Path]) -> list[str]:
    chosen = runs if kind == Kind.AGREEMENT else runs[:1]
    return [word for folder in chosen for word in ("--tables", str(folder))]


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("form", ["png", "svg"])
def test_every_kind_is_drawn(kind: str, form: str, runs: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / f"picture.{form}"
    few = ["conv2d.wgrad"] if kind == Kind.BEST_SO_FAR else []
    result = run(kind, *few, *tables_of(kind, runs), "--out", str(file))
    assert str(file) in result.stdout.replace("\n", "")
    if form == "png":
        assert file.read_bytes().startswith(b"\x89PNG")
        return
    text = " ".join(t.strip() for t in ET.parse(file).getroot().itertext() if t.strip())
    assert "NVIDIA H100" in text and "graph-cold" in text and "2026-11" in text
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("kind", list(Kind))
def test_json_gives_the_numbers_and_draws_only_when_asked(
    kind: str, runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    few = ["conv2d.wgrad"] if kind == Kind.BEST_SO_FAR else []
    value = json.loads(run(kind, *few, *tables_of(kind, runs), "--json").stdout)
    assert next(iter(value)) == "schema_version" and value["kind"] == kind
    assert "NVIDIA H100" in value["caption"]
    assert not list(tmp_path.iterdir())
    if kind == Kind.REGRET:
        assert len(value["rows"]) == len(PROBLEMS) and value["geomean"] >= 0.9
    if kind == Kind.BEST_SO_FAR:
        assert {c["strategy"] for c in value["curves"]} >= {"random", "exhaustive"}
        assert all(c["points"][-1][1] >= 1 for c in value["curves"])
    if kind == Kind.AGREEMENT:
        assert value["runs"] == 2 and len(value["rows"]) == len(PROBLEMS)


def test_a_missing_matplotlib_names_the_extra(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("sorted", "--tables", str(runs[0]), "--out", "x.png", code=2)
    assert "pip install 'tritonconv[demo]'" in result.stderr and "Traceback" not in result.stderr


def test_the_same_numbers_give_the_same_svg(runs: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        run("regret", "--tables", str(runs[0]), "--out", str(tmp_path / name))
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_operators_and_shapes_choose_entries(runs: tuple[Path, Path]) -> None:
    everything = json.loads(run("sorted", "--tables", str(runs[0]), "--json").stdout)
    assert len(everything["problems"]) == len(PROBLEMS)
    chosen = ("sorted", "--tables", str(runs[0]), "--json")
    wgrad = json.loads(run(*chosen, "conv2d.wgrad").stdout)["problems"]
    assert 0 < len(wgrad) < len(PROBLEMS)
    assert all(one["problem"].startswith("wgrad") for one in wgrad)
    suite = json.loads(run(*chosen, "--shapes", "resnet50").stdout)["problems"]
    assert len(suite) == len(PROBLEMS)
    shape = "N=8,C=3,M=64,H=224,K=7,S=2,P=3,dtype=bfloat16"
    (stem,) = json.loads(run(*chosen, "conv2d.forward", "--shapes", shape).stdout)["problems"]
    assert stem["problem"] == "forward n8 3→64 224² k7/2"


def test_one_device_is_drawn_at_a_time(tmp_path: Path) -> None:
    operator, problem = PROBLEMS[0]
    other = record(operator, problem, most=10)
    store = fill(tmp_path, [record(o, p, most=10) for o, p in PROBLEMS[:2]])
    a100 = environment(nominal_device("sm_80"))
    store.save(a100, _on(other, a100.as_dict()))
    result = run("sorted", "--tables", str(tmp_path), "--json")
    assert H100.name in json.loads(result.stdout)["caption"] and "--device" in result.stderr
    result = run("sorted", "--tables", str(tmp_path), "--json", "--device", "a100")
    value = json.loads(result.stdout)
    assert "A100" in value["caption"] and len(value["problems"]) == 1


def _on(entry: Any, env: dict[str, Any]) -> Any:
    import dataclasses

    return dataclasses.replace(entry, environment=env)


def test_speedups_by_fields(runs: tuple[Path, Path]) -> None:
    arguments = ("speedup", "--tables", str(runs[0]), "--json", "--rows", "kernel")
    value = json.loads(run(*arguments, "--columns", "batch").stdout)
    assert value["columns"] == ["batch 8"] and "kernel 7x7" in value["rows"]
    assert all(ratio[0] > 0.9 for ratio in value["values"])
    assert "both or neither" in run(*arguments, code=2).stderr
    assert "in_channels" in run(*arguments, "--columns", "hight", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("agreement", "--tables", "RUN"), "two or more"),
        (("regret", "--tables", "RUN", "--tables", "RUN"), "one directory"),
        (("regret", "--tables", "EMPTY"), "entries"),
        (("regret", "--tables", "RUN", "--device", "B200"), "entries"),
        (("regret", "--tables", "RUN", "--out", "x.pdf"), ".png or .svg"),
        (("portrait",), "portrait"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_usage_is_exit_2(
    arguments: tuple[str, ...], said: str, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    places = {"RUN": str(runs[0]), "EMPTY": str(tmp_path)}
    result = run(*(places.get(word, word) for word in arguments), code=2)
    assert said in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.01), (15.0, 26.0), (0.3, 7.0), (1, 1e4), (5.0, 5.0), (97.0, 104.0)]
)
def test_ticks_are_round_and_enough(low: float, high: float) -> None:
    ticks = plots.round_ticks(low, high)
    assert 3 <= len(ticks) <= 13 and ticks == sorted(ticks)
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
    assert all(len(f"{tick:g}") <= 6 for tick in ticks)
