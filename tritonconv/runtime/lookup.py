"""One table of tuned entries: which entry serves a problem, step by step of the read order."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .device import DeviceFacts
from .entries import canonical, distance, problem_key, warn_once
from .environment import Environment
from .freshness import serves
from .operators import Config, Field, Operator, Problem
from .settings import settings
from .sources import Located, Source


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
    """What a call should run, and why.

    Attributes:
        algorithm: its name.
        config: what it is launched with.
        tier: how the tables came to it.
        source: the table; empty for the default.
        final: it holds for later calls too. It does not where tuning is switched on but had to
            wait: during the capture of a graph, for instance.
    """

    algorithm: str
    config: Config
    tier: Tier
    source: str = ""
    final: bool = field(default=True, compare=False)


@dataclass(frozen=True)
class Found:
    """A choice and the entry behind it, without its trials; None for the default.

    ``stale`` is the entry, exact or the nearest, for whose sake the default is chosen: its winner
    has changed since, and a farther entry says less about the problem than it did.
    """

    choice: Choice
    located: Located | None = None
    stale: Located | None = None


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


@dataclass(frozen=True)
class _Row:
    """What is known of a problem in one environment."""

    place: _Place
    located: Located
    serves: bool


@dataclass
class _OperatorTable:
    """The entries of an operator in one environment: one per problem."""

    groups: dict[Any, list[_Row]] = field(default_factory=dict)

    def ranked(self, place: _Place) -> list[tuple[float, _Row]]:
        """Entries that differ in sizes only, the nearest first; ties in a fixed order."""
        rows = [(distance(r.place.sizes, place.sizes), r) for r in self.groups.get(place.group, ())]
        return sorted(rows, key=lambda row: (row[0], row[1].place.text))


@dataclass
class _Near:
    """The entries near a problem that may serve it: none that is farther than a stale one.

    After a change of kernels only those entries serve that were won by what has not changed, by
    PyTorch above all. Where the nearest entry is no such one, they are no sample of what is best.
    """

    place: _Place
    limit: float = math.inf
    stale: Located | None = None

    def rows(self, table: _OperatorTable) -> list[_Row]:
        """What serves of a table, the nearest first."""
        ranked = table.ranked(self.place)
        apart, stale = next(((d, row) for d, row in ranked if not row.serves), (math.inf, None))
        if stale is not None and apart < self.limit:
            self.limit, self.stale = apart, stale.located
        return [row for d, row in ranked if row.serves and d <= self.limit]


_MAX_SEEN = 4096
_NEAREST = 4
"""So many of the nearest entries are asked whether their winner serves the problem."""


def newest(found: Iterable[Located]) -> Located | None:
    """The entry that was made last: the policy is not asked for."""
    return max(found, key=lambda located: located.entry.age(), default=None)


class TunedTable:
    """All entries that may serve in one environment; files are read when a lookup needs them."""

    def __init__(self, env: Environment, sources: tuple[Source, ...]) -> None:
        self.environment = env
        self.sources = sources
        self._tables: dict[tuple[str, Operator], _OperatorTable] = {}
        self._hashes: dict[Operator, Mapping[str, str]] = {}
        self._found: dict[tuple[Operator, Problem], Found] = {}
        self._families: list[tuple[Environment, ...]] = []

    def entries(self, operator: str) -> Iterator[Located]:
        """Readable entries of an operator in this environment, best source first."""
        for source in self.sources:
            yield from source.entries(self.environment, operator)

    def exact(self, operator: Operator, problem: Problem) -> Iterator[Located]:
        """The entry that serves this very problem, with its trials, in every source with one."""
        key = problem_key(operator.name, problem.fields())
        current = self._source_hashes(operator)
        for source in self.sources:
            found = source.exact(self.environment, operator.name, key)
            located = newest(row for row in found if serves(row.entry, current))
            if located is not None:
                yield located

    def forget(self, operator: str | None = None) -> None:
        """Read the files of an operator, or of all, again at the next lookup (after tuning)."""
        for source in self.sources:
            source.forget(operator)
        # New memories: a lookup still under way in another thread fills those that it began with.
        self._families = []
        if operator is None:
            self._tables, self._hashes, self._found = {}, {}, {}
        else:
            tables, hashes = list(self._tables.items()), list(self._hashes.items())
            self._tables = {key: t for key, t in tables if key[1].name != operator}
            self._hashes = {o: text for o, text in hashes if o.name != operator}
            found = list(self._found.items())
            self._found = {key: f for key, f in found if key[0].name != operator}

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
        near = _Near(_Place.of(problem.fields()))
        for tier, located in self._candidates(operator, problem, near):
            choice = _choice_of(operator, problem, located, tier)
            if choice is not None:
                slim = replace(located.entry, trials=(), tied=())
                return Found(choice, replace(located, entry=slim))
        choice = default_choice(operator, problem, self.environment.device)
        return Found(choice, stale=near.stale)

    def _candidates(
        self, operator: Operator, problem: Problem, near: _Near
    ) -> Iterator[tuple[Tier, Located]]:
        """Entries in the read order; later steps are computed only when earlier ones fail."""
        yield from ((Tier.EXACT, located) for located in self.exact(operator, problem))
        rows = near.rows(self._table(operator, self.environment))
        yield from ((Tier.BUCKET, r.located) for r in rows if near.place.in_bucket(r.place))
        yield from ((Tier.NEAREST, row.located) for row in rows[:_NEAREST])
        for env in self.family():
            rows = near.rows(self._table(operator, env))
            yield from ((Tier.FAMILY, row.located) for row in rows[:_NEAREST])

    def _source_hashes(self, operator: Operator) -> Mapping[str, str]:
        memory = self._hashes
        known = memory.get(operator)
        if known is None:
            known = memory[operator] = operator.source_hashes()
        return known

    def _table(self, operator: Operator, env: Environment) -> _OperatorTable:
        memory = self._tables
        table = memory.get((env.hash, operator))
        if table is None:
            table = _OperatorTable()
            for located, serving in self.known(operator, env):
                place = _Place.of(located.entry.problem)
                # Lookups need winners; trials of a whole table would be much memory.
                slim = replace(located, entry=replace(located.entry, trials=(), tied=()))
                row = _Row(place, slim, serving)
                table.groups.setdefault(place.group, []).append(row)
            memory[env.hash, operator] = table
        return table

    def effective(self, operator: Operator, env: Environment) -> Iterator[Located]:
        """The entry that answers for each problem tuned in an environment."""
        return (located for located, serving in self.known(operator, env) if serving)

    def known(self, operator: Operator, env: Environment) -> Iterator[tuple[Located, bool]]:
        """The entry of each problem tuned in an environment, and whether it serves.

        One that does not is given where no source has one that does.
        """
        current = self._source_hashes(operator)
        answered: set[str] = set()
        stale: dict[str, Located] = {}
        for source in self.sources:
            by_problem: dict[str, list[Located]] = {}
            for located in source.entries(env, operator.name):
                problem = canonical(located.entry.problem)
                if serves(located.entry, current):
                    by_problem.setdefault(problem, []).append(located)
                else:
                    stale.setdefault(problem, located)
            for problem in sorted(by_problem.keys() - answered):
                found = newest(by_problem[problem])
                assert found is not None
                yield found, True
            answered |= by_problem.keys()
        yield from ((stale[problem], False) for problem in sorted(stale.keys() - answered))

    def family(self) -> tuple[Environment, ...]:
        """Other environments of the same architecture that have entries, the most alike first."""
        memory = self._families
        if not memory:
            own = self.environment
            others = {
                env.hash: env
                for source in self.sources
                for env in source.environments()
                if env.device.arch == own.device.arch and env.hash != own.hash
            }
            memory.append(
                tuple(
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
            )
        return memory[0]

    def answers(self, operator: Operator) -> list[Any]:
        """What lookups of an operator depend on, as a JSON value."""
        rows = []
        for env in (self.environment, *self.family()):
            winners = sorted(
                [
                    canonical(row.entry.problem),
                    *(
                        (row.entry.best.algorithm, canonical(row.entry.best.config))
                        if serving
                        else ("", "")  # stale: it only keeps farther ones from serving
                    ),
                ]
                for row, serving in self.known(operator, env)
            )
            if winners or env == self.environment:
                rows.append([env.hash, winners])
        return [operator.name, operator.source_hash(), rows]


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
    config = operator.space(algorithm, problem, device)[0]
    return Choice(algorithm.name, config, Tier.DEFAULT)
