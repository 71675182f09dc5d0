"""Write tuned entries: one JSON file each, replaced atomically, merged under a lock.

A reader sees the old file or the new one, whatever happens to the writer. Writers of the same
operator take turns through a lock on a separate file, which the system releases when a writer
dies, so that two processes that tune the same problem keep each other's timings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tritonconv.runtime.entries import SCHEMA_VERSION, Entry, Trial, entry_key
from tritonconv.runtime.environment import Environment
from tritonconv.runtime.files import locked, make_folder, replace_text
from tritonconv.runtime.freshness import current_sources, is_stale
from tritonconv.runtime.operators import Field
from tritonconv.runtime.sources import ENVIRONMENT_FILE, entry_path, read_located
from tritonconv.runtime.tables import user_directory

from .choose import choose
from .search import Status
from .space import CandidateKey, candidate_key


def trial_key(trial: Trial) -> CandidateKey:
    """Identity of a stored trial's candidate."""
    return candidate_key(trial.algorithm, trial.config)


def elect(entry: Entry) -> Entry | None:
    """Set ``default``, ``best`` and ``tied`` of an entry from its trials, the default first.

    Returns:
        None when no trial may win.
    """
    may_win = [trial.timing if trial.status == Status.OK else None for trial in entry.trials]
    chosen = choose(may_win)
    if chosen is None:
        return None
    return replace(
        entry, default=entry.trials[0], best=entry.trials[chosen.winner], tied=chosen.tied
    )


def merge(new: Entry, old: Entry | None, current: Mapping[str, str] | None = None) -> Entry:
    """Add to ``new`` the trials that only ``old`` has and that still hold, and choose again.

    Entries of another problem or policy are not merged. The trials of one algorithm are all of one
    source: that of ``new``, unless only that of ``old`` is current. What only ``old`` has cannot
    win unless both searched the same space: ``new`` did not run it, and its time is of another day.

    Args:
        new, old: the entries.
        current: today's sources, where ``new`` need not have them.
    """
    if old is None or old.key() != new.key():
        return new
    today = current or {}
    older = {
        name: source
        for name, source in old.sources.items()
        if new.sources.get(name) not in (source, today.get(name)) and today.get(name) == source
    }
    sources = {**new.sources, **older}
    kept = [trial for trial in new.trials if trial.algorithm not in older]
    known = {trial_key(trial) for trial in kept}
    same_space = bool(new.space_hash) and new.space_hash == old.space_hash
    for trial in old.trials:
        source = old.sources.get(trial.algorithm)
        if trial_key(trial) not in known and source == sources.get(trial.algorithm, ""):
            demoted = trial.status == Status.OK and not same_space
            kept.append(replace(trial, status=Status.TIMED) if demoted else trial)
    # With today's source of an algorithm comes the default that it has today.
    keys = {trial_key(trial) for trial in kept}
    defaults = [trial_key(entry.default) for entry in (new, old)]
    first = next((key for key in defaults if key in keys), None)
    if first is None:
        return new  # without its default it would say nothing about what tuning is worth
    kept.sort(key=lambda trial: trial_key(trial) != first)
    recorded = dict(new.recorded)
    if older:
        # What was finished of ``new`` are the algorithms that it has lost.
        recorded.pop("completed", None)
        spaces = recorded.get("spaces", {})
        recorded["spaces"] = {name: spaces[name] for name in spaces if name not in older}
    merged = elect(replace(new, trials=tuple(kept), sources=sources, recorded=recorded))
    return merged if merged is not None else new


def _joined(new: Entry, old: Entry) -> Entry:
    """``new`` with the trials that only ``old`` has, of algorithms whose source is the same."""
    known = {trial_key(trial) for trial in new.trials}
    same = {name for name, source in old.sources.items() if new.sources.get(name) == source}
    others = [t for t in old.trials if t.algorithm in same and trial_key(t) not in known]
    return replace(new, trials=(*new.trials, *others))


@dataclass(frozen=True)
class Stored:
    """An entry and the file that holds it."""

    entry: Entry
    path: Path


