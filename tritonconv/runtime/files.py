"""Files that several processes write: a lock, atomic replacement.

Who may read and write them is the user's choice: modes follow the umask (and default ACLs), which
the system applies. Python cannot read the umask without changing it for all threads.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: replacing stays atomic, merging is not serialised
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"
TEMPORARY_SUFFIX = ".tmp"


def make_folder(folder: Path) -> None:
    """Create a directory and its parents; their modes follow the umask."""
    missing = []
    step = folder
    while not step.exists():
        missing.append(step)
        step = step.parent
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was faster
            path.mkdir()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Take turns with other writers of a directory; the system frees the lock of a dead one.

    The lock is a file of its own, so that the files it protects can be replaced.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder / LOCK_NAME, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    try:
        # A file system without locks still gets atomic replacement.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part."""
    temporary = path.parent / f".{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
