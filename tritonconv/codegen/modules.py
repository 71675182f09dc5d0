"""The per-user cache of generated modules.

A module is a file named by the sha256 of its content, so that tracebacks, debuggers and profilers
show real source. The directory must belong to the user and be writable by nobody else; a file is
read once, compared with its name, and exactly those bytes are executed. The cache directory around
it may be a group's: a member could put another directory in the place of the private one, which is
then refused, and whatever is in it, only bytes of the right hash are executed.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import linecache
import os
import stat
import sys
import tempfile
import threading
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from ..runtime.errors import TritonConvError
from ..runtime.files import make_folder
from ..runtime.settings import settings


class CacheSecurityError(TritonConvError, PermissionError):
    """The generated-module directory could be written by somebody else."""


def digest(text: str) -> str:
    """sha256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def directory() -> Path:
    """The directory of generated modules, made with mode 0700 when it is missing.

    Raises:
        CacheSecurityError: The directory or the cache directory it is in belongs to another user
            or can be written by others (the cache directory: by more than its group), or the
            directory is a symbolic link.
    """
    parent = Path(settings.cache_dir)
    target = parent / "generated"
    try:
        make_folder(parent)  # the user's umask says who may read the tuned entries in it
        target.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise CacheSecurityError(
            f"cannot make the directory of generated modules {target}: {error}. "
            "Point TRITONCONV_CACHE_DIR to a directory that you can write"
        ) from error
    _check_private(parent, follow=True, writable=stat.S_IWOTH)
    _check_private(target, follow=False)
    return target


def _check_private(
    path: Path, *, follow: bool, writable: int = stat.S_IWGRP | stat.S_IWOTH
) -> None:
    """Refuse a directory that is not the user's or has one of the bits ``writable``."""
    status = path.stat() if follow else path.lstat()
    problem = None
    if not stat.S_ISDIR(status.st_mode):
        problem = "it is a symbolic link or not a directory"
    elif hasattr(os, "getuid"):
        if status.st_uid != os.getuid():
            problem = f"it belongs to user {status.st_uid}, not to you ({os.getuid()})"
        elif status.st_mode & writable:
            problem = f"others can write to it (mode {stat.S_IMODE(status.st_mode):04o})"
    if problem:
        raise CacheSecurityError(
            f"{path} is refused as a directory of generated code: {problem}. "
            "Expected a directory of yours that others cannot write; chmod go-w it, or set another "
            "TRITONCONV_CACHE_DIR (a team's tuned entries can still be read through "
            "TRITONCONV_CACHE_PATH)"
        )


def write(source: str) -> Path:
    """Store a module and return its path; a file with other content under its name is replaced."""
    path = directory() / f"{digest(source)}.py"
    if _read(path) != source.encode():
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as stream:  # mkstemp: mode 0600
                stream.write(source.encode())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return path


def _read(path: Path) -> bytes | None:
    """The bytes of a regular file; ``None`` for anything else."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        handle = os.open(path, flags)
    except OSError:
        return None
    with os.fdopen(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return None
        return stream.read()


class _VerifiedLoader(importlib.machinery.SourceFileLoader):
    """Executes the bytes whose hash was checked: no second read, no ``.pyc`` file."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self._source = source

    def get_source(self, fullname: str) -> str:
        return self._source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._source, self.path, "exec", dont_inherit=True)


def load(path: Path) -> ModuleType:
    """Import a stored module after comparing its content with its name.

    Raises:
        CacheSecurityError: The file is missing, or its content is not what its name says.
    """
    content = _read(path)
    if content is None or hashlib.sha256(content).hexdigest() != path.stem:
        raise CacheSecurityError(f"{path}: the content does not have the hash of the file's name")
    source = content.decode()
    name = f"tritonconv._generated.m{path.stem[:24]}"
    loader = _VerifiedLoader(name, str(path), source)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # Triton and debuggers read source through linecache; without a time stamp the entry is not
    # compared with the file again.
    linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


_FUNCTIONS: dict[str, Any] = {}
_LOCK = threading.Lock()


def load_function(source: str, name: str, key: str) -> Any:
    """The ``@triton.jit`` function ``name`` of a generated module, one object for each ``key``."""
    with _LOCK:
        function = _FUNCTIONS.get(key)
        if function is None:
            function = _FUNCTIONS[key] = getattr(load(write(source)), name)
        return function
