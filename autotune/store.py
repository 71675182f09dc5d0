"""Write tuned entries: one JSON file each, replaced atomically, merged under a lock.

A reader sees the old file or the new one, whatever happens to the writer. Writers of the same
operator take turns through a lock on a separate file, which the system releases when a writer
dies, so that two processes that tune the same problem keep each other's timings.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tritonconv.runtime.operators import Field
from tritonconv.runtime.tables import (
    SCHEMA_VERSION,
    Entry,
    Environment,
    Trial,
    entry_path,
    problem_key,
    read_entry,
    user_directory,
)

from .choose import choose
from .search import Status
from .space import CandidateKey, candidate_key

try:
    import fcntl
except ImportError:  # not a POSIX system: replacing stays atomic, merging is not serialised
    fcntl = None  # type: ignore[assignment]


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

    Timings taken under another policy, and entries of another problem or source, are not merged.
    """
    if old is None or old.key() != new.key() or old.policy != new.policy:
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
    ) -> Entry | None:
        """The entry of a problem; None when there is none or it cannot be read."""
        return read_entry(
            self.path(environment, operator, problem_key(operator, problem, source_hash))
        )

    def save(self, environment: Environment, entry: Entry, *, replace_old: bool = False) -> Stored:
        """Write an entry, keeping the timings of candidates that only the old one has.

        Args:
            environment: where the timings were taken.
            entry: a complete entry.
            replace_old: drop the old entry instead of merging with it.
        """
        path = self.path(environment, entry.operator, entry.key())
        folder = path.parent
        _make_private(folder)
        self._describe(environment, folder.parent)
        with _lock(folder / ".lock"):
            merged = entry if replace_old else merge(entry, read_entry(path))
            _write_json(path, merged.to_json())
        return Stored(merged, path)

    def entries(
        self, environment: Environment | None = None, operator: str | None = None
    ) -> Iterator[Stored]:
        """Readable entries, of every environment and operator unless named, in a fixed order."""
        env = "*" if environment is None else environment.hash
        pattern = f"v{SCHEMA_VERSION}/{env}/{operator or '*'}/*.json"
        for path in sorted(self.root.glob(pattern)):
            entry = read_entry(path)
            if entry is not None:
                yield Stored(entry, path)

    def _describe(self, environment: Environment, folder: Path) -> None:
        path = folder / "environment.json"
        if not path.exists():
            _write_json(path, {"schema_version": SCHEMA_VERSION, **environment.as_dict()})


def _make_private(folder: Path) -> None:
    """Create a directory and its parents, readable by the user only."""
    missing = []
    step = folder
    while not step.exists():
        missing.append(step)
        step = step.parent
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was faster
            path.mkdir(mode=0o700)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        # A file system without locks still gets atomic replacement.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_json(path: Path, value: Any) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
