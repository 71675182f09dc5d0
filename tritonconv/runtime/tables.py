"""Tuned tables: the entry format, where entries are looked for, and the lookup at a call.

An entry is one JSON file, read as data and never executed. Read order of a lookup: exact entry,
bucketed entry, nearest tuned problem (log distance over the integer fields, strings exact), then
the operator's default. A file that cannot be read is a miss and one warning. The tuner
(``tritonconv.autotune``) writes entries; this module only reads them.

Layout of a table directory::

    v1/<environment hash>/environment.json
    v1/<environment hash>/<operator>/<problem hash>.json
"""

from __future__ import annotations

import atexit
import enum
import functools
import hashlib
import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import triton

from .device import DeviceFacts
from .errors import TritonConvError
from .operators import Config, Field, Operator, Problem
from .settings import settings

SCHEMA_VERSION = 1


class Tier(enum.StrEnum):
    """Which step of the read order served a lookup."""

    EXACT = "exact"
    BUCKET = "bucket"
    NEAREST = "nearest"
    DEFAULT = "default"


@dataclass(frozen=True)
class Choice:
    """What a call should run, and why."""

    algorithm: str
    config: Config
    tier: Tier
    source: str = ""


@dataclass(frozen=True)
class Environment:
    """What must be equal for a timing to be valid: part of every entry's key."""

    device: DeviceFacts
    triton: str
    torch: str

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {"device": self.device.as_dict(), "triton": self.triton, "torch": self.torch}

    @functools.cached_property
    def hash(self) -> str:
        """Directory name of this environment."""
        return digest(self.as_dict())


@functools.cache
def environment(device: DeviceFacts) -> Environment:
    """The running environment on a device."""
    torch_version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    return Environment(device, triton.__version__, torch_version)


