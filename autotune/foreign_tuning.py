"""What a decorated kernel does at the first call of a key: look it up, or tune it."""

from __future__ import annotations

import atexit
import os
import pickle
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton

from tritonconv.runtime import tables
from tritonconv.runtime.compat import interpreting
from tritonconv.runtime.device import device_facts
from tritonconv.runtime.operators import Field
from tritonconv.runtime.settings import settings
from tritonconv.runtime.tables import Entry, digest

from .answers import readable
from .foreign import (
    KernelOperator,
    KernelProblem,
    UnstableValueError,
    config_values,
    grids_of,
)
from .kernel_call import capture
from .kernel_source import KernelNotFoundError, chain, place_of
from .measure import CudaLab, Lab
from .search import Effort, Status
from .store import Store
from .tune import Options, Report, Result, tune_pairs

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
        try:
            listed = digest([[list(item) for item in config_values(c).items()] for c in configs])
            persistent = True
        except UnstableValueError:
            listed, persistent = "", False
        key = {**fields, "configs": listed}
        entry = self._stored(key, device) if persistent else None
        if entry is not None:
            return Found(self._winner(entry, configs), keep=not capturing)
        reason, keep = _why_not_tune(capturing)
        name = self.operator(False).name
        if reason is not None:
            if reason:
                _warn_once(name, f"{name} is not tuned and its first config is used: {reason}")
            return Found(default, keep)

        problem = self.problem(args, kwargs, grid, configs, key, named)
        begin = time.monotonic()
        report = self._tune(problem, device, persistent)
        self.tuner.bench_time = time.monotonic() - begin
        if report.entry is None:
            return Found(default, keep=True)
        self._show(report, configs)
        return Found(self._winner(report.entry, configs), keep=True)

    def problem(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        grid: Any,
        configs: Sequence[triton.Config],
        key: Mapping[str, Field],
        named: Mapping[str, Any],
    ) -> KernelProblem:
        """A call as a problem for the tuner; arguments as for :meth:`find`, and the whole key."""
        return KernelProblem(
            operator=self.operator(False).name,
            key=tuple(key.items()),
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

    def _stored(self, key: Mapping[str, Field], device: torch.device | None) -> Entry | None:
        """The entry of a key in the tuned tables, best source first."""
        operator = self.operator(False)
        facts = device_facts(device) if _lab is None else _lab.facts
        table = tables.tuned_table(facts)
        state = (tables.epoch(), table)
        if self._entries is None or self._entries[0] != state:
            self._entries = state, list(readable(table, operator.name))
        source = operator.source_hash()
        for entry in self._entries[1]:
            if entry.source_hash == source and dict(entry.problem) == key:
                return entry
        return None

    def _tune(
        self, problem: KernelProblem, device: torch.device | None, persistent: bool
    ) -> Report:
        """Measure the candidates; a warning says when some are wrong or none passed."""
        if device is not None:
            torch.cuda.synchronize(device)  # what the tensors hold is still being computed
        isolated = _lab is None and self._can_leave(problem)
        operator = self.operator(isolated)
        report = None
        with tempfile.TemporaryDirectory(prefix="tritonconv-") as scratch:
            store = Store() if persistent else Store(Path(scratch))
            for trusted in range(min(_TRUSTED_TRIES, len(problem.configs))):
                with _laboratory(device, isolated) as lab:
                    (report,) = tune_pairs(
                        [(operator, replace(problem, trusted=trusted))],
                        budget_s=self.tuner.budget_s,
                        options=Options(effort=Effort.FULL),
                        store=store,
                        lab=lab,
                    )
                if report.result is not Result.FAILED or not _died(report):
                    break
                # The config that all were to be compared with may be the one that kills: try
                # another one in a process that has not met it.
                _close_labs()
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
            self.operator(True)
            # Tensors travel as bytes, which always works.
            pickle.dumps((replace(problem.arguments, storages=()), problem.configs_to_send()))
            import_module(f"{__package__}.isolated")
        except (KernelNotFoundError, ImportError) as error:
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

    @staticmethod
    def _winner(entry: Entry, configs: Sequence[triton.Config]) -> triton.Config:
        best = dict(entry.best.config)
        return next((c for c in configs if _values_or_none(c) == best), configs[0])

    def _show(self, report: Report, configs: Sequence[triton.Config]) -> None:
        """Publish the timings as Triton's class does, in milliseconds."""
        assert report.entry is not None
        timings = {}
        for trial in report.entry.trials:
            for config in configs:
                if trial.timing is not None and _values_or_none(config) == dict(trial.config):
                    timing = trial.timing
                    timings[config] = [t / 1e3 for t in (timing.p50, timing.p20, timing.p80)]
        self.tuner.configs_timings = timings
        if triton.knobs.autotuning.print:
            print(
                f"tritonconv: tuned {report.problem} in {self.tuner.bench_time:.1f} s, best: "
                f"{self._winner(report.entry, configs)}",
                file=sys.stderr,
            )


def decorated_operators() -> list[KernelOperator]:
    """Operators of the kernels that were decorated and called in this process."""
    return [operator for tuning in list(_live) for operator in tuning._operators.values()]


def _values_or_none(config: triton.Config) -> dict[str, int] | None:
    try:
        return config_values(config)
    except UnstableValueError:
        return None


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


@contextmanager
def using_lab(lab: Lab) -> Iterator[None]:
    """Tune decorated kernels in ``lab`` inside a ``with`` block, also where there is no GPU."""
    global _lab
    before, _lab = _lab, lab
    try:
        yield
    finally:
        _lab = before


_labs: dict[torch.device, Any] = {}
_labs_lock = threading.RLock()
_closing: threading.Timer | None = None


@contextmanager
def _laboratory(device: torch.device | None, isolated: bool) -> Iterator[Lab]:
    """Where to measure; the measuring process stays for a while, as more keys may follow."""
    global _closing
    if _lab is not None or not isolated:
        yield _lab if _lab is not None else CudaLab(device)
        return
    assert device is not None
    with _labs_lock:
        if _closing is not None:
            _closing.cancel()
        if device not in _labs:
            _labs[device] = import_module(f"{__package__}.isolated").WorkerLab(device)
        try:
            yield _labs[device]
        finally:
            _closing = threading.Timer(_IDLE_SECONDS, _close_labs)
            _closing.daemon = True
            _closing.start()


@atexit.register
def _close_labs() -> None:
    with _labs_lock:
        while _labs:
            _labs.popitem()[1].close()
