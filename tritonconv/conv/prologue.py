"""Prologues: from a user's scalar function of the input to a program that the kernel's load calls.

An operand is read at the coordinates of the axes on which it has more than one element, like a
tensor that the function captures: a vector per channel costs one load per channel and block of the
sum, not one per element.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..codegen import Argument, Role, ScalarFunction, trace
from ..codegen.program import Program
from ..codegen.registry import program_of, register_program
from ..runtime.errors import bad_type, bad_value
from .epilogue import COORDINATES, check_arity, operand_dtype, wanted_coordinates

Tensor = torch.Tensor
Axes = tuple[int, ...]


@functools.cache
def _stand_in(index: int, axes: int, size: int, dtype: torch.dtype) -> Tensor:
    """What the function captures in the place of an operand while it is traced.

    The generated code keeps to the size of a vector; that of others does not matter, nor that of a
    vector if it is 0.
    """
    return torch.zeros((size,) if axes == 1 else (2,) * axes, dtype=dtype)


def _call(
    fn: Callable[..., Any],
    asked: tuple[str, ...],
    coordinates: tuple[str, ...],
    read: tuple[Axes, ...],
    operands: tuple[Tensor, ...],
    *values: Tensor,
) -> Any:
    at = values[1:]
    named = dict(zip(coordinates, at, strict=True))
    scalars = [
        (operand[tuple(at[axis] for axis in axes)] if axes else operand * 1).to(
            operand_dtype(operand.dtype)
        )
        for operand, axes in zip(operands, read, strict=True)
    ]
    return fn(values[0], *scalars, **{name: named[name] for name in asked})


def _build(
    fn: Callable[..., Any],
    read: tuple[Axes, ...],
    sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    dtype: torch.dtype,
    rank: int,
) -> tuple[ScalarFunction, tuple[Tensor, ...]]:
    """The traced prologue of a map of ``max(rank, 2)`` axes, and the operands' stand-ins."""
    if not callable(fn):
        raise bad_type("prologue", "a function of 0-d tensors or None", type(fn).__name__)
    asked = wanted_coordinates(fn, rank)
    check_arity(fn, 1 + len(read), asked, "prologue")
    names = COORDINATES[max(rank, 2)]
    operands = tuple(
        _stand_in(index, len(axes), size, kind)
        for index, (axes, size, kind) in enumerate(zip(read, sizes, dtypes, strict=True))
    )
    arguments = [Argument("x", operand_dtype(dtype), Role.VALUE)]
    arguments += [Argument(name, torch.int32, Role.COORD) for name in names]
    wrapped = functools.partial(_call, fn, asked, names, read, operands)
    return trace(wrapped, arguments), operands


@torch.compiler.assume_constant_result
def prologue_key(
    fn: Callable[..., Any],
    read: tuple[Axes, ...],
    sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    dtype: torch.dtype,
    rank: int,
) -> str:
    """Key of the traced prologue; a constant under ``torch.compile``.

    Args:
        fn: the user's function ``fn(x, *operands, [n, c, d, h, w])``.
        read: for every operand the axes of the input on which it has several elements.
        sizes: of the operands that are vectors; 0 for others, and where it is not known.
        dtypes: of the operands.
        dtype: of the input.
        rank: number of spatial axes.

    Raises:
        ArgumentTypeError: ``fn`` cannot be called.
        TritonConvError: ``fn`` cannot be traced; the error says why.
    """
    return register_program(_build(fn, read, sizes, dtypes, dtype, rank)[0].program)


@torch.compiler.assume_constant_result
def prologue_order(
    fn: Callable[..., Any],
    read: tuple[Axes, ...],
    sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    dtype: torch.dtype,
    rank: int,
) -> tuple[int, ...]:
    """For every tensor that the program reads: which operand, or −1 − k for the k-th captured."""
    function, operands = _build(fn, read, sizes, dtypes, dtype, rank)
    order: list[int] = []
    captured = 0
    for tensor in function.captures:
        index = next((k for k, stand_in in enumerate(operands) if stand_in is tensor), None)
        if index is None:
            captured += 1
            index = -captured
        order.append(index)
    return tuple(order)


