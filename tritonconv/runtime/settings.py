"""The settings of the library: one table of Python name, environment variable and meaning.

A setting is read from its environment variable when first used, unless Python code has assigned it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import bad_value


def _flag(value: object) -> bool:
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    lowered = value.strip().lower() if isinstance(value, str) else None
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("", "0", "false", "no", "off"):
        return False
    raise ValueError("1 or 0")


def _choice(*allowed: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(" | ".join(allowed))
        return value

    return parse


def _path(value: object) -> Path:
    if not isinstance(value, (str, Path)):
        raise ValueError("a path")
    return Path(value).expanduser()


def _paths(value: object) -> tuple[Path, ...]:
    if isinstance(value, str):
        value = [part for part in value.split(os.pathsep) if part]
    elif isinstance(value, Path):
        value = [value]
    if not isinstance(value, Iterable) or isinstance(value, bytes):
        raise ValueError("a path or several")
    return tuple(map(_path, value))


def _name(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError("a name or None")
    return value or None


def _user_cache() -> Path:
    """Where the XDG base directory specification puts a program's cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tritonconv"


@dataclass(frozen=True)
class Setting:
    """One row of the settings table.

    Attributes:
        name, env: in Python and in the environment.
        meaning: one line of the documentation.
        default: the value where nothing is set.
        parse: the value that the text of a variable, or what Python code assigns, means; raises
            ValueError, saying what was expected.
    """

    name: str
    env: str
    meaning: str
    default: Any
    parse: Callable[[object], Any]


TABLE: tuple[Setting, ...] = (
    Setting(
        "backend",
        "TRITONCONV_BACKEND",
        "auto (Triton on GPUs and under TRITON_INTERPRET=1, PyTorch elsewhere), triton, torch",
        "auto",
        _choice("auto", "triton", "torch"),
    ),
    Setting(
        "autotune",
        "TRITONCONV_AUTOTUNE",
        "lookup (use tuned tables), tune (tune a problem when first met), off (defaults only)",
        "lookup",
        _choice("lookup", "tune", "off"),
    ),
    Setting(
        "cache_dir",
        "TRITONCONV_CACHE_DIR",
        "writable directory for generated modules and tuned entries",
        _user_cache(),
        _path,
    ),
    Setting(
        "cache_path",
        "TRITONCONV_CACHE_PATH",
        "further read-only directories of tuned entries, separated like PATH",
        (),
        _paths,
    ),
    Setting(
        "deterministic",
        "TRITONCONV_DETERMINISTIC",
        "never measure, whatever TRITONCONV_AUTOTUNE says; tuned tables and defaults only",
        False,
        _flag,
    ),
    Setting(
        "atomics",
        "TRITONCONV_ATOMICS",
        "let PyTorch's kernels sum in an order that differs from run to run where that is faster",
        False,
        _flag,
    ),
    Setting(
        "device_name",
        "TRITONCONV_DEVICE_NAME",
        "look tuned entries up under this device name instead of the GPU's own",
        None,
        _name,
    ),
    Setting(
        "require_tuned",
        "TRITONCONV_REQUIRE_TUNED",
        "raise where a call has no exact or bucketed entry, and say how the key differs",
        False,
        _flag,
    ),
    Setting(
        "report_misses",
        "TRITONCONV_REPORT_MISSES",
        "at exit, note which problems ran untuned and say on stderr how many",
        True,
        _flag,
    ),
    Setting(
        "fast_launch",
        "TRITONCONV_FAST_LAUNCH",
        "launch compiled kernels directly instead of through Triton's Python dispatcher",
        True,
        _flag,
    ),
)


class Settings:
    """Attribute access to :data:`TABLE`; assignments win over environment variables.

    Example:
        >>> import tritonconv as tc
        >>> tc.settings.autotune
        'lookup'
        >>> with tc.settings.override(autotune="off"):
        ...     tc.settings.autotune
        'off'
    """

    def __init__(self) -> None:
        self.__dict__["_rows"] = {row.name: row for row in TABLE}
        self.__dict__["_watchers"] = []

    def __getattr__(self, name: str) -> Any:
        # Reached only while the value is not in __dict__: later reads are plain attribute reads.
        row = self.__dict__["_rows"].get(name)
        if row is None:
            raise AttributeError(f"no setting {name!r}; there are {', '.join(self._rows)}")
        text = os.environ.get(row.env)
        value = row.default
        if text is not None:
            try:
                value = row.parse(text)
            except ValueError as error:
                raise bad_value(f"environment variable {row.env}", str(error), repr(text)) from None
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        row = self._rows.get(name)
        if row is None:
            raise AttributeError(f"no setting {name!r}; there are {', '.join(self._rows)}")
        try:
            self.__dict__[name] = row.parse(value)
        except ValueError as error:
            raise bad_value(f"settings.{name}", str(error), repr(value)) from None
        self._notify((name,))

    def watch(self, names: tuple[str, ...], callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever one of the named settings may have changed."""
        self._watchers.append((frozenset(names), callback))

    def _notify(self, names: Iterable[str]) -> None:
        for watched, callback in self._watchers:
            if not watched.isdisjoint(names):
                callback()

    def reset(self, *names: str) -> None:
        """Forget assigned and remembered values, so that the environment is read again."""
        names = names or tuple(self._rows)
        for name in names:
            self.__dict__.pop(name, None)
        self._notify(names)

    @contextmanager
    def override(self, **values: Any) -> Iterator[None]:
        """Assign settings inside a ``with`` block and restore them after it."""
        before = {name: getattr(self, name) for name in values}
        try:
            for name, value in values.items():
                setattr(self, name, value)
            yield
        finally:
            self.__dict__.update(before)
            self._notify(before)


settings = Settings()
