"""Tuning of one problem: what is known already, the search, the finalists, the entry.

A session is begun some time before its candidates are measured, so that its first candidates are
compiled while another problem is on the GPU.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from tritonconv.runtime.accuracy import Accuracy
from tritonconv.runtime.entries import Resources
from tritonconv.runtime.errors import TritonConvError
from tritonconv.runtime.operators import Operator, Problem
from tritonconv.runtime.tables import Entry, Environment, Timing, Trial, environment

from .compiling import CompileResult
from .hardware import compiled_limits
from .measure import CandidateError, Lab, Timer, time_in_turns, time_once
from .renew import trial_plan
from .report import Check, Options, Progress, Report, Result
from .search import (
    Budget,
    Failure,
    Outcome,
    Searched,
    Status,
    Strategy,
    make_strategy,
    search,
    settled,
)
from .seeds import nearest_winners, served_now
from .space import PYTORCH_ALGORITHM, Candidate, CandidateKey, Space, space
from .store import Store, elect, trial_key

FINALISTS = 5
MOST_FINALISTS = 10
FINAL_BAND = 1.04
"""Everything that the first round puts so close to the fastest goes into the final: which of
several equal configs are in it must not hang on the noise of a short timing."""

_FAILED = tuple(status for status in Status if status not in (Status.OK, Status.TIMED))


class Compiler(Protocol):
    """Compiles candidates ahead of their measurement, in parallel."""

    def submit(self, operator: Operator, problem: Problem, candidates: Iterable[Candidate]) -> None:
        """Start compiling."""
        ...

    def results(
        self, operator: Operator, problem: Problem, candidates: Iterable[Candidate]
    ) -> Iterator[tuple[Candidate, CompileResult | Failure]]:
        """Candidates as they are compiled, whether submitted before or not."""
        ...


@dataclass
class Session:
    """Tuning of one problem.

    Attributes:
        operator, problem: what is tuned.
        lab: where candidates run.
        store: where entries are.
        options: what was asked for.
        progress: told of every step.
        compiler: compiles ahead; candidates are compiled where they run when None.
    """

    operator: Operator
    problem: Problem
    lab: Lab
    store: Store
    options: Options
    progress: Progress
    compiler: Compiler | None = None
    env: Environment = field(init=False)
    space: Space = field(init=False)
    sources: Mapping[str, str] = field(init=False)
    old: Entry | None = field(init=False, default=None)
    trials: dict[CandidateKey, Trial] = field(init=False, default_factory=dict)
    _strategy: Strategy = field(init=False)
    _first: tuple[Candidate, ...] = field(init=False, default=())
    _begun: bool = field(init=False, default=False)
    _finished: bool = field(init=False, default=False)
    _fresh: int = field(init=False, default=0)
    _before: dict[str, Any] = field(init=False, default_factory=dict)
    _checked: set[CandidateKey] = field(init=False, default_factory=set)
    _again: set[CandidateKey] = field(init=False, default_factory=set)

    def begin(self) -> int:
        """Look up what is known and start compiling; the number of candidates that are submitted.

        Raises whatever a problem that cannot be described raises.
        """
        if self._begun:
            return 0
        options, fields = self.options, dict(self.problem.fields())
        self.env = environment(self.lab.facts)
        self.space = space(self.operator, self.problem, self.lab.facts)
        current = self.operator.source_hashes()
        self.sources = {name: current[name] for name in self.space.configs}
        if not options.force:
            self.old = self.store.load(
                self.env,
                self.operator.name,
                fields,
                str(options.policy),
                getattr(self.problem, "variants", ()),
            )
        self.trials = self._known_trials()
        nearest = (
            *served_now(self.operator, self.problem, self.lab.facts),
            *nearest_winners(self.store, self.env, self.operator.name, fields),
        )
        searched = self._to_search()

        def strategy() -> Strategy:
            return make_strategy(
                options.strategy,
                searched,
                options.effort,
                nearest=nearest,
                max_configs=options.max_configs,
                seed=options.seed,
            )

        self._strategy = strategy()
        self._first = self._strategy.ask()
        self._finished = not self._again and (
            self._has_all()
            or (self._is_current() and self._all_checked() and self._settles(strategy()))
        )
        self._begun = True
        if self._finished:
            return 0
        unknown = [candidate for candidate in self._first if candidate.as_key() not in self.trials]
        if self.compiler is not None:
            self.compiler.submit(self.operator, self.problem, unknown)
        return len(unknown)

    def run(self, index: int, seconds: float | None) -> Report:
        """Search within ``seconds``, check the best, and store the entry."""
        start = time.monotonic()
        self.begin()
        if self._finished:
            assert self.old is not None
            path = self.store.path(self.env, self.operator.name, self.old.key())
            return self._report(Result.KEPT, start, entry=self.old, path=path, complete=True)
        if seconds is not None and seconds <= 0:
            return self._report(Result.PENDING, start, entry=self.old)
        planned = max(self._strategy.planned - len(self.trials), 0)
        self.progress.problem(index, self.problem, planned)
        options = self.options
        timer = self.lab.timer(self.operator, self.problem, options.policy, options.seed)
        self._before = self._state()
        try:
            checker = self.lab.checker(self.operator, self.problem, options.seed)
            searched = search(
                _Resumed(self._strategy, self._first),
                lambda batch: self._evaluate(timer, batch),
                Budget(seconds),
            )
            # Outcomes come as they are compiled: a small budget may have ended before its turn.
            rest = [self.space.default]
            if searched.complete:  # a strategy need not come back to what may pass by now
                rest += [self.space.by_key[key] for key in sorted(self._again - {*self.trials})]
            for _ in self._evaluate(timer, tuple(dict.fromkeys(rest))):
                pass
            if options.check is Check.ALL:
                for candidate, outcome in searched.outcomes:
                    if isinstance(outcome, Timing):
                        self._accept(checker, candidate)
            self._final(timer, checker)
        except BaseException:
            self._keep_trials(start)
            raise
        finally:
            timer.close()
        return self._store(searched, start)

    def _is_current(self) -> bool:
        """Whether the earlier entry is of the very same space and of today's sources."""
        old = self.old
        return (
            old is not None
            and old.space_hash == self.space.hash
            and all(_same(name, old.sources, self.sources) for name in self.sources)
        )

    def _has_completed(self) -> bool:
        """Whether an earlier run did all that this one is asked for, with the sources of then."""
        return self.old is not None and self.old.recorded.get("completed") == self._request()

    def _has_all(self) -> bool:
        """Whether an earlier run did all that this one is asked for."""
        return self._is_current() and self._has_completed()

    def _to_search(self) -> Space:
        """What a run like the earlier one has to look at: nothing new of what has not changed."""
        if self.old is None or not self._has_completed():
            return self.space
        spaces = self.old.recorded.get("spaces", {})
        unchanged = {
            name
            for name in self.sources
            if _same(name, self.old.sources, self.sources)
            and _same(name, spaces, self.space.hashes)
        }
        return self.space.restricted(
            {key for key in self.space.by_key if key[0] not in unchanged or key in self.trials}
            | {self.space.default.as_key()}
            | self._again
        )

    def _all_checked(self) -> bool:
        """Whether nothing is left to check of what is known, as ``check`` asks for."""
        return self.options.check is not Check.ALL or all(
            trial.timing is None or trial.max_error is not None for trial in self.trials.values()
        )

    def _settles(self, strategy: Strategy) -> bool:
        """Whether all that this run would try is known."""
        return settled(strategy, {key: _outcome(trial) for key, trial in self.trials.items()})

    def _known_trials(self) -> dict[CandidateKey, Trial]:
        """Earlier trials whose candidate is still there, unchanged; old finalists compete anew.

        A candidate that took its process with it is tried again only when asked to time everything
        again; one that ran out of time also when it gets more of it, one that ran out of memory
        always.
        """
        if self.options.force:
            return {}
        current = {candidate.as_key() for candidate in self.space.candidates}
        limits = self._limits()
        known = {}
        for entry in (self.old, self.store.load_partial(self.env, self._draft(()))):
            if entry is None:
                continue
            for trial in entry.trials:
                key = trial_key(trial)
                if key not in current:
                    continue
                if not _same(trial.algorithm, entry.sources, self.sources):
                    continue
                if _passing(trial, entry.recorded, limits):
                    self._again.add(key)
                    continue
                status = Status.TIMED if trial.status == Status.OK else trial.status
                known[key] = replace(trial, status=status)
        self._again -= known.keys()
        return known

    def _state(self) -> dict[str, Any]:
        """Driver and clock of the GPU, recorded but not part of the key."""
        try:
            state: dict[str, Any] = getattr(self.lab, "state", dict)()
        except TritonConvError:  # it is not worth a problem
            state = {}
        return state

    def _limits(self) -> dict[str, float]:
        """How long a candidate may take, by the failure of those that take longer."""
        found = {
            Status.RUN_TIMEOUT: getattr(self.lab, "run_timeout", None),
            Status.COMPILE_TIMEOUT: getattr(self.compiler, "timeout", None),
        }
        return {str(status): limit for status, limit in found.items() if limit is not None}

    def _keep_trials(self, start: float) -> None:
        """Keep the timings of a search that did not come to its end, for the next start."""
        if self.trials:
            draft = self._draft(self._ordered(), self._recorded(start))
            self.store.save_partial(self.env, draft)

    def _evaluate(
        self, timer: Timer, batch: Sequence[Candidate]
    ) -> Iterator[tuple[Candidate, Outcome]]:
        """Measure a batch as its candidates are compiled; what is known already costs nothing."""
        fresh = []
        for candidate in batch:
            known = self.trials.get(candidate.as_key())
            if known is None:
                fresh.append(candidate)
            else:
                yield candidate, _outcome(known)
        compiled: Iterable[tuple[Candidate, CompileResult | Failure | None]]
        if self.compiler is None:
            compiled = ((candidate, None) for candidate in fresh)
        else:
            compiled = self.compiler.results(self.operator, self.problem, fresh)
        for candidate, result in compiled:
            trial = self._measure(timer, candidate, result)
            self.trials[candidate.as_key()] = trial
            self._fresh += 1
            outcome = _outcome(trial)
            self.progress.candidate(candidate, outcome)
            yield candidate, outcome

    def _measure(
        self, timer: Timer, candidate: Candidate, compiled: CompileResult | Failure | None
    ) -> Trial:
        trial = Trial(candidate.algorithm, candidate.config.as_dict(), Status.TIMED)
        if isinstance(compiled, Failure):
            return replace(trial, status=compiled.status, reason=compiled.reason)
        if compiled is not None:
            trial = replace(
                trial, resources=compiled.resources, compile_s=round(compiled.seconds, 3)
            )
            reason = self._too_hungry(candidate, compiled.resources)
            if reason is not None:
                return replace(trial, status=Status.CONSTRAINT, reason=reason)
        try:
            timing, note = time_once(timer, candidate)
        except CandidateError as error:
            return replace(trial, status=error.failure.status, reason=error.failure.reason)
        plan = trial_plan(self.operator, self.problem, trial)
        return replace(trial, timing=timing, reason=note, plan=plan)

    def _too_hungry(self, candidate: Candidate, resources: Resources | None) -> str | None:
        """Why a compiled candidate is not worth timing; the default is timed whatever it takes."""
        if resources is None or candidate == self.space.default:
            return None
        broken = compiled_limits(resources, self.lab.facts)
        return broken[0].reason if broken else None

    def _accept(self, checker: Callable[[Candidate], Accuracy], candidate: Candidate) -> bool:
        """Check a candidate's result; a wrong one is marked and can never win."""
        key = candidate.as_key()
        trial = self.trials[key]
        if key in self._checked:
            return trial.timing is not None
        self._checked.add(key)
        try:
            verdict = checker(candidate)
        except CandidateError as error:
            self._reject(candidate, error.failure)
            return False
        error_value = verdict.error if math.isfinite(verdict.error) else None
        if verdict.ok:
            self.trials[key] = replace(trial, max_error=error_value)
            return True
        self.trials[key] = replace(
            trial, status=Status.NUMERIC, reason=str(verdict), timing=None, max_error=error_value
        )
        return False

    def _final(self, timer: Timer, checker: Callable[[Candidate], Accuracy]) -> None:
        """Check the best few, the default and PyTorch's own, and time in turns those that pass.

        The last two are in it whatever their first, short timing says: a call must never lose to
        them because the host was busy for a moment.
        """
        seeded = {self.space.default.as_key()} | {
            head.as_key() for head in self.space.heads if head.algorithm == PYTORCH_ALGORITHM
        }
        ranked: list[tuple[bool, float, int, Candidate]] = []
        for position, candidate in enumerate(self.space.candidates):
            trial = self.trials.get(candidate.as_key())
            if trial is not None and trial.timing is not None:
                row = (candidate.as_key() not in seeded, trial.timing.p50, position, candidate)
                ranked.append(row)
        ranked.sort(key=lambda row: row[:3])
        fastest = min((time for _, time, *_ in ranked), default=0.0)
        close = sum(time <= FINAL_BAND * fastest for _, time, *_ in ranked)
        wanted = min(max(close, FINALISTS), MOST_FINALISTS) + len(seeded)
        self.progress.finalists(min(len(ranked), wanted))
        finalists: list[Candidate] = []
        handles: list[Any] = []
        for *_, candidate in ranked:
            if len(finalists) >= wanted:
                break
            if not self._accept(checker, candidate):
                continue
            try:
                handles.append(timer.prepare(candidate))
            except CandidateError as error:
                self._reject(candidate, error.failure)
                continue
            finalists.append(candidate)
        timings = time_in_turns(timer, handles)
        for candidate, handle, timing in zip(finalists, handles, timings, strict=True):
            if isinstance(timing, Failure):
                self._reject(candidate, timing)
                continue
            key = candidate.as_key()
            self.trials[key] = replace(
                self.trials[key], status=Status.OK, timing=timing, reason=timer.note(handle)
            )

    def _reject(self, candidate: Candidate, failure: Failure) -> None:
        key = candidate.as_key()
        self.trials[key] = replace(
            self.trials[key], status=failure.status, reason=failure.reason, timing=None
        )

    def _store(self, searched: Searched, start: float) -> Report:
        ordered = self._ordered()
        rejected = tuple(trial for trial in ordered if trial.status in _FAILED)
        recorded = self._recorded(start)
        if searched.complete:
            recorded["completed"] = self._request()
        measured = self._fresh
        draft = self._draft(ordered, recorded)
        entry = elect(draft)
        if entry is None:
            self._keep_trials(start)
            self._withdraw()
            return self._report(
                Result.FAILED,
                start,
                measured=measured,
                complete=searched.complete,
                rejected=rejected,
            )
        stored = self.store.save(self.env, entry, replace_old=self.options.force)
        self.store.drop_partial(self.env, entry)
        return self._report(
            Result.TUNED,
            start,
            entry=stored.entry,
            path=stored.path,
            measured=measured,
            complete=searched.complete,
            rejected=rejected,
        )

    def _draft(self, trials: tuple[Trial, ...], recorded: Mapping[str, Any] | None = None) -> Entry:
        """An entry of these trials, before its winner is elected."""
        default = self.space.default
        unknown = Trial(default.algorithm, default.config.as_dict(), Status.TIMED)
        first = self.trials.get(default.as_key(), unknown)
        return Entry(
            operator=self.operator.name,
            problem=dict(self.problem.fields()),
            sources=self.sources,
            policy=str(self.options.policy),
            environment=self.env.as_dict(),
            default=first,
            best=first,
            trials=trials,
            recorded=recorded or {},
            space_hash=self.space.hash,
        )

    def _withdraw(self) -> None:
        """Drop the stored entry if its winner has just been shown to be wrong."""
        wrong = {key for key, trial in self.trials.items() if trial.status == Status.NUMERIC}
        self.store.withdraw(self.env, self._draft(()), lambda best: trial_key(best) in wrong)

    def _ordered(self) -> tuple[Trial, ...]:
        """Trials in the fixed order of the space, the default first."""
        keys = (candidate.as_key() for candidate in self.space.candidates)
        return tuple(self.trials[key] for key in keys if key in self.trials)

    def _request(self) -> dict[str, Any]:
        """What was asked for: a finished entry of the same request needs nothing more."""
        options = self.options
        return {
            "effort": str(options.effort),
            "strategy": str(options.strategy),
            "max_configs": options.max_configs,
            "seed": options.seed,
            "check": str(options.check),
        }

    def _recorded(self, start: float) -> dict[str, Any]:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        return {
            "created": now,
            "wall_s": round(time.monotonic() - start, 3),
            "effort": str(self.options.effort),
            "strategy": str(self.options.strategy),
            "seed": self.options.seed,
            "space_size": len(self.space.candidates),
            "spaces": dict(self.space.hashes),
            "dropped": len(self.space.dropped),
            "unsupported": dict(self.space.unsupported),
            "limits_s": self._limits(),
            "before": self._before,
            "after": self._state(),
            "tritonconv": importlib.metadata.version("tritonconv"),
            "torch": torch.__version__,
            "cuda": torch.version.cuda or torch.version.hip or "",
        }

    def _report(
        self,
        result: Result,
        start: float,
        *,
        entry: Entry | None = None,
        path: Path | None = None,
        measured: int = 0,
        complete: bool = False,
        rejected: tuple[Trial, ...] = (),
    ) -> Report:
        return Report(
            self.operator.name,
            self.problem,
            result,
            entry,
            path,
            len(self.space.candidates),
            measured,
            complete,
            rejected,
            time.monotonic() - start,
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
            False,
            (),
            0.0,
            reason,
        )


