"""The format of tuned entries and of bundles of them: JSON, read as data and never executed.

A file that cannot be read is a miss and one warning.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import TritonConvError
from .operators import Field

SCHEMA_VERSION = 2


def digest(value: Any) -> str:
    """Hash of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def canonical(fields: Mapping[str, Field]) -> str:
    """One text for equal fields, whatever their order."""
    return json.dumps(dict(fields), sort_keys=True)


def distance(left: Sequence[int], right: Sequence[int]) -> float:
    """Squared distance of sizes in octaves."""
    return sum(
        (math.log2(max(a, 1)) - math.log2(max(b, 1))) ** 2 for a, b in zip(left, right, strict=True)
    )


@functools.cache
def warn_once(message: str) -> None:
    """Warn at the first time a message comes up in this process."""
    warnings.warn(message, stacklevel=3)


class InvalidEntryError(TritonConvError, ValueError):
    """A file is not a tuned entry, or not a bundle, of this schema."""


@dataclass(frozen=True)
class Timing:
    """One measurement of one config, microseconds."""

    p50: float
    p20: float
    p80: float
    count: int


@dataclass(frozen=True)
class Resources:
    """What the compiled kernels of a config need, the largest over its kernels."""

    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None


@dataclass(frozen=True)
class Trial:
    """One candidate of a tuning run: its fate and, if it ran, its timing.

    Attributes:
        algorithm, config: the candidate.
        status: ``ok``, ``timed`` or the class of the failure.
        reason: why it failed, or what a reader of the timing should know.
        timing: microseconds; None when it did not run.
        max_error: against the float64 reference; None when it was not compared.
        resources: of the compiled kernels; None when they are not known.
        compile_s: seconds that compiling took; None when it is not known.
        plan: digest of what was launched; empty when it is not known, or is not ours.
    """

    algorithm: str
    config: Mapping[str, int]
    status: str
    reason: str = ""
    timing: Timing | None = None
    max_error: float | None = None
    resources: Resources | None = None
    compile_s: float | None = None
    plan: str = ""


@dataclass(frozen=True)
class Entry:
    """One tuned problem, as stored.

    Attributes:
        operator: its name.
        problem: the fields of the problem.
        sources: hash of the source of every algorithm that was in the search, by its name.
        policy: how the candidates were timed.
        environment: device and versions.
        default: the trial of the untuned choice.
        best: the winner.
        tied: positions in ``trials`` that cannot be told from the fastest.
        trials: every candidate that was tried, in the fixed order of the space.
        recorded: what is worth knowing and identifies nothing: date, driver, clocks, effort.
        space_hash: of the space that was searched; empty when it is not known.
    """

    operator: str
    problem: Mapping[str, Field]
    sources: Mapping[str, str]
    policy: str
    environment: Mapping[str, Any]
    default: Trial
    best: Trial
    tied: tuple[int, ...] = ()
    trials: tuple[Trial, ...] = ()
    recorded: Mapping[str, Any] = field(default_factory=dict)
    space_hash: str = ""

    def problem_key(self) -> str:
        """What :func:`problem_key` gives for this entry."""
        return problem_key(self.operator, self.problem)

    def key(self) -> str:
        """File name without ending: what identifies the entry in its environment."""
        return entry_key(self.operator, self.problem, self.policy)

    def age(self) -> tuple[str, str]:
        """Sorts entries of one problem, the newest last; equal dates by key, the same anywhere."""
        return str(self.recorded.get("created", "")), self.key()

    def speedup(self) -> float | None:
        """Time of the default over that of the winner; None where the default did not run."""
        if self.default.timing is None or self.best.timing is None:
            return None
        return self.default.timing.p50 / self.best.timing.p50

    def to_json(self) -> dict[str, Any]:
        """The entry as a JSON value, ``schema_version`` first."""
        return {
            "schema_version": SCHEMA_VERSION,
            "operator": self.operator,
            "problem": dict(self.problem),
            "sources": dict(self.sources),
            "space_hash": self.space_hash,
            "policy": self.policy,
            "environment": dict(self.environment),
            "default": trial_to_json(self.default),
            "best": trial_to_json(self.best),
            "tied": list(self.tied),
            "trials": [trial_to_json(trial) for trial in self.trials],
            "recorded": dict(self.recorded),
        }

    @classmethod
    def from_json(cls, value: Any) -> Entry:
        """Rebuild an entry.

        Raises:
            InvalidEntryError: the value is not an entry of this schema.
        """
        try:
            _require_schema(value)
            problem = value["problem"]
            if not all(isinstance(v, (str, int, bool)) for v in problem.values()):
                raise InvalidEntryError("problem fields must be strings, integers or booleans")
            sources = dict(value["sources"])
            if not all(isinstance(v, str) for v in sources.values()):
                raise InvalidEntryError("sources must be hashes by the names of algorithms")
            trials = tuple(trial_from_json(trial) for trial in value["trials"])
            tied = tuple(int(index) for index in value["tied"])
            if any(not 0 <= index < len(trials) for index in tied):
                raise InvalidEntryError("tied must hold positions of trials")
            return cls(
                operator=str(value["operator"]),
                problem=dict(problem),
                sources=sources,
                policy=str(value["policy"]),
                environment=dict(value["environment"]),
                default=trial_from_json(value["default"]),
                best=trial_from_json(value["best"]),
                tied=tied,
                trials=trials,
                recorded=dict(value["recorded"]),
                space_hash=str(value.get("space_hash", "")),
            )
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            raise _invalid(error) from None


def problem_key(operator: str, fields: Mapping[str, Field]) -> str:
    """Hash of what a lookup knows: with it begin the names of all entries that are exact."""
    return digest({"schema": SCHEMA_VERSION, "operator": operator, "problem": dict(fields)})


