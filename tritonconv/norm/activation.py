"""The activation behind a normalisation: a scalar function of one value, traced once."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch

from ..codegen import Argument, Role, ScalarFunction, trace
from ..codegen.registry import program_of, register_program
from ..runtime.errors import bad_type

Scalar = Callable[..., Any]

_KEYS: dict[Any, str | None] = {}


def derivative_of(key: str) -> ScalarFunction:
    """The scalar function (z, cotangent) of an activation's derivative."""
    derivative = ScalarFunction(program_of(key).vjp(("z",)), ())
    (cotangent,) = [a.name for a in derivative.arguments if a.name != "z"]
    return derivative.with_roles(**{cotangent: Role.VALUE})


def never_changes(fn: Any) -> Any:
    """What identifies a function of PyTorch's own, which does tomorrow what it does today."""
    if isinstance(fn, functools.partial):
        inner = never_changes(fn.func)
        settings = (fn.args, tuple(sorted(fn.keywords.items())))
        plain = all(isinstance(v, (int, float, str)) for v in (*fn.args, *fn.keywords.values()))
        return (inner, settings) if inner is not None and plain else None
    if isinstance(fn, types.BuiltinFunctionType):
        owner = fn.__self__
        return fn if owner is None or isinstance(owner, (types.ModuleType, type)) else None
    if isinstance(fn, types.FunctionType) and (fn.__module__ or "").startswith("torch."):
        return fn if fn.__closure__ is None else None
    return None


@torch.compiler.assume_constant_result
def activation_key(fn: Scalar | None, dtype: torch.dtype) -> str | None:
    """Key of the traced activation, empty for none; a constant under ``torch.compile``.

    Args:
        fn: the user's function.
        dtype: in which it is computed.

    Returns:
        None where the function reads tensors or coordinates, which these kernels do not hand it.

    Raises:
        ArgumentTypeError: ``fn`` cannot be called.
        TritonConvError: ``fn`` cannot be traced; the error says why.
    """
    if fn is None:
        return ""
    identity = never_changes(fn)
    if identity is not None and (identity, dtype) in _KEYS:
        return _KEYS[identity, dtype]
    if not callable(fn):
        raise bad_type("activation", "a function of a 0-d tensor or None", type(fn).__name__)
    key: str | None = None
    if not _asks_for_more(fn):
        function = trace(fn, (Argument("z", dtype, Role.VALUE),))
        if not function.captures:
            key = register_program(function.program)
    if identity is not None:
        _KEYS[identity, dtype] = key
    return key


def _asks_for_more(fn: Scalar) -> bool:
    """Whether a function has keywords without a default: coordinates."""
    target = fn.forward if isinstance(fn, torch.nn.Module) else fn
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters)


__all__ = ["activation_key", "derivative_of", "never_changes"]
