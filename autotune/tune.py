"""Tune problems: search, measure, check, choose, store.

One entry is written per problem as soon as it is finished. Tuning that is interrupted keeps what
is done; started again, it times only what is not yet in the entry.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from tritonconv.runtime.accuracy import Accuracy
from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.errors import TritonConvError
from tritonconv.runtime.operators import Field, Operator, Problem
from tritonconv.runtime.tables import (
    Entry,
    Environment,
    Timing,
    Trial,
    digest,
    environment,
    invalidate,
)

from .measure import (
    CandidateError,
    CudaLab,
    DeviceLostError,
    Lab,
    Policy,
    Timer,
    first_round,
    take_turns,
)
from .search import (
    Budget,
    Effort,
    Failure,
    Outcome,
    Status,
    Strategy,
    StrategyName,
    make_strategy,
    search,
    settled,
)
from .space import Candidate, CandidateKey, Space, space
from .store import Store, elect, trial_key

FINALISTS = 5
_NEAREST = 8
_ON_THE_SPOT_SECONDS = 20.0

_FAILED = tuple(status for status in Status if status not in (Status.OK, Status.TIMED))


class Check(StrEnum):
    """Which candidates are compared with float64: nothing unchecked can win either way."""

    FINALISTS = "finalists"
    ALL = "all"


@dataclass(frozen=True)
class Options:
    """How to tune.

    Attributes:
        effort: how much of each space to try.
        max_configs: at most so many candidates per problem.
        policy: how candidates are timed.
        check: which candidates are checked numerically.
        seed: of the order in large spaces and of the tensors.
        force: time everything again and replace the entry.
    """

    effort: Effort = Effort.QUICK
    max_configs: int | None = None
    policy: Policy = Policy.GRAPH_COLD
    check: Check = Check.FINALISTS
    seed: int = 0
    force: bool = False


class Result(StrEnum):
    """What became of one problem."""

    TUNED = "tuned"
    KEPT = "kept"
    FAILED = "failed"
    PENDING = "pending"


@dataclass(frozen=True)
class Report:
    """The outcome for one problem.

    Attributes:
        operator: its name.
        problem: what was tuned.
        result: ``tuned`` now, ``kept`` because an earlier run had done it, ``failed`` because no
            candidate passed (the default stays in use), ``pending`` because the budget was used up.
        entry: what is stored now.
        path: the file.
        space_size: candidates in the space.
        planned: candidates that the effort asked for.
        measured: candidates evaluated in this run.
        complete: the plan was finished within the budget.
        rejected: candidates that failed, with status and reason.
        wall_s: seconds taken.
        reason: why the problem as a whole failed.
    """

    operator: str
    problem: Problem
    result: Result
    entry: Entry | None
    path: Path | None
    space_size: int
    planned: int
    measured: int
    complete: bool
    rejected: tuple[Trial, ...]
    wall_s: float
    reason: str = ""

    def speedup(self) -> float | None:
        """Time of the default over that of the winner."""
        if self.entry is None or self.entry.default.timing is None:
            return None
        assert self.entry.best.timing is not None
        return self.entry.default.timing.p50 / self.entry.best.timing.p50

    def failures(self) -> Mapping[str, int]:
        """Number of rejected candidates by failure class."""
        return dict(Counter(trial.status for trial in self.rejected))


class Progress:
    """What happens during tuning; override what you want to show."""

    def begin(self, problems: int) -> None:
        """Tuning starts."""

    def problem(self, index: int, problem: Problem, planned: int) -> None:
        """A problem starts; ``planned`` candidates are still to be evaluated."""

    def candidate(self, candidate: Candidate, outcome: Outcome) -> None:
        """A candidate was timed for the first time, or failed."""

    def finalists(self, count: int) -> None:
        """The best few are checked and timed in turns."""

    def end(self, report: Report) -> None:
        """A problem is finished and its entry written."""


class TuningInterrupted(KeyboardInterrupt):
    """Ctrl-C during tuning; ``reports`` holds the problems that were finished."""

    def __init__(self, reports: Sequence[Report]) -> None:
        super().__init__("tuning was interrupted")
        self.reports = tuple(reports)


class TuningStoppedError(TritonConvError):
    """Tuning cannot go on in this process; ``reports`` holds the problems that were finished."""

    def __init__(self, reports: Sequence[Report], cause: Exception) -> None:
        super().__init__(str(cause))
        self.reports = tuple(reports)


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
        lab: where candidates run, instead of a GPU (tests).

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
) -> list[Report]:
    """:func:`tune` for problems of several operators, as a model has them."""
    options = options or Options()
    progress = progress or Progress()
    store = store or Store()
    lab = lab or CudaLab(device)
    todo = unique_pairs(pairs)
    deadline = None if budget_s is None else time.monotonic() + budget_s
    reports: list[Report] = []
    progress.begin(len(todo))
    try:
        for index, (operator, problem) in enumerate(todo):
            share = None
            if deadline is not None:
                share = max(deadline - time.monotonic(), 0.0) / (len(todo) - index)
            tuning = _Tuning(operator, problem, lab, store, options, progress)
            try:
                report = tuning.run(index, share)
            except DeviceLostError:
                raise
            except Exception as error:
                # One problem that cannot be set up (too large for the device) is not all of them.
                report = tuning.failed(error)
            reports.append(report)
            if report.result is Result.TUNED:
                invalidate(operator.name)
            progress.end(report)
    except KeyboardInterrupt:
        raise TuningInterrupted(reports) from None
    except DeviceLostError as error:
        raise TuningStoppedError(reports, error) from error
    return reports


def unique_pairs(pairs: Iterable[tuple[Operator, Problem]]) -> list[tuple[Operator, Problem]]:
    """Drop pairs whose tuned entry would be the same, keeping the first of each."""
    found: dict[str, tuple[Operator, Problem]] = {}
    for operator, problem in pairs:
        found.setdefault(digest([operator.name, dict(problem.fields())]), (operator, problem))
    return list(found.values())


@dataclass
class _Tuning:
    """Tuning of one problem."""

    operator: Operator
    problem: Problem
    lab: Lab
    store: Store
    options: Options
    progress: Progress
    env: Environment = field(init=False)
    space: Space = field(init=False)

    def run(self, index: int, seconds: float | None) -> Report:
        begin = time.monotonic()
        facts, options = self.lab.facts, self.options
        self.env = environment(facts)
        fields = dict(self.problem.fields())
        self.space = space(self.operator, self.problem, facts)
        source = self.operator.source_hash()
        old = self.store.load(self.env, self.operator.name, fields, source)
        if old is not None and (options.force or old.policy != options.policy):
            old = None
        nearest = nearest_winners(self.store, self.env, self.operator.name, fields)

        def strategy() -> Strategy:
            return make_strategy(
                StrategyName.AUTO,
                self.space,
                options.effort,
                nearest=nearest,
                max_configs=options.max_configs,
                seed=options.seed,
            )

        planned = strategy().planned
        trials = self._known_trials(old)
        known = {key: _outcome(trial) for key, trial in trials.items()}
        request = self._request()
        if old is not None and (
            old.recorded.get("completed") == request or settled(strategy(), known)
        ):
            path = self.store.path(self.env, self.operator.name, old.key())
            return self._report(Result.KEPT, old, path, planned, 0, True, (), begin)

        if seconds is not None and seconds <= 0:
            return self._report(Result.PENDING, old, None, planned, 0, False, (), begin)
        self.progress.problem(index, self.problem, max(planned - len(known), 0))
        timer = self.lab.timer(self.operator, self.problem, options.policy, options.seed)
        try:
            checker = self.lab.checker(self.operator, self.problem, options.seed)

            def evaluate(batch: Sequence[Candidate]) -> Iterator[tuple[Candidate, Outcome]]:
                for candidate in batch:
                    outcome = known.get(candidate.as_key())
                    if outcome is None:
                        outcome = self._evaluate(timer, candidate, trials)
                        self.progress.candidate(candidate, outcome)
                    yield candidate, outcome

            searched = search(strategy(), evaluate, Budget(seconds))
            fresh = [row for row in searched.outcomes if row[0].as_key() not in known]
            if options.check is Check.ALL:
                for candidate, outcome in fresh:
                    if isinstance(outcome, Timing):
                        self._accept(checker, candidate, trials)
            self._final(timer, checker, trials)
        finally:
            timer.close()

        ordered = self._ordered(trials)
        rejected = tuple(trial for trial in ordered if trial.status in _FAILED)
        recorded = self._recorded(begin, planned)
        if searched.complete:
            recorded["completed"] = request
        draft = Entry(
            operator=self.operator.name,
            problem=fields,
            source_hash=source,
            policy=str(options.policy),
            environment=self.env.as_dict(),
            default=ordered[0],
            best=ordered[0],
            trials=ordered,
            recorded=recorded,
        )
        entry = elect(draft)
        count = len(fresh)
        if entry is None:
            return self._report(
                Result.FAILED, None, None, planned, count, searched.complete, rejected, begin
            )
        stored = self.store.save(self.env, entry, replace_old=options.force)
        return self._report(
            Result.TUNED,
            stored.entry,
            stored.path,
            planned,
            count,
            searched.complete,
            rejected,
            begin,
        )

    def failed(self, error: Exception) -> Report:
        """The report of a problem that could not be set up or checked."""
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Report(
            self.operator.name,
            self.problem,
            Result.FAILED,
            None,
            None,
            0,
            0,
            0,
            False,
            (),
            0.0,
            reason,
        )

    def _known_trials(self, old: Entry | None) -> dict[CandidateKey, Trial]:
        """Trials of the earlier entry whose candidate still exists; old finalists compete anew."""
        if old is None:
            return {}
        current = {candidate.as_key() for candidate in self.space.candidates}
        known = {}
        for trial in old.trials:
            key = trial_key(trial)
            if key in current:
                known[key] = (
                    replace(trial, status=Status.TIMED) if trial.status == Status.OK else trial
                )
        return known

    def _evaluate(
        self, timer: Timer, candidate: Candidate, trials: dict[CandidateKey, Trial]
    ) -> Outcome:
        config = candidate.config.as_dict()
        try:
            handle = timer.prepare(candidate)
            timing = first_round(timer, handle)
        except CandidateError as error:
            failure = error.failure
            trials[candidate.as_key()] = Trial(
                candidate.algorithm, config, failure.status, failure.reason
            )
            return failure
        trials[candidate.as_key()] = Trial(
            candidate.algorithm, config, Status.TIMED, timer.note(handle), timing
        )
        return timing

    def _accept(
        self,
        checker: Callable[[Candidate], Accuracy],
        candidate: Candidate,
        trials: dict[CandidateKey, Trial],
    ) -> bool:
        """Check a candidate's result; a wrong one is marked and can never win."""
        key = candidate.as_key()
        trial = trials[key]
        try:
            verdict = checker(candidate)
        except CandidateError as error:
            trials[key] = replace(
                trial, status=error.failure.status, reason=error.failure.reason, timing=None
            )
            return False
        error_value = verdict.error if math.isfinite(verdict.error) else None
        if verdict.ok:
            trials[key] = replace(trial, max_error=error_value)
            return True
        trials[key] = replace(
            trial, status=Status.NUMERIC, reason=str(verdict), timing=None, max_error=error_value
        )
        return False

    def _final(
        self,
        timer: Timer,
        checker: Callable[[Candidate], Accuracy],
        trials: dict[CandidateKey, Trial],
    ) -> None:
        """Check the best few and the default, and time in turns those that pass."""
        default = self.space.default.as_key()
        ranked: list[tuple[bool, float, int, Candidate]] = []
        for position, candidate in enumerate(self.space.candidates):
            trial = trials.get(candidate.as_key())
            if trial is not None and trial.timing is not None:
                row = (candidate.as_key() != default, trial.timing.p50, position, candidate)
                ranked.append(row)
        ranked.sort(key=lambda row: row[:3])
        self.progress.finalists(min(len(ranked), FINALISTS + 1))
        finalists: list[Candidate] = []
        handles: list[Any] = []
        for *_, candidate in ranked:
            if len(finalists) > FINALISTS:
                break
            if not self._accept(checker, candidate, trials):
                continue
            try:
                handles.append(timer.prepare(candidate))
            except CandidateError as error:
                trials[candidate.as_key()] = replace(
                    trials[candidate.as_key()],
                    status=error.failure.status,
                    reason=error.failure.reason,
                    timing=None,
                )
                continue
            finalists.append(candidate)
        timings = take_turns(timer, handles)
        for candidate, handle, timing in zip(finalists, handles, timings, strict=True):
            key = candidate.as_key()
            trials[key] = replace(
                trials[key], status=Status.OK, timing=timing, reason=timer.note(handle)
            )

    def _ordered(self, trials: Mapping[CandidateKey, Trial]) -> tuple[Trial, ...]:
        """Trials in the fixed order of the space, the default first."""
        keys = (candidate.as_key() for candidate in self.space.candidates)
        return tuple(trials[key] for key in keys if key in trials)

    def _request(self) -> dict[str, Any]:
        """What was asked for: a finished entry of the same request needs nothing more."""
        options = self.options
        return {
            "effort": str(options.effort),
            "max_configs": options.max_configs,
            "seed": options.seed,
            "check": str(options.check),
            "space": self.space.hash,
        }

    def _recorded(self, begin: float, planned: int) -> dict[str, Any]:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return {
            "created": now,
            "wall_s": round(time.monotonic() - begin, 3),
            "effort": str(self.options.effort),
            "seed": self.options.seed,
            "planned": planned,
            "space_size": len(self.space.candidates),
            "unsupported": dict(self.space.unsupported),
            "tritonconv": importlib.metadata.version("tritonconv"),
            "torch": torch.__version__,
            "cuda": torch.version.cuda or torch.version.hip or "",
        }

    def _report(
        self,
        result: Result,
        entry: Entry | None,
        path: Path | None,
        planned: int,
        measured: int,
        complete: bool,
        rejected: tuple[Trial, ...],
        begin: float,
    ) -> Report:
        return Report(
            self.operator.name,
            self.problem,
            result,
            entry,
            path,
            len(self.space.candidates),
            planned,
            measured,
            complete,
            rejected,
            time.monotonic() - begin,
        )


