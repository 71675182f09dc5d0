"""Programs by key: how an operator's string argument finds its scalar function.

Operators of ``torch.library`` take tensors and strings, not functions. A program is registered
under the hash of its text; what the function captures travels as tensors, so equal programs are
one and no parameter is kept alive here.
"""

from __future__ import annotations

from ..runtime.errors import bad_value
from .program import Program

_PROGRAMS: dict[str, Program] = {}


def register_program(program: Program) -> str:
    """Make a program known under its key, arguments included, and return the key."""
    key = f"{program.key}.{'.'.join(a.role.value[0] for a in program.arguments)}"
    _PROGRAMS.setdefault(key, program)
    return key


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