def digest(value: Any) -> str:
    """Hash of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Timing:
    """One measurement of one config, microseconds."""

    p50: float
    p20: float
    p80: float
    count: int


@dataclass(frozen=True)
class Trial:
    """One candidate of a tuning run: its fate and, if it ran, its timing."""

    algorithm: str
    config: Mapping[str, int]
    status: str
    reason: str = ""
    timing: Timing | None = None
    max_error: float | None = None


@dataclass(frozen=True)
class Entry:
    """One tuned problem, as stored."""

    operator: str
    problem: Mapping[str, Field]
    source_hash: str
    policy: str
    environment: Mapping[str, Any]
    default: Trial
    best: Trial
    tied: tuple[int, ...] = ()
    trials: tuple[Trial, ...] = ()
    recorded: Mapping[str, Any] = field(default_factory=dict)

    def key(self) -> str:
        """File name without ending: hash of all that identifies the tuned problem."""
        return problem_key(self.operator, self.problem, self.source_hash)

    def to_json(self) -> dict[str, Any]:
        """The entry as a JSON value, ``schema_version`` first."""
        return {
            "schema_version": SCHEMA_VERSION,
            "operator": self.operator,
            "problem": dict(self.problem),
            "source_hash": self.source_hash,
            "policy": self.policy,
            "environment": dict(self.environment),
            "default": _trial_to_json(self.default),
            "best": _trial_to_json(self.best),
            "tied": list(self.tied),
            "trials": [_trial_to_json(trial) for trial in self.trials],
            "recorded": dict(self.recorded),
        }

    @classmethod
    def from_json(cls, value: Any) -> Entry:
        """Rebuild an entry.

        Raises:
            InvalidEntryError: the value is not an entry of this schema.
        """
        try:
            if value["schema_version"] != SCHEMA_VERSION:
                raise InvalidEntryError(f"schema_version {value['schema_version']!r}")
            problem = value["problem"]
            if not all(isinstance(v, (str, int, bool)) for v in problem.values()):
                raise InvalidEntryError("problem fields must be strings, integers or booleans")
            return cls(
                operator=str(value["operator"]),
                problem=dict(problem),
                source_hash=str(value["source_hash"]),
                policy=str(value["policy"]),
                environment=dict(value["environment"]),
                default=_trial_from_json(value["default"]),
                best=_trial_from_json(value["best"]),
                tied=tuple(int(index) for index in value["tied"]),
                trials=tuple(_trial_from_json(trial) for trial in value["trials"]),
                recorded=dict(value["recorded"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, InvalidEntryError):
                raise
            raise InvalidEntryError(f"{type(error).__name__}: {error}") from None


class InvalidEntryError(TritonConvError, ValueError):
    """A file is not a tuned entry of this schema."""


def _trial_to_json(trial: Trial) -> dict[str, Any]:
    value: dict[str, Any] = {
        "algorithm": trial.algorithm,
        "config": dict(trial.config),
        "status": trial.status,
    }
    if trial.reason:
        value["reason"] = trial.reason
    if trial.timing is not None:
        timing = trial.timing
        value["p50_us"], value["p20_us"], value["p80_us"] = timing.p50, timing.p20, timing.p80
        value["count"] = timing.count
    if trial.max_error is not None:
        value["max_error"] = trial.max_error
    return value


def _trial_from_json(value: Any) -> Trial:
    timing = None
    if "p50_us" in value:
        timing = Timing(
            float(value["p50_us"]),
            float(value["p20_us"]),
            float(value["p80_us"]),
            int(value["count"]),
        )
    config = dict(value["config"])
    if any(type(v) is not int for v in config.values()):
        raise InvalidEntryError("config values must be integers")
    error = value.get("max_error")
    return Trial(
        str(value["algorithm"]),
        config,
        str(value["status"]),
        str(value.get("reason", "")),
        timing,
        None if error is None else float(error),
    )


def problem_key(operator: str, fields: Mapping[str, Field], source_hash: str) -> str:
    """Hash naming the file of a tuned problem."""
    return digest(
        {
            "schema": SCHEMA_VERSION,
            "operator": operator,
            "problem": dict(fields),
            "source": source_hash,
        }
    )


def entry_path(root: Path, env: Environment, operator: str, key: str) -> Path:
    """Where an entry lives below a table directory."""
    return root / f"v{SCHEMA_VERSION}" / env.hash / operator / f"{key}.json"


def user_directory() -> Path:
    """The writable table directory."""
    return Path(settings.cache_dir) / "tuned"


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


def _split(
    fields: Mapping[str, Field],
) -> tuple[tuple[tuple[str, Field], ...], tuple[tuple[str, int], ...]]:
    """Categorical and size fields, each in a fixed order."""
    categorical = []
    sizes = []
    for name in sorted(fields):
        value = fields[name]
        if type(value) is int:
            sizes.append((name, value))
        else:
            categorical.append((name, value))
    return tuple(categorical), tuple(sizes)


@dataclass
class _OperatorTable:
    exact: dict[str, tuple[Entry, str]] = field(default_factory=dict)
    buckets: dict[Any, tuple[Entry, str]] = field(default_factory=dict)
    groups: dict[Any, list[tuple[tuple[int, ...], Entry, str]]] = field(default_factory=dict)


def _canonical(fields: Mapping[str, Field]) -> str:
    return json.dumps(dict(fields), sort_keys=True)


class TunedTable:
    """All entries that are valid in one environment, loaded once per operator."""

    def __init__(self, env: Environment, directories: tuple[tuple[str, Path], ...]) -> None:
        self.environment = env
        self.directories = directories
        self._tables: dict[str, _OperatorTable] = {}
        self.missed: dict[tuple[str, str], Problem] = {}

    def entries(self, operator: str) -> Iterator[tuple[Entry, str, Path]]:
        """Readable entries of an operator with the name of their source, best source first."""
        for source, root in self.directories:
            folder = root / f"v{SCHEMA_VERSION}" / self.environment.hash / operator
            if not folder.is_dir():
                continue
            for path in sorted(folder.glob("*.json")):
                entry = read_entry(path)
                if entry is not None:
                    yield entry, source, path

    def _table(self, operator: Operator) -> _OperatorTable:
        table = self._tables.get(operator.name)
        if table is None:
            table = _OperatorTable()
            current = operator.source_hash()
            for entry, source, _ in self.entries(operator.name):
                if entry.source_hash != current:
                    continue
                table.exact.setdefault(_canonical(entry.problem), (entry, source))
                categorical, sizes = _split(entry.problem)
                bucketed = tuple((name, bucket(size)) for name, size in sizes)
                table.buckets.setdefault((categorical, bucketed), (entry, source))
                names = tuple(name for name, _ in sizes)
                values = tuple(size for _, size in sizes)
                table.groups.setdefault((categorical, names), []).append((values, entry, source))
            self._tables[operator.name] = table
        return table

    def forget(self, operator: str | None = None) -> None:
        """Read the files again at the next lookup (after tuning)."""
        if operator is None:
            self._tables.clear()
        else:
            self._tables.pop(operator, None)

    def lookup(self, operator: Operator, problem: Problem) -> Choice:
        """What to run for a problem: exact, bucket, nearest, default."""
        if settings.autotune != "off":
            table = self._table(operator)
            fields = problem.fields()
            hit = table.exact.get(_canonical(fields))
            if hit is not None:
                choice = self._choice(operator, problem, hit, Tier.EXACT)
                if choice is not None:
                    return choice
            categorical, sizes = _split(fields)
            bucketed = tuple((name, bucket(size)) for name, size in sizes)
            hit = table.buckets.get((categorical, bucketed))
            if hit is not None:
                choice = self._choice(operator, problem, hit, Tier.BUCKET)
                if choice is not None:
                    return choice
            self.missed.setdefault((operator.name, _canonical(fields)), problem)
            names = tuple(name for name, _ in sizes)
            values = tuple(size for _, size in sizes)
            group = table.groups.get((categorical, names), ())
            for _, entry, source in sorted(
                group, key=lambda row: (_distance(row[0], values), row[1].key())
            )[:4]:
                choice = self._choice(operator, problem, (entry, source), Tier.NEAREST)
                if choice is not None:
                    return choice
        return default_choice(operator, problem, self.environment.device)

    @staticmethod
    def _choice(
        operator: Operator, problem: Problem, hit: tuple[Entry, str], tier: Tier
    ) -> Choice | None:
        """The entry's winner, if it can serve this very problem."""
        entry, source = hit
        try:
            algorithm = operator.algorithm(entry.best.algorithm)
            config = algorithm.config_type.from_dict(entry.best.config)
        except ValueError as error:
            _warn_once(f"tuned entry {entry.key()} of {entry.operator} is ignored: {error}")
            return None
        if algorithm.supports(problem) is not None:
            return None
        return Choice(algorithm.name, config, tier, source)


