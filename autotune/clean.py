"""Find and remove files of a table that no lookup uses any more."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tritonconv.runtime.entries import SCHEMA_VERSION, Entry
from tritonconv.runtime.files import TEMPORARY_SUFFIX, locked
from tritonconv.runtime.freshness import is_stale
from tritonconv.runtime.sources import ENVIRONMENT_FILE, read_located

from .store import Store

_ABANDONED_S = 3600.0


class Why(StrEnum):
    """Why a file can go."""

    STALE = "stale"
    """The winner's kernels have changed since."""
    UNREADABLE = "unreadable"
    ABANDONED = "abandoned"
    """What a killed writer left behind."""
    OLD = "old"


@dataclass(frozen=True)
class Removable:
    """A file that can go."""

    path: Path
    why: Why
    entry: Entry | None = None


def find(
    store: Store,
    *,
    operators: frozenset[str] | None = None,
    older_than: datetime.timedelta | None = None,
    only_stale: bool = False,
) -> list[Removable]:
    """List what can go, in a fixed order.

    Args:
        store: the table; every environment in it.
        operators: only files of these; all when None.
        older_than: also entries that were made before, however good.
        only_stale: nothing but stale entries (and old ones, when asked for).
    """
    found: list[Removable] = []
    limit = None
    if older_than is not None:
        limit = (datetime.datetime.now(datetime.UTC) - older_than).isoformat()
    for folder in sorted(store.root.glob(f"v{SCHEMA_VERSION}/*/*")):
        if folder.is_dir() and (operators is None or folder.name in operators):
            found += _in_folder(folder, limit, only_stale)
    return found


def _in_folder(folder: Path, limit: str | None, only_stale: bool) -> Iterator[Removable]:
    for path in sorted(folder.iterdir()):
        if path.name.endswith(TEMPORARY_SUFFIX):
            if not only_stale and _age(path) > _ABANDONED_S:
                yield Removable(path, Why.ABANDONED)
            continue
        if path.suffix != ".json" or path.name == ENVIRONMENT_FILE:
            continue
        entry = read_located(path)
        if entry is None:
            if not only_stale:
                yield Removable(path, Why.UNREADABLE)
        elif is_stale(entry):
            yield Removable(path, Why.STALE, entry)
        elif limit is not None and str(entry.recorded.get("created", "")) < limit:
            yield Removable(path, Why.OLD, entry)


def _age(path: Path) -> float:
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime
    return 0.0


def remove(found: list[Removable]) -> list[Removable]:
    """Delete files, in turns with writers; what has changed since it was listed stays.

    Returns:
        What was deleted.
    """
    gone = []
    for row in found:
        with locked(row.path.parent):
            if row.why is not Why.ABANDONED and read_located(row.path) != row.entry:
                continue  # of an unreadable file the entry is None
            with contextlib.suppress(FileNotFoundError):
                row.path.unlink()
                gone.append(row)
    return gone
