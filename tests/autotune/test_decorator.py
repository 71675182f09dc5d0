"""The decorator for users' own kernels, in the interpreter with recorded times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import timeit
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import foreign_kernels as kernels
import pytest
import torch
import triton
from autotune_fakes import PlaybackLab

from tritonconv.autotune import autotune, foreign_tuning
from tritonconv.autotune.decorator import Autotuner
from tritonconv.autotune.foreign_tuning import using_lab
from tritonconv.autotune.measure import DeviceLostError
from tritonconv.autotune.report import TuningStoppedError
from tritonconv.autotune.search import Failure, Status
from tritonconv.autotune.space import Candidate
from tritonconv.runtime.settings import settings

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="in the interpreter; test_decorator_gpu.py is the GPU's"
    ),
]

SIZE = 100


def by_block(times: dict[int, float | Failure]) -> Callable[[Candidate], float | Failure]:
    return lambda candidate: times[candidate.config.as_dict()["BLOCK"]]


def grid(meta: dict[str, Any]) -> tuple[int]:
    return (triton.cdiv(meta["size"], meta["BLOCK"]),)


def blocks_prepared(lab: PlaybackLab) -> list[int]:
    """Blocks in the order first tried."""
    return list(dict.fromkeys(c.config.as_dict()["BLOCK"] for c in lab.prepared))


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Kernels are globals: every test meets them for the first time."""

    def forget() -> None:
        for value in vars(kernels).values():
            while hasattr(value, "fn"):
                if isinstance(value, Autotuner):
                    value.forget()
                value = value.fn
        foreign_tuning._warned.clear()

    forget()
    yield
    forget()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def lab() -> Iterator[PlaybackLab]:
    lab = PlaybackLab(times=by_block({32: 30.0, 64: 10.0, 128: 20.0}))
    with using_lab(lab):  # type: ignore[arg-type]
        yield lab


def double(x: torch.Tensor, launch: Any = grid) -> torch.Tensor:
    y = torch.full_like(x, float("nan"))
    kernels.double[launch](x, y, x.numel())
    return y


def entries(cache: Path) -> list[dict[str, Any]]:
    files = sorted((cache / "tuned").rglob("kernel.*/*.json"))
    return [json.loads(file.read_text()) for file in files]


