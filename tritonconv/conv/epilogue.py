"""Epilogues: from the user's scalar function to a program of (accumulator, operands, coordinates)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..codegen import Argument, Role, ScalarFunction, trace
from ..codegen.registry import register_program
from ..runtime.errors import bad_type

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


def _with_bias(fn: Callable[..., Any], acc: Tensor, bias: Tensor, *operands: Any, **named: Any) -> Any:
    return fn(acc + bias, *operands, **named)


def _without_bias(fn: Callable[..., Any], acc: Tensor, *operands: Any, **named: Any) -> Any:
    return fn(acc, *operands, **named)


def _identity(acc: Tensor) -> Tensor:
    return acc


@functools.lru_cache(maxsize=1024)
def _wanted_coordinates(code_owner: Any, rank: int) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(code_owner).parameters.values()
    except (TypeError, ValueError):
        return ()
    asked = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return tuple(name for name in COORDINATES[rank] if name in asked)


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an operand takes part in the function: half precision in float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def build_epilogue(
    fn: Callable[..., Any] | None,
    bias: Tensor | None,
    operands: Sequence[Tensor],
    acc_dtype: torch.dtype,
    rank: int,
) -> Epilogue:
    """Trace an epilogue for these operands; repeated calls hit the trace cache.

    Args:
        fn: the user's function ``fn(y, *operands, [n, c, h, w])``; None is the identity.
        bias: per-channel bias added to the accumulator before ``fn``, or None.
        operands: tensors read at the output element.
        acc_dtype: dtype of the convolution's operands.
        rank: number of spatial axes.

    Raises:
        ArgumentTypeError: ``fn`` cannot be called.
        TritonConvError: ``fn`` cannot be traced; the error says why.
    """
    if fn is None:
        fn = _identity
    if not callable(fn):
        raise bad_type("epilogue", "a function of 0-d tensors or None", type(fn).__name__)
    names = ["acc"] + (["bias"] if bias is not None else [])
    tensors = ([bias] if bias is not None else []) + list(operands)
    arguments = [Argument("acc", operand_dtype(acc_dtype), Role.VALUE)]
    names = (["bias"] if bias is not None else []) + [f"arg{k}" for k in range(len(operands))]
    for name, tensor in zip(names, tensors, strict=True):
        arguments.append(Argument(name, operand_dtype(tensor.dtype), Role.ELEMENT))
    coordinates = COORDINATES[rank]
    arguments += [Argument(name, torch.int32, Role.COORD) for name in coordinates]
    wrapped = functools.partial(_with_bias if bias is not None else _without_bias, fn)
    asked = _wanted_coordinates(fn, rank)
    function = trace(functools.partial(_call, wrapped, asked, len(tensors) + 1, coordinates), tuple(arguments))
    return Epilogue(register_program(function.program), function.captures)


def _call(
    fn: Callable[..., Any],
    asked: tuple[str, ...],
    count: int,
    coordinates: tuple[str, ...],
    *values: Tensor,
) -> Any:
    named = dict(zip(coordinates, values[count:], strict=True))
    return fn(*values[:count], **{name: named[name] for name in asked})


def evaluate_with_torch(
    fn: Callable[..., Any] | None, y: Tensor, bias: Tensor | None, operands: Sequence[Tensor]
) -> Tensor:
    """The epilogue as plain PyTorch over whole tensors; differentiable by PyTorch."""
    rank = y.dim() - 2
    epilogue = build_epilogue(fn, bias, operands, y.dtype, rank)
    from ..codegen.registry import program_of

    tensors = ([bias.reshape(-1, *[1] * rank)] if bias is not None else []) + list(operands)
    coordinates = [
        torch.arange(size, dtype=torch.int32, device=y.device).reshape(
            [size if axis == k else 1 for k in range(y.dim())]
        )
        for axis, size in enumerate(y.shape)
    ]
    function = ScalarFunction(program_of(epilogue.key), epilogue.captures)
    result = function(y, *tensors, *coordinates)
    assert isinstance(result, Tensor)
    return result.to(y.dtype)
