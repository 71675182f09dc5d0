"""What tuned entries say beyond their winner: the numbers behind the plots.

Pure functions of entries; nothing here reads a file, knows a GPU or draws. Speed-ups and regrets
are ratios of medians, summarised by geometric means.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tritonconv.runtime.operators import Field
from tritonconv.runtime.tables import Entry, Tier, Timing, Trial, bucket

from .choose import TIE_FRACTION
from .replay import Curve
from .search import Status
from .space import CandidateKey
from .store import trial_key


def geomean(ratios: Iterable[float]) -> float | None:
    """Geometric mean; None of nothing.

    Example:
        >>> geomean([1.0, 4.0])
        2.0
    """
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs)) if logs else None


def label(entry: Entry) -> str:
    """A problem in few words: what differs from an ordinary 3×3 convolution and all sizes.

    Fields that a family does not have are left out, so it works for any operator.
    """
    fields = entry.problem
    if "in_channels" not in fields:
        return " ".join(f"{name}={value}" for name, value in fields.items())
    direction = entry.operator.rpartition(".")[2]
    text = f"{direction} n{fields['batch']} {fields['in_channels']}→{fields['out_channels']}"
    text += f" {fields.get('height', fields.get('width'))}² k{str(fields['kernel']).split('x')[0]}"
    stride = str(fields.get("stride", "1")).split("x")[0]
    text += f"/{stride}" if stride != "1" else ""
    text += f" g{fields['groups']}" if fields.get("groups", 1) != 1 else ""
    return text + (" fused" if str(fields.get("epilogue", "none")) != "none" else "")


# Timings of one entry, sorted


@dataclass(frozen=True)
class Ranked:
    """One timed candidate; ``role`` is ``best``, ``tied``, ``default`` or empty."""

    algorithm: str
    config: Mapping[str, int]
    p50_us: float
    p20_us: float
    p80_us: float
    role: str


@dataclass(frozen=True)
class SortedTimings:
    """All timed candidates of a problem, fastest first.

    Attributes:
        problem: in words.
        rows: the candidates.
        band_us: lower and upper end of the band in which timings count as equal.
        failed: candidates without a timing, by failure class.
    """

    problem: str
    rows: tuple[Ranked, ...]
    band_us: tuple[float, float]
    failed: Mapping[str, int]


def sorted_timings(entry: Entry) -> SortedTimings:
    """Sort the timings of an entry; the default keeps its role even where it is tied or best."""
    rows = []
    tied = {trial_key(entry.trials[index]) for index in entry.tied}
    best, default = trial_key(entry.best), trial_key(entry.default)
    for trial in entry.trials:
        if trial.timing is None:
            continue
        key, timing = trial_key(trial), trial.timing
        roles = [
            role
            for role, holds in (
                ("best", key == best),
                ("tied", key in tied and key != best),
                ("default", key == default),
            )
            if holds
        ]
        rows.append(
            Ranked(
                trial.algorithm,
                trial.config,
                timing.p50,
                timing.p20,
                timing.p80,
                " ".join(roles),
            )
        )
    rows.sort(key=lambda row: row.p50_us)
    may_win = [timing.p50 for timing in _finalists(entry).values()]
    low = min(may_win, default=rows[0].p50_us if rows else 0.0)
    failed = Counter(trial.status for trial in entry.trials if trial.timing is None)
    return SortedTimings(label(entry), tuple(rows), (low, low * (1 + TIE_FRACTION)), dict(failed))


def p50(trial: Trial) -> float:
    """The median time of a trial that has one, µs."""
    assert trial.timing is not None
    return trial.timing.p50


def _finalists(entry: Entry) -> dict[CandidateKey, Timing]:
    return {
        trial_key(trial): trial.timing
        for trial in entry.trials
        if trial.status == Status.OK and trial.timing is not None
    }


# Best so far


@dataclass(frozen=True)
class StrategyCurve:
    """One search strategy over many simulated searches.

    Attributes:
        strategy: its name.
        problems: how many different ones it searched.
        points: (seconds since the start of a problem, best so far over the optimum) steps.
    """

    strategy: str
    problems: int
    points: tuple[tuple[float, float], ...]

    def at(self, seconds: float) -> float | None:
        """The value at a time; None before every search has its first timing."""
        reached = [value for when, value in self.points if when <= seconds]
        return reached[-1] if reached else None

    def reaches(self, ratio: float) -> float | None:
        """Seconds until the value is at most ``ratio``; None when it never is."""
        return next((when for when, value in self.points if value <= ratio), None)


def best_so_far(searches: Iterable[Curve]) -> tuple[StrategyCurve, ...]:
    """Average searches by strategy: at every time the geometric mean over problems and seeds.

    A curve starts when the slowest of its searches has its first timing.
    """
    grouped: dict[str, list[Curve]] = {}
    for search in searches:
        if search.points:
            grouped.setdefault(str(search.strategy), []).append(search)
    curves = []
    for strategy, found in grouped.items():
        start = max(search.points[0].seconds for search in found)
        moments = {point.seconds for search in found for point in search.points}
        points = []
        for when in sorted(moment for moment in moments if moment >= start):
            value = geomean(search.regret(seconds=when) for search in found)
            assert value is not None
            points.append((when, value))
        problems = {(search.operator, _words(search.problem)) for search in found}
        curves.append(StrategyCurve(strategy, len(problems), tuple(points)))
    return tuple(curves)


# Regret of the lookup


@dataclass(frozen=True)
class Regret:
    """What a problem would have run had it not been tuned itself.

    Attributes:
        problem: in words.
        tier: which step of the read order would have served it.
        chosen: key of the config it would have run.
        ratio: time of that config over that of its own winner; None where it was not timed.
    """

    problem: str
    tier: Tier
    chosen: CandidateKey
    ratio: float | None


@dataclass(frozen=True)
class RegretSummary:
    """Regret over many problems.

    Attributes:
        rows: one per problem.
        counted: rows with a ratio.
        geomean: of the ratios.
        worst: the largest ratio.
        untuned: geometric mean of the default's time over the winner's, for the same rows.
    """

    rows: tuple[Regret, ...]
    counted: int
    geomean: float | None
    worst: float | None
    untuned: float | None


Serves = Callable[[Trial, Mapping[str, Field], str], bool]
"""Whether a stored winner can serve a problem of an operator."""


def _always(trial: Trial, problem: Mapping[str, Field], operator: str) -> bool:
    return True


def look_up(
    entries: Sequence[Entry],
    operator: str,
    problem: Mapping[str, Field],
    serves: Serves = _always,
) -> tuple[Tier, Entry] | None:
    """What bucket and nearest lookup find among entries; None is the default.

    The same steps as the lookup of a call without an exact entry, on entries in memory: tests hold
    the two together.
    """
    categorical, sizes = _split(problem)
    same = [e for e in entries if e.operator == operator and _split(e.problem)[0] == categorical]
    same = [e for e in same if _split(e.problem)[1].keys() == sizes.keys()]
    buckets = {name: bucket(size) for name, size in sizes.items()}

    def distance(entry: Entry) -> float:
        theirs = _split(entry.problem)[1]
        return sum((math.log2(max(theirs[n], 1)) - math.log2(max(sizes[n], 1))) ** 2 for n in sizes)

    ranked = sorted(same, key=lambda entry: (distance(entry), _words(entry.problem)))
    for entry in ranked:
        theirs = {name: bucket(size) for name, size in _split(entry.problem)[1].items()}
        if theirs == buckets and serves(entry.best, problem, operator):
            return Tier.BUCKET, entry
    for entry in ranked[:4]:
        if serves(entry.best, problem, operator):
            return Tier.NEAREST, entry
    return None


def _words(fields: Mapping[str, Field]) -> str:
    return json.dumps(dict(fields), sort_keys=True)


def _split(fields: Mapping[str, Field]) -> tuple[dict[str, Field], dict[str, int]]:
    sizes = {name: value for name, value in fields.items() if type(value) is int}
    return {name: value for name, value in fields.items() if name not in sizes}, sizes


def regret_of(entry: Entry, found: tuple[Tier, Entry] | None) -> Regret:
    """The regret of one problem, given what the lookup found without its own entry."""
    tier, winner = (Tier.DEFAULT, entry.default) if found is None else (found[0], found[1].best)
    key = trial_key(winner)
    timed = next((t for t in entry.trials if trial_key(t) == key and t.timing is not None), None)
    ratio = None if timed is None else p50(timed) / p50(entry.best)
    return Regret(label(entry), tier, key, ratio)


def leave_one_out(entries: Sequence[Entry], serves: Serves = _always) -> RegretSummary:
    """For every entry, what the lookup would have chosen from all the others.

    A ratio is counted only where the chosen config was timed for the problem. It can be a little
    below 1: of tied configs not the fastest wins, but the first.
    """
    rows = []
    for index, entry in enumerate(entries):
        others = [*entries[:index], *entries[index + 1 :]]
        rows.append(regret_of(entry, look_up(others, entry.operator, entry.problem, serves)))
    return summarize_regret(rows, entries)


def summarize_regret(rows: Sequence[Regret], entries: Sequence[Entry]) -> RegretSummary:
    """Geometric mean and worst case; ``entries`` are those of the rows, in their order."""
    ratios = [row.ratio for row in rows if row.ratio is not None]
    untuned = [
        p50(entry.default) / p50(entry.best)
        for row, entry in zip(rows, entries, strict=True)
        if row.ratio is not None and entry.default.timing is not None
    ]
    return RegretSummary(
        tuple(rows), len(ratios), geomean(ratios), max(ratios, default=None), geomean(untuned)
    )


# Agreement between repeated tunes


@dataclass(frozen=True)
class Picks:
    """What repeated tunes of one problem picked.

    Attributes:
        problem: in words.
        chosen: per run, the number of its config among those that were chosen, the most
            frequent being 0.
        fastest: the same for the config with the least median: without the tie-break.
        configs: the chosen configs, most frequent first.
        spread: largest over smallest time of the chosen configs, as each run measured its own.
    """

    problem: str
    chosen: tuple[int, ...]
    fastest: tuple[int, ...]
    configs: tuple[CandidateKey, ...]
    spread: float


@dataclass(frozen=True)
class Agreement:
    """Whether repeated tunes agree.

    Attributes:
        runs: how many there are.
        rows: one per problem that every run has.
        unanimous: share of the problems for which all runs chose the same config.
        modal: share of all choices that are the most frequent one of their problem.
        unanimous_fastest, modal_fastest: the same without the tie-break.
        left_out: problems that not every run has.
    """

    runs: int
    rows: tuple[Picks, ...]
    unanimous: float | None
    modal: float | None
    unanimous_fastest: float | None
    modal_fastest: float | None
    left_out: int


def fastest(entry: Entry) -> CandidateKey:
    """What would have won by the least median, without the tie-break."""
    timings = _finalists(entry)
    if not timings:
        return trial_key(entry.best)
    return min(timings, key=lambda key: timings[key].p50)


def agreement(runs: Sequence[Sequence[Entry]]) -> Agreement:
    """Compare tunes of the same problems.

    Args:
        runs: the entries of each tune, at most one per problem.
    """
    tables = [{(e.operator, _fixed(e.problem)): e for e in run} for run in runs]
    common = [key for key in tables[0] if all(key in table for table in tables)] if tables else []
    everything = {key for table in tables for key in table}
    rows = []
    for key in common:
        entries = [table[key] for table in tables]
        chosen, configs = _numbered([trial_key(entry.best) for entry in entries])
        quickest, _ = _numbered([fastest(entry) for entry in entries])
        times = [p50(entry.best) for entry in entries]
        rows.append(Picks(label(entries[0]), chosen, quickest, configs, max(times) / min(times)))

    def unanimous(picks: Sequence[tuple[int, ...]]) -> float | None:
        return sum(not any(p) for p in picks) / len(picks) if picks else None

    def modal(picks: Sequence[tuple[int, ...]]) -> float | None:
        flat = [number for p in picks for number in p]
        return flat.count(0) / len(flat) if flat else None

    chosen_all = [row.chosen for row in rows]
    fastest_all = [row.fastest for row in rows]
    return Agreement(
        len(runs),
        tuple(rows),
        unanimous(chosen_all),
        modal(chosen_all),
        unanimous(fastest_all),
        modal(fastest_all),
        len(everything) - len(common),
    )


def _fixed(fields: Mapping[str, Field]) -> tuple[tuple[str, Field], ...]:
    return tuple(sorted(fields.items()))


def _numbered(keys: Sequence[CandidateKey]) -> tuple[tuple[int, ...], tuple[CandidateKey, ...]]:
    ordered = tuple(key for key, _ in Counter(keys).most_common())
    return tuple(ordered.index(key) for key in keys), ordered