class TestLikeTriton:
    """Where triton.autotune can be run in the interpreter, both do the same."""

    def pair(self, kernel: Autotuner, **options: Any) -> tuple[Any, Any]:
        """The kernel under Triton's tuner with recorded times, and under ours."""
        times = {32: 30.0, 64: 10.0, 128: 20.0}
        chosen: list[int] = []

        def bench(call: Callable[[], None], quantiles: Any) -> list[float]:
            call()
            return [times[chosen.pop(0)]] * 3

        theirs = triton.autotune(kernel.configs, kernel.keys, do_bench=bench, **options)(kernel.fn)
        original = theirs._bench

        def note(*args: Any, config: Any, **meta: Any) -> Any:
            chosen[:] = [config.kwargs["BLOCK"]]
            return original(*args, config=config, **meta)

        theirs._bench = note
        return theirs, kernel

    def test_results_choice_and_cache(self, x: torch.Tensor, lab: PlaybackLab) -> None:
        results = []
        for tuner in self.pair(kernels.double):
            y = torch.empty_like(x)
            tuner[grid](x, y, SIZE)
            results.append((y, tuner.best_config.kwargs, list(tuner.cache)))
        (theirs, *rest), (ours, *same) = results
        assert torch.equal(theirs, ours)
        assert rest == same

    @pytest.mark.parametrize("kernel", ["accumulate", "increment"])
    def test_reset_and_restore(self, kernel: str, x: torch.Tensor, lab: PlaybackLab) -> None:
        ours = getattr(kernels, kernel)
        options = {"reset_to_zero": ours.reset_to_zero, "restore_value": ours.restore_value}
        found = []
        for tuner in self.pair(ours, **options):
            a, b = x.clone(), torch.ones_like(x)
            tensors = (a, b) if kernel == "accumulate" else (a,)
            for _ in range(2):
                tuner[grid](*tensors, SIZE)
            found.append((a, b, tuner.best_config.kwargs))
        for mine, other in zip(*found, strict=True):
            assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other

    def test_prune_hooks_get_what_triton_gives(self, x: torch.Tensor, lab: PlaybackLab) -> None:
        calls: list[tuple[Any, ...]] = []

        def early(configs: list[Any], named: dict[str, Any], **kwargs: Any) -> list[Any]:
            calls.append(("early", len(configs), sorted(named), sorted(kwargs)))
            return configs[:2]

        def model(**named: Any) -> float:
            calls.append(("model", sorted(named)))
            return float(named["BLOCK"])

        prune = {"early_config_prune": early, "perf_model": model, "top_k": 1}
        ours = autotune(kernels.double.configs, ["size"], prune_configs_by=prune)(kernels.double.fn)
        theirs, _ = self.pair(kernels.double, prune_configs_by=prune)
        y = torch.empty_like(x)
        theirs[grid](x, y, SIZE)
        expected, calls = calls.copy(), calls
        calls.clear()
        ours[grid](x, y, SIZE)
        assert calls == expected
        assert ours.best_config == theirs.best_config

    def test_meta_parameters_that_clash(self, x: torch.Tensor, lab: PlaybackLab) -> None:
        for tuner in self.pair(kernels.double):
            with pytest.raises(ValueError, match=r"Conflicting meta-parameters: BLOCK"):
                tuner[grid](x, torch.empty_like(x), SIZE, BLOCK=32)

    def test_it_is_one(self) -> None:
        assert isinstance(kernels.double, triton.runtime.Autotuner)
        assert kernels.double.arg_names == ["x_ptr", "y_ptr", "size", "BLOCK"]
        assert kernels.double.base_fn.__name__ == "double"

    def test_no_configs_is_one_config(self, x: torch.Tensor) -> None:
        tuner = autotune([], ["size"])(kernels.make_local(2).fn)
        y = torch.empty_like(x)
        tuner[(4,)](x, y, SIZE, BLOCK=32)
        assert torch.equal(y, 2 * x)


