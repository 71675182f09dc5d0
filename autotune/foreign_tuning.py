"""What a decorated kernel does at the first call of a key: look it up, or tune it."""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton

from tritonconv.runtime import tables
from tritonconv.runtime.compat import interpreting
from tritonconv.runtime.device import device_facts
from tritonconv.runtime.freshness import serves
from tritonconv.runtime.operators import Field, Operator, Problem
from tritonconv.runtime.settings import settings
from tritonconv.runtime.tables import Entry, Trial, digest

from .compiling import CompilePool, CompileResult
from .foreign import (
    KernelOperator,
    KernelProblem,
    grids_of,
)
from .forkserver import dumps
from .kernel_call import capture
from .kernel_config import stored_values
from .kernel_source import KernelNotFoundError, chain, place_of
from .laboratory import Setup, close_lab
from .measure import CudaLab, DeviceLostError, Lab
from .report import Options, Report, Result, TuningStoppedError
from .search import Effort, Failure, Status, StrategyName
from .session import Compiler
from .space import Candidate
from .store import Store
from .tune import tune_pairs

if TYPE_CHECKING:
    from .decorator import Autotuner

_IDLE_SECONDS = 60.0
_TRUSTED_TRIES = 3


@dataclass(frozen=True)
class Found:
    """A config for a key, and whether it holds for later calls."""

    config: triton.Config
    keep: bool


_live: weakref.WeakSet[Tuning] = weakref.WeakSet()