def _passing(trial: Trial, recorded: Mapping[str, Any], limits: Mapping[str, float]) -> bool:
    """Whether a failure may be gone by now."""
    if trial.status == Status.LAUNCH:
        return "out of GPU memory" in trial.reason
    if trial.status in limits:
        before = recorded.get("limits_s", {}).get(trial.status, 0.0)
        return limits[trial.status] > float(before)
    return False


def _same(name: str, old: Mapping[str, str], new: Mapping[str, str]) -> bool:
    """Whether both name the same hash for an algorithm."""
    return name in old and old[name] == new.get(name)


def _outcome(trial: Trial) -> Outcome:
    return trial.timing or Failure(Status(trial.status), trial.reason)


class _Resumed:
    """A strategy whose first batch was asked for already."""

    @property
    def planned(self) -> int:
        """Candidates in all."""
        return self.strategy.planned

    def __init__(self, strategy: Strategy, first: tuple[Candidate, ...]) -> None:
        self.strategy = strategy
        self.first: tuple[Candidate, ...] | None = first

    def ask(self) -> tuple[Candidate, ...]:
        """The batch that was asked for before, then new ones."""
        if self.first is not None:
            first, self.first = self.first, None
            return first
        return self.strategy.ask()

    def tell(self, outcomes: Sequence[tuple[Candidate, Outcome]]) -> None:
        """Pass on what was measured."""
        self.strategy.tell(outcomes)
