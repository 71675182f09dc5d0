"""Epilogues: from a user's scalar function to a program of accumulator, operands, coordinates."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as hooks

from ..codegen import Argument, Role, ScalarArityError, ScalarFunction, trace
from ..codegen.registry import program_of, register_program
from ..runtime.errors import bad_type
from .problem import FLOAT8

Tensor = torch.Tensor

COORDINATES: dict[int, tuple[str, ...]] = {
    1: ("n", "c", "w"),
    2: ("n", "c", "h", "w"),
    3: ("n", "c", "d", "h", "w"),
}
"""Names under which an epilogue may ask for its coordinates, by number of spatial axes."""


@dataclass(frozen=True)
class Epilogue:
    """A traced epilogue ready to be fused.

    Attributes:
        key: the registered program: VALUE ``acc``, ELEMENT operands (bias first), coordinates.
        captures: tensors that the function reads at computed indices.
    """

    key: str
    captures: tuple[Tensor, ...]


def _identity(acc: Tensor) -> Tensor:
    return acc


_WANTED: dict[tuple[types.CodeType, int], tuple[str, ...]] = {}


def wanted_coordinates(fn: Callable[..., Any], rank: int) -> tuple[str, ...]:
    """Coordinates that a function asks for; remembered by code, which keeps no closure alive."""
    # A decorated function has the signature of what it wraps, which its own code does not tell.
    if not isinstance(fn, types.FunctionType) or fn.__dict__:
        return _signature_coordinates(fn, rank)
    key = (fn.__code__, rank)
    found = _WANTED.get(key)
    if found is None:
        found = _WANTED[key] = _signature_coordinates(fn, rank)
    return found


def _signature_coordinates(fn: Callable[..., Any], rank: int) -> tuple[str, ...]:
    target = fn.forward if isinstance(fn, torch.nn.Module) else fn
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return ()
    asked = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return tuple(name for name in COORDINATES[rank] if name in asked)


_GLOBAL_NAMES: dict[types.CodeType, tuple[str, ...] | None] = {}
_SETTINGS = (bool, int, float, str, type(None))
_BUILT_IN = "a built-in name"


def static_identity(fn: Callable[..., Any]) -> Any:
    """What identifies a function whose meaning cannot change between calls, else None.

    A built-in function of a module and a function of ``torch.nn.functional`` are themselves; one of
    PyTorch's activation modules is its class and settings. A Python function without closure and
    defaults is its code with the globals that it names, so that a lambda written inside a
    ``forward`` is recognised although every call makes it anew; these may be PyTorch's modules,
    such functions, and numbers. Whatever reads other state goes through the trace cache, which
    looks at that state at every call.
    """
    if _is_fixed(fn):
        return fn
    if isinstance(fn, nn.Module):
        return _activation_identity(fn)
    if not isinstance(fn, types.FunctionType):
        return None
    if fn.__closure__ is not None or fn.__defaults__ is not None or fn.__kwdefaults__ is not None:
        return None
    code, scope = fn.__code__, fn.__globals__
    if code in _GLOBAL_NAMES:
        names = _GLOBAL_NAMES[code]
    else:
        names = _GLOBAL_NAMES[code] = _globals_of(code)
    if names is None:
        return None
    identity: list[Any] = [code]
    for name in names:
        value = scope.get(name, _BUILT_IN)
        if value is None or value is _BUILT_IN or type(value) in (bool, int, float):
            # 1 and 1.0 are equal, and compute in different dtypes; so are 0.0 and -0.0.
            identity += (type(value), str(value))
            continue
        if isinstance(value, types.ModuleType):
            fixed = value.__name__.split(".")[0] == "torch"
        else:
            fixed = _is_fixed(value)
        if not fixed:
            return None
        identity.append(value)
    return tuple(identity)


def _is_fixed(value: Any) -> bool:
    """Whether this is a function that nobody but its library defines."""
    if isinstance(value, types.BuiltinFunctionType):
        owner = value.__self__
        return owner is None or isinstance(owner, (types.ModuleType, type))
    if not isinstance(value, types.FunctionType) or value.__module__ != functional.__name__:
        return False
    return getattr(functional, value.__name__, None) is value


def _activation_identity(module: nn.Module) -> Any:
    """Class and settings of an activation of PyTorch's; None where it has more to it."""
    cls = type(module)
    if cls.__module__ != nn.modules.activation.__name__:
        return None
    if module._parameters or module._forward_hooks or module._forward_pre_hooks:
        return None
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return None
    settings = [(k, type(v), str(v)) for k, v in module.__dict__.items() if not k.startswith("_")]
    if any(kind not in _SETTINGS for _, kind, _ in settings):  # a forward of its own, for one
        return None
    return (cls, *settings)