class Tuning:
    """Lookup and tuning for one decorated kernel."""

    def __init__(self, tuner: Autotuner) -> None:
        self.tuner = tuner
        self._operators: dict[bool, KernelOperator] = {}
        self._entries: tuple[Any, list[Entry]] | None = None
        _live.add(self)

    def find(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        grid: Any,
        configs: Sequence[triton.Config],
        fields: Mapping[str, Field],
        named: Mapping[str, Any],
    ) -> Found:
        """The config for a key that this process has not met.

        Args:
            args: positional arguments of the call.
            kwargs: keyword arguments without grid and warmup.
            grid: as given in the brackets.
            configs: the candidates after pruning, the default first.
            fields: what distinguishes the kernel's entries.
            named: all arguments by name.
        """
        default = configs[0]
        device = _device(named)
        unmeasurable = _lab is None and (interpreting() or device is None)
        if settings.autotune == "off" or unmeasurable:
            return Found(default, keep=True)
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        problem = self.problem(args, kwargs, grid, configs, fields, named)
        persistent = problem.lasts()
        entry = self._stored(problem, device) if persistent else None
        if entry is not None:
            return Found(_winner(entry, problem), keep=not capturing)
        reason, keep = _why_not_tune(capturing)
        if reason is not None:
            name = problem.operator
            if reason:
                _warn_once(name, f"{name} is not tuned and its first config is used: {reason}")
            return Found(default, keep)

        begin = time.monotonic()
        isolated = (_lab is None or _lab_is_isolated) and self._can_leave(problem)
        try:
            report = self._tune(problem, device, persistent, isolated)
        except (DeviceLostError, TuningStoppedError) as error:
            if not isolated:
                raise
            # What is lost is the measuring process; this one and its GPU are well.
            _warn(f"tuning {problem} failed, its first config is used: {error}")
            return Found(default, keep=True)
        self.tuner.bench_time = time.monotonic() - begin
        if report.entry is None:
            return Found(default, keep=True)
        self._show(report.entry, problem)
        return Found(_winner(report.entry, problem), keep=True)

    def problem(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        grid: Any,
        configs: Sequence[triton.Config],
        fields: Mapping[str, Field],
        named: Mapping[str, Any],
    ) -> KernelProblem:
        """A call as a problem for the tuner; arguments as for :meth:`find`."""
        # Kernels of one name, and lists of configs for one key, may take turns in a process:
        # their entries must not replace each other.
        operator = self.operator(False)
        identity = {"source": operator.source_hash(), "configs": digest(stored_values(configs))}
        return KernelProblem(
            operator=operator.name,
            key=(*fields.items(), *identity.items()),
            arguments=capture(self.tuner.arg_names, args, kwargs),
            configs=tuple(configs),
            grids=grids_of(grid, configs, lambda config: self._meta(named, config)),
        )

    def operator(self, isolated: bool) -> KernelOperator:
        """The kernel's operator; one that can travel needs the kernel's place.

        Raises:
            KernelNotFoundError: it shall travel, and cannot be found by its place.
        """
        if isolated not in self._operators:
            place = place_of(self.tuner, self.tuner.scope) if isolated else None
            self._operators[isolated] = KernelOperator(self.tuner, place)
        return self._operators[isolated]

    def _stored(self, problem: KernelProblem, device: torch.device | None) -> Entry | None:
        """The entry of a call and its configs in the tuned tables, best source first."""
        operator = self.operator(False)
        facts = device_facts(device) if _lab is None else _lab.facts
        table = tables.tuned_table(facts)
        state = (tables.epoch(), table)
        if self._entries is None or self._entries[0] != state:
            self._entries = state, [row.entry for row in table.entries(operator.name)]
        sources, key = operator.source_hashes(), dict(problem.fields())
        for entry in self._entries[1]:
            if entry.problem == key and serves(entry, sources):
                return entry
        return None

    def _tune(
        self,
        problem: KernelProblem,
        device: torch.device | None,
        persistent: bool,
        isolated: bool,
    ) -> Report:
        """Measure the candidates; a warning says when some are wrong or none passed."""
        if device is not None:
            torch.cuda.synchronize(device)  # what the tensors hold is still being computed
        operator = self.operator(isolated)
        report = None
        with tempfile.TemporaryDirectory(prefix="tritonconv-") as scratch:
            store = Store() if persistent else Store(Path(scratch))
            for trusted in range(min(_TRUSTED_TRIES, len(problem.configs))):
                with _laboratory(device, isolated) as (lab, compiler):
                    (report,) = tune_pairs(
                        [(operator, replace(problem, trusted=trusted))],
                        budget_s=self.tuner.budget_s,
                        options=Options(Effort.FULL, StrategyName.EXHAUSTIVE),
                        store=store,
                        lab=lab,
                        compiler=compiler,
                    )
                if report.result is not Result.FAILED or not _died(report):
                    break
                # The config that all were to be compared with may be the one that kills: try
                # another one in a process that has not met it.
                _end_processes()
        assert report is not None
        wrong = report.failures().get(Status.NUMERIC, 0)
        if wrong:
            _warn(
                f"{wrong} of {len(problem.configs)} configs of {operator.name} give results that "
                "differ from the first config's, and are not used"
            )
        if report.result is Result.FAILED:
            reasons = [f"{trial.status}: {trial.reason}" for trial in report.rejected]
            reason = report.reason or next(iter(reasons), "no config passed")
            _warn(f"tuning {problem} failed, its first config is used: {reason}")
        return report

    def _can_leave(self, problem: KernelProblem) -> bool:
        """Whether the call can be made in another process; a warning says why not."""
        if not self.tuner.isolated:
            return False
        try:
            # Tensors travel as bytes, which always works.
            dumps((self.operator(True), problem.without_tensors()))
        except KernelNotFoundError as error:
            reason = str(error)
        except Exception as error:  # pickling fails in as many ways as there are classes
            reason = f"an argument cannot be sent to another process ({error})"
        else:
            return True
        name = self.operator(False).name
        _warn_once(
            name,
            f"{name} is measured in this process, which a bad config can "
            f"end, because {reason}; isolated=False in @autotune silences this",
        )
        return False

    def _meta(self, named: Mapping[str, Any], config: triton.Config) -> Mapping[str, Any]:
        """What a grid function is given: arguments, the config, what heuristics compute."""
        meta = {**named, **config.all_kwargs()}
        for layer in chain(self.tuner.fn):
            heuristics = getattr(layer, "values", None)
            if isinstance(heuristics, Mapping):
                for name, compute in heuristics.items():
                    meta[name] = compute(meta)
        return meta

    def _show(self, entry: Entry, problem: KernelProblem) -> None:
        """Publish the timings as Triton's class does, in milliseconds."""
        times = {_identity(trial): trial.timing for trial in entry.trials}
        self.tuner.configs_timings = {}
        for config, values in zip(problem.configs, problem.values(), strict=True):
            timing = times.get(tuple(sorted(values.items())))
            if timing is not None:
                milliseconds = [t / 1e3 for t in (timing.p50, timing.p20, timing.p80)]
                self.tuner.configs_timings[config] = milliseconds
        if triton.knobs.autotuning.print:
            print(
                f"tritonconv: tuned {problem} in {self.tuner.bench_time:.1f} s, best: "
                f"{_winner(entry, problem)}",
                file=sys.stderr,
            )


