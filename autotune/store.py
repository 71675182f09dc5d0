"""Write tuned entries: one JSON file each, replaced atomically, merged under a lock.

A reader sees the old file or the new one, whatever happens to the writer. Writers of the same
operator take turns through a lock on a separate file, which the system releases when a writer
dies, so that two processes that tune the same problem keep each other's timings.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tritonconv.runtime.entries import SCHEMA_VERSION, Entry, Trial, entry_key, problem_key
from tritonconv.runtime.environment import Environment
from tritonconv.runtime.files import locked, make_folder, replace_text
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


def merge(new: Entry, old: Entry | None) -> Entry:
    """Add to ``new`` the trials that only ``old`` has, and choose again.

    Entries of another problem, source, policy or space are not merged.
    """
    if old is None or old.key() != new.key():
        return new
    known = {trial_key(trial) for trial in new.trials}
    extra = tuple(trial for trial in old.trials if trial_key(trial) not in known)
    merged = elect(replace(new, trials=new.trials + extra))
    return merged if merged is not None else new


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
        source_hash: str,
        policy: str,
        space_hash: str = "",
    ) -> Entry | None:
        """The entry of a problem, or the newest of another space, whose trials are as good.

        Args:
            environment: where the timings were taken.
            operator, problem, source_hash, policy: what must be equal.
            space_hash: of the space that is to be searched.

        Returns:
            None when there is none or it cannot be read. ``space_hash`` of the entry tells whether
            it is of the very same space.
        """
        key = entry_key(operator, problem, source_hash, policy, space_hash)
        entry = read_located(self.path(environment, operator, key))
        if entry is not None:
            return entry
        found = self.siblings(environment, operator, problem, source_hash, policy)
        return found[0].entry if found else None

    def siblings(
        self,
        environment: Environment,
        operator: str,
        problem: Mapping[str, Field],
        source_hash: str,
        policy: str,
    ) -> list[Stored]:
        """Entries of a problem under a policy, of whatever space, the newest first."""
        folder = self.path(environment, operator, "-").parent
        key = problem_key(operator, problem, source_hash)
        read = ((path, read_located(path)) for path in folder.glob(f"{key}-*.json"))
        found = [Stored(e, path) for path, e in read if e is not None and e.policy == policy]
        return sorted(found, key=lambda stored: stored.entry.age(), reverse=True)

    def save(self, environment: Environment, entry: Entry, *, replace_old: bool = False) -> Stored:
        """Write an entry, keeping the timings of candidates that only the old one has.

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
        """Write an entry that was measured elsewhere, unless the present one is as fast.

        Returns:
            None when the present entry of the same problem and policy stays.
        """
        path = self._prepare(environment, entry)
        with locked(path.parent):
            identity = (entry.operator, entry.problem, entry.source_hash, entry.policy)
            present = self.siblings(environment, *identity)
            if present and best_us(present[0].entry) <= best_us(entry):
                return None
            if present:  # it must become the newest, which is the one that lookups take
                now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
                created = max(now, str(present[0].entry.recorded.get("created", "")))
                entry = replace(entry, recorded={**entry.recorded, "created": created})
            merged = merge(entry, read_located(path))
            self._write(path, merged)
        return Stored(merged, path)

    def _partial(self, environment: Environment, entry: Entry) -> Path:
        path = self.path(environment, entry.operator, entry.key())
        return path.parent / "partial" / path.name

    def save_partial(self, environment: Environment, entry: Entry) -> None:
        """Keep trials that have no winner yet, where no lookup finds them."""
        path = self._partial(environment, entry)
        self._prepare(environment, entry)
        make_folder(path.parent)
        self._write(path, entry)

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


def best_us(entry: Entry) -> float:
    """Median of an entry's winner, microseconds; infinite when it has no timing."""
    return float("inf") if entry.best.timing is None else entry.best.timing.p50
