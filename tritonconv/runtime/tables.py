"""Tuned tables: what a call looks up, and in which order.

Read order of a lookup: exact entry, bucketed entry, nearest tuned problem (log distance over the
integer fields, strings exact), the same three among entries of the same architecture but another
board or other versions (``family``), then the operator's default. Entries are looked for in the
user's table, in shared ones, and in those packaged with the library. The tuner
(``tritonconv.autotune``) writes entries; this module only reads them.
"""

from __future__ import annotations

import atexit
import enum
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import missed
from .device import DeviceFacts, device_facts
from .diagnosis import describe_miss
from .entries import (
    SCHEMA_VERSION,
    Bundle,
    Entry,
    InvalidEntryError,
    Resources,
    Timing,
    Trial,
    canonical,
    digest,
    distance,
    entry_key,
    problem_key,
    read_entry,
    warn_once,
)
from .environment import Environment, environment
from .errors import TritonConvError
from .operators import Config, Field, Operator, Problem, operator_names
from .operators import get_operator as _get_operator
from .recording import RECORDINGS, advance, epoch, is_recording, note, recording
from .settings import settings
from .sources import BundleSource, DirectorySource, Located, Source, entry_path


class Tier(enum.StrEnum):
    """Which step of the read order served a lookup."""

    EXACT = "exact"
    BUCKET = "bucket"
    NEAREST = "nearest"
    FAMILY = "family"
    DEFAULT = "default"


TUNED_TIERS = frozenset((Tier.EXACT, Tier.BUCKET))
"""The tiers that are no miss."""


@dataclass(frozen=True)
class Choice:
    """What a call should run, and why."""

    algorithm: str
    config: Config
    tier: Tier
    source: str = ""


@dataclass(frozen=True)
class Found:
    """A choice and the entry behind it, without its trials; None for the default."""

    choice: Choice
    located: Located | None = None


class NotTunedError(TritonConvError, LookupError):
    """A call has no tuned entry, and ``settings.require_tuned`` demands one."""


def user_directory() -> Path:
    """The writable table directory."""
    return Path(settings.cache_dir) / "tuned"


def packaged_directory() -> Path | None:
    """The folder of packaged bundles."""
    # Found without importing the tuner's package, which no kernel call needs.
    spec = find_spec("tritonconv.autotune")
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) / "tuned" if places else None