def _outcome(trial: Trial) -> Outcome:
    """What a stored trial tells a strategy."""
    if trial.timing is not None:
        return trial.timing
    return Failure(Status(trial.status), trial.reason)


def nearest_winners(
    store: Store, env: Environment, operator: str, fields: Mapping[str, Field]
) -> tuple[CandidateKey, ...]:
    """Winners of the stored problems most like this one: seeds of a search in a large space.

    Problems are ranked by the number of differing strings, then by log distance of their sizes.
    """
    rows = []
    for stored in store.entries(env, operator):
        other = stored.entry.problem
        differing, distance = 0, 0.0
        for name in fields.keys() | other.keys():
            mine, theirs = fields.get(name), other.get(name)
            if type(mine) is int and type(theirs) is int:
                distance += (math.log2(max(mine, 1)) - math.log2(max(theirs, 1))) ** 2
            elif mine != theirs:
                differing += 1
        rows.append((differing, distance, stored.path.name, trial_key(stored.entry.best)))
    rows.sort(key=lambda row: row[:3])
    return tuple(dict.fromkeys(key for *_, key in rows))[:_NEAREST]


_attempted: set[str] = set()


def tune_on_the_spot(operator: Operator, problem: Problem, device: DeviceFacts) -> None:
    """Tune one problem now, because ``settings.autotune`` asks for it; what dispatch calls.

    A problem is tried once per process. Failure is a warning, and the call goes on with the
    default, unless the GPU context is lost (:class:`TuningStoppedError`). Ranks of a distributed
    job would choose differently, so there nothing is measured.
    """
    key = digest([device.as_dict(), operator.name, dict(problem.fields())])
    if key in _attempted:
        return
    _attempted.add(key)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        warnings.warn(
            "tritonconv does not tune inside a distributed job, because ranks could choose "
            "differently; run `autotune tune --model ...` once before it",
            stacklevel=2,
        )
        return
    (report,) = tune(operator, [problem], budget_s=_ON_THE_SPOT_SECONDS)
    if report.result is Result.FAILED:
        reason = report.reason or "no candidate passed"
        warnings.warn(f"tuning {problem} failed, the default is used: {reason}", stacklevel=2)


__all__ = [
    "Check",
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
