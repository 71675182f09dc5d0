"""Bundles of tuned entries: make one from a table, take one in, merge several.

What is packaged with the library lies in ``autotune/tuned/<device>.json``; the format is read by
``tritonconv.runtime.entries``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tritonconv.runtime.entries import (
    Bundle,
    Entry,
    InvalidEntryError,
    canonical,
    digest,
    load_bundle,
)
from tritonconv.runtime.environment import Environment
from tritonconv.runtime.errors import bad_value
from tritonconv.runtime.files import make_folder, replace_text
from tritonconv.runtime.freshness import changes, is_stale

from .store import Store, standing

Key = tuple[str, str]
"""Operator and problem."""


def compact(entry: Entry) -> Entry:
    """An entry with only the trials that explain the choice: the default, the best and the tied.

    What failed and what lost is left out; a tuner that goes on from here times it again.
    """
    kept: list[int] = []
    for index, trial in enumerate(entry.trials):
        if index in entry.tied or trial in (entry.default, entry.best):
            kept.append(index)
    position = {old: new for new, old in enumerate(kept)}
    recorded = {name: entry.recorded[name] for name in ("created",) if name in entry.recorded}
    return replace(
        entry,
        trials=tuple(replace(entry.trials[index], reason="") for index in kept),
        default=replace(entry.default, reason=""),
        best=replace(entry.best, reason=""),
        tied=tuple(position[index] for index in entry.tied),
        recorded=recorded,
    )


def key_of(entry: Entry) -> Key:
    """What two tables are compared by."""
    return entry.operator, canonical(entry.problem)


def stale(bundle: Bundle) -> tuple[Entry, ...]:
    """Entries whose winner's source is no longer that of today: lookups pass them over."""
    return tuple(filter(is_stale, bundle.entries))


def outdated(bundle: Bundle) -> tuple[Entry, ...]:
    """Entries that serve, but to which some other algorithm has changed or come since."""
    return tuple(entry for entry in bundle.entries if changes(entry).outdated)


def export(
    store: Store,
    environment: Environment,
    *,
    operators: Iterable[str] | None = None,
    min_speedup: float | None = None,
    keep_stale: bool = False,
) -> Bundle:
    """The entries of one environment that lookups take, made compact, in a fixed order.

    Args:
        store: where they lie.
        environment: which of them.
        operators: names; all when None.
        min_speedup: leave out problems whose winner is not that many times faster than the
            default. What is left out is served by its nearest neighbour, not by the default.
        keep_stale: also entries whose winner has changed since.
    """
    wanted = None if operators is None else set(operators)
    chosen: dict[Key, Entry] = {}
    for stored in store.entries(environment):
        entry = stored.entry
        if wanted is not None and entry.operator not in wanted:
            continue
        if not keep_stale and is_stale(entry):
            continue
        other = chosen.get(key_of(entry))
        if other is None or _served(other) < _served(entry):
            chosen[key_of(entry)] = entry
    kept = [entry for entry in chosen.values() if _fast_enough(entry, min_speedup)]
    return _bundle(environment.as_dict(), map(compact, kept))


def _fast_enough(entry: Entry, least: float | None) -> bool:
    speedup = entry.speedup()
    return least is None or speedup is None or speedup >= least


def _bundle(environment: object, entries: Iterable[Entry]) -> Bundle:
    assert isinstance(environment, dict)
    ordered = sorted(entries, key=lambda e: (*key_of(e), e.policy))
    return Bundle(environment, tuple(ordered))


def write(bundle: Bundle, path: Path) -> None:
    """Write a bundle, replacing the file atomically."""
    if not path.parent.exists():
        make_folder(path.parent)
    replace_text(path, bundle.to_text())


def load_bundle_file(path: Path) -> Bundle:
    """The bundle of a file.

    Raises:
        ArgumentValueError: the file holds none.
    """
    try:
        bundle = load_bundle(path)
        Environment.from_dict(bundle.environment)
    except (OSError, InvalidEntryError) as error:
        raise bad_value("bundle", f"a bundle of tuned entries in {path}", error) from None
    return bundle


