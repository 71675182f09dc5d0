"""Experiments that measure the tuner itself.

Do repeated tunes agree, what does a lookup cost, how good is it for problems never tuned, how long
does tuning take? Each is a function that takes problems and a folder to work in and gives numbers;
what runs in fresh processes goes through :mod:`.fresh`. ``autotune selfcheck`` runs them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tritonconv.runtime import tables
from tritonconv.runtime.device import DeviceFacts, device_facts
from tritonconv.runtime.errors import ArgumentValueError, bad_value
from tritonconv.runtime.operators import Field, Operator, Problem
from tritonconv.runtime.tables import Entry, Tier, Trial, choose

from .analysis import Agreement, agreement, geomean, look_up
from .fresh import Done, Job, Launch, in_fresh_process
from .host import HostTime, host_time
from .measure import CandidateError, Lab, NoDeviceError, Policy, take_turns
from .report import Options
from .session import Compiler
from .space import Candidate
from .store import Store
from .triton_autotune import launches
from .tune import tune_pairs, unique_pairs

Pair = tuple[Operator, Problem]
Say = Callable[[str], None]


def _silent(text: str) -> None:
    pass


def spread(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """``count`` of the pairs, evenly spaced, all of them when there are fewer.

    Example:
        >>> spread(list(range(10)), 4)
        [0, 2, 5, 7]
    """
    if count >= len(pairs):
        return list(pairs)
    return [pairs[index * len(pairs) // count] for index in range(count)]


# Stability


@dataclass(frozen=True)
class Stability:
    """Whether fresh tunes agree.

    Attributes:
        agreement: over all runs, with and without the tie-break.
        seconds: of every run.
        folders: cache directory of every run, for ``autotune plot agreement``.
    """

    agreement: Agreement
    seconds: tuple[float, ...]
    folders: tuple[Path, ...]


def stability(
    pairs: Sequence[Pair],
    folder: Path,
    *,
    runs: int = 10,
    options: Mapping[str, Any] | None = None,
    budget_s: float | None = None,
    launch: Launch = in_fresh_process,
    lab: str = "",
    say: Say = _silent,
) -> Stability:
    """Tune the same problems several times, each in a fresh process with an empty table.

    The kernels are compiled once: what the runs may differ in are timings. A run that is found
    complete in the folder is not repeated.
    """
    folders, seconds = [], []
    for run in range(runs):
        place = folder / f"run{run + 1:02d}"
        done = launch(Job(pairs, place, folder / "kernels", None, options or {}, budget_s, lab=lab))
        say(f"run {run + 1} of {runs}: {done.seconds:.1f} s, {dict(done.results)}")
        folders.append(place)
        seconds.append(done.seconds)
    entries = [[s.entry for s in Store(place / "tuned").entries()] for place in folders]
    return Stability(agreement(entries), tuple(seconds), tuple(folders))


# Lookup


def lookup_times(pair: Pair, *, calls: int = 400, repeats: int = 7) -> list[HostTime]:
    """Host time of our lookup of a problem seen before and of ``triton.autotune``'s hit path.

    The hit path is the difference of two launches of the same kernel, with and without
    ``triton.autotune``; nothing of ours is in either.

    Raises:
        NoDeviceError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise NoDeviceError(
            "the hit path of triton.autotune is measured on a GPU, and there is none"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    found = [HostTime("our lookup, problem seen before", lookup_time(pair, device_facts(device)))]
    times = {name: host_time(call, calls, repeats) for name, call in launches(device).items()}
    found += [HostTime(name, us) for name, us in times.items()]
    bare, through = times.values()
    found.append(HostTime("hit path of triton.autotune (the difference)", through - bare))
    return found


def lookup_time(pair: Pair, facts: DeviceFacts, *, calls: int = 20_000, repeats: int = 7) -> float:
    """Microseconds of one lookup of a problem seen before; needs no GPU."""
    operator, problem = pair
    choose(operator, problem, facts)
    means = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            choose(operator, problem, facts)
        means.append((time.perf_counter() - begin) / calls)
    return min(means) * 1e6


# Regret


@dataclass(frozen=True)
class Unseen:
    """A problem that was looked up, then tuned.

    Attributes:
        problem: in words.
        tier: what served the lookup.
        looked_up, tuned: the two configs in words.
        looked_up_us, tuned_us: their medians, timed in turns; equal where they are one config.
    """

    problem: str
    tier: Tier
    looked_up: str
    tuned: str
    looked_up_us: float | None
    tuned_us: float

    @property
    def ratio(self) -> float | None:
        """The regret; None where what was looked up does not run."""
        return None if self.looked_up_us is None else self.looked_up_us / self.tuned_us


@dataclass(frozen=True)
class UnseenSummary:
    """Regret of the lookup over problems never tuned."""

    rows: tuple[Unseen, ...]
    geomean: float | None
    worst: float | None
    base: int
    by_tier: Mapping[str, int] = field(default_factory=dict)


# Batch, and size as a fraction: what users change in a network that was tuned.
_CHANGES = ((48, 8, 7), (24, 1, 1), (96, 6, 7), (12, 9, 7), (40, 10, 7))
_DERIVED = ("out_height", "out_width", "wide")


def unseen_pairs(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """Problems like the given ones at other batches and image sizes, none of them among those.

    Raises:
        ArgumentValueError: there are not so many.
    """
    known = {_identity(pair) for pair in pairs}
    found: dict[Any, Pair] = {}
    for shift in range(len(_CHANGES)):
        for index, (operator, problem) in enumerate(pairs):
            batch, over, under = _CHANGES[(index + shift) % len(_CHANGES)]
            fields: dict[str, Field] = dict(problem.fields())
            for name in _DERIVED:
                fields.pop(name, None)
            if "batch" not in fields:
                raise bad_value("problems", "ones with a batch", str(problem))
            fields["batch"] = batch
            for name in ("height", "width", "depth"):
                if name in fields:
                    fields[name] = max(1, int(fields[name]) * over // under)
            try:
                pair = operator, operator.parse(fields)
            except ArgumentValueError:  # too small for its kernel
                continue
            if _identity(pair) not in known:
                found.setdefault(_identity(pair), pair)
    if len(found) < count:
        raise bad_value("count", f"at most {len(found)} for {len(pairs)} problems", count)
    return spread(list(found.values()), count)


def _identity(pair: Pair) -> tuple[str, tuple[tuple[str, Field], ...]]:
    return pair[0].name, tuple(sorted(pair[1].fields().items()))


def regret(
    base: Sequence[Pair],
    others: Sequence[Pair],
    folder: Path,
    *,
    options: Options | None = None,
    lab: Lab,
    compiler: Compiler | None = None,
    say: Say = _silent,
) -> UnseenSummary:
    """Tune a base set, look the others up, tune each of them, and compare the two configs.

    Both configs are timed in turns, so that neither gains from when it was timed.
    """
    options = options or Options()
    base_store = Store(folder / "base" / "tuned")
    own_store = Store(folder / "own" / "tuned")
    say(f"tuning the base of {len(base)} problems")
    tune_pairs(base, options=options, lab=lab, store=base_store, compiler=compiler)
    known = [stored.entry for stored in base_store.entries(tables.environment(lab.facts))]
    say(f"tuning the {len(others)} others, in a table of their own")
    reports = tune_pairs(others, options=options, lab=lab, store=own_store, compiler=compiler)
    rows = []
    for index, ((operator, problem), report) in enumerate(zip(others, reports, strict=True)):
        tier, looked_up = _look_up(known, operator, problem, lab.facts)
        if report.entry is None:
            say(f"{problem}: nothing passed")
            continue
        winner = _candidate(operator, report.entry)
        row = _compare(lab, operator, problem, tier, looked_up, winner, options.policy)
        rows.append(row)
        ratio = "does not run" if row.ratio is None else f"{row.ratio:.3f}"
        say(f"[{index + 1}/{len(others)}] {problem}: {tier} {ratio}")
    ratios = [row.ratio for row in rows if row.ratio is not None]
    tiers = [str(row.tier) for row in rows]
    return UnseenSummary(
        tuple(rows),
        geomean(ratios),
        max(ratios, default=None),
        len(base),
        {tier: tiers.count(tier) for tier in dict.fromkeys(tiers)},
    )


def _look_up(
    known: Sequence[Entry], operator: Operator, problem: Problem, facts: DeviceFacts
) -> tuple[Tier, Candidate]:
    def serves(trial: Trial, fields: Mapping[str, Field], name: str) -> bool:
        return operator.algorithm(trial.algorithm).supports(problem) is None

    found = look_up(known, operator.name, problem.fields(), serves)
    if found is None:
        default = tables.default_choice(operator, problem, facts)
        return Tier.DEFAULT, Candidate(default.algorithm, default.config)
    return found[0], _candidate(operator, found[1])


def _candidate(operator: Operator, entry: Entry) -> Candidate:
    best = entry.best
    config = operator.algorithm(best.algorithm).config_type.from_dict(best.config)
    return Candidate(best.algorithm, config)


def _compare(
    lab: Lab,
    operator: Operator,
    problem: Problem,
    tier: Tier,
    looked_up: Candidate,
    winner: Candidate,
    policy: Policy,
) -> Unseen:
    timer = lab.timer(operator, problem, policy, 0)
    try:
        handles = [timer.prepare(winner)]
        runs = True
        if looked_up != winner:
            try:
                handles.append(timer.prepare(looked_up))
            except CandidateError:
                runs = False
        timings = take_turns(timer, handles)
    finally:
        timer.close()
    return Unseen(
        str(problem),
        tier,
        str(looked_up),
        str(winner),
        timings[-1].p50 if runs else None,
        timings[0].p50,
    )


# Wall time


@dataclass(frozen=True)
class Arm:
    """One way to tune the problems, from empty caches."""

    name: str
    done: Done


@dataclass(frozen=True)
class WallTime:
    """Wall times of the arms, and how many times faster the first is than each."""

    problems: int
    arms: tuple[Arm, ...]

    def speedups(self) -> dict[str, float]:
        """Times as long as the first arm."""
        first = self.arms[0].done.seconds
        return {arm.name: arm.done.seconds / first for arm in self.arms}


PARALLEL, SERIAL, TRITON = "parallel", "serial", "triton.autotune"


def wall_time(
    pairs: Sequence[Pair],
    folder: Path,
    *,
    arms: Sequence[str] = (PARALLEL, SERIAL, TRITON),
    options: Mapping[str, Any] | None = None,
    launch: Launch = in_fresh_process,
    lab: str = "",
    say: Say = _silent,
) -> WallTime:
    """Tune the problems from empty caches in several ways, each in a fresh process.

    ``parallel`` compiles ahead on all cores, ``serial`` each config just before it is measured.
    ``triton.autotune`` compiles and times one config after the other, as Triton does, for exactly
    the configs that ``parallel`` met; PyTorch's own kernels, which Triton could not try, cost it
    nothing.

    Args:
        pairs: what to tune.
        folder: must hold nothing of an earlier run, or the caches would not be empty.
        arms: some of the three, ``parallel`` first.
        options: of the tuner, for the first two.
        launch: does the jobs.
        lab: as in :class:`~tritonconv.autotune.fresh.Job`.
        say: told of every arm.
    """
    if not arms or arms[0] != PARALLEL or not set(arms) <= {PARALLEL, SERIAL, TRITON}:
        raise bad_value("arms", f"{PARALLEL}, then {SERIAL} or {TRITON}", tuple(arms))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise bad_value("folder", "an empty one, because caches must be empty", folder)
    pairs = unique_pairs(pairs)
    measured = []
    for name in arms:
        place = folder / name
        candidates = _met(pairs, folder / PARALLEL) if name == TRITON else None
        jobs = 0 if name == SERIAL else None
        job = Job(pairs, place, place / "kernels", jobs, options or {}, None, candidates, lab)
        done = launch(job)
        say(f"{name}: {done.seconds:.1f} s for {done.configs} configs")
        measured.append(Arm(name, done))
    return WallTime(len(pairs), tuple(measured))


def _met(pairs: Sequence[Pair], place: Path) -> list[list[Candidate]]:
    """The candidates with kernels of ours that a tune recorded, per pair."""
    by_problem = {
        (s.entry.operator, tuple(sorted(s.entry.problem.items()))): s.entry
        for s in Store(place / "tuned").entries()
    }
    found = []
    for operator, problem in pairs:
        entry = by_problem.get(_identity((operator, problem)))
        some = []
        for trial in () if entry is None else entry.trials:
            algorithm = operator.algorithm(trial.algorithm)
            config = algorithm.config_type.from_dict(trial.config)
            if algorithm.plan(problem, config) is not None:
                some.append(Candidate(trial.algorithm, config))
        found.append(some)
    return found