class TestTuning:
    def test_the_fastest_wins_and_is_kept(
        self, x: torch.Tensor, lab: PlaybackLab, cache: Path
    ) -> None:
        assert torch.equal(double(x), 2 * x)
        assert kernels.double.best_config.kwargs == {"BLOCK": 64}
        tried = len(lab.prepared)
        assert torch.equal(double(x), 2 * x)
        kernels.double.forget()
        assert torch.equal(double(x), 2 * x)
        assert kernels.double.best_config.kwargs == {"BLOCK": 64}
        assert len(lab.prepared) == tried
        (entry,) = entries(cache)
        assert entry["operator"] == "kernel.foreign_kernels.double"
        assert entry["problem"]["key.size"] == SIZE
        assert entry["best"]["config"]["BLOCK"] == 64

    def test_a_list_that_grows_times_only_what_is_new(
        self, x: torch.Tensor, lab: PlaybackLab, cache: Path
    ) -> None:
        double(x)
        finalists = 3
        assert len(lab.prepared) == 3 + finalists
        lab.prepared.clear()
        configs = [*kernels.double.configs, triton.Config({"BLOCK": 128}, num_warps=8)]
        tuner = autotune(configs, ["size"])(kernels.double.fn)
        tuner[grid](x, torch.empty_like(x), SIZE)
        assert len(lab.prepared) == 1 + finalists + 1
        assert lab.prepared[0].config.as_dict()["num_warps"] == 8
        assert len(entries(cache)) == 2
        kernels.double.forget()
        double(x)
        assert len(lab.prepared) == 1 + finalists + 1

    def test_sources_under_one_name_keep_entries_of_their_own(
        self, x: torch.Tensor, lab: PlaybackLab, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A factory makes kernels of one name; an edited kernel is another, too."""

        def call(source: str) -> int:
            before = len(lab.prepared)
            monkeypatch.setattr("tritonconv.autotune.foreign.source_hash", lambda tuner: source)
            tuner = autotune(kernels.double.configs, ["size"])(kernels.double.fn)
            tuner[grid](x, torch.empty_like(x), SIZE)
            return len(lab.prepared) - before

        assert [bool(call(source)) for source in ("one", "two", "one", "two")] == [1, 1, 0, 0]
        found = entries(cache)
        assert sorted(entry["sources"]["triton"] for entry in found) == ["one", "two"]

    @pytest.mark.parametrize("launch", [(4,), (4, 1), grid], ids=["1", "2", "function"])
    def test_grids(self, x: torch.Tensor, lab: PlaybackLab, launch: Any) -> None:
        assert torch.equal(double(x, launch), 2 * x)

    def test_ties_go_to_the_first(self, x: torch.Tensor) -> None:
        for noise in range(5):
            lab = PlaybackLab(by_block({32: 10.1, 64: 10.0, 128: 10.05}), 0.001, noise)
            with using_lab(lab), settings.override(cache_dir=settings.cache_dir / str(noise)):  # type: ignore[arg-type]
                double(x)
            assert kernels.double.best_config.kwargs == {"BLOCK": 32}

    @pytest.mark.parametrize(
        ("change", "tunes"),
        [
            (lambda x: x + 1, False),
            (lambda x: torch.cat([x, x]), True),
            (lambda x: x.half(), True),
            (lambda x: torch.cat([x, x])[1 : SIZE + 1], True),
        ],
        ids=["values", "key", "dtype", "alignment"],
    )
    def test_what_a_key_is(
        self, x: torch.Tensor, lab: PlaybackLab, change: Any, tunes: bool
    ) -> None:
        double(x)
        before = len(lab.prepared)
        changed = change(x)
        assert torch.equal(double(changed), 2 * changed)
        assert (len(lab.prepared) > before) is tunes
        before = len(lab.prepared)
        double(changed)
        double(x)
        assert len(lab.prepared) == before

    def test_wrong_configs_and_those_that_overrun_cannot_win(self, x: torch.Tensor) -> None:
        def times(candidate: Candidate) -> float:
            config = candidate.config.as_dict()
            return 1.0 if config["OVERRUN"] or config["SCALE"] == 3 else float(config["BLOCK"])

        y = torch.zeros(SIZE)
        with (
            using_lab(PlaybackLab(times)),  # type: ignore[arg-type]
            pytest.warns(
                UserWarning, match=r"2 of 4 configs of \S+sloppy give results that differ"
            ),
        ):
            kernels.sloppy[grid](x, y, SIZE)
        assert kernels.sloppy.best_config.kwargs == {"BLOCK": 64, "OVERRUN": 0, "SCALE": 2}
        assert torch.equal(y, 2 * x)

    def test_failures_are_not_fatal(self, x: torch.Tensor) -> None:
        broken = Failure(Status.CRASH, "died")
        with using_lab(PlaybackLab(by_block({32: 30.0, 64: broken, 128: 20.0}))):  # type: ignore[arg-type]
            assert torch.equal(double(x), 2 * x)
        assert kernels.double.best_config.kwargs == {"BLOCK": 128}

    def test_nothing_passes(self, x: torch.Tensor) -> None:
        broken = Failure(Status.LAUNCH, "no")
        with (
            using_lab(PlaybackLab(lambda candidate: broken)),  # type: ignore[arg-type]
            pytest.warns(UserWarning, match="first config is used: launch: no"),
        ):
            assert torch.equal(double(x), 2 * x)
            double(x)
        assert kernels.double.best_config.kwargs == {"BLOCK": 32}

    def test_a_measuring_process_that_is_lost(self, x: torch.Tensor) -> None:
        class Lost(PlaybackLab):
            def timer(self, operator: Any, problem: Any, policy: Any, seed: int) -> Any:
                raise DeviceLostError("no memory for another context")

        with using_lab(Lost(), isolated=True), pytest.warns(UserWarning, match="no memory"):  # type: ignore[arg-type]
            assert torch.equal(double(x), 2 * x)
        kernels.double.forget()
        with using_lab(Lost()), pytest.raises(TuningStoppedError, match="no memory"):  # type: ignore[arg-type]
            double(x)

    def test_the_caller_tensors_are_not_touched(self, x: torch.Tensor, lab: PlaybackLab) -> None:
        before = x.clone()
        kernels.increment[grid](x, SIZE)
        assert torch.equal(x, before + 1)

    def test_pruned_away(self, lab: PlaybackLab) -> None:
        x = torch.randn(96)
        y = torch.empty_like(x)
        kernels.unmasked[grid](x, y, 96)
        assert torch.equal(y, 2 * x)
        assert kernels.unmasked.best_config.kwargs == {"BLOCK": 32}
        assert not lab.prepared  # a single config is left
        x = torch.randn(64)
        kernels.unmasked[grid](x, x, 64)
        assert blocks_prepared(lab) == [64, 32]

    def test_heuristics_below_and_above(self, x: torch.Tensor) -> None:
        def times(candidate: Candidate) -> float:
            config = candidate.config.as_dict()
            return float(config.get("SPLIT", config.get("BLOCK", 0)))

        y = torch.empty_like(x)
        with using_lab(PlaybackLab(times)):  # type: ignore[arg-type]
            kernels.heuristic_below[lambda meta: (meta["SPLIT"],)](x, y, SIZE)
            assert torch.equal(y, 2 * x)
            assert kernels.heuristic_below.best_config.kwargs == {"SPLIT": 2}
            y.zero_()
            kernels.heuristic_above[grid](x, y, SIZE)
            kernels.heuristic_above[grid](x[1:], y[1:], SIZE - 1)
        assert torch.equal(y, 2 * x)
        tuner = kernels.heuristic_above.fn
        assert {key[0] for key in tuner.cache} == {False, True}

    def test_hooks_of_configs(self, x: torch.Tensor) -> None:
        seen: list[int] = []
        y = torch.empty_like(x)
        with using_lab(PlaybackLab(by_block({32: 30.0, 64: 10.0}))):  # type: ignore[arg-type]
            for _ in range(3):
                kernels.hooked[grid](x, y, SIZE, seen)
        assert torch.equal(y, 2 * x)
        assert seen == [64, 64, 64]  # measured runs got lists of their own

    def test_keyword_arguments_and_changing_integers(
        self, x: torch.Tensor, lab: PlaybackLab
    ) -> None:
        y = torch.empty_like(x)
        kernels.double[grid](x_ptr=x, y_ptr=y, size=SIZE)
        tried = len(lab.prepared)
        kernels.double[grid](x, size=SIZE, y_ptr=y)
        assert len(lab.prepared) == tried
        tuner = autotune(kernels.double.configs, ["y_ptr"])(kernels.double.fn)
        for size in range(1, 2000):
            tuner._raw_keys.get((3,))
            tuner._remember((x, y, size), {}, tuner._decide((x, y, SIZE), {}, (1,), True))
        assert tuner._classes_only
        assert len(tuner._raw) < 10


def test_the_host_time_of_a_known_key(
    x: torch.Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python's part of a call over the bare launch: the launch itself does nothing here."""
    jitted = kernels.double.fn
    monkeypatch.setattr(type(jitted), "run", lambda self, *args, grid, warmup, **kwargs: None)
    theirs = triton.autotune(kernels.double.configs, key=["size"])(jitted)
    theirs.cache[SIZE, "torch.float32", "torch.float32"] = theirs.configs[0]
    ours, y, options = kernels.double, torch.empty_like(x), theirs.configs[0].all_kwargs()
    ours[1,](x, y, SIZE)

    def microseconds(call: Callable[[], Any]) -> float:
        return min(timeit.repeat(call, number=2000, repeat=30)) / 2000 * 1e6

    bare = microseconds(lambda: jitted[1,](x, y, SIZE, **options))
    over = [microseconds(lambda t=t: t[1,](x, y, SIZE)) - bare for t in (ours, theirs)]
    with capsys.disabled():
        print(f" over the bare launch: ours {over[0]:.2f} us, triton.autotune {over[1]:.2f} us")
    assert over[0] < 0.5 * over[1]


class TestWhenNothingIsMeasured:
    def check(self, x: torch.Tensor, lab: PlaybackLab) -> None:
        assert torch.equal(double(x), 2 * x)
        assert kernels.double.best_config.kwargs == {"BLOCK": 32}
        assert not lab.prepared

    def test_off(self, x: torch.Tensor, lab: PlaybackLab) -> None:
        with settings.override(autotune="off"):
            self.check(x, lab)
        double(x)
        assert lab.prepared

    def test_deterministic(self, x: torch.Tensor, lab: PlaybackLab) -> None:
        with settings.override(deterministic=True):
            self.check(x, lab)

    def test_deterministic_torch(self, x: torch.Tensor, lab: PlaybackLab) -> None:
        torch.use_deterministic_algorithms(True)
        try:
            self.check(x, lab)
        finally:
            torch.use_deterministic_algorithms(False)
        double(x)
        assert lab.prepared

    def test_deterministic_mode_uses_tables(self, x: torch.Tensor, lab: PlaybackLab) -> None:
        double(x)
        with settings.override(deterministic=True):
            double(x)
            assert kernels.double.best_config.kwargs == {"BLOCK": 64}

    def test_graph_capture(
        self, x: torch.Tensor, lab: PlaybackLab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "device_count", lambda: 1)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with pytest.warns(UserWarning, match="a CUDA graph is being captured"):
                self.check(x, lab)
        double(x)
        assert kernels.double.best_config.kwargs == {"BLOCK": 64}

    def test_distributed(
        self, x: torch.Tensor, lab: PlaybackLab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.warns(UserWarning, match="ranks of a distributed job could choose differently"):
            self.check(x, lab)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            double(torch.cat([x, x]))

    def test_interpreter(self, x: torch.Tensor) -> None:
        self.check(x, PlaybackLab())

    def test_ignored_arguments_are_named(self) -> None:
        with pytest.warns(UserWarning, match="ignores rep, use_cuda_graph"):
            autotune(kernels.double.configs, ["size"], rep=100, use_cuda_graph=True)


PROGRAM = """
import sys
import torch
from autotune_fakes import PlaybackLab
from tritonconv.autotune.foreign_tuning import using_lab
import {module} as kernels
lab = PlaybackLab(lambda candidate: float(candidate.config.as_dict()["BLOCK"] != 64) + 10)
x = torch.arange(100.0)
y = torch.empty_like(x)
with using_lab(lab):
    kernels.double[lambda meta: (-(-100 // meta["BLOCK"]),)](x, y, 100)
assert torch.equal(y, 2 * x)
print(kernels.double.best_config.kwargs["BLOCK"], len(lab.prepared))
"""


class TestProcesses:
    def run(self, folder: Path, cache: Path, source: str | None = None) -> tuple[int, int]:
        """Tune in a process of its own; the winner's block, and how many configs were tried."""
        here = Path(__file__).parent
        module = folder / "user_kernels.py"
        text = (here / "foreign_kernels.py").read_text() if source is None else source
        module.write_text(text)
        environment = {**os.environ, "TRITONCONV_CACHE_DIR": str(cache), "TRITON_INTERPRET": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(here)])
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(module="user_kernels")],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        block, tried = map(int, done.stdout.split())
        return block, tried

    def test_a_second_process_measures_nothing(self, tmp_path: Path, cache: Path) -> None:
        source = (Path(__file__).parent / "foreign_kernels.py").read_text()
        block, tried = self.run(tmp_path, cache)
        assert block == 64
        assert tried >= 3
        assert self.run(tmp_path, cache) == (64, 0)
        moved = source.replace("@triton.jit\ndef _twice", "# moved\n\n\n@triton.jit\ndef _twice")
        assert self.run(tmp_path, cache, moved) == (64, 0)
        changed = source.replace("return x + x", "return 2 * x")
        assert self.run(tmp_path, cache, changed)[1] >= 3
        fewer = source.replace("for block in (32, 64, 128)", "for block in (32, 64)")
        assert self.run(tmp_path, cache, fewer)[1] > 0
