"""Tune problems: search, measure, check, choose, store.

One entry is written per problem as soon as it is finished. Tuning that is interrupted keeps what
is done; started again, it times only what is not yet in the entry.
"""

from __future__ import annotations

import atexit
import functools
import os
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch

from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.operators import Operator, Problem
from tritonconv.runtime.tables import digest, invalidate

from .laboratory import laboratory
from .measure import CudaLab, DeviceLostError, Lab, Policy
from .report import (
    Check,
    Options,
    Progress,
    Report,
    Result,
    TuningInterrupted,
    TuningStoppedError,
)
from .search import Effort, Failure
from .seeds import nearest_winners
from .session import Compiler, Session
from .store import Store

_ON_THE_SPOT_SECONDS = 20.0
_AHEAD = 256
"""Candidates that are being compiled for problems that are not measured yet."""


def tune(
    operator: Operator,
    problems: Iterable[Problem],
    device: torch.device | int | None = None,
    *,
    budget_s: float | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
    store: Store | None = None,
    lab: Lab | None = None,
    compiler: Compiler | None = None,
) -> list[Report]:
    """Tune problems of one operator.

    Args:
        operator: a registered operator.
        problems: what to tune; repeats are tuned once.
        device: the GPU; the current one when None.
        budget_s: seconds for all problems together, shared evenly between those still to do; a
            problem that is reached in time is finished, those after it stay pending.
        options: effort, policy and the like.
        progress: told of every step.
        store: where entries go; the user's table directory when None.
        lab: where candidates run: this process and its GPU when None, a process of its own with
            :class:`~tritonconv.autotune.isolated.WorkerLab`.
        compiler: compiles ahead, a :class:`~tritonconv.autotune.compiling.CompilePool`;
            candidates are compiled one by one where they run when None.

    Returns:
        One report per problem, in their order.

    Raises:
        NoDeviceError: there is no GPU.
        TuningInterrupted: Ctrl-C; carries the reports of the problems that are done.
        TuningStoppedError: a candidate broke the GPU context; likewise.
    """
    return tune_pairs(
        [(operator, problem) for problem in problems],
        device,
        budget_s=budget_s,
        options=options,
        progress=progress,
        store=store,
        lab=lab,
        compiler=compiler,
    )


def tune_pairs(
    pairs: Iterable[tuple[Operator, Problem]],
    device: torch.device | int | None = None,
    *,
    budget_s: float | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
    store: Store | None = None,
    lab: Lab | None = None,
    compiler: Compiler | None = None,
) -> list[Report]:
    """:func:`tune` for problems of several operators, as a model has them."""
    options = options or Options()
    progress = progress or Progress()
    store = store or Store()
    lab = lab or CudaLab(device)
    sessions = [
        Session(operator, problem, lab, store, options, progress, compiler)
        for operator, problem in unique_pairs(pairs)
    ]
    deadline = None if budget_s is None else time.monotonic() + budget_s
    reports: list[Report] = []
    ahead = LookAhead(sessions)
    progress.begin(len(sessions))
    try:
        for index, session in enumerate(sessions):
            ahead.feed(index)
            share = None
            if deadline is not None:
                share = max(deadline - time.monotonic(), 0.0) / (len(sessions) - index)
            reports.append(run_session(session, index, share))
    except KeyboardInterrupt:
        raise TuningInterrupted(reports) from None
    except DeviceLostError as error:
        raise TuningStoppedError(reports, error) from error
    finally:
        drop = getattr(compiler, "drop_pending", None)
        if drop is not None:
            drop()  # what a budget left over would go on compiling behind the user's program
    return reports


def run_session(session: Session, index: int, seconds: float | None) -> Report:
    """Tune one problem, and let lookups and the user know.

    Raises:
        DeviceLostError: nothing more can run on this lab.
    """
    try:
        report = session.run(index, seconds)
    except DeviceLostError:
        raise
    except Exception as error:
        # One problem that cannot be set up (too large for the device) is not all of them.
        report = session.failed(error)
    if report.result is not Result.PENDING:
        # KEPT: written by another process, perhaps; FAILED: an entry may have been withdrawn.
        invalidate(session.operator.name)
    session.progress.end(report)
    return report


class LookAhead:
    """Begins sessions before their turn, so that the compiler always has work."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self.sessions = sessions
        self.begun = 0
        self.submitted: list[int] = []

    def feed(self, current: int) -> None:
        """Begin sessions until enough candidates wait behind the current one."""
        if self.sessions[current].compiler is None:
            return
        while self.begun < len(self.sessions) and sum(self.submitted[current:]) < _AHEAD:
            try:
                count = self.sessions[self.begun].begin()
            except Exception:  # it is reported when its turn comes
                count = 0
            self.submitted.append(count)
            self.begun += 1


def unique_pairs(pairs: Iterable[tuple[Operator, Problem]]) -> list[tuple[Operator, Problem]]:
    """Drop pairs whose tuned entry would be the same, keeping the first of each."""
    found: dict[str, tuple[Operator, Problem]] = {}
    for operator, problem in pairs:
        found.setdefault(digest([operator.name, dict(problem.fields())]), (operator, problem))
    return list(found.values())


_attempted: set[str] = set()
_one_at_a_time = threading.Lock()
_kept = ExitStack()
atexit.register(_kept.close)


@functools.cache
def _equipment(device: int) -> tuple[Lab, Compiler | None]:
    """Processes that last as long as this one: a program meets its problems one by one."""
    return _kept.enter_context(laboratory(device))


def tune_on_the_spot(operator: Operator, problem: Problem, device: DeviceFacts) -> None:
    """Tune one problem now, because ``settings.autotune`` asks for it; what dispatch calls.

    A problem is tried once per process. Failure is a warning, and the call goes on with the
    default. Ranks of a distributed job would choose differently, so there nothing is measured.
    """
    key = digest([device.as_dict(), operator.name, dict(problem.fields())])
    if key in _attempted:
        return
    _attempted.add(key)
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    if initialized or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        warnings.warn(
            "tritonconv does not tune inside a distributed job, because ranks could choose "
            "differently; run `autotune tune --model ...` once before it",
            stacklevel=2,
        )
        return
    try:
        with _one_at_a_time:
            lab, compiler = _equipment(torch.cuda.current_device())
            (report,) = tune(
                operator, [problem], budget_s=_ON_THE_SPOT_SECONDS, lab=lab, compiler=compiler
            )
    except (DeviceLostError, TuningStoppedError) as error:
        warnings.warn(f"tuning {problem} stopped, the default is used: {error}", stacklevel=2)
        return
    if report.result is Result.FAILED:
        reason = report.reason or "no candidate passed"
        warnings.warn(f"tuning {problem} failed, the default is used: {reason}", stacklevel=2)


__all__ = [
    "Check",
    "Compiler",
    "Effort",
    "Failure",
    "Options",
    "Policy",
    "Progress",
    "Report",
    "Result",
    "TuningInterrupted",
    "TuningStoppedError",
    "nearest_winners",
    "tune",
    "tune_on_the_spot",
    "tune_pairs",
    "unique_pairs",
]
