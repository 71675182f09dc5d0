"""Every error that tritonconv raises on purpose derives from one class."""

from __future__ import annotations


class TritonConvError(Exception):
    """Base of tritonconv's errors; bad arguments are ``ValueError`` or ``TypeError`` too."""


class ArgumentValueError(TritonConvError, ValueError):
    """An argument has a value that the function cannot accept."""


class ArgumentTypeError(TritonConvError, TypeError):
    """An argument has a type or dtype that the function cannot accept."""


def bad_value(argument: str, expected: str, got: object) -> ArgumentValueError:
    """Build the error for a wrong value: the argument, what was expected, what came."""
    return ArgumentValueError(f"{argument}: expected {expected}, got {got}")


def bad_type(argument: str, expected: str, got: object) -> ArgumentTypeError:
    """Build the error for a wrong type: the argument, what was expected, what came."""
    return ArgumentTypeError(f"{argument}: expected {expected}, got {got}")