def entry_key(operator: str, fields: Mapping[str, Field], policy: str) -> str:
    """Name of an entry: the problem's key, then a hash of how it was timed.

    Neither sources nor space are part of it: when they change, the entry is replaced by one that
    keeps what still holds.

    Example:
        >>> key = entry_key("conv2d.forward", {"batch": 8}, "graph-cold")
        >>> key.startswith(problem_key("conv2d.forward", {"batch": 8}) + "-")
        True
    """
    return f"{problem_key(operator, fields)}-{digest(policy)[:8]}"


def read_entry(path: Path) -> Entry | None:
    """Read an entry; a bad file is a miss and one warning."""
    try:
        return Entry.from_json(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        warn_once(f"tuned entry {path.name} cannot be read and is ignored: {error}")
        return None


@dataclass(frozen=True)
class Bundle:
    """Entries of one environment in one file: what is packaged, exported and imported."""

    environment: Mapping[str, Any]
    entries: tuple[Entry, ...]

    def to_text(self) -> str:
        """JSON with one entry per line, so that a change of one is a change of one line."""
        head = {"schema_version": SCHEMA_VERSION, "environment": dict(self.environment)}
        lines = [json.dumps(_packed(entry), separators=(",", ":")) for entry in self.entries]
        body = ",\n".join(lines)
        return f'{json.dumps(head, indent=1)[:-2]},\n "entries": [\n{body}\n]}}\n'

    @classmethod
    def from_json(cls, value: Any) -> Bundle:
        """Rebuild a bundle.

        Raises:
            InvalidEntryError: the value is not a bundle of this schema.
        """
        try:
            _require_schema(value)
            environment = dict(value["environment"])
            entries = tuple(_unpacked(row, environment) for row in value["entries"])
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            raise _invalid(error) from None
        return cls(environment, entries)


def load_bundle(path: Path) -> Bundle:
    """Read a bundle.

    Raises:
        OSError: the file cannot be read.
        InvalidEntryError: it is not a bundle of this schema.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidEntryError(str(error)) from None
    return Bundle.from_json(value)


def read_bundle(path: Path) -> Bundle | None:
    """Read a bundle; a bad file is a miss and one warning."""
    try:
        return load_bundle(path)
    except FileNotFoundError:
        return None
    except (OSError, InvalidEntryError) as error:
        warn_once(f"tuned bundle {path.name} cannot be read and is ignored: {error}")
        return None


def _packed(entry: Entry) -> dict[str, Any]:
    """An entry of a bundle: trials once, the environment left to the bundle."""
    value = entry.to_json()
    for name in ("schema_version", "environment"):
        del value[name]
    trials = list(entry.trials)
    for name in ("default", "best"):
        trial = getattr(entry, name)
        if trial not in trials:
            trials.append(trial)
        value[name] = trials.index(trial)
    value["trials"] = [trial_to_json(trial) for trial in trials]
    return value


def _unpacked(row: Any, environment: Mapping[str, Any]) -> Entry:
    trials = row["trials"]
    named = {name: trials[int(row[name])] for name in ("default", "best")}
    return Entry.from_json(
        {**row, **named, "schema_version": SCHEMA_VERSION, "environment": environment}
    )


def _require_schema(value: Any) -> None:
    if value["schema_version"] != SCHEMA_VERSION:
        raise InvalidEntryError(f"schema_version {value['schema_version']!r}")


def _invalid(error: Exception) -> InvalidEntryError:
    if isinstance(error, InvalidEntryError):
        return error
    return InvalidEntryError(f"{type(error).__name__}: {error}")


_RESOURCES = ("registers", "spill_bytes", "shared_bytes")


def trial_to_json(trial: Trial) -> dict[str, Any]:
    """A trial as a JSON value; what is not known is left out."""
    value: dict[str, Any] = {
        "algorithm": trial.algorithm,
        "config": dict(trial.config),
        "status": str(trial.status),
    }
    if trial.reason:
        value["reason"] = trial.reason
    if trial.timing is not None:
        timing = trial.timing
        value["p50_us"], value["p20_us"], value["p80_us"] = timing.p50, timing.p20, timing.p80
        value["count"] = timing.count
    if trial.max_error is not None:
        value["max_error"] = trial.max_error
    if trial.resources is not None:
        known = {name: getattr(trial.resources, name) for name in _RESOURCES}
        value["resources"] = {name: amount for name, amount in known.items() if amount is not None}
    if trial.compile_s is not None:
        value["compile_s"] = trial.compile_s
    if trial.plan:
        value["plan"] = trial.plan
    return value


def trial_from_json(value: Any) -> Trial:
    """Rebuild a trial; what raises here is no trial."""
    timing = None
    if "p50_us" in value:
        p50, p20, p80 = (float(value[name]) for name in ("p50_us", "p20_us", "p80_us"))
        if not all(math.isfinite(time) and time > 0 for time in (p50, p20, p80)):
            raise InvalidEntryError("times must be positive numbers")
        timing = Timing(p50, p20, p80, int(value["count"]))
    config = dict(value["config"])
    if any(type(v) is not int for v in config.values()):
        raise InvalidEntryError("config values must be integers")
    resources = None
    if "resources" in value:
        amounts = {name: value["resources"].get(name) for name in _RESOURCES}
        if not all(amount is None or type(amount) is int for amount in amounts.values()):
            raise InvalidEntryError("resources must be integers")
        resources = Resources(**amounts)
    error, seconds = value.get("max_error"), value.get("compile_s")
    return Trial(
        str(value["algorithm"]),
        config,
        str(value["status"]),
        str(value.get("reason", "")),
        timing,
        None if error is None else float(error),
        resources,
        None if seconds is None else float(seconds),
        str(value.get("plan", "")),
    )
