"""The scales of a float8 convolution and the quantisation of its result, as an epilogue.

Scales and the bias are captured tensors of the generated function: it reads them on the device, so
that no scale is ever waited for and a captured graph follows scales that change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..runtime.errors import bad_type
from .epilogue import build_epilogue, check_arity, static_identity, wanted_coordinates
from .problem import FLOAT8

Tensor = torch.Tensor

LARGEST = torch.finfo(FLOAT8).max


@functools.cache
def _stand_ins(filters: int) -> dict[str, Tensor]:
    """What the function is traced with, in place of the tensors of a call."""
    return {
        "scale_input": torch.ones(()),
        "scale_weight": torch.ones(1).expand(filters),
        "bias": torch.ones(1).expand(filters),
        "scale_output": torch.ones(()),
    }


class Scaling(NamedTuple):
    """What is done to a sum of products around the user's function.

    Attributes:
        scaled: it is multiplied by the scales of input and weight.
        bias: a bias is added.
        quantised: the result is cut to the range of float8.
        divided: before that it is divided by the scale of the output.
        filters: number of output channels.
    """

    scaled: bool
    bias: bool
    quantised: bool
    divided: bool
    filters: int


class ScaledEpilogue(NamedTuple):
    """A traced epilogue with scales.

    Attributes:
        key: of the registered program.
        order: what the program captures, by name: an argument of the call, or the index of a
            tensor of the user's function.
        captures: the tensors of the user's function.
    """

    key: str
    order: tuple[str, ...]
    captures: tuple[Tensor, ...]


def scaled_epilogue(
    fn: Callable[..., Any] | None,
    scaling: Scaling,
    operand_dtypes: tuple[torch.dtype, ...],
    rank: int,
    lifted: bool = False,
) -> ScaledEpilogue:
    """Trace ``fn`` with scales around it.

    Args:
        fn: the user's function; None is the identity.
        scaling: what happens before and after it.
        operand_dtypes, rank, lifted: see :func:`build_epilogue`.
    """
    asked: tuple[str, ...] = ()
    if fn is not None and not callable(fn):
        raise bad_type("epilogue", "a function of 0-d tensors or None", type(fn).__name__)
    if fn is not None:
        asked = wanted_coordinates(fn, rank)
        check_arity(fn, 1 + len(operand_dtypes), asked)
    stand_ins = _stand_ins(scaling.filters)
    # Plain values and lasting tensors: what the cache of traces knows again.
    wrapped = functools.partial(_scaled, fn, tuple(scaling), asked, *stand_ins.values())
    epilogue = build_epilogue(wrapped, False, operand_dtypes, torch.float32, rank, lifted)
    order: list[str] = []
    own: list[Tensor] = []
    for capture in epilogue.captures:
        name = next((name for name, tensor in stand_ins.items() if tensor is capture), None)
        if name is None:
            name = str(len(own))
            own.append(capture)
        order.append(name)
    return ScaledEpilogue(epilogue.key, tuple(order), tuple(own))


def _scaled(
    fn: Callable[..., Any] | None,
    flags: tuple[Any, ...],
    asked: tuple[str, ...],
    scale_input: Tensor,
    scale_weight: Tensor,
    bias: Tensor,
    scale_output: Tensor,
    y: Tensor,
    *operands: Tensor,
    n: Any = None,
    c: Any = None,
    d: Any = None,
    h: Any = None,
    w: Any = None,
) -> Tensor:
    scaling = Scaling(*flags)
    if scaling.scaled:
        y = y * (scale_input * scale_weight[c])
    if scaling.bias:
        y = y + bias[c]
    if fn is not None:
        coordinates = {"n": n, "c": c, "d": d, "h": h, "w": w}
        y = fn(y, *operands, **{name: coordinates[name] for name in asked})
    if scaling.divided:
        y = y * torch.reciprocal(scale_output)
    if scaling.quantised:
        y = torch.clamp(y, -LARGEST, LARGEST)
    return y


_KNOWN: dict[Any, ScaledEpilogue] = {}
_MAX_KNOWN = 4096


def known_epilogue(
    fn: Callable[..., Any] | None,
    scaling: tuple[Any, ...],
    operand_dtypes: tuple[torch.dtype, ...],
    rank: int,
    lifted: bool,
) -> ScaledEpilogue:
    """The same in a tenth of the time, where the meaning of ``fn`` cannot change between calls."""
    identity = None if fn is None else static_identity(fn)
    if identity is None and fn is not None:
        return scaled_epilogue(fn, Scaling(*scaling), operand_dtypes, rank, lifted)
    key = (identity, scaling, operand_dtypes, rank, lifted)
    found = _KNOWN.get(key)
    if found is None:
        found = scaled_epilogue(fn, Scaling(*scaling), operand_dtypes, rank, lifted)
        if not found.captures:
            if len(_KNOWN) >= _MAX_KNOWN:
                _KNOWN.clear()
            _KNOWN[key] = found
    return found


@torch.compiler.assume_constant_result
def scaled_key(
    fn: Callable[..., Any] | None,
    scaling: tuple[Any, ...],
    operand_dtypes: tuple[torch.dtype, ...],
    rank: int,
    lifted: bool,
) -> tuple[str, ...]:
    """The key of the program, then the names of what it captures: constants when compiling."""
    found = scaled_epilogue(fn, Scaling(*scaling), operand_dtypes, rank, lifted)
    return (found.key, *found.order)


@torch.compiler.assume_constant_result
def scaled_captures(
    fn: Callable[..., Any] | None,
    scaling: tuple[Any, ...],
    operand_dtypes: tuple[torch.dtype, ...],
    rank: int,
    lifted: bool,
) -> list[Tensor]:
    """Tensors that the user's function reads at computed indices."""
    return list(scaled_epilogue(fn, Scaling(*scaling), operand_dtypes, rank, lifted).captures)
