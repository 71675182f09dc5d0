"""Map a scalar function over broadcast tensors in one generated kernel, and differentiate it.

The operator ``tritonconv::elementwise`` serves the gradients of fused epilogues (and any other
scalar function): every operand is read at the element, every output is either written at the
element or summed over the other axes into its channel while the tile is still in registers. Its
own gradient is the same operator on the function's vector-Jacobian product, so every order exists.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..runtime import library
from ..runtime.backend import uses_triton
from .ir import Role
from .map_kernel import CHANNEL, bind_kernel, coordinate_names
from .program import Program, ScalarFunction
from .registry import program_of, register_program

Tensor = torch.Tensor

_DTYPES: tuple[torch.dtype, ...] = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
"""Dtypes by the number that stands for them in the operator's schema.

In torch 2.11 ``ScalarType[]`` reaches Python kernels as bare integers, so the schema has ``int[]``.
"""


def dtype_codes(dtypes: Sequence[torch.dtype]) -> list[int]:
    """Numbers of dtypes as the elementwise operator takes them."""
    return [_DTYPES.index(dtype) for dtype in dtypes]


def _full_mask(rank: int) -> int:
    return (1 << rank) - 1


def dims_of(mask: int, rank: int) -> list[int]:
    """The axes whose bits are set."""
    return [axis for axis in range(rank) if mask >> axis & 1]


def allocate(shape: Sequence[int], dtype: torch.dtype, channels_last: bool, device: Any) -> Tensor:
    """An uninitialised tensor in one of the two memory formats."""
    form = torch.contiguous_format
    if channels_last and len(shape) in (4, 5):
        form = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=form)


def _reduced_shape(shape: Sequence[int], mask: int) -> tuple[int, ...]:
    return tuple(1 if mask >> axis & 1 else size for axis, size in enumerate(shape))


def _elementwise(
    function: str,
    shape: list[int],
    elements: list[Tensor],
    captures: list[Tensor],
    reduce: list[int],
    codes: list[int],
    channels_last: bool,
) -> list[Tensor]:
    program = program_of(function)
    dtypes = [_DTYPES[code] for code in codes]
    space = tuple(shape)
    device = elements[0].device if elements else captures[0].device
    if math.prod(space) == 0:
        return [
            torch.zeros(_reduced_shape(space, mask), dtype=dtype, device=device)
            for mask, dtype in zip(reduce, dtypes, strict=True)
        ]
    views = [t.expand(space) for t in elements]
    if not uses_triton(device):
        return _with_torch(program, space, views, captures, reduce, dtypes, channels_last)
    reduced = summed_in_kernel(reduce, space)
    outputs = [
        None if summed else allocate(space, info.dtype if mask else dtype, channels_last, device)
        for summed, mask, dtype, info in zip(reduced, reduce, dtypes, program.outputs, strict=True)
    ]
    bound = bind_kernel(function, space, views, captures, outputs, reduced)
    results = bound(outputs, *views, *captures)
    return finish_sums(results, space, reduce, reduced, dtypes)


def summed_in_kernel(reduce: Sequence[int], space: Sequence[int]) -> tuple[bool, ...]:
    """A sum over all axes but the channel, or over all, ends in the kernel's partial sums.

    Axes of one element make no difference. Any other subset of axes is summed by PyTorch from the
    elementwise result.
    """
    full = _full_mask(len(space))
    return tuple(
        [mask != 0 and _with_ones(mask, space) in (full, full & ~(1 << CHANNEL)) for mask in reduce]
    )


def _with_ones(mask: int, space: Sequence[int]) -> int:
    """The axes that are summed over, and those of one element."""
    for axis, size in enumerate(space):
        if size == 1:
            mask |= 1 << axis
    return mask


def unshared(
    results: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Copies of results that are one of the gradients themselves, where nothing is recorded.

    Autograd adds into tensors that nobody else seems to hold, and a view hides who does.
    """
    if torch.is_grad_enabled():
        return tuple(results)
    given = {id(grad) for grad in grads if grad is not None}
    return tuple([t.clone() if t is not None and id(t) in given else t for t in results])