def _globals_of(code: types.CodeType) -> tuple[str, ...] | None:
    """Global names that code and the functions inside of it read; None where it imports others."""
    names: list[str] = []
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.append(step.argval)
        elif step.opname == "IMPORT_NAME":
            return None
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            inner = _globals_of(part)
            if inner is None:
                return None
            names += inner
    return tuple(dict.fromkeys(names))


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an operand takes part in the function: narrow floats in float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16, FLOAT8) else dtype


def build_epilogue(
    fn: Callable[..., Any] | None,
    has_bias: bool,
    operand_dtypes: tuple[torch.dtype, ...],
    acc_dtype: torch.dtype,
    rank: int,
    lifted: bool = False,
) -> Epilogue:
    """Trace an epilogue for operands of these dtypes; repeated calls hit the trace cache.

    Args:
        fn: the user's function ``fn(y, *operands, [n, c, h, w])``; None is the identity.
        has_bias: whether a per-channel bias is added to the accumulator before ``fn``.
        operand_dtypes: dtypes of the tensors read at the output element.
        acc_dtype: dtype of the convolution's operands.
        rank: number of spatial axes.
        lifted: the program is for maps of one more axis, the first one, of size one.

    Raises:
        ArgumentTypeError: ``fn`` cannot be called.
        TritonConvError: ``fn`` cannot be traced; the error says why.
    """
    if fn is None:
        fn = _identity
    if not callable(fn):
        raise bad_type("epilogue", "a function of 0-d tensors or None", type(fn).__name__)
    asked = wanted_coordinates(fn, rank)
    check_arity(fn, 1 + len(operand_dtypes), asked)
    axes = rank + lifted
    wrapped = functools.partial(_call, fn, has_bias, asked, COORDINATES[axes])
    function = trace(wrapped, _arguments(has_bias, operand_dtypes, acc_dtype, axes))
    function = function.with_narrow(acc_dtype in (torch.float16, torch.bfloat16))
    return Epilogue(register_program(function.program), function.captures)