def _distance(left: tuple[int, ...], right: tuple[int, ...]) -> float:
    return sum(
        (math.log2(max(a, 1)) - math.log2(max(b, 1))) ** 2 for a, b in zip(left, right, strict=True)
    )


def default_choice(operator: Operator, problem: Problem, device: DeviceFacts) -> Choice:
    """The untuned choice: the operator's heuristic algorithm with its default config."""
    algorithm = operator.default_algorithm(problem, device)
    return Choice(algorithm.name, algorithm.configs(problem, device)[0], Tier.DEFAULT)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def read_entry(path: Path) -> Entry | None:
    """Read an entry; a bad file is a miss and one warning."""
    try:
        return Entry.from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _warn_once(f"tuned entry {path.name} cannot be read and is ignored: {error}")
        return None


def _packaged_directory() -> Path | None:
    # The folder is found without importing the tuner's package, which no kernel call needs.
    spec = find_spec("tritonconv.autotune")
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) / "tuned" if places else None


@functools.cache
def _table(device: DeviceFacts, cache_dir: Path, cache_path: tuple[Path, ...]) -> TunedTable:
    directories = [("user", cache_dir / "tuned")]
    directories += [(f"shared {path}", path) for path in cache_path]
    packaged = _packaged_directory()
    if packaged is not None:
        directories.append(("packaged", packaged))
    table = TunedTable(environment(device), tuple(directories))
    _LIVE.append(table)
    return table