def bucket(value: int) -> int:
    """Bucket of a size: powers of two up to 32, then steps of one eighth of an octave.

    Example:
        >>> [bucket(n) for n in (1, 7, 33, 100, 224)]
        [1, 8, 36, 104, 224]
    """
    if value <= 32:
        return 1 << max(value - 1, 0).bit_length()
    step = 1 << (value.bit_length() - 4)
    return -(-value // step) * step


@dataclass(frozen=True)
class _Place:
    """A problem as lookups see it: what must be equal, and a point in the space of sizes."""

    group: tuple[Any, ...]
    sizes: tuple[int, ...]
    text: str

    @classmethod
    def of(cls, fields: Mapping[str, Field]) -> _Place:
        names = sorted(fields)
        sizes = [(name, value) for name in names if type(value := fields[name]) is int]
        rest = [(name, value) for name in names if type(value := fields[name]) is not int]
        group = (tuple(rest), tuple(name for name, _ in sizes))
        return cls(group, tuple(value for _, value in sizes), canonical(fields))

    def in_bucket(self, other: _Place) -> bool:
        return all(bucket(a) == bucket(b) for a, b in zip(self.sizes, other.sizes, strict=True))


@dataclass
class _OperatorTable:
    """The entries of an operator that may serve in one environment: one per problem."""

    groups: dict[Any, list[tuple[_Place, Located]]] = field(default_factory=dict)

    def ranked(self, place: _Place) -> list[tuple[_Place, Located]]:
        """Entries that differ in sizes only, the nearest first; ties in a fixed order."""
        rows = self.groups.get(place.group, ())
        return sorted(rows, key=lambda row: (distance(row[0].sizes, place.sizes), row[0].text))


_MAX_SEEN = 4096
_NEAREST = 4
"""So many of the nearest entries are asked whether their winner serves the problem."""


def newest(found: Iterable[Located]) -> Located | None:
    """The entry that was made last: the space and the policy are not asked for."""
    return max(found, key=lambda located: located.entry.age(), default=None)


class TunedTable:
    """All entries that may serve in one environment; files are read when a lookup needs them."""

    def __init__(self, env: Environment, sources: tuple[Source, ...]) -> None:
        self.environment = env
        self.sources = sources
        self._tables: dict[tuple[str, Operator], _OperatorTable] = {}
        self._hashes: dict[Operator, str] = {}
        self._found: dict[tuple[Operator, Problem], Found] = {}
        self._family: tuple[Environment, ...] | None = None

    def entries(self, operator: str) -> Iterator[Located]:
        """Readable entries of an operator in this environment, best source first."""
        for source in self.sources:
            yield from source.entries(self.environment, operator)

    def exact(self, operator: Operator, problem: Problem) -> Iterator[Located]:
        """The entry of this very problem, with its trials, in every source that has one."""
        key = problem_key(operator.name, problem.fields(), self._source_hash(operator))
        for source in self.sources:
            located = newest(source.exact(self.environment, operator.name, key))
            if located is not None:
                yield located

    def forget(self, operator: str | None = None) -> None:
        """Read the files of an operator, or of all, again at the next lookup (after tuning)."""
        for source in self.sources:
            source.forget(operator)
        self._family = None
        if operator is None:
            self._tables, self._hashes, self._found = {}, {}, {}
        else:
            self._tables = {key: t for key, t in self._tables.items() if key[1].name != operator}
            self._hashes = {o: text for o, text in self._hashes.items() if o.name != operator}
            self._found = {key: f for key, f in self._found.items() if key[0].name != operator}

    def lookup(self, operator: Operator, problem: Problem) -> Choice:
        """What to run for a problem: exact, bucket, nearest, family, default."""
        return self.find(operator, problem).choice

    def find(self, operator: Operator, problem: Problem) -> Found:
        """:meth:`lookup` with the entry that serves the problem."""
        if settings.autotune == "off":
            return Found(default_choice(operator, problem, self.environment.device))
        memory = self._found
        found = memory.get((operator, problem))
        if found is None:
            if len(memory) >= _MAX_SEEN:
                memory.clear()
            found = memory[operator, problem] = self._find(operator, problem)
        return found

    def _find(self, operator: Operator, problem: Problem) -> Found:
        for tier, located in self._candidates(operator, problem):
            choice = _choice_of(operator, problem, located, tier)
            if choice is not None:
                slim = replace(located.entry, trials=(), tied=())
                return Found(choice, replace(located, entry=slim))
        return Found(default_choice(operator, problem, self.environment.device))

    def _candidates(self, operator: Operator, problem: Problem) -> Iterator[tuple[Tier, Located]]:
        """Entries in the read order; later steps are computed only when earlier ones fail."""
        yield from ((Tier.EXACT, located) for located in self.exact(operator, problem))
        place = _Place.of(problem.fields())
        ranked = self._table(operator, self.environment).ranked(place)
        yield from ((Tier.BUCKET, row) for other, row in ranked if place.in_bucket(other))
        yield from ((Tier.NEAREST, row) for _, row in ranked[:_NEAREST])
        for env in self.family():
            ranked = self._table(operator, env).ranked(place)
            yield from ((Tier.FAMILY, row) for _, row in ranked[:_NEAREST])

    def _source_hash(self, operator: Operator) -> str:
        known = self._hashes.get(operator)
        if known is None:
            known = self._hashes[operator] = operator.source_hash()
        return known

    def _table(self, operator: Operator, env: Environment) -> _OperatorTable:
        table = self._tables.get((env.hash, operator))
        if table is None:
            table = _OperatorTable()
            for located in self._effective(operator, env):
                place = _Place.of(located.entry.problem)
                # Lookups need winners; trials of a whole table would be much memory.
                slim = replace(located, entry=replace(located.entry, trials=(), tied=()))
                table.groups.setdefault(place.group, []).append((place, slim))
            self._tables[env.hash, operator] = table
        return table

    def _effective(self, operator: Operator, env: Environment) -> Iterator[Located]:
        """The entry that answers for each problem tuned in an environment with these sources."""
        current = self._source_hash(operator)
        answered: set[str] = set()
        for source in self.sources:
            by_problem: dict[str, list[Located]] = {}
            for located in source.entries(env, operator.name):
                if located.entry.source_hash == current:
                    by_problem.setdefault(canonical(located.entry.problem), []).append(located)
            for problem in sorted(by_problem.keys() - answered):
                found = newest(by_problem[problem])
                assert found is not None
                yield found
            answered |= by_problem.keys()

    def family(self) -> tuple[Environment, ...]:
        """Other environments of the same architecture that have entries, the most alike first."""
        if self._family is None:
            own = self.environment
            others = {
                env.hash: env
                for source in self.sources
                for env in source.environments()
                if env.device.arch == own.device.arch and env.hash != own.hash
            }
            self._family = tuple(
                sorted(
                    others.values(),
                    key=lambda env: (
                        env.device.name != own.device.name,
                        env.triton != own.triton,
                        env.torch != own.torch,
                        env.ptxas != own.ptxas,
                        env.hash,
                    ),
                )
            )
        return self._family

    def answers(self, operator: Operator) -> list[Any]:
        """What lookups of an operator depend on, as a JSON value."""
        rows = []
        for env in (self.environment, *self.family()):
            winners = sorted(
                [
                    canonical(row.entry.problem),
                    row.entry.best.algorithm,
                    canonical(row.entry.best.config),
                ]
                for row in self._effective(operator, env)
            )
            if winners or env == self.environment:
                rows.append([env.hash, winners])
        return [operator.name, self._source_hash(operator), rows]


def _choice_of(operator: Operator, problem: Problem, located: Located, tier: Tier) -> Choice | None:
    """The entry's winner, if it can serve this very problem."""
    entry = located.entry
    try:
        algorithm = operator.algorithm(entry.best.algorithm)
        config = algorithm.config_type.from_dict(entry.best.config)
    except ValueError as error:
        warn_once(f"tuned entry {entry.key()} of {entry.operator} is ignored: {error}")
        return None
    if algorithm.supports(problem) is not None:
        return None
    return Choice(algorithm.name, config, tier, located.source)


def default_choice(operator: Operator, problem: Problem, device: DeviceFacts) -> Choice:
    """The untuned choice: the operator's heuristic algorithm with its default config."""
    algorithm = operator.default_algorithm(problem, device)
    return Choice(algorithm.name, algorithm.configs(problem, device)[0], Tier.DEFAULT)


@functools.cache
def _table(device: DeviceFacts, cache_dir: Path, cache_path: tuple[Path, ...]) -> TunedTable:
    sources: list[Source] = [DirectorySource("user", cache_dir / "tuned")]
    for path in cache_path:
        kind = BundleSource if path.suffix == ".json" else DirectorySource
        sources.append(kind(f"shared {path}", path))
    packaged = packaged_directory()
    if packaged is not None:
        sources.append(BundleSource("packaged", packaged))
    table = TunedTable(environment(device), tuple(sources))
    _LIVE.append(table)
    return table


_LIVE: list[TunedTable] = []


def tuned_table(device: DeviceFacts) -> TunedTable:
    """The table of a device under the present settings."""
    return _table(device, Path(settings.cache_dir), tuple(settings.cache_path))


def fingerprint(operators: Iterable[str] | None = None, device: DeviceFacts | None = None) -> str:
    """One hash over what lookups would answer: equal on all ranks if and only if their tables are.

    It covers the device, versions, kernel sources and the winner of every tuned problem; not where
    an entry was found, nor its timings.

    Args:
        operators: names; all registered operators when None.
        device: whose table; the current GPU's when None.

    Example:
        >>> fingerprint(["conv2d.forward"]) == fingerprint(["conv2d.forward"])
        True
    """
    table = tuned_table(device_facts() if device is None else device)
    names = sorted(operator_names() if operators is None else operators)
    answers = []
    if settings.autotune != "off":
        answers = [table.answers(_get_operator(name)) for name in names]
    return digest([table.environment.as_dict(), names, answers])


def from_tuner(module: str) -> Any:
    """A module of the tuner: the one lazy way from the kernels to it.

    Taken only where tuning is switched on, or an explanation is asked for.
    """
    return import_module(f"tritonconv.autotune.{module}")


_Seen = dict[tuple[int, int, int], tuple[Choice, Operator, Problem, DeviceFacts]]
_seen: _Seen = {}
"""Earlier choices by identity: hashing a problem costs more than all the rest of a call's lookup.

An item keeps its objects alive, so that no other object can take their identity.
"""


def invalidate(operator: str | None = None) -> None:
    """Read tuned entries again at the next lookup, and make dispatch look up again.

    Args:
        operator: the operator whose entries have changed; all of them when None.
    """
    for table in _LIVE:
        table.forget(operator)
    _settings_changed()


def _settings_changed() -> None:
    global _seen
    _seen = {}  # a lookup that is still under way in another thread fills the old one
    advance()


settings.watch(
    (
        "autotune",
        "backend",
        "cache_dir",
        "cache_path",
        "deterministic",
        "device_name",
        "fast_launch",
        "require_tuned",
    ),
    _settings_changed,
)


def choose(operator: Operator, problem: Problem, device: DeviceFacts) -> Choice:
    """Lookup at a call, tuning first when ``settings.autotune == "tune"`` allows it.

    The same three objects again cost one dictionary lookup.

    Raises:
        NotTunedError: ``settings.require_tuned`` is set and the call has no exact or bucketed
            entry.
    """
    if RECORDINGS:
        note(operator, problem)
    hit = _seen.get((id(operator), id(problem), id(device)))
    if hit is not None:
        return hit[0]
    return _choose(operator, problem, device)


def _choose(operator: Operator, problem: Problem, device: DeviceFacts) -> Choice:
    seen = _seen
    table = tuned_table(device)
    choice = table.lookup(operator, problem)
    final = True
    if settings.autotune == "tune" and choice.tier is not Tier.EXACT:
        final = _may_measure()
        if final:
            from_tuner("tune").tune_on_the_spot(operator, problem, device)
            seen = _seen  # a new one, if there is a new entry
            choice = table.lookup(operator, problem)
    if choice.tier not in TUNED_TIERS:
        if settings.require_tuned:
            raise NotTunedError(describe_miss(table.environment, table.sources, operator, problem))
        if settings.autotune != "off":
            missed.record(table.environment, operator, problem)
    if final:
        if len(seen) >= _MAX_SEEN:
            seen.clear()
        seen[id(operator), id(problem), id(device)] = (choice, operator, problem, device)
    return choice


def _may_measure() -> bool:
    return (
        not settings.deterministic
        and not torch.are_deterministic_algorithms_enabled()
        and torch.cuda.is_available()
        and not torch.cuda.is_current_stream_capturing()
    )


def missed_problems() -> tuple[Problem, ...]:
    """Problems this process ran without an exact or bucketed entry."""
    return tuple(miss.problem for miss in missed.noted())


@atexit.register
def _report_misses() -> None:
    # In the interpreter and on the CPU nothing runs that could be tuned.
    if not missed.noted() or not settings.report_misses or not torch.cuda.is_available():
        return
    found: dict[Environment, list[tuple[Operator, Problem]]] = {}
    for miss in missed.noted():
        table = tuned_table(miss.environment.device)
        # Some may have been tuned since.
        if table.lookup(miss.operator, miss.problem).tier not in TUNED_TIERS:
            found.setdefault(miss.environment, []).append((miss.operator, miss.problem))
    count = sum(map(len, found.values()))
    if not count:
        return
    try:
        for env, pairs in found.items():
            missed.save(env, pairs)
    except OSError as error:
        advice = f"they could not be noted: {error}"
    else:
        advice = "`autotune tune --missed` tunes exactly those"
    print(f"tritonconv: {count} problem(s) ran untuned on this GPU; {advice}", file=sys.stderr)


__all__ = [
    "SCHEMA_VERSION",
    "TUNED_TIERS",
    "Bundle",
    "Choice",
    "Entry",
    "Environment",
    "Found",
    "InvalidEntryError",
    "Located",
    "NotTunedError",
    "Resources",
    "Tier",
    "Timing",
    "Trial",
    "TunedTable",
    "bucket",
    "choose",
    "default_choice",
    "digest",
    "distance",
    "entry_key",
    "entry_path",
    "environment",
    "epoch",
    "fingerprint",
    "from_tuner",
    "invalidate",
    "is_recording",
    "missed_problems",
    "newest",
    "note",
    "packaged_directory",
    "problem_key",
    "read_entry",
    "recording",
    "tuned_table",
    "user_directory",
]
