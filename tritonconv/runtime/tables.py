"""Tuned tables: what a call looks up, and in which order.

Read order of a lookup: exact entry, bucketed entry, nearest tuned problem (log distance over the
integer fields, strings exact), the same three among entries of the same architecture but another
board or other versions (``family``), then the operator's default. Entries are looked for in the
user's table, in shared ones, and in those packaged with the library. The tuner
(``tritonconv.autotune``) writes entries; this module only reads them.
"""

from __future__ import annotations

import atexit
import functools
import sys
from collections.abc import Iterable
from dataclasses import replace
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
    digest,
    entry_key,
    problem_key,
    read_entry,
)
from .environment import Environment, environment
from .errors import TritonConvError
from .lookup import (
    TUNED_TIERS,
    Choice,
    Found,
    Tier,
    TunedTable,
    bucket,
    default_choice,
    newest,
)
from .operators import Operator, Problem, operator_names
from .operators import get_operator as _get_operator
from .recording import RECORDINGS, advance, epoch, is_recording, note, recording
from .settings import settings
from .sources import BundleSource, DirectorySource, Located, Source, entry_path


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


def fingerprint(
    operators: Iterable[str | Operator] | None = None, device: DeviceFacts | None = None
) -> str:
    """One hash over what lookups would answer: equal on all ranks if and only if their tables are.

    It covers the device, versions, kernel sources and the winner of every tuned problem; not where
    an entry was found, nor its timings.

    Args:
        operators: operators, or names of registered ones; all of these when None.
        device: whose table; the current GPU's when None.

    Example:
        >>> fingerprint(["conv2d.forward"]) == fingerprint(["conv2d.forward"])
        True
    """
    table = tuned_table(device_facts() if device is None else device)
    asked = operator_names() if operators is None else operators
    known = [op if isinstance(op, Operator) else _get_operator(op) for op in asked]
    known.sort(key=lambda operator: (operator.name, operator.source_hash()))
    answers = [] if settings.autotune == "off" else [table.answers(operator) for operator in known]
    names = [operator.name for operator in known]
    return digest([table.environment.as_dict(), names, answers])


def from_tuner(module: str) -> Any:
    """A module of the tuner: the one lazy way from the kernels to it.

    Taken only where tuning is switched on, or an explanation is asked for.
    """
    return import_module(f"tritonconv.autotune.{module}")


_Call = tuple[Operator, Problem, DeviceFacts]
_MAX_SEEN = 4096
_seen: dict[tuple[int, int, int], tuple[Choice, _Call]] = {}
"""Earlier choices by identity: hashing a problem costs more than all the rest of a call's lookup.

An item keeps its objects alive, so that no other object can take their identity.
"""
_known: dict[_Call, Choice] = {}
"""Earlier choices by value, for a problem that is described anew at every call."""


def invalidate(operator: str | None = None) -> None:
    """Read tuned entries again at the next lookup, and make dispatch look up again.

    Args:
        operator: the operator whose entries have changed; all of them when None.
    """
    for table in _LIVE:
        table.forget(operator)
    _settings_changed()


def _settings_changed() -> None:
    global _known, _seen
    _known, _seen = {}, {}  # a lookup still under way in another thread fills the old ones
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

    The same three objects again cost one dictionary lookup. A choice that is not ``final`` must
    not be kept: tuning had to wait.

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
    known, seen = _known, _seen
    call = (operator, problem, device)
    earlier = known.get(call)
    if earlier is not None:
        _remember(seen, (id(operator), id(problem), id(device)), (earlier, call))
        return earlier
    table = tuned_table(device)
    choice = table.lookup(operator, problem)
    final = True
    if settings.autotune == "tune" and choice.tier is not Tier.EXACT:
        final = _may_measure()
        if final:
            from_tuner("tune").tune_on_the_spot(operator, problem, device)
            known, seen = _known, _seen  # new ones, if there is a new entry
            choice = table.lookup(operator, problem)
    if choice.tier not in TUNED_TIERS:
        if settings.require_tuned:
            raise NotTunedError(describe_miss(table.environment, table.sources, operator, problem))
        if settings.autotune != "off":
            missed.record(table.environment, operator, problem)
    if final:
        _remember(known, call, choice)
        _remember(seen, (id(operator), id(problem), id(device)), (choice, call))
        return choice
    return replace(choice, final=False)


_replaced: dict[tuple[Problem, Choice], Choice] = {}


def note_replaced(problem: Problem, choice: Choice, by: Choice) -> None:
    """Remember that a choice could not run here, and what ran in its place."""
    _remember(_replaced, (problem, choice), by)


def served_by(problem: Problem, choice: Choice) -> Choice:
    """What runs where this is chosen: the choice, unless it was found not to fit."""
    return _replaced.get((problem, choice), choice)


def _remember(memory: dict[Any, Any], key: Any, value: Any) -> None:
    if len(memory) >= _MAX_SEEN:
        memory.clear()
    memory[key] = value


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
    "note_replaced",
    "packaged_directory",
    "problem_key",
    "read_entry",
    "recording",
    "served_by",
    "tuned_table",
    "user_directory",
]