_LIVE: list[TunedTable] = []


def tuned_table(device: DeviceFacts) -> TunedTable:
    """The table of a device under the present settings."""
    return _table(device, Path(settings.cache_dir), tuple(settings.cache_path))


def _tune_now(operator: Operator, problem: Problem, device: DeviceFacts) -> None:
    """The one lazy way from the kernels to the tuner, taken only when tuning is switched on."""
    from importlib import import_module

    import_module("tritonconv.autotune.tune").tune_on_the_spot(operator, problem, device)
    invalidate(operator.name)


_epoch = 0
_recordings: list[list[tuple[Operator, Problem]]] = []


def epoch() -> int:
    """Changes whenever an earlier :func:`choose` may no longer hold; what dispatch caches by."""
    return _epoch


def invalidate(operator: str | None = None) -> None:
    """Read tuned entries again at the next lookup, and make dispatch look up again.

    Args:
        operator: the operator whose entries have changed; all of them when None.
    """
    global _epoch
    for table in _LIVE:
        table.forget(operator)
    _epoch += 1


def _settings_changed() -> None:
    global _epoch
    _epoch += 1


settings.watch(
    (
        "autotune",
        "backend",
        "cache_dir",
        "cache_path",
        "deterministic",
        "device_name",
        "fast_launch",
    ),
    _settings_changed,
)


def note(operator: Operator, problem: Problem) -> None:
    """Tell the active recordings of a call; dispatch does so where it does not :func:`choose`."""
    for recording_ in _recordings:
        recording_.append((operator, problem))


@contextmanager
def recording() -> Iterator[list[tuple[Operator, Problem]]]:
    """Collect the problems met inside a ``with`` block, in order, repeats possible.

    Dispatch caches are invalidated at the start, so that problems met before are met again.
    """
    global _epoch
    met: list[tuple[Operator, Problem]] = []
    _recordings.append(met)
    _epoch += 1
    try:
        yield met
    finally:
        # By identity: two recordings of the same problems compare equal.
        _recordings[:] = [other for other in _recordings if other is not met]


def is_recording() -> bool:
    """Whether a :func:`recording` block is active."""
    return bool(_recordings)


def choose(operator: Operator, problem: Problem, device: DeviceFacts) -> Choice:
    """Lookup at a call, tuning first when ``settings.autotune == "tune"`` allows it."""
    if _recordings:
        note(operator, problem)
    table = tuned_table(device)
    choice = table.lookup(operator, problem)
    if (
        settings.autotune == "tune"
        and choice.tier is not Tier.EXACT
        and not settings.deterministic
        and not torch.are_deterministic_algorithms_enabled()
        and torch.cuda.is_available()
        and not torch.cuda.is_current_stream_capturing()
    ):
        _tune_now(operator, problem, device)
        choice = table.lookup(operator, problem)
    return choice


def missed_problems() -> tuple[Problem, ...]:
    """Problems this process ran without an exact or bucketed entry."""
    return tuple(problem for table in _LIVE for problem in table.missed.values())


@atexit.register
def _report_misses() -> None:
    if not torch.cuda.is_available() or not settings.report_misses:
        return
    count = len(missed_problems())
    if count:
        print(
            f"tritonconv: {count} problem(s) ran untuned on this GPU; tune them with "
            "`autotune tune --model ...` or run once under TRITONCONV_AUTOTUNE=tune",
            file=sys.stderr,
        )


__all__ = [
    "SCHEMA_VERSION",
    "Choice",
    "Entry",
    "Environment",
    "InvalidEntryError",
    "Tier",
    "Timing",
    "Trial",
    "TunedTable",
    "bucket",
    "choose",
    "default_choice",
    "digest",
    "entry_path",
    "environment",
    "epoch",
    "invalidate",
    "is_recording",
    "missed_problems",
    "note",
    "problem_key",
    "read_entry",
    "recording",
    "tuned_table",
    "user_directory",
]