class Store:
    """A writable directory of tuned entries."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = user_directory() if root is None else root

    def path(self, environment: Environment, operator: str, key: str) -> Path:
        """Where an entry lives."""
        return entry_path(self.root, environment, operator, key)

    def load(
        self,
        environment: Environment,
        operator: str,
        problem: Mapping[str, Field],
        policy: str,
        apart_from: Collection[str] = (),
    ) -> Entry | None:
        """The entry of a problem, of whatever sources and space.

        Args:
            environment: where the timings were taken.
            operator, problem, policy: what must be equal.
            apart_from: fields of the problem in which another entry may differ, where there is
                none of the very problem; the newest is taken.

        Returns:
            None when there is none or it cannot be read. ``sources`` and ``space_hash`` tell which
            of its trials hold, and whether it is of the very same space.
        """
        path = self.path(environment, operator, entry_key(operator, problem, policy))
        entry = read_located(path)
        if entry is not None or not apart_from:
            return entry

        def rest(fields: Mapping[str, Field]) -> dict[str, Field]:
            return {name: fields[name] for name in fields if name not in apart_from}

        others = [stored.entry for stored in self.entries(environment, operator)]
        alike = [e for e in others if e.policy == policy and rest(e.problem) == rest(problem)]
        return max(alike, key=Entry.age, default=None)

    def save(self, environment: Environment, entry: Entry, *, replace_old: bool = False) -> Stored:
        """Write an entry of today's sources, keeping what only the old one has and still holds.

        Args:
            environment: where the timings were taken.
            entry: a complete entry.
            replace_old: drop the old entry instead of merging with it.
        """
        path = self._prepare(environment, entry)
        with locked(path.parent):
            merged = entry if replace_old else merge(entry, read_located(path))
            self._write(path, merged)
        return Stored(merged, path)

    def adopt(self, environment: Environment, entry: Entry) -> Stored | None:
        """Write an entry that was measured elsewhere, unless the present one is better.

        One that serves is better than a stale one, whatever their times; else the faster is.

        Returns:
            None when the present entry of the same problem and policy stays.
        """
        path = self._prepare(environment, entry)
        with locked(path.parent):
            present = read_located(path)
            if present is not None and standing(present) <= standing(entry):
                return None
            merged = merge(entry, present, current_sources(entry.operator))
            self._write(path, merged)
        return Stored(merged, path)

    def rewrite(self, path: Path, old: Entry, new: Entry) -> bool:
        """Put an entry into the place of one that was read, unless another process changed it."""
        with locked(path.parent):
            if read_located(path) != old:
                return False
            self._write(path, new)
        return True

    def withdraw(
        self, environment: Environment, entry: Entry, is_wrong: Callable[[Trial], bool]
    ) -> None:
        """Delete the stored entry of the same key if its winner is wrong."""
        path = self._prepare(environment, entry)
        with locked(path.parent):
            stored = read_located(path)
            if stored is not None and is_wrong(stored.best):
                path.unlink(missing_ok=True)

    def _partial(self, environment: Environment, entry: Entry) -> Path:
        path = self.path(environment, entry.operator, entry.key())
        return path.parent / "partial" / path.name

    def save_partial(self, environment: Environment, entry: Entry) -> None:
        """Keep trials that have no winner yet, where no lookup finds them.

        Those that another process has kept meanwhile stay, where they are of the same source.
        """
        path = self._partial(environment, entry)
        self._prepare(environment, entry)
        make_folder(path.parent)
        with locked(path.parent):
            kept = self.load_partial(environment, entry)
            self._write(path, entry if kept is None else _joined(entry, kept))

    def load_partial(self, environment: Environment, entry: Entry) -> Entry | None:
        """What :meth:`save_partial` kept for an entry of the same key."""
        try:
            return Entry.from_json(json.loads(self._partial(environment, entry).read_text()))
        except (OSError, ValueError):
            return None

    def drop_partial(self, environment: Environment, entry: Entry) -> None:
        """Forget them; the entry itself has them now."""
        self._partial(environment, entry).unlink(missing_ok=True)

    def _prepare(self, environment: Environment, entry: Entry) -> Path:
        """Make the folder of an entry and describe its environment there."""
        path = self.path(environment, entry.operator, entry.key())
        make_folder(path.parent)
        described = path.parent.parent / ENVIRONMENT_FILE
        if not described.exists():
            value = {"schema_version": SCHEMA_VERSION, **environment.as_dict()}
            replace_text(described, json.dumps(value, indent=1) + "\n")
        return path

    @staticmethod
    def _write(path: Path, entry: Entry) -> None:
        replace_text(path, json.dumps(entry.to_json(), indent=1) + "\n")

    def entries(
        self, environment: Environment | None = None, operator: str | None = None
    ) -> Iterator[Stored]:
        """Readable entries, of every environment and operator unless named, in a fixed order."""
        env = "*" if environment is None else environment.hash
        pattern = f"v{SCHEMA_VERSION}/{env}/{operator or '*'}/*.json"
        for path in sorted(self.root.glob(pattern)):
            entry = read_located(path)
            if entry is not None:
                yield Stored(entry, path)


def standing(entry: Entry) -> tuple[bool, float]:
    """Sorts entries of one problem by what they are worth: stale ones last, then by time."""
    return is_stale(entry), best_us(entry)


def best_us(entry: Entry) -> float:
    """Median of an entry's winner, microseconds; infinite when it has no timing."""
    return float("inf") if entry.best.timing is None else entry.best.timing.p50