def load_tables(path: Path) -> list[Bundle]:
    """What a path holds: a bundle file, or a table directory with a bundle per environment.

    Raises:
        ArgumentValueError: there is neither.
    """
    if path.is_file():
        return [load_bundle_file(path)]
    # A cache directory holds its table in a folder.
    root = path / "tuned" if (path / "tuned").is_dir() else path
    found: dict[str, list[Entry]] = {}
    environments = {}
    for stored in Store(root).entries():
        name = digest(dict(stored.entry.environment))
        environments[name] = dict(stored.entry.environment)
        found.setdefault(name, []).append(stored.entry)
    if not found:
        raise bad_value("table", "a bundle file, or a directory of tuned entries", path)
    return [_bundle(environments[name], entries) for name, entries in sorted(found.items())]


@dataclass(frozen=True)
class Imported:
    """What became of a bundle's entries: written, or left because the present one is as fast."""

    written: tuple[Entry, ...]
    kept: tuple[Entry, ...]


def take_in(bundle: Bundle, store: Store) -> Imported:
    """Write a bundle's entries into a table, where they are better than what is there.

    Raises:
        InvalidEntryError: the bundle names no environment.
    """
    environment = Environment.from_dict(bundle.environment)
    written: list[Entry] = []
    kept: list[Entry] = []
    for entry in bundle.entries:
        (kept if store.adopt(environment, entry) is None else written).append(entry)
    return Imported(tuple(written), tuple(kept))


def merge(bundles: Iterable[Bundle]) -> Bundle:
    """One bundle of several of the same environment: of each problem the lower median.

    An entry that serves goes before a stale one, whatever their times and dates.

    Raises:
        ArgumentValueError: there are no bundles, or they are of several environments.
    """
    found = list(bundles)
    environments = {digest(dict(bundle.environment)): bundle.environment for bundle in found}
    if len(environments) != 1:
        names = [describe_environment(value) for value in environments.values()]
        raise bad_value("bundles", "tables of one environment", " and ".join(names) or "none")
    chosen: dict[tuple[str, ...], Entry] = {}
    for bundle in found:
        for entry in bundle.entries:
            identity = (*key_of(entry), entry.policy)
            other = chosen.get(identity)
            if other is None or _order(entry) < _order(other):
                chosen[identity] = entry
    (environment,) = environments.values()
    return _bundle(dict(environment), map(compact, chosen.values()))


def _order(entry: Entry) -> tuple[tuple[bool, float], str]:
    # A fixed order of equals, whatever that of the files.
    return standing(entry), digest(entry.to_json())


def _served(entry: Entry) -> tuple[bool, tuple[str, str]]:
    """Sorts entries of one problem, the one that lookups take last."""
    return not is_stale(entry), entry.age()


def describe_environment(environment: object) -> str:
    """An environment in a few words."""
    try:
        assert isinstance(environment, dict)
        env = Environment.from_dict(environment)
    except (AssertionError, InvalidEntryError):
        return "an unknown environment"
    return f"{env.device.name} (triton {env.triton}, torch {env.torch}, ptxas {env.ptxas or '?'})"


def file_name(environment: Environment) -> str:
    """Name of a device's packaged bundle.

    Example:
        >>> from tritonconv.runtime.device import nominal_device
        >>> file_name(Environment(nominal_device("sm_90"), "3.6.0", "2.11"))
        'nvidia_h100_80gb_hbm3.json'
    """
    return re.sub(r"[^a-z0-9]+", "_", environment.device.name.lower()).strip("_") + ".json"


def winners(
    bundles: Iterable[Bundle], accept: Callable[[Entry], bool] = lambda entry: True
) -> dict[tuple[str, str, str, str], Entry]:
    """The entry of every environment, operator, problem and policy that lookups would take."""
    found: dict[tuple[str, str, str, str], Entry] = {}
    for bundle in bundles:
        env = digest(dict(bundle.environment))
        for entry in bundle.entries:
            if not accept(entry):
                continue
            key = (env, *key_of(entry), entry.policy)
            if key not in found or _served(found[key]) < _served(entry):
                found[key] = entry
    return found


__all__ = [
    "Bundle",
    "Imported",
    "compact",
    "describe_environment",
    "export",
    "file_name",
    "load_bundle_file",
    "load_tables",
    "merge",
    "outdated",
    "stale",
    "take_in",
    "winners",
    "write",
]
