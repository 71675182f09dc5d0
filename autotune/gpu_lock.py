"""One measuring process per GPU: a file lock that ends with whoever holds it."""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
import time
import warnings
from pathlib import Path


class GpuLock:
    """An exclusive lock on one GPU among the processes of this user; nested in one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._depth = 0
        self._file: int | None = None
        self._guard = threading.RLock()

    def acquire(self, patience: float = 5.0) -> None:
        """Wait for the lock; after some seconds of it, say so once."""
        with self._guard:
            if not self._depth:
                self._file = self._locked(time.monotonic() + patience)
            self._depth += 1

    def release(self) -> None:
        """Give the lock up as often as it was acquired."""
        with self._guard:
            self._depth -= 1
            if not self._depth and self._file is not None:
                os.close(self._file)
                self._file = None

    def _locked(self, patient_until: float) -> int:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        told = False
        try:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return file
                except BlockingIOError:
                    if not told and time.monotonic() > patient_until:
                        told = True
                        warnings.warn(
                            f"waiting for another process that measures on this GPU ({self.path})",
                            stacklevel=2,
                        )
                    time.sleep(0.05)
        except BaseException:
            os.close(file)
            raise


_locks: dict[Path, GpuLock] = {}


def gpu_lock(board: str) -> GpuLock:
    """The lock of a board, one object in this process: two labs of it do not wait for each other.

    Args:
        board: what identifies it among all boards of the machine.
    """
    # Not below the table directory: two tunes with different ones still share the GPU.
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    path = Path(base) / f"tritonconv-{os.getuid()}" / f"gpu-{board}.lock"
    return _locks.setdefault(path, GpuLock(path))


__all__ = ["GpuLock", "gpu_lock"]
