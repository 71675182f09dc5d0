"""The first thing to run: generate, tune (or compile) and train, on whatever machine this is.

The network and its training are reached by name, as any user's would be.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import triton
from torch import Tensor, nn

from tritonconv import backend
from tritonconv.codegen import show
from tritonconv.runtime.aot import Compiled, compile_plan
from tritonconv.runtime.device import DeviceFacts, device_facts, nominal_device
from tritonconv.runtime.operators import Operator, Problem
from tritonconv.runtime.settings import settings
from tritonconv.runtime.tables import tuned_table

from .harvest import Pair, collect, harvest
from .interpret import Interpreted, InterpreterError, interpret, own_kernel
from .laboratory import laboratory
from .roofline import floor_us
from .search import Effort
from .session import Compiler
from .space import Candidate, space
from .tune import Options, Progress, Report, tune_pairs, unique_pairs

TASK = "tritonconv.models.vision.segmentation"
NETWORK = "tritonconv.models.vision.attention_unet:build"
SCHEMA_VERSION = 1

_COMPILE_SECONDS = 30.0
_SECONDS_PER_PROBLEM = 2.0
_INTERPRETED_CROP = 32
_INTERPRETED_FLOPS = 20_000_000


@dataclass(frozen=True)
class Quickstart:
    """What to do.

    Attributes:
        data: folder of PNG pairs; the demonstration data when None.
        budget: seconds of tuning (with a GPU).
        target: GPU to compile for (without one).
        train_seconds: seconds of training.
        out: folder for the picture, the record and the checkpoint.
        seed: of weights, crops and search.
    """

    data: Path | None = None
    budget: float = 60.0
    target: str = "sm_90"
    train_seconds: float = 60.0
    out: Path = Path("tritonconv-quickstart")
    seed: int = 0


class Reporter(Protocol):
    """Shows the steps; the command line implements it with rich."""

    def heading(self, number: int, text: str) -> None:
        """A step begins."""
        ...

    def text(self, text: str) -> None:
        """A line."""
        ...

    def code(self, text: str) -> None:
        """Source text."""
        ...

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows of cells; columns named with a trailing ``>`` are numbers."""
        ...

    def tuning(self) -> contextlib.AbstractContextManager[Progress]:
        """Progress of the tuning step."""
        ...

    def bar(self, text: str) -> contextlib.AbstractContextManager[Callable[[float, str], None]]:
        """A bar to be moved to a fraction with a remark."""
        ...


@dataclass
class Record:
    """What the run found; written to ``quickstart.json``."""

    device: dict[str, Any] = field(default_factory=dict)
    generated: dict[str, str] = field(default_factory=dict)
    tuning: dict[str, Any] | None = None
    compiled: dict[str, Any] | None = None
    interpreted: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON value, ``schema_version`` first."""
        return {"schema_version": SCHEMA_VERSION, **self.__dict__}


def swish_shift(y: Tensor, shift: Tensor) -> Tensor:
    """The user's function: z = y + shift, times the sigmoid of z."""
    z = y + shift
    return z * torch.sigmoid(z)


def run(plan: Quickstart, reporter: Reporter) -> Record:
    """Do all steps; Ctrl-C during training keeps what is learned and still draws it.

    Raises:
        ImportError: an optional dependency of the demonstration is missing; the message says
            which and how to get it.
    """
    return _Run(plan, reporter).run()


