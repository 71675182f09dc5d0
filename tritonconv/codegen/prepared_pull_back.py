"""Gradients of a scalar function for tensors of one kind: what is constant is worked out once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..runtime.backend import uses_triton
from .elementwise import (
    allocate,
    broadcast_mask,
    dims_of,
    finish_sums,
    passed_through,
    summed_in_kernel,
)
from .ir import Role
from .map_kernel import bind_kernel
from .program import Program
from .registry import register_program

Tensor = torch.Tensor
PullBack = Callable[..., tuple[Tensor | None, ...]]


def prepared_pull_back(
    program: Program,
    elements: Sequence[Tensor],
    grad: Tensor,
    needed: Sequence[bool],
    channels_last: bool,
) -> PullBack | None:
    """:func:`~.elementwise.pull_back` for tensors of one kind and calls that record nothing.

    Args:
        program: of one output and without captures; all its float arguments are ELEMENT.
        elements: what the program read, each of the result's number of axes, none of them empty.
        grad: of the output.
        needed, channels_last: as for :func:`pull_back`.

    Returns:
        A function of the elements and the gradient that gives one gradient per element. It reads
        by pointer what the kernel needs, so that axes of size one make no difference to it. What
        passes through unchanged is the gradient itself. None
        where PyTorch computes.
    """
    if not uses_triton(grad.device) or program.captures or len(program.outputs) != 1:
        return None
    space, device = tuple(grad.shape), grad.device
    operands = [a for a in program.arguments if a.role is Role.ELEMENT]
    places = [
        index
        for index, (argument, wanted) in enumerate(zip(operands, needed, strict=True))
        if wanted and argument.dtype.is_floating_point
    ]
    if not places:
        return None
    derivative = program.vjp(tuple([operands[index].name for index in places]))
    reduce = [broadcast_mask(elements[index].shape, space) for index in places]
    dtypes = [elements[index].dtype for index in places]
    shapes = [elements[index].shape for index in places]
    count = len(elements)
    none: list[Tensor | None] = [None] * count

    def spread(values: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        results = none.copy()
        for index, value, shape in zip(places, values, shapes, strict=True):
            results[index] = value if value.shape == shape else value.reshape(shape)
        return tuple(results)

    cotangent = [a.name for a in derivative.arguments if a.role is Role.ELEMENT][-1]
    direct = passed_through(derivative)
    if all(name == cotangent for name in direct):
        dims = [dims_of(mask, len(space)) for mask in reduce]

        def passed(*tensors: Tensor) -> tuple[Tensor | None, ...]:
            grad = tensors[-1]
            pairs = zip(dims, dtypes, strict=True)
            return spread(
                [grad.sum(d, keepdim=True, dtype=t) if d else grad.to(t) for d, t in pairs]
            )

        return passed
    reduced = summed_in_kernel(reduce, space)
    samples = [
        None if summed else allocate(space, info.dtype if mask else dtype, channels_last, device)
        for summed, mask, dtype, info in zip(
            reduced, reduce, dtypes, derivative.outputs, strict=True
        )
    ]
    views = [t.expand(space) for t in (*elements, grad)]
    bound = bind_kernel(register_program(derivative), space, views, (), samples, reduced)
    forms = [None if t is None else (t.stride(), t.dtype) for t in samples]

    def computed(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        outputs = [
            None
            if form is None
            else torch.empty_strided(space, form[0], dtype=form[1], device=device)
            for form in forms
        ]
        return spread(finish_sums(bound(outputs, *tensors), space, reduce, reduced, dtypes))

    return computed


__all__ = ["PullBack", "prepared_pull_back"]
