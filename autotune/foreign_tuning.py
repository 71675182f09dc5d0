"""What a decorated kernel does at the first call of a key: look it up, or tune it."""

from __future__ import annotations

import pickle
import tempfile
import threading
import time
import warnings
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

from .foreign import (
    KernelConfig,
    KernelOperator,
    KernelProblem,
    UnstableValueError,
    config_values,
    grids_of,
    stable_text,
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


class Tuning:
    """Lookup and tuning for one decorated kernel."""

    def __init__(self, tuner: Autotuner) -> None:
        self.tuner = tuner
        self._operators: dict[bool, KernelOperator] = {}
        self._entries: tuple[Any, list[Entry]] | None = None

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
        if settings.autotune == "off" or (_lab is None and (interpreting() or device is None)):
            return Found(default, keep=True)
        try:
            listed = digest([[list(item) for item in config_values(c).items()] for c in configs])
            persistent = True
        except UnstableValueError:
            listed, persistent = "", False
        key = {**fields, "configs": listed}
        entry = self._stored(key, device) if persistent else None
        if entry is not None:
            return Found(self._winner(entry, configs), keep=True)
        why_not, keep = _why_not_tune(device)
        if why_not is not None:
            _warn_once(self.tuner, why_not)
            return Found(default, keep)

        problem = KernelProblem(
            operator=self._operator(False).name,
            key=tuple(key.items()),
            arguments=capture(self.tuner.arg_names, args, kwargs),
            configs=tuple(configs),
            grids=grids_of(grid, configs, lambda config: self._meta(named, config)),
        )
        begin = time.monotonic()
        report = self._tune(problem, device, persistent)
        self.tuner.bench_time = time.monotonic() - begin
        if report is None or report.entry is None:
            return Found(default, keep=True)
        self._show(report, configs)
        return Found(self._winner(report.entry, configs), keep=True)