def _winner(entry: Entry, problem: KernelProblem) -> triton.Config:
    best = _identity(entry.best)
    rows = zip(problem.configs, problem.values(), strict=True)
    return next((c for c, v in rows if tuple(sorted(v.items())) == best), problem.configs[0])


def _identity(trial: Trial) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(trial.config.items()))


def decorated_operators() -> list[KernelOperator]:
    """Operators of the kernels that were decorated and called in this process."""
    return [operator for tuning in list(_live) for operator in tuning._operators.values()]


def _died(report: Report) -> bool:
    return bool({Status.CRASH, Status.RUN_TIMEOUT} & report.failures().keys())


def _why_not_tune(capturing: bool) -> tuple[str | None, bool]:
    """Why nothing may be measured now, in words for the user, and whether that stays so."""
    if capturing:
        return "a CUDA graph is being captured", False
    if settings.deterministic:
        return "", True
    if torch.are_deterministic_algorithms_enabled():
        return "", False
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return (
            "ranks of a distributed job could choose differently: tune in a single process first, "
            "and check with tritonconv.autotune.distributed.assert_same_tables"
        ), True
    return None, True


def _device(named: Mapping[str, Any]) -> torch.device | None:
    """The GPU that a call runs on."""
    for value in named.values():
        tensor = value if isinstance(value, torch.Tensor) else getattr(value, "base", None)
        if isinstance(tensor, torch.Tensor):
            return tensor.device if tensor.is_cuda else None
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


_warned: set[tuple[str, str]] = set()


def _warn_once(name: str, message: str) -> None:
    if (name, message) not in _warned:
        _warned.add((name, message))
        _warn(message)


_lab: Lab | None = None
_lab_is_isolated = False


@contextmanager
def using_lab(lab: Lab, *, isolated: bool = False) -> Iterator[None]:
    """Tune decorated kernels in ``lab`` inside a ``with`` block, also where there is no GPU.

    Args:
        lab: where candidates run.
        isolated: it runs them in another process, where the kernel has to be found.
    """
    global _lab, _lab_is_isolated
    before = _lab, _lab_is_isolated
    _lab, _lab_is_isolated = lab, isolated
    try:
        yield
    finally:
        _lab, _lab_is_isolated = before


class _TypesOnly:
    """Passes candidates on to a pool, which compiles and has no use for the tensors' bytes."""

    def __init__(self, pool: CompilePool) -> None:
        self.pool = pool

    def submit(self, operator: Operator, problem: Problem, candidates: Iterable[Candidate]) -> None:
        """Start compiling."""
        assert isinstance(problem, KernelProblem)
        self.pool.submit(operator, problem.without_tensors(), candidates)

    def results(
        self, operator: Operator, problem: Problem, candidates: Iterable[Candidate]
    ) -> Iterator[tuple[Candidate, CompileResult | Failure]]:
        """Candidates as they are compiled."""
        assert isinstance(problem, KernelProblem)
        for candidate, found in self.pool.results(operator, problem.without_tensors(), candidates):
            if isinstance(found, CompileResult):
                # The user wants this config tried, whatever it spills.
                found = replace(found, resources=replace(found.resources, spill_bytes=None))
            yield candidate, found


_processes: dict[torch.device, tuple[Lab, CompilePool | None]] = {}
_processes_lock = threading.RLock()
_ending: threading.Timer | None = None


@contextmanager
def _laboratory(
    device: torch.device | None, isolated: bool
) -> Iterator[tuple[Lab, Compiler | None]]:
    """Where to measure; the processes stay for a while, as more keys may follow."""
    global _ending
    if _lab is not None or not isolated:  # a lab that was given stays its giver's
        yield _lab if _lab is not None else CudaLab(device), None
        return
    assert device is not None
    with _processes_lock:
        if _ending is not None:
            _ending.cancel()
        if device not in _processes:
            setup = Setup()
            lab = setup.lab(device)
            _processes[device] = lab, setup.pool(device_facts(device))
        lab, pool = _processes[device]
        try:
            yield lab, None if pool is None else _TypesOnly(pool)
        finally:
            _ending = threading.Timer(_IDLE_SECONDS, _end_processes)
            _ending.daemon = True
            _ending.start()


@atexit.register
def _end_processes() -> None:
    with _processes_lock:
        while _processes:
            lab, pool = _processes.popitem()[1]
            close_lab(lab)
            if pool is not None:
                pool.close()
