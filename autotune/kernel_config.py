"""Configs of a user's kernel as the integers that are stored, and texts that identify values."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any

import torch
import triton

from tritonconv.runtime.errors import bad_value
from tritonconv.runtime.operators import Config
from tritonconv.runtime.tables import digest

from .kernel_source import code_hash, source_hash


def text_of(value: Any) -> str:
    """A text that identifies a value, in every process if there is such a text.

    Example:
        >>> text_of(0.5), text_of((1, None))
        ('0.5', '(1, None)')
    """
    if isinstance(value, torch.Tensor):
        return f"tensor {value.dtype} {tuple(value.shape)}"
    if hasattr(value, "fn") and not isinstance(value, type):
        return f"{value.__name__} {source_hash(value)}"
    if callable(value) and hasattr(value, "__code__"):
        return f"{value.__qualname__} {code_hash(value)}"
    return repr(value)


def is_lasting(text: str) -> bool:
    """Whether a text of :func:`text_of` means the same in the next process.

    Example:
        >>> is_lasting(text_of(64)), is_lasting(text_of(object()))
        (True, False)
    """
    return " at 0x" not in text


ABSENT = -1
"""Stands where a config says nothing of what another one of the list says."""


def stored_values(configs: Sequence[triton.Config]) -> list[dict[str, int]]:
    """Triton configs as the integers that are stored: all with the same names.

    What is no integer becomes a hash.

    Example:
        >>> configs = [triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128}, maxnreg=96)]
        >>> [values["maxnreg"] for values in stored_values(configs)]
        [-1, 96]
    """
    rows = []
    for config in configs:
        row = {name: _as_int(value) for name, value in config.all_kwargs().items()}
        if config.pre_hook is not None:
            row["pre_hook"] = _as_int(config.pre_hook)
        rows.append(row)
    absent = {name: ABSENT for row in rows for name in row}
    return [{**absent, **row} for row in rows]


def _as_int(value: Any) -> int:
    if isinstance(value, int):
        return int(value)
    return int(digest(text_of(value))[:12], 16)


@dataclass(frozen=True)
class KernelConfig(Config):
    """One config as stored; the names of a list of configs make a class of their own."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KernelConfig:
        """Rebuild a config from JSON.

        Example:
            >>> KernelConfig.from_dict({"BLOCK": 64, "num_warps": 4}).as_dict()
            {'BLOCK': 64, 'num_warps': 4}
        """
        if any(type(value) is not int for value in values.values()):
            raise bad_value("config", "integers", dict(values))
        return _config_class(tuple(values))(*values.values())

    def __reduce__(self) -> tuple[Any, ...]:
        return KernelConfig.from_dict, (self.as_dict(),)


@functools.cache
def _config_class(names: tuple[str, ...]) -> type[KernelConfig]:
    fields = [(name, int) for name in names]
    return make_dataclass("KernelConfig", fields, bases=(KernelConfig,), frozen=True)