@torch.compiler.assume_constant_result
def prologue_captures(
    fn: Callable[..., Any],
    read: tuple[Axes, ...],
    sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    dtype: torch.dtype,
    rank: int,
) -> list[Tensor]:
    """Tensors of the function's own that it reads at computed indices."""
    function, operands = _build(fn, read, sizes, dtypes, dtype, rank)
    return [t for t in function.captures if not any(t is stand_in for stand_in in operands)]


def bind_prologue(
    fn: Callable[..., Any], arguments: Sequence[Tensor], x: Tensor, rank: int
) -> tuple[str, list[Tensor]]:
    """The prologue's program and the tensors that it reads, in its order.

    Args:
        fn: the user's function.
        arguments: its operands as given.
        x: the input, (batch, channels, *spatial) with ``rank`` spatial axes.
        rank: number of spatial axes.
    """
    if not isinstance(arguments, (tuple, list)):
        raise bad_type("prologue_args", "a tuple of tensors", type(arguments).__name__)
    read: list[Axes] = []
    operands: list[Tensor] = []
    for index, operand in enumerate(arguments):
        axes, squeezed = _read(operand, x, f"prologue_args[{index}]")
        # A map of one axis is served as one of height one.
        read.append(tuple(axis + 1 if rank == 1 and axis == 2 else axis for axis in axes))
        operands.append(squeezed)
    # Sizes may be symbolic where code is compiled.
    known = not torch.compiler.is_compiling()
    sizes = tuple([t.shape[0] if known and t.dim() == 1 else 0 for t in operands])
    asked = (fn, tuple(read), sizes, tuple(t.dtype for t in operands), x.dtype, rank)
    key, order, captured = prologue_key(*asked), prologue_order(*asked), prologue_captures(*asked)
    for index, capture in enumerate(captured):
        if capture.device != x.device:
            name = f"captured tensor {index}"
            raise bad_value(name, f"the input's device {x.device}", capture.device)
    return key, [operands[k] if k >= 0 else captured[-1 - k] for k in order]


def _read(operand: Tensor, x: Tensor, name: str) -> tuple[Axes, Tensor]:
    """The axes that an operand is read at, and the operand with these axes only."""
    if not isinstance(operand, Tensor):
        raise bad_type(name, "a tensor (a Python number belongs into the function)", operand)
    if operand.device != x.device:
        raise bad_value(name, f"the input's device {x.device}", operand.device)
    shape = tuple(x.shape)
    if operand.dim() == 1:
        wanted = f"({shape[1]},), one number per channel, or a shape broadcastable to {shape}"
        have, want = operand.shape[0], shape[1]
        if have != 1 and have != want:  # not `in`: a symbolic size has to be compared
            raise bad_value(name, wanted, tuple(operand.shape))
        return ((1,), operand) if operand.shape[0] != 1 else ((), operand.reshape(()))
    lead = len(shape) - operand.dim()
    if lead < 0 or any(
        have != 1 and have != want for have, want in zip(operand.shape, shape[lead:], strict=True)
    ):
        wanted = f"({shape[1]},) or a shape broadcastable to {shape}"
        raise bad_value(name, wanted, tuple(operand.shape))
    kept = [axis for axis, size in enumerate(operand.shape) if size != 1]
    single = operand.reshape([operand.shape[axis] for axis in kept])
    return tuple(lead + axis for axis in kept), single


def per_channel(program: Program) -> bool:
    """Whether all that a prologue reads is a number or a vector over channels."""
    return all(load.pattern in ((), ("c",)) for load in program.loads)


def apply_prologue(key: str, x: Tensor, captures: Sequence[Tensor]) -> Tensor:
    """A registered prologue evaluated by PyTorch on a whole input; differentiable by PyTorch."""
    coordinates = [
        torch.arange(size, dtype=torch.int32, device=x.device).reshape(
            [size if axis == k else 1 for k in range(x.dim())]
        )
        for axis, size in enumerate(x.shape)
    ]
    result = ScalarFunction(program_of(key), tuple(captures))(x, *coordinates)
    assert isinstance(result, Tensor)
    return result.to(x.dtype)
