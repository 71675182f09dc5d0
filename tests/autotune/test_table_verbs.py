"""The verbs on tables: explain, compare, verify, export, import, merge, clean."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from autotune_entries import DEVICE, ENV, OLDER, SISTER, entry_of, trial, winner
from autotune_fakes import PlaybackLab, Scale, ScaleProblem
from typer.testing import CliRunner

from tritonconv.autotune.bundle import Bundle, write
from tritonconv.autotune.clean import find, remove
from tritonconv.autotune.cli import app
from tritonconv.autotune.report import Progress, Result
from tritonconv.autotune.store import Store
from tritonconv.autotune.tune import tune
from tritonconv.runtime import tables

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")


def invoke(cache: Path, *arguments: Any, code: int = 0) -> Any:
    tables.invalidate()
    result = CliRunner().invoke(app, [*map(str, arguments), "--cache-dir", str(cache)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def as_json(cache: Path, *arguments: Any, code: int = 0) -> dict[str, Any]:
    value = json.loads(invoke(cache, *arguments, "--json", code=code).stdout)
    assert next(iter(value)) == "schema_version" and value["schema_version"] == 1
    return value


def save(path: Path, *entries: tables.Entry, env: tables.Environment = ENV) -> Path:
    write(Bundle(env.as_dict(), entries), path)
    return path


@no_gpu
def test_explain_names_the_tier_and_what_differs(cache: Path, scale: Scale) -> None:
    value = as_json(cache, "explain", scale.name, "size=64")
    assert value["choice"]["tier"] == "default" and value["is_miss"] and value["is_default"]
    assert value["nearest"] == [] and "user" in value["without_entries"]
    Store().save(ENV, winner(1))
    Store().save(OLDER, winner(2, env=OLDER, size=9))

    value = as_json(cache, "explain", scale.name, "size=64")
    assert value["choice"]["tier"] == "exact" and not value["is_miss"] and not value["is_default"]
    assert value["served_by"]["source"] == "user" and value["served_by"]["p50_us"] == 5.0
    assert Path(value["served_by"]["path"]).exists()
    assert value["nearest"][0]["differences"] == []
    assert value["unsupported"] == {"picky": "size is not a multiple of 1000003"}

    value = as_json(cache, "explain", scale.name, "size=64,dtype=bfloat16")
    assert value["choice"]["tier"] == "default" and value["is_miss"]
    assert value["nearest"][0]["differences"] == [
        {"field": "dtype", "wanted": "bfloat16", "found": "float32"}
    ]
    value = as_json(cache, "explain", scale.name, "size=9")
    assert value["choice"]["tier"] == "nearest"
    assert [d["field"] for d in value["nearest"][0]["differences"]] in (["size"], ["triton"])

    text = invoke(cache, "explain", scale.name, "size=64").stdout
    assert "exact" in text and "picky" in text
    text = invoke(cache, "explain", scale.name, "size=64", "--target", "sm_80").stdout
    assert "device.name" in text and "NVIDIA A100" in text


@no_gpu
def test_explain_says_what_the_model_drops_and_expects(cache: Path) -> None:
    shape = "N=8,C=64,M=64,H=56,K=3,P=1"
    value = as_json(cache, "explain", "conv2d.forward", shape, "--target", "sm_86")
    assert value["predicted_us"] > 0
    assert {row["algorithm"] for row in value["dropped"]} >= {"dense"}
    assert all(row["configs"] > 0 and row["reason"] for row in value["dropped"])
    text = invoke(cache, "explain", "conv2d.forward", shape, "--target", "sm_86").stdout
    assert value["dropped"][0]["constraint"] in text and "model expects" in text


@no_gpu
def test_explain_knows_stale_entries(cache: Path, scale: Scale) -> None:
    Store().save(ENV, winner(1, source="source-0"))
    value = as_json(cache, "explain", scale.name, "size=64")
    assert value["is_miss"]
    assert value["nearest"][0]["differences"] == [
        {"field": "source.fine", "wanted": "source-1", "found": "source-0"}
    ]
    text = invoke(cache, "explain", scale.name, "size=64").stdout
    assert "the source of fine (stale)" in text
    for verb in ("explain", "show"):
        for size, which in ((64, "this very problem"), (60, "the nearest problem")):
            text = " ".join(invoke(cache, verb, scale.name, f"size={size}").stdout.split())
            assert f"{which} is tuned, but fine has changed since (stale): the default" in text
            assert "nothing like it" not in text
        text = invoke(cache, verb, scale.name, "size=64,dtype=bfloat16").stdout
        assert "nothing like it is tuned" in text


@no_gpu
def test_what_was_cut_short_is_not_current(cache: Path, scale: Scale) -> None:
    lab = PlaybackLab()
    tune(scale, [ScaleProblem(64)], lab=lab, store=Store(cache / "tuned"))
    assert not as_json(cache, "list", "--cached")["entries"][0]["unfinished"]
    assert "current" in invoke(cache, "list", "--cached").stdout
    scale.changed = {"fine": "source-2", "vector": "source-2"}
    slow = Progress()
    slow.candidate = lambda *_: time.sleep(0.6)  # type: ignore[method-assign]
    (report,) = tune(
        scale,
        [ScaleProblem(64)],
        lab=lab,
        store=Store(cache / "tuned"),
        budget_s=0.5,
        progress=slow,
    )
    assert report.result is Result.TUNED and not report.complete
    (row,) = as_json(cache, "list", "--cached")["entries"]
    assert row["unfinished"] and not row["changes"]
    text = invoke(cache, "list", "--cached").stdout
    assert "unfinished" in text and "current" not in text
    assert "goes on with it" in invoke(cache, "show", scale.name, "size=64").stdout


@no_gpu
def test_what_is_outdated_serves_and_is_named(cache: Path, scale: Scale, lab: PlaybackLab) -> None:
    scale._algorithms = scale._algorithms[1:]
    entry = winner(1, changed={"aten": "source-0"})
    Store().save(ENV, entry)
    for verb in ("explain", "show"):
        value = as_json(cache, verb, scale.name, "size=64")
        assert value["choice"]["tier"] == "exact"
        assert (value.get("served_by") or value)["outdated"] == ["aten"]
        assert "changed: aten" in invoke(cache, verb, scale.name, "size=64").stdout
    (row,) = as_json(cache, "list", "--cached")["entries"]
    assert (row["stale"], row["outdated"]) == (False, ["aten"])
    assert "outdated" in invoke(cache, "list", "--cached").stdout
    value = as_json(cache, "verify")
    assert (value["counts"]["passed"], value["outdated"]) == (1, 1)
    assert value["results"][0]["outdated"] == "changed: aten"
    assert "changed: aten" in invoke(cache, "verify").stderr
    assert as_json(cache, "clean")["files"] == []

    scale.changed = {"fine": "source-2"}
    assert as_json(cache, "show", scale.name, "size=64")["entry"] is None
    (row,) = as_json(cache, "list", "--cached")["entries"]
    assert row["stale"] and row["changes"] == "changed: fine, aten"
    (row,) = as_json(cache, "verify", code=3)["results"]
    assert "fine has changed" in row["reason"]
    assert [row["why"] for row in as_json(cache, "clean")["files"]] == ["stale"]


def test_compare_and_its_exit_code(cache: Path, tmp_path: Path, scale: Scale) -> None:
    a = save(tmp_path / "a.json", winner(1, 5.0, size=1), winner(1, 5.0, size=2))
    b = save(tmp_path / "b.json", winner(1, 5.0, size=1), winner(2, 6.0, size=2))
    value = as_json(cache, "compare", a, b)
    assert value["counts"] == {"FAST": 0, "SLOW": 1, "SAME": 1, "AMBG": 0}
    assert [row["verdict"] for row in value["changes"]] == ["SAME", "SLOW"]
    assert value["changes"][1]["ratio"] == pytest.approx(1.2)
    as_json(cache, "compare", a, b, "--fail-on-regression", "25")
    as_json(cache, "compare", b, a, "--fail-on-regression", "5")
    value = as_json(
        cache, "compare", a, b, "--fail-on-regression", "5", "--only-changed", "--sort", "ratio",
        code=5,
    )  # fmt: skip
    assert value["regressions"] == 1 and len(value["changes"]) == 1
    text = invoke(cache, "compare", a, b).stdout
    assert "1 SLOW" in text and "fine(variant=2)" in text
    Store().save(ENV, winner(1, 4.0, size=1))
    assert as_json(cache, "compare", a, cache)["counts"]["FAST"] == 1


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> PlaybackLab:
    lab = PlaybackLab(facts=DEVICE)
    monkeypatch.setattr("tritonconv.autotune.cli.verify.CudaLab", lambda: lab)
    return lab


def test_verify_and_its_exit_codes(
    cache: Path, tmp_path: Path, scale: Scale, lab: PlaybackLab
) -> None:
    assert as_json(cache, "verify", code=3)["results"] == []
    Store().save(ENV, winner(1))
    Store().save(ENV, winner(1, size=8))
    value = as_json(cache, "verify", "--op", "fake")
    assert value["counts"] == {"passed": 2, "wrong": 0, "skipped": 0}
    (row,) = as_json(cache, "verify", "--quick")["results"]
    assert row["problem"]["size"] == 8 and row["error"] <= row["budget"]

    Store().save(ENV, winner(2, size=9, source="source-0"))
    assert as_json(cache, "verify")["counts"] == {"passed": 2, "wrong": 0, "skipped": 1}
    assert as_json(cache, "verify", "--strict", code=7)["counts"]["skipped"] == 1

    wrong = entry_of(trial(0, 10.0), trial(1, 5.0, algorithm="wrong"), size=10)
    scale._algorithms = (*scale._algorithms, *_wrong())
    Store().save(ENV, wrong)
    value = as_json(cache, "verify", code=4)
    assert value["counts"]["wrong"] == 1
    result = invoke(cache, "verify", code=4)
    assert "exceeds budget" in result.stdout and "tune --force" in result.stderr

    path = save(tmp_path / "b.json", winner(1))
    other = save(tmp_path / "c.json", winner(1, env=SISTER), env=SISTER)
    value = as_json(cache, "verify", path, other)
    assert value["counts"]["passed"] == 1 and value["left_out"] == 1
    assert as_json(cache, "verify", path, other, "--strict", code=7)["left_out"] == 1
    assert as_json(cache, "verify", path, "--strict")["left_out"] == 0
    value = as_json(cache, "verify", other, code=3)  # nothing was checked
    assert value["left_out"] == 1 and value["results"] == []
    skipped = save(tmp_path / "d.json", winner(2, source="source-0"))
    assert as_json(cache, "verify", skipped, "--strict", code=3)["counts"]["skipped"] == 1
    value = as_json(cache, "verify", path, other, "--op", "conv2d.forward", code=3)
    assert value["left_out"] == 0  # of other operators


def _wrong() -> tuple[Any, ...]:
    from autotune_fakes import Wrong

    return (Wrong(),)


@no_gpu
def test_verifying_without_a_gpu_is_exit_6(cache: Path, scale: Scale) -> None:
    result = invoke(cache, "verify", code=6)
    assert "GPU" in result.stderr and result.stdout == ""


@no_gpu
def test_export_import_merge(cache: Path, tmp_path: Path, scale: Scale) -> None:
    Store(cache / "tuned").save(ENV, winner(1))
    Store(cache / "tuned").save(ENV, winner(0, 10.0, size=9))
    path = tmp_path / "out" / "mine.json"
    value = as_json(cache, "export", path)
    assert value["entries"] == 2 and value["by_operator"] == {"fake.scale": 2}
    assert value["bytes"] == path.stat().st_size
    value = as_json(cache, "export", tmp_path, "--min-speedup", "1.5", "--op", "fake")
    assert value["entries"] == 1 and value["path"] == str(tmp_path / "nvidia_h100_80gb_hbm3.json")
    result = invoke(cache, "export", tmp_path / "no.json", "--min-speedup", "99", code=3)
    assert "nothing written" in result.stderr and not (tmp_path / "no.json").exists()

    Store(cache / "tuned").save(SISTER, winner(1, env=SISTER))
    result = invoke(cache, "export", path, code=2)  # of which of the two?
    assert "H200" in result.stderr and ENV.hash[:8] in result.stderr
    assert as_json(cache, "export", path, "--environment", ENV.hash[:8])["entries"] == 2

    other = tmp_path / "other"
    value = as_json(other, "import", path)
    assert [(b["imported"], b["kept"], b["stale"]) for b in value["bundles"]] == [(2, 0, 0)]
    assert as_json(other, "import", path, path)["bundles"][1]["kept"] == 2
    assert "H100" in invoke(other, "import", path).stdout
    value = as_json(other, "explain", scale.name, "size=64")
    assert value["choice"]["tier"] == "exact" and value["served_by"]["source"] == "user"

    faster = save(tmp_path / "faster.json", winner(3, 4.0))
    merged = tmp_path / "merged.json"
    value = as_json(cache, "merge", path, faster, "--out", merged)
    assert (value["given"], value["entries"]) == (3, 2)
    assert "2 entries of 3" in invoke(cache, "merge", path, faster, "--out", merged).stdout
    assert as_json(cache, "compare", path, merged)["counts"]["FAST"] == 1
    foreign = save(tmp_path / "foreign.json", winner(1, env=SISTER), env=SISTER)
    result = invoke(cache, "merge", path, foreign, "--out", merged, code=2)
    assert "one environment" in result.stderr


def test_clean_shows_before_it_deletes(cache: Path, scale: Scale) -> None:
    store = Store(cache / "tuned")
    assert as_json(cache, "clean")["files"] == []
    good = store.save(ENV, winner(1, created="2026-02-01")).path
    store.save(ENV, winner(1, size=3, changed={"aten": "source-0"}))  # outdated: it serves
    store.save(ENV, winner(1, size=2, source="source-0"))
    unknown = good.parents[1] / "kernel.mine" / good.name
    unknown.parent.mkdir()
    (good.parent / "torn.json").write_text("{")
    left = good.parent / ".abc.tmp"
    left.write_text("")
    os.utime(left, (0, 0))
    (good.parent / ".def.tmp").write_text("")  # of a writer that is at work now

    value = as_json(cache, "clean")
    whys = ["abandoned", "stale", "unreadable"]
    assert sorted(row["why"] for row in value["files"]) == whys and value["deleted"] == 0
    assert all(Path(row["path"]).exists() for row in value["files"])
    assert [row["why"] for row in as_json(cache, "clean", "--stale")["files"]] == ["stale"]
    assert "--yes" in invoke(cache, "clean").stderr
    value = as_json(cache, "clean", "--yes", "--op", "fake")
    assert value["deleted"] == 3 and not any(Path(r["path"]).exists() for r in value["files"])
    assert {stored.entry.problem["size"] for stored in store.entries()} == {64, 3}
    assert as_json(cache, "clean", "--yes")["files"] == []

    assert as_json(cache, "clean", "--older-than", "5200w")["files"] == []
    old = store.save(ENV, winner(1, size=5, created="2000-01-01T00:00:00+00:00")).path
    value = as_json(cache, "clean", "--older-than", "1000w", "--stale", "--yes")
    assert [(row["why"], row["path"]) for row in value["files"]] == [("old", str(old))]


def test_what_replaced_an_unreadable_file_meanwhile_is_not_deleted(cache: Path) -> None:
    store = Store(cache / "tuned")
    path = store.save(ENV, winner(1)).path
    good = path.read_text()
    path.write_text("{")
    found = find(store)
    assert [row.why for row in found] == ["unreadable"]
    path.write_text(good)
    assert remove(found) == [] and path.read_text() == good
    path.write_text("{")
    assert remove(found) == found and not path.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", "nothing.like.it", "size=64"),
        ("explain", "fake.scale", "size"),
        ("compare", "no-such-table", "neither"),
        ("compare", "only-one"),
        ("merge", "no-such-table", "--out", "x.json"),
        ("merge", "no-such-table"),
        ("import", "no-such-bundle.json"),
        ("export",),
        ("export", "x.json", "--environment", "zzz"),
        ("clean", "--older-than", "yesterday"),
        ("verify", "--op", "nothing.like.it"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_2_and_says_why(
    cache: Path, scale: Scale, arguments: tuple[str, ...]
) -> None:
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == 2, result.output
    assert result.stderr.strip() and "Traceback" not in result.stderr


@no_gpu
def test_the_verbs_of_the_installed_command(tmp_path: Path) -> None:
    """Every verb in a process of its own, as a user starts it, on real operators."""
    from tritonconv.runtime.operators import get_operator

    operator = get_operator("conv2d.forward")
    problem = operator.parse({"N": 8, "C": 64, "M": 64, "H": 56, "K": 3, "P": 1})
    aten = tables.Trial("aten", {}, "ok", "", tables.Timing(5.0, 5.0, 5.0, 9))
    entry = tables.Entry(
        operator.name,
        dict(problem.fields()),
        operator.source_hashes(),
        "graph-cold",
        ENV.as_dict(),
        aten,
        aten,
        (0,),
        (aten,),
    )
    Store(tmp_path / "cache" / "tuned").save(ENV, entry)
    script = """
