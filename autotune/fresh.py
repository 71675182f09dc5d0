"""Tune in a process of its own, with caches of its own: what repeatable experiments start from.

Parent and child speak JSON over the child's standard streams. Problems travel by their fields,
which ``Operator.parse`` takes, candidates as an algorithm's name and a config's integers.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import tritonconv  # noqa: F401  # registers the operators
from tritonconv.runtime.errors import TritonConvError, bad_value
from tritonconv.runtime.operators import Operator, Problem, get_operator
from tritonconv.runtime.settings import settings

from .harvest import resolve
from .laboratory import Setup, laboratory
from .measure import Lab, Policy
from .report import Check, Options
from .search import Effort, StrategyName
from .session import Compiler
from .space import Candidate
from .store import Store
from .triton_autotune import tune_like_triton
from .tune import tune_pairs

Pair = tuple[Operator, Problem]


class FreshProcessError(TritonConvError):
    """The child process did not finish its job; its messages went to stderr."""


@dataclass(frozen=True)
class Job:
    """What a fresh process is to do.

    Attributes:
        pairs: what to tune.
        cache_dir: where its tables go.
        kernel_cache: directory of Triton's compiled kernels; the user's own when None.
        jobs: processes that compile ahead, as in :class:`~tritonconv.autotune.laboratory.Setup`;
            with 0 each candidate is compiled where it runs, just before.
        options: fields of :class:`~tritonconv.autotune.tune.Options` by name.
        budget_s: for everything.
        triton: instead of tuning, do what ``triton.autotune`` does for these candidates of each
            pair.
        lab: ``module:callable`` that makes the laboratory; a GPU's when empty.
    """

    pairs: Sequence[Pair]
    cache_dir: Path
    kernel_cache: Path | None = None
    jobs: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    budget_s: float | None = None
    triton: Sequence[Sequence[Candidate]] | None = None
    lab: str = ""

    def to_json(self) -> dict[str, Any]:
        """The job as a JSON value."""
        return {
            "pairs": [[operator.name, dict(problem.fields())] for operator, problem in self.pairs],
            "cache_dir": str(self.cache_dir),
            "jobs": self.jobs,
            "options": dict(self.options),
            "budget_s": self.budget_s,
            "triton": None
            if self.triton is None
            else [[[c.algorithm, c.config.as_dict()] for c in some] for some in self.triton],
            "lab": self.lab,
        }


@dataclass(frozen=True)
class Done:
    """What a fresh process did.

    Attributes:
        seconds: of the job alone, without the start of the process.
        configs: candidates that were compiled and timed, or failed.
        results: number of problems by what became of them.
    """

    seconds: float
    configs: int
    results: Mapping[str, int]


class Launch(Protocol):
    """Does a job somewhere."""

    def __call__(self, job: Job) -> Done:
        """Do it and wait."""
        ...


def in_fresh_process(job: Job) -> Done:
    """Do a job in a new Python process, whose progress goes to stderr.

    Raises:
        FreshProcessError: it failed.
    """
    environment = {**os.environ, "TRITONCONV_REPORT_MISSES": "0"}
    if job.kernel_cache is not None:
        job.kernel_cache.mkdir(parents=True, exist_ok=True)
        environment["TRITON_CACHE_DIR"] = str(job.kernel_cache.absolute())
    code = f"from {__name__} import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(job.to_json()),
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        check=False,
    )
    if ended.returncode:
        raise FreshProcessError(f"a tuning process ended with exit code {ended.returncode}")
    value = json.loads(ended.stdout.strip().splitlines()[-1])
    return Done(float(value["seconds"]), int(value["configs"]), dict(value["results"]))


def main() -> None:
    """The child: read a job from stdin, do it, print what was done."""
    value = json.load(sys.stdin)
    output, sys.stdout = sys.stdout, sys.stderr  # nothing else may print among the results
    done = do(value)
    json.dump({"seconds": done.seconds, "configs": done.configs, "results": done.results}, output)
    output.write("\n")
    output.flush()  # at its end Python flushes what sys.stdout is by then


def do(value: Mapping[str, Any]) -> Done:
    """Do a job given as a JSON value, in this process."""
    pairs: list[Pair] = []
    given: Lab | None = resolve(value["lab"])() if value["lab"] else None
    for name, problem in value["pairs"]:
        operator = get_operator(name)
        pairs.append((operator, operator.parse(problem)))
    with settings.override(cache_dir=Path(value["cache_dir"]), cache_path=()):
        if value["triton"] is not None:
            return _like_triton(pairs, value["triton"])
        begin = time.monotonic()
        with _laboratory(given, value["jobs"]) as (lab, compiler):
            reports = tune_pairs(
                pairs,
                budget_s=value["budget_s"],
                options=options_of(value["options"]),
                store=Store(Path(value["cache_dir"]) / "tuned"),
                lab=lab,
                compiler=compiler,
            )
        seconds = time.monotonic() - begin
    results: dict[str, int] = {}
    for report in reports:
        results[str(report.result)] = results.get(str(report.result), 0) + 1
    return Done(seconds, sum(report.measured for report in reports), results)


@contextlib.contextmanager
def _laboratory(given: Lab | None, jobs: int | None) -> Iterator[tuple[Lab, Compiler | None]]:
    if given is not None:
        yield given, None
        return
    with laboratory(setup=Setup(jobs=jobs)) as made:
        yield made


def options_of(values: Mapping[str, Any]) -> Options:
    """Options from JSON.

    Raises:
        ArgumentValueError: there is no such option.
    """
    known = {one.name for one in fields(Options)}
    if not set(values) <= known:
        raise bad_value("options", ", ".join(sorted(known)), sorted(set(values) - known))
    kinds: dict[str, Any] = {
        "effort": Effort,
        "policy": Policy,
        "strategy": StrategyName,
        "check": Check,
    }
    typed = {name: kinds.get(name, lambda v: v)(value) for name, value in values.items()}
    return Options(**typed)


def _like_triton(pairs: Sequence[Pair], candidates: Sequence[Sequence[Any]]) -> Done:
    begin = time.monotonic()
    count = failed = 0
    for (operator, problem), listed in zip(pairs, candidates, strict=True):
        some = [
            Candidate(name, operator.algorithm(name).config_type.from_dict(config))
            for name, config in listed
        ]
        timed = tune_like_triton(operator, problem, some)
        count += len(timed)
        failed += all(us is None for us in timed.values())
    seconds = time.monotonic() - begin
    return Done(seconds, count, {"tuned": len(pairs) - failed, "failed": failed})
