"""Programs by key: how an operator's string argument finds its scalar function.

Operators of ``torch.library`` take tensors and strings, not functions. A program is registered
under the hash of its text; what the function captures travels as tensors, so equal programs are
one and no parameter is kept alive here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..runtime.errors import bad_value
from .ir import Argument, Output
from .program import Program

_PROGRAMS: dict[str, Program] = {}


def register_program(program: Program) -> str:
    """Make a program known under its key, arguments and results included, and return the key.

    The text of a function may be the same in float32 and float64.
    """
    roles = ".".join(a.role.value[0] for a in program.arguments)
    typed: list[Argument | Output] = [*program.arguments, *program.outputs]
    dtypes = "" if all(t.dtype is torch.float32 for t in typed) else _dtypes(typed)
    key = f"{program.key}.{roles}{dtypes}"
    _PROGRAMS.setdefault(key, program)
    return key


def _dtypes(typed: Iterable[Argument | Output]) -> str:
    """The dtypes of arguments and results, in short."""
    return "." + ".".join(str(t.dtype).removeprefix("torch.") for t in typed)


def find_program(key: str) -> Program | None:
    """The program of a key, or None where no such program is known."""
    return _PROGRAMS.get(key)


def program_of(key: str) -> Program:
    """The program of a key.

    Raises:
        ArgumentValueError: no program of that key was registered in this process.
    """
    program = _PROGRAMS.get(key)
    if program is None:
        raise bad_value("function", "the key of a scalar function traced in this process", key)
    return program