class _Run:
    def __init__(self, plan: Quickstart, reporter: Reporter) -> None:
        self.plan = plan
        self.reporter = reporter
        self.record = Record()
        self.cuda = torch.cuda.is_available()
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        )
        self.task = importlib.import_module(TASK)

    def run(self) -> Record:
        # First what can fail for want of a package or a file, then what takes time.
        data = self.task.demo_data(self.plan.data)
        importlib.import_module("matplotlib")
        self.plan.out.mkdir(parents=True, exist_ok=True)
        self._step(1, "The device", self._show_device)
        self._step(2, "A Python function becomes a kernel", self._show_codegen)
        if self.cuda:
            self._step(3, "Tune the network's kernels for this GPU", lambda: self._tune(data))
        else:
            title = f"Compile the network's kernels for {self.plan.target} and check one"
            self._step(3, title, lambda: self._compile(data))
        self._step(4, f"Train an Attention U-Net on {data.name}", lambda: self._train(data))
        self._step(5, "Results", self._results)
        write_json(Path(self.record.files["record"]), self.record.to_json())
        return self.record

    def _step(self, number: int, title: str, action: Callable[[], None]) -> None:
        self.reporter.heading(number, title)
        begin = time.monotonic()
        action()
        self.record.seconds[str(number)] = round(time.monotonic() - begin, 2)

    def _show_device(self) -> None:
        facts = device_facts(self.device) if self.cuda else nominal_device(self.plan.target)
        found = facts.name if self.cuda else f"no GPU; kernels will be compiled for {facts.name}"
        rows = [("GPU", found)]
        if self.cuda:
            rows += [
                ("multiprocessors", str(facts.sm_count)),
                ("L2", f"{facts.l2_bytes / 2**20:.0f} MiB"),
            ]
        rows += [("torch", torch.__version__), ("triton", triton.__version__)]
        self.reporter.table(("", "value"), rows)
        self.record.device = {
            "gpu": self.cuda,
            **facts.as_dict(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }

    def _show_codegen(self) -> None:
        written = inspect.getsource(swish_shift)
        generated = generated_source(swish_shift)
        self.reporter.text("You write the arithmetic of one output element:")
        self.reporter.code(written)
        self.reporter.text(
            "tritonconv traces it, differentiates it and emits what the kernel calls:"
        )
        self.reporter.code(generated)
        self.record.generated = {"function": written, "source": generated}

    def _network(self, data: Any, sized_for: str | None = None) -> nn.Module:
        network: nn.Module = self.task.demo_model(
            data, self.device, seed=self.plan.seed, sized_for=sized_for
        )
        return network

    def _config(self, **changes: Any) -> Any:
        config = self.task.demo_config(self.device, seconds=self.plan.train_seconds)
        return replace(config, seed=self.plan.seed, **changes)

    def _problems(self, network: nn.Module, inputs: Tensor, *, amp: bool) -> list[Pair]:
        """Problems of one training step of a network, in the memory format of GPUs."""
        network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # A copy, for images of one channel: only their strides say which format is meant.
        inputs = torch.empty_like(inputs, memory_format=torch.channels_last).copy_(inputs)
        return harvest(network, inputs, amp=torch.bfloat16 if amp else None)

    def _gpu_problems(self, data: Any) -> list[Pair]:
        """Problems of a step as it is on a GPU: its network, its batch, its dtype."""
        config = self.task.demo_config("cuda")
        shape = (config.batch_size, data.in_channels, config.crop, config.crop)
        inputs = torch.randn(shape, device=self.device)
        return self._problems(self._network(data, "cuda"), inputs, amp=config.amp)

    def _tune(self, data: Any) -> None:
        budget = self.plan.budget
        facts = device_facts(self.device)
        met = self._gpu_problems(data)
        pairs = heaviest(met, facts, max(1, int(budget / _SECONDS_PER_PROBLEM)))
        self.reporter.text(
            f"one training step meets {len(met)} problems; {budget:.0f} s go to the "
            f"{len(pairs)} that cost most, the others run the default"
        )
        options = Options(effort=Effort.QUICK, seed=self.plan.seed)
        with laboratory(self.device) as (lab, compiler):
            with self.reporter.tuning() as progress:
                reports = tune_pairs(
                    pairs,
                    budget_s=budget,
                    options=options,
                    progress=progress,
                    lab=lab,
                    compiler=compiler,
                )
            if compiler is not None:
                self._compile_ahead(compiler, unique_pairs([*met, *self._scoring(data)]), facts)
        self.reporter.table(
            ("problem", "default µs>", "tuned µs>", "speedup>", "kernel"),
            [_tuned_row(report) for report in reports],
        )
        self.record.tuning = {
            "problems": len(met),
            "attempted": len(pairs),
            "results": {
                str(report.problem): {"result": str(report.result), "speedup": report.speedup()}
                for report in reports
            },
        }

    def _scoring(self, data: Any) -> list[Pair]:
        """Problems of scoring the held-out images."""
        network = self._network(data)
        return collect(lambda: self.task.evaluate(network, data, device=self.device))

    def _compile_ahead(self, compiler: Compiler, pairs: Sequence[Pair], facts: DeviceFacts) -> None:
        """Compile in parallel what training will launch; one by one it would take a minute."""
        chosen = []
        for operator, problem in pairs:
            choice = tuned_table(facts).lookup(operator, problem)
            candidate = Candidate(choice.algorithm, choice.config)
            chosen.append((operator, problem, [candidate]))
            compiler.submit(*chosen[-1])
        with self.reporter.bar("compiling") as move:
            for index, row in enumerate(chosen):
                for _ in compiler.results(*row):
                    move((index + 1) / len(chosen), f"{index + 1} of {len(chosen)} problems")

    def _compile(self, data: Any) -> None:
        facts = nominal_device(self.plan.target)
        met = self._gpu_problems(data)
        rows: list[tuple[str, Compiled]] = []
        begin = time.monotonic()
        ordered = heaviest(met, facts, len(met))
        done = 0
        with self.reporter.bar("compiling") as move:
            for index, (operator, problem) in enumerate(ordered):
                if time.monotonic() - begin > _COMPILE_SECONDS:
                    break
                rows += [(str(problem), c) for c in compile_default(operator, problem, facts)]
                done = index + 1
                move(done / len(ordered), f"{done} of {len(ordered)} problems")
        wall = time.monotonic() - begin
        by_name: dict[str, list[tuple[str, Compiled]]] = {}
        for text, compiled in rows:
            by_name.setdefault(compiled.name, []).append((text, compiled))
        self.reporter.table(
            ("kernel", "variants>", "registers>", "spills, bytes>", "shared, KiB>", "for example"),
            [
                (
                    name.strip("_"),
                    str(len(found)),
                    _span([c.registers for _, c in found]),
                    _span([c.spill_bytes for _, c in found]),
                    _span([round(c.shared_bytes / 1024) for _, c in found]),
                    found[0][0],
                )
                for name, found in by_name.items()
            ],
        )
        self.reporter.text(
            f"one training step meets {len(met)} problems; the default kernels of the {done} that "
            f"cost most compiled for {self.plan.target} in {wall:.0f} s, without a GPU"
        )
        self.record.compiled = {
            "target": self.plan.target,
            "problems": len(met),
            "compiled": done,
            "kernels": [{"problem": text, **c.__dict__} for text, c in rows],
            "seconds": round(wall, 2),
        }
        self._interpret(data, facts)

    def _interpret(self, data: Any, facts: DeviceFacts) -> None:
        image = torch.randn(1, data.in_channels, _INTERPRETED_CROP, _INTERPRETED_CROP)
        small = self._problems(self._network(data), image, amp=False)
        chosen = interpretable(small, facts)
        if chosen is None:
            self.reporter.text("no problem of the network is small enough for the interpreter")
            return
        operator, problem = chosen
        try:
            answer: Interpreted = interpret(operator.name, problem.fields())
        except InterpreterError as error:
            self.reporter.text(str(error))
            self.record.interpreted = {"problem": str(problem), "failure": str(error)}
            return
        verdict = answer.accuracy
        self.reporter.text(
            f"interpreted on the CPU, {problem} with {answer.candidate}: {verdict}, "
            "against PyTorch in float64"
        )
        self.record.interpreted = {
            "problem": str(problem),
            "candidate": answer.candidate,
            "error": verdict.error,
            "budget": verdict.budget,
            "ok": verdict.ok,
        }

    def _train(self, data: Any) -> None:
        task, plan, device = self.task, self.plan, self.device
        network = self._network(data)
        before = task.evaluate(network, data, device=device)
        checkpoint = plan.out / f"checkpoint-{data.name}-{device.type}-{plan.seed}.pt"
        config = self._config(checkpoint=checkpoint)
        with self.reporter.bar("training") as move:
            result = task.train(
                network,
                data,
                config,
                device=device,
                progress=lambda p: move(p.fraction, f"step {p.step}, loss {p.loss:.3f}"),
            )
        if not result.interrupted:
            checkpoint.unlink(missing_ok=True)  # it is there to go on after an interruption
        after = task.evaluate(network, data, device=device)
        self.record.interrupted = result.interrupted
        self.record.training = {
            "network": NETWORK,
            "data": data.name,
            "source": data.source,
            "steps": result.steps,
            "seconds": round(result.seconds, 2),
            "classes": list(data.classes),
            "dice_before": list(before.dice),
            "dice_after": list(after.dice),
            "mean_dice_before": before.mean,
            "mean_dice_after": after.mean,
            "loss_first": result.losses[0] if result.losses else None,
            "loss_last": result.losses[-1] if result.losses else None,
            "ms_per_step": self._step_times(data),
        }
        sample = data.test[0]
        labels, attention = task.predict(network, sample, device=device)
        picture = task.render(
            plan.out / "segmentation.png",
            sample.image,
            sample.label,
            labels,
            attention,
            classes=data.classes,
            title=f"{sample.name}: mean Dice {before.mean:.3f} before, {after.mean:.3f} after "
            f"{result.seconds:.0f} s of training",
        )
        self.record.files["picture"] = str(picture)

    def _step_times(self, data: Any) -> dict[str, float | None]:
        """Milliseconds of a training step, the same few steps from the same weights each."""
        steps = 40 if self.cuda else 7
        arms: dict[str, contextlib.AbstractContextManager[Any]] = {"ours": contextlib.nullcontext()}
        if self.cuda:
            arms["ours, untuned"] = settings.override(autotune="off")
        arms["PyTorch"] = backend("torch")
        times: dict[str, float | None] = {}
        with self.reporter.bar("timing steps") as move:
            for index, (name, arm) in enumerate(arms.items()):
                with arm:
                    config = self._config(checkpoint=None, steps=steps)
                    config = replace(config, seconds=None)
                    result = self.task.train(self._network(data), data, config, device=self.device)
                times[name] = None if result.step_ms != result.step_ms else round(result.step_ms, 3)
                move((index + 1) / len(arms), name)
        return times

    def _results(self) -> None:
        training, record = self.record.training, self.record
        rows = [
            (f"Dice, {name}", f"{before:.3f}", f"{after:.3f}")
            for name, before, after in zip(
                training["classes"], training["dice_before"], training["dice_after"], strict=True
            )
        ]
        means = (f"{training['mean_dice_before']:.3f}", f"{training['mean_dice_after']:.3f}")
        rows.append(("Dice, mean", *means))
        self.reporter.table(("", "before>", f"after {training['steps']} steps>"), rows)
        times = training["ms_per_step"]
        self.reporter.table(
            ("training step", "ms>"),
            [(name, "-" if ms is None else f"{ms:.1f}") for name, ms in times.items()],
        )
        if not self.cuda:
            self.reporter.text("without a GPU both rows run PyTorch's kernels")
        record.files["record"] = str(self.plan.out / "quickstart.json")
        for name, file in record.files.items():
            self.reporter.text(f"{name}: {file}")


def generated_source(function: Callable[..., Any]) -> str:
    """What is generated from a function, with its first derivative."""
    printed = io.StringIO()
    show(function, order=1, file=printed)
    return printed.getvalue()


def heaviest(pairs: Sequence[Pair], facts: DeviceFacts, count: int) -> list[Pair]:
    """The problems with the largest floors, largest first."""

    def cost(pair: Pair) -> float:
        problem = pair[1]
        return floor_us(problem, facts) or float(problem.bytes_moved())

    return sorted(pairs, key=cost, reverse=True)[:count]


def compile_default(
    operator: Operator, problem: Problem, facts: DeviceFacts
) -> tuple[Compiled, ...]:
    """Compile our default kernels of a problem for a GPU that is not here."""
    candidate = own_kernel(operator, space(operator, problem, facts), problem)
    if candidate is None:
        return ()
    plan = operator.algorithm(candidate.algorithm).plan(problem, candidate.config)
    assert plan is not None
    return compile_plan(plan, facts.arch)


def interpretable(pairs: Sequence[Pair], facts: DeviceFacts) -> Pair | None:
    """The largest problem that the interpreter can do in seconds."""
    small = [
        pair
        for pair in pairs
        if pair[1].flops() <= _INTERPRETED_FLOPS
        and own_kernel(pair[0], space(*pair, facts), pair[1]) is not None
    ]
    return max(small, key=lambda pair: pair[1].flops(), default=None)


def write_json(path: Path, value: Any) -> None:
    """Write a file that is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def _span(values: Sequence[int | None]) -> str:
    known = sorted({value for value in values if value is not None})
    if not known:
        return "-"
    return str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"


def _tuned_row(report: Report) -> tuple[str, ...]:
    entry, speedup = report.entry, report.speedup()
    default = entry.default.timing if entry else None
    best = entry.best.timing if entry else None
    return (
        str(report.problem),
        f"{default.p50:.1f}" if default else "-",
        f"{best.p50:.1f}" if best else "-",
        f"{speedup:.2f}x" if speedup else "-",
        entry.best.algorithm if entry else str(report.result),
    )
