"""Places where tuned entries are looked for: table directories and bundles.

Layout of a table directory::

    v2/<environment hash>/environment.json
    v2/<environment hash>/<operator>/<problem hash>-<policy hash>.json
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .entries import (
    SCHEMA_VERSION,
    Entry,
    InvalidEntryError,
    digest,
    read_bundle,
    read_entry,
    warn_once,
)
from .environment import Environment

ENVIRONMENT_FILE = "environment.json"
_SHARED = "shared "
"""The names of sources from ``settings.cache_path`` begin so."""


@dataclass(frozen=True)
class Located:
    """An entry, the name of the source that has it, and the file."""

    entry: Entry
    source: str
    path: Path


class Source(Protocol):
    """A place with entries of any environments."""

    name: str

    def environments(self) -> Iterator[Environment]:
        """Every environment that has entries here, in a fixed order."""
        ...

    def exact(self, env: Environment, operator: str, key: str) -> Iterator[Located]:
        """Entries whose problem key is ``key``: of all policies and sources."""
        ...

    def entries(self, env: Environment, operator: str) -> Iterator[Located]:
        """Readable entries of an operator in a fixed order."""
        ...

    def forget(self, operator: str | None = None) -> None:
        """Look at the files of an operator, or of all, again."""
        ...


def operator_folder(root: Path, env: Environment, operator: str) -> Path:
    """Where the entries of an operator live below a table directory."""
    return root / f"v{SCHEMA_VERSION}" / env.hash / operator


def entry_path(root: Path, env: Environment, operator: str, key: str) -> Path:
    """Where an entry lives below a table directory."""
    return operator_folder(root, env, operator) / f"{key}.json"


def read_located(path: Path) -> Entry | None:
    """Read an entry of a table directory; a misplaced one is a miss and one warning, too.

    A file that was copied to where its content does not belong would answer for another device or
    another problem.
    """
    entry = read_entry(path)
    if entry is None:
        return None
    place = (path.parent.parent.name, path.parent.name, path.stem)
    if (digest(dict(entry.environment)), entry.operator, entry.key()) != place:
        warn_once(f"tuned entry {path.name} is ignored: it belongs to another place")
        return None
    return entry


def _warn_of_missing(name: str, path: Path) -> None:
    """Remark on a shared table that is not there; the user's need not be."""
    if name.startswith(_SHARED) and not os.path.lexists(path):
        warn_once(f"{path} of TRITONCONV_CACHE_PATH does not exist")


class DirectorySource:
    """A table directory.

    What it remembers is written into the dictionary that was there before files were read:
    :meth:`forget` puts a new one in place, which a slower reader in another thread does not fill
    with what it saw before.
    """

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.root = root
        self._names: dict[tuple[str, str], dict[str, list[str]]] = {}

    def environments(self) -> Iterator[Environment]:
        """Every environment that has entries here, in a fixed order."""
        for path in sorted(self.root.glob(f"v{SCHEMA_VERSION}/*/{ENVIRONMENT_FILE}")):
            try:
                env = Environment.from_dict(json.loads(path.read_bytes()))
            except (OSError, ValueError) as error:
                warn_once(f"{path} cannot be read, its entries are ignored: {error}")
                continue
            if env.hash == path.parent.name:
                yield env

    def exact(self, env: Environment, operator: str, key: str) -> Iterator[Located]:
        """Entries of a problem; only their files are read."""
        folder = operator_folder(self.root, env, operator)
        for name in self._listing(env, operator).get(key, ()):
            entry = read_located(folder / name)
            if entry is not None:
                yield Located(entry, self.name, folder / name)

    def entries(self, env: Environment, operator: str) -> Iterator[Located]:
        """Readable entries of an operator in a fixed order."""
        for key in sorted(self._listing(env, operator)):
            yield from self.exact(env, operator, key)

    def forget(self, operator: str | None = None) -> None:
        """List the files of an operator, or of all, again."""
        names = list(self._names.items())
        self._names = {key: found for key, found in names if operator not in (None, key[1])}

    def _listing(self, env: Environment, operator: str) -> dict[str, list[str]]:
        """File names of an operator by problem key."""
        memory = self._names
        found = memory.get((env.hash, operator))
        if found is None:
            found = {}
            names: list[str] = []
            try:
                names = os.listdir(operator_folder(self.root, env, operator))
            except FileNotFoundError:
                _warn_of_missing(self.name, self.root)
            except OSError as error:
                reason = error.strerror or error  # one remark, not one for each folder
                warn_once(f"tuned entries in {self.root} cannot be read and are ignored: {reason}")
            for name in sorted(names):
                if name.endswith(".json") and not name.startswith("."):
                    found.setdefault(name.removesuffix(".json").partition("-")[0], []).append(name)
            memory[env.hash, operator] = found
        return found


_Loaded = tuple[list[Environment], dict[tuple[Environment, str], dict[str, list[Located]]]]
"""Environments of bundles, and their entries by operator and problem."""


class BundleSource:
    """Bundle files: one, or all of a folder."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self._loaded: list[_Loaded] = []

    def _load(self) -> _Loaded:
        memory = self._loaded
        if memory:
            return memory[0]
        environments: list[Environment] = []
        found: dict[tuple[Environment, str], dict[str, list[Located]]] = {}
        _warn_of_missing(self.name, self.path)
        for path in bundle_files(self.path):
            bundle = read_bundle(path)
            if bundle is None:
                continue
            try:
                env = Environment.from_dict(bundle.environment)
            except InvalidEntryError as error:
                warn_once(f"tuned bundle {path.name} is ignored: {error}")
                continue
            environments.append(env)
            for entry in bundle.entries:
                by_key = found.setdefault((env, entry.operator), {})
                located = Located(entry, self.name, path)
                by_key.setdefault(entry.problem_key(), []).append(located)
        memory.append((environments, found))
        return memory[0]

    def environments(self) -> Iterator[Environment]:
        """The environment of every bundle."""
        yield from self._load()[0]

    def exact(self, env: Environment, operator: str, key: str) -> Iterator[Located]:
        """Entries of a problem."""
        yield from self._load()[1].get((env, operator), {}).get(key, ())

    def entries(self, env: Environment, operator: str) -> Iterator[Located]:
        """Entries of an operator in a fixed order."""
        for _, found in sorted(self._load()[1].get((env, operator), {}).items()):
            yield from found

    def forget(self, operator: str | None = None) -> None:
        """Read the files again; nothing writes into them while an operator is tuned."""
        if operator is None:
            self._loaded = []


def bundle_files(path: Path) -> list[Path]:
    """The bundle files that a path stands for."""
    return sorted(path.glob("*.json")) if path.is_dir() else [path]