def finish_sums(
    results: Sequence[Tensor],
    space: tuple[int, ...],
    reduce: Sequence[int],
    reduced: Sequence[bool],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    """Sums of what the kernel left to be summed, in the dtypes asked for."""
    rank = len(space)
    finished = []
    for result, summed, mask, dtype in zip(results, reduced, reduce, dtypes, strict=True):
        if summed:
            whole = _with_ones(mask, space) == _full_mask(rank)
            total = result.sum() if whole else result.sum(0)
            result = total.reshape(_reduced_shape(space, mask))
        elif mask:
            result = result.sum(dims_of(mask, rank), keepdim=True)
        finished.append(result if result.dtype is dtype else result.to(dtype))
    return finished


def _coordinates(space: Sequence[int], device: torch.device) -> list[Tensor]:
    return [
        torch.arange(size, dtype=torch.int32, device=device).reshape(
            [size if axis == k else 1 for k in range(len(space))]
        )
        for axis, size in enumerate(space)
    ]


def _with_torch(
    program: Program,
    space: tuple[int, ...],
    views: list[Tensor],
    captures: list[Tensor],
    reduce: list[int],
    dtypes: list[torch.dtype],
    channels_last: bool,
) -> list[Tensor]:
    operands = iter(views)
    coordinates = iter(_coordinates(space, views[0].device if views else captures[0].device))
    arguments = [
        next(coordinates) if a.role is Role.COORD else next(operands) for a in program.arguments
    ]
    results = ScalarFunction(program, tuple(captures))(*arguments)
    if isinstance(results, Tensor):
        results = (results,)
    finished = []
    for result, mask, dtype in zip(results, reduce, dtypes, strict=True):
        value = result.expand(space)
        if mask:
            value = value.sum(dims_of(mask, len(space)), keepdim=True)
        out = allocate(value.shape, dtype, channels_last and not mask, value.device)
        finished.append(out.copy_(value))
    return finished


def _elementwise_fake(
    function: str,
    shape: list[int],
    elements: list[Tensor],
    captures: list[Tensor],
    reduce: list[int],
    codes: list[int],
    channels_last: bool,
) -> list[Tensor]:
    device = elements[0].device if elements else captures[0].device
    dtypes = [_DTYPES[code] for code in codes]
    return [
        allocate(_reduced_shape(shape, mask), dtype, channels_last and not mask, device)
        for mask, dtype in zip(reduce, dtypes, strict=True)
    ]


class _Elementwise(library.OpFunction):
    """``tritonconv::elementwise`` with a gradient that is the same operator again."""

    @staticmethod
    def forward(
        function: str,
        shape: list[int],
        count: int,
        reduce: list[int],
        codes: list[int],
        channels_last: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        return tuple(
            ELEMENTWISE.below_autograd(
                function,
                shape,
                list(tensors[:count]),
                list(tensors[count:]),
                reduce,
                codes,
                channels_last,
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function, ctx.shape, ctx.count, _, _, ctx.channels_last = inputs[:6]
        ctx.save_for_backward(*inputs[6:])
        ctx.set_materialize_grads(False)
        indices = [out for out in output if not out.dtype.is_floating_point]
        ctx.mark_non_differentiable(*indices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        results = pull_back(
            program_of(ctx.function),
            ctx.shape,
            tensors[: ctx.count],
            tensors[ctx.count :],
            grads,
            ctx.needs_input_grad[6:],
            ctx.channels_last,
        )
        return (None,) * 6 + unshared(results, grads)


def _elementwise_autograd(
    function: str,
    shape: list[int],
    elements: list[Tensor],
    captures: list[Tensor],
    reduce: list[int],
    codes: list[int],
    channels_last: bool,
) -> list[Tensor]:
    return list(
        _Elementwise.run(
            function,
            list(shape),
            len(elements),
            list(reduce),
            list(codes),
            channels_last,
            *elements,
            *captures,
        )
    )


ELEMENTWISE = library.define(
    "elementwise",
    "(str function, SymInt[] shape, Tensor[] elements, Tensor[] captures, int[] reduce, "
    "int[] dtypes, bool channels_last) -> Tensor[]",
    _elementwise,
    _elementwise_fake,
    _elementwise_autograd,
)


def apply(
    function: ScalarFunction,
    shape: Sequence[int],
    elements: Sequence[Tensor],
    captures: Sequence[Tensor] | None = None,
    *,
    reduce: Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    channels_last: bool = False,
) -> list[Tensor]:
    """Evaluate a function of ELEMENT and COORD arguments over an index space.

    Args:
        function: its COORD arguments, in order, are the axes of ``shape``.
        shape: the index space, (batch, channels, ...).
        elements: one tensor per ELEMENT argument, broadcastable to ``shape``.
        captures: tensors to read in place of the captured ones.
        reduce: for each output a bit mask of the axes to sum over (kept with size 1).
        dtypes: dtype of each output; by default what the function returns.
        channels_last: memory format of the outputs that are not summed.

    Returns:
        One tensor per output, differentiable in elements and captures to any order.
    """
    outputs = function.outputs
    return list(
        ELEMENTWISE(
            register_program(function.program),
            list(shape),
            list(elements),
            list(function.captures if captures is None else captures),
            [0] * len(outputs) if reduce is None else list(reduce),
            dtype_codes([out.dtype for out in outputs] if dtypes is None else dtypes),
            channels_last,
        )
    )


def apply_into(
    program: Program, output: Tensor, elements: Sequence[Tensor], captures: Sequence[Tensor]
) -> None:
    """Evaluate a program of one output into an existing tensor (GPU tensors or interpreter)."""
    key = register_program(program)
    if output.numel():
        views = [t.expand(output.shape) for t in elements]
        bound = bind_kernel(key, tuple(output.shape), views, captures, [output], (False,))
        bound([output], *views, *captures)


def pull_back(
    program: Program,
    shape: Sequence[int],
    elements: Sequence[Tensor],
    captures: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
    channels_last: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of a program's elements and captures from the gradients of its outputs.

    Args:
        program: all its float arguments are ELEMENT.
        shape: index space.
        elements, captures: what the program read.
        grads: one per output, of the output's (possibly summed) shape; None where unused.
        needed: for every element, then every capture, whether its gradient is wanted.
        channels_last: memory format for gradients of full-size elements.

    Returns:
        One gradient per element and capture, None where not needed.
    """
    space = tuple(shape)
    rank = len(space)
    results: list[Tensor | None] = [None] * (len(elements) + len(captures))
    operands = [a for a in program.arguments if a.role is Role.ELEMENT]
    if all(g is None for g in grads):
        return tuple(results)
    wrt: list[str] = []
    for argument, wanted in zip(operands, needed[: len(elements)], strict=True):
        if wanted and argument.dtype.is_floating_point:
            wrt.append(argument.name)
    for k, load in enumerate(program.loads):
        if needed[len(elements) + load.capture] and load.dtype.is_floating_point:
            wrt.append(f"load:{k}")
    if not wrt:
        return tuple(results)
    derivative = _without_plain_indices(program.vjp(tuple(wrt)))
    cotangents = []
    for out, grad in zip(program.outputs, grads, strict=True):
        if out.dtype.is_floating_point:
            reference = elements[0] if elements else captures[0]
            cotangents.append(reference.new_zeros((1,) * rank) if grad is None else grad)
    position = {a.name: k for k, a in enumerate(operands)}
    reduce: list[int] = []
    dtypes: list[torch.dtype] = []
    for name in wrt:
        if name in position:
            tensor = elements[position[name]]
            reduce.append(broadcast_mask(tensor.shape, space))
            dtypes.append(tensor.dtype)
        else:
            load = program.loads[int(name.split(":")[1])]
            coordinates = coordinate_names(program)
            mask = 0
            if load.pattern is not None:
                mask = _full_mask(rank)
                for axis in load.pattern:
                    mask &= ~(1 << coordinates.index(axis))
            reduce.append(mask)
            dtypes.append(captures[load.capture].dtype)
            if load.pattern is None:
                reduce.append(0)
                dtypes.append(torch.int64)
    outputs = _evaluate_derivative(
        derivative, space, [*elements, *cotangents], captures, reduce, dtypes, channels_last
    )
    stream = iter(outputs)
    for name in wrt:
        value = next(stream)
        if name in position:
            index = position[name]
            shape = elements[index].shape
            results[index] = value if value.shape == shape else value.reshape(shape)
            continue
        load = program.loads[int(name.split(":")[1])]
        target = captures[load.capture]
        if load.pattern is None:
            where = next(stream)
            flat = target.new_zeros(target.numel())
            grad = flat.index_put((where.reshape(-1),), value.reshape(-1), accumulate=True)
            grad = grad.reshape(target.shape)
        else:
            grad = _to_capture(value, load.pattern, coordinate_names(program), target.shape)
        index = len(elements) + load.capture
        previous = results[index]
        results[index] = grad if previous is None else previous + grad
    return tuple(results)


@functools.cache
def _without_plain_indices(program: Program) -> Program:
    """Drop the index outputs of loads at plain coordinates: their gradient is a sum over axes."""
    keep = [
        k
        for k, out in enumerate(program.outputs)
        if not (
            out.name.startswith("i_load:")
            and program.loads[int(out.name.split(":")[1])].pattern is not None
        )
    ]
    if len(keep) == len(program.outputs):
        return program
    graph = fx.Graph()
    results: Any = graph.graph_copy(program.graph, {})
    graph.output(tuple(results[k] for k in keep))
    outputs = tuple(program.outputs[k] for k in keep)
    return replace(program, graph=graph, outputs=outputs, _derived={})


def broadcast_mask(shape: Sequence[int], space: Sequence[int]) -> int:
    """Bits of the axes along which a tensor is broadcast to an index space."""
    lead = len(space) - len(shape)
    mask = (1 << lead) - 1
    for axis, size in enumerate(shape):
        if size == 1 and space[lead + axis] != 1:
            mask |= 1 << (lead + axis)
    return mask


def _to_capture(
    value: Tensor, pattern: tuple[str, ...], names: tuple[str, ...], shape: torch.Size
) -> Tensor:
    """Rearrange a gradient summed over the unused axes into the captured tensor's axes.

    The captured tensor may be larger than the index space: what lies outside was never read.
    """
    axes = [names.index(name) for name in pattern]
    rest = [axis for axis in range(len(names)) if axis not in axes]
    value = value.permute(*axes, *rest).reshape([value.shape[axis] for axis in axes])
    if value.shape != shape:
        missing = [want - have for want, have in zip(shape, value.shape, strict=True)]
        padding = [amount for gap in reversed(missing) for amount in (0, gap)]
        value = torch.nn.functional.pad(value, padding)
    return value


def _evaluate_derivative(
    derivative: Program,
    space: tuple[int, ...],
    elements: list[Tensor],
    captures: Sequence[Tensor],
    reduce: list[int],
    dtypes: list[torch.dtype],
    channels_last: bool,
) -> list[Tensor]:
    """One fused call, except that outputs which are an operand unchanged need no kernel."""
    direct = passed_through(derivative)
    if all(name is not None for name in direct):
        operands = [a.name for a in derivative.arguments if a.role is Role.ELEMENT]
        results = []
        for name, mask, dtype in zip(direct, reduce, dtypes, strict=True):
            value = elements[operands.index(name)]  # type: ignore[arg-type]
            if value.shape != space:
                value = value.expand(space)
            if mask:
                value = value.sum(dims_of(mask, len(space)), keepdim=True, dtype=dtype)
            results.append(value.to(dtype))
        return results
    return list(
        ELEMENTWISE(
            register_program(derivative),
            list(space),
            elements,
            list(captures),
            reduce,
            dtype_codes(dtypes),
            channels_last,
        )
    )


@functools.cache
def passed_through(program: Program) -> tuple[str | None, ...]:
    """For each output, the ELEMENT argument that it equals, if it is one."""
    placeholders = {}
    arguments = iter(program.arguments)
    for node in program.lowered.nodes:
        if node.op == "placeholder":
            placeholders[node] = next(arguments)
    (output,) = [node for node in program.lowered.nodes if node.op == "output"]
    names: list[str | None] = []
    for value in output.args[0]:
        argument = placeholders.get(value)
        if argument is not None and argument.role is Role.ELEMENT:
            names.append(argument.name)
        else:
            names.append(None)
    return tuple(names)


__all__ = [
    "ELEMENTWISE",
    "allocate",
    "apply",
    "apply_into",
    "broadcast_mask",
    "dims_of",
    "dtype_codes",
    "finish_sums",
    "passed_through",
    "pull_back",
    "summed_in_kernel",
    "unshared",
]