import sys
from tritonconv.autotune.cli import app
for words in sys.argv[1].split(";"):
    try:
        app(words.split(), prog_name="autotune")
    except SystemExit as error:
        print(words.split()[0], error.code, file=sys.stderr)
"""
    verbs = (
        "export mine.json --json",
        "import mine.json --json",
        "merge mine.json mine.json --out both.json --json",
        "compare mine.json both.json --json --fail-on-regression 1",
        "explain conv2d.forward N=8,C=64,M=64,H=56,K=3,P=1 --json",
        "clean --json",
        "verify --json",
    )
    done = subprocess.run(
        [sys.executable, "-c", script, ";".join(verbs)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HOME": str(tmp_path), "TRITONCONV_CACHE_DIR": str(tmp_path / "cache")},
        timeout=120,
    )
    codes = dict(line.split() for line in done.stderr.splitlines() if len(line.split()) == 2)
    names = [verb.split()[0] for verb in verbs]
    assert codes == {**dict.fromkeys(names, "0"), "verify": "6"}, done.stderr
    decoder, text, values = json.JSONDecoder(), done.stdout.strip(), []
    while text:
        value, end = decoder.raw_decode(text)
        values.append(value)
        text = text[end:].strip()
    assert len(values) == len(verbs) - 1
    assert all(value["schema_version"] == 1 for value in values)
    assert values[4]["choice"] == {
        "algorithm": "aten", "config": {}, "tier": "exact", "source": "user",
    }  # fmt: skip