def check_arity(
    fn: Callable[..., Any], positional: int, named: tuple[str, ...], role: str = "epilogue"
) -> None:
    """Refuse a function that cannot take the operands before it is called with them."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # built-in functions do not always have one
        return
    try:
        signature.bind(*range(positional), **dict.fromkeys(named))
    except TypeError as error:
        code = getattr(fn, "__code__", None)
        place = f" ({Path(code.co_filename).name}:{code.co_firstlineno})" if code else ""
        name = getattr(fn, "__name__", type(fn).__name__)
        raise ScalarArityError(
            f"{role} {name!r}{place}: it is called with the value and {positional - 1} of "
            f"{role}_args, but its signature is {signature}: {error}"
        ) from None


@functools.cache
def _arguments(
    has_bias: bool, operand_dtypes: tuple[torch.dtype, ...], acc_dtype: torch.dtype, rank: int
) -> tuple[Argument, ...]:
    arguments = [Argument("acc", operand_dtype(acc_dtype), Role.VALUE)]
    if has_bias:
        arguments.append(Argument("bias", operand_dtype(acc_dtype), Role.ELEMENT))
    for index, dtype in enumerate(operand_dtypes):
        arguments.append(Argument(f"arg{index}", operand_dtype(dtype), Role.ELEMENT))
    arguments += [Argument(name, torch.int32, Role.COORD) for name in COORDINATES[rank]]
    return tuple(arguments)


@torch.compiler.assume_constant_result
def epilogue_key(
    fn: Callable[..., Any] | None,
    has_bias: bool,
    operand_dtypes: tuple[torch.dtype, ...],
    acc_dtype: torch.dtype,
    rank: int,
    lifted: bool = False,
) -> str:
    """Key of the traced epilogue; a constant under ``torch.compile``."""
    return build_epilogue(fn, has_bias, operand_dtypes, acc_dtype, rank, lifted).key


@torch.compiler.assume_constant_result
def epilogue_captures(
    fn: Callable[..., Any] | None,
    has_bias: bool,
    operand_dtypes: tuple[torch.dtype, ...],
    acc_dtype: torch.dtype,
    rank: int,
    lifted: bool = False,
) -> list[Tensor]:
    """Tensors that the epilogue reads at computed indices."""
    epilogue = build_epilogue(fn, has_bias, operand_dtypes, acc_dtype, rank, lifted)
    return list(epilogue.captures)


def _call(
    fn: Callable[..., Any],
    has_bias: bool,
    asked: tuple[str, ...],
    coordinates: tuple[str, ...],
    *values: Tensor,
) -> Any:
    count = len(values) - len(coordinates)
    named = dict(zip(coordinates, values[count:], strict=True))
    y, operands = values[0], values[1:count]
    if has_bias:
        y, operands = y + operands[0], operands[1:]
    return fn(y, *operands, **{name: named[name] for name in asked})


def evaluate_with_torch(
    fn: Callable[..., Any] | None, y: Tensor, bias: Tensor | None, operands: Sequence[Tensor]
) -> Tensor:
    """The epilogue as plain PyTorch over whole tensors; differentiable by PyTorch."""
    rank = y.dim() - 2
    dtypes = tuple(operand.dtype for operand in operands)
    epilogue = build_epilogue(fn, bias is not None, dtypes, y.dtype, rank)
    tensors = ([bias.reshape(-1, *[1] * rank)] if bias is not None else []) + list(operands)
    return apply_with_torch(epilogue.key, y, tensors, epilogue.captures)


def made_in_compiled_code(fn: Any) -> bool:
    """Whether a function was made, closing over something, inside the code being compiled.

    ``torch.compile`` cannot hand such a function out to be traced: it exists only symbolically,
    which shows in its closure being out of reach.
    """
    if isinstance(fn, types.BuiltinFunctionType):
        return False
    try:
        fn.__closure__  # noqa: B018  # reading it is the test
        return False
    except Exception:
        pass
    try:
        return len(fn.__code__.co_freevars) > 0
    except Exception:
        return False


def apply_to_whole(
    fn: Callable[..., Any] | None, y: Tensor, bias: Tensor | None, operands: Sequence[Tensor]
) -> Tensor:
    """Call the function on whole tensors, for code that is being compiled: it is fused there."""
    rank = y.dim() - 2
    wide = operand_dtype(y.dtype)
    values = [y.to(wide)]
    if bias is not None:
        values[0] = values[0] + bias.to(wide).reshape(1, -1, *[1] * rank)
    values += [operand.to(operand_dtype(operand.dtype)) for operand in operands]
    parameters = fn.__code__  # type: ignore[union-attr]
    first = parameters.co_argcount
    asked = parameters.co_varnames[first : first + parameters.co_kwonlyargcount]
    named = {
        name: torch.arange(y.shape[axis], dtype=torch.int32, device=y.device).reshape(
            [-1 if axis == k else 1 for k in range(rank + 2)]
        )
        for axis, name in enumerate(COORDINATES[rank])
        if name in asked
    }
    result: Tensor = fn(*values, **named)  # type: ignore[misc]
    return result.expand(y.shape).to(y.dtype)


def apply_with_torch(
    key: str, acc: Tensor, operands: Sequence[Tensor], captures: Sequence[Tensor]
) -> Tensor:
    """A registered epilogue evaluated by PyTorch on a whole accumulator."""
    program = program_of(key)
    unused = torch.zeros((), dtype=torch.int32, device=acc.device)
    coordinates = [
        torch.arange(size, dtype=torch.int32, device=acc.device).reshape(
            [size if axis == k else 1 for k in range(acc.dim())]
        )
        if name in program.live
        else unused
        for axis, (name, size) in enumerate(zip(COORDINATES[acc.dim() - 2], acc.shape, strict=True))
    ]
    result = ScalarFunction(program, tuple(captures))(acc, *operands, *coordinates)
    assert isinstance(result, Tensor)
    return result.to(acc.dtype)
