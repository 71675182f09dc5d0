"""A transposed convolution with an epilogue: the adjoint product, then one generated kernel."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..codegen.elementwise import apply_key
from ..codegen.ir import Role
from ..codegen.program import ScalarFunction
from ..codegen.registry import program_of, register_program
from .ops import CONV_DGRAD, result_channels_last

Tensor = torch.Tensor


def dgrad_epilogue(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    result: list[int],
    geometry: tuple[Any, ...],
) -> Tensor:
    """y = f(dgrad(x, w), …), differentiable to any order.

    Args:
        x, w: the transposed convolution's input and weight.
        operands: of the epilogue, broadcastable to the result.
        captures: what it reads at computed indices.
        function: its key.
        result: spatial extent of the result.
        geometry: stride, padding, dilation, groups, precision.
    """
    acc = CONV_DGRAD(x, w, result, *geometry)
    channels_last = result_channels_last(x, w)
    elements = [acc, *operands]
    key = _element_key(function)
    return apply_key(key, acc.shape, elements, captures, acc.dtype, channels_last)


@torch.compiler.assume_constant_result
def _element_key(function: str) -> str:
    return _registered_elements(function)


@functools.cache
def _registered_elements(function: str) -> str:
    """The epilogue read from memory: its accumulator is an operand like the others."""
    program = ScalarFunction(program_of(function), ()).with_roles(acc=Role.ELEMENT).program
    return register_program(program)
