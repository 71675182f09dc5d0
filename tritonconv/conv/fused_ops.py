"""PyTorch operators of a convolution with a fused epilogue, and their derivatives.

The product is ``conv(x, w)`` or, for a transposed convolution, its adjoint ``dgrad(x, w)``, whose
spatial extent is given as ``result``. The backward of ``y = f(product, …)`` runs the generated
derivative of f (``tritonconv::elementwise``) and then the two gradients of the product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..codegen.elementwise import pull_back, unshared
from ..codegen.ir import Role
from ..codegen.program import Program, ScalarFunction
from ..codegen.registry import program_of
from ..runtime import library, tables
from ..runtime.backend import uses_triton
from .dispatch import Runner, runner
from .epilogue import apply_with_torch
from .ops import (
    CONV,
    CONV_WGRAD,
    FORWARD,
    GEOMETRY,
    conv_fake,
    dgrad_fake,
    dgrad_problem,
    dgrad_with_torch,
    forward_problem,
    gradients,
    has_kernels,
    is_channels_last,
    note,
    product_with_torch,
    refresh,
)
from .prepared_products import prepared_product
from .problem import ConvProblem, EpilogueSpec

Tensor = torch.Tensor


def _epilogue_impl(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    save_acc: bool,
    geometry: tuple[Any, ...],
    result: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    stride, padding, dilation, groups, precision = geometry
    refresh()
    if not uses_triton(x.device) or not has_kernels(x):
        if tables.is_recording():
            note(problem_of(x, w, operands, captures, function, save_acc, geometry, result))
        if result is None:
            acc = product_with_torch(x, w, *geometry)
        else:
            acc = dgrad_with_torch(x, w, result, geometry)
        y = apply_with_torch(function, acc, operands, captures)
        return torch.empty_like(acc).copy_(y), acc
    key = (
        x.shape,
        x.stride(),
        w.shape,
        w.stride(),
        x.dtype,
        x.device,
        *stride,
        *padding,
        *dilation,
        groups,
        precision,
        function,
        save_acc,
        result if result is None else tuple(result),
        *[(t.dtype, t.shape, t.stride()) for t in operands],
        *[(t.dtype, t.shape, t.stride()) for t in captures],
    )
    found = FORWARD.get(key)
    if found is None:
        problem = problem_of(x, w, operands, captures, function, save_acc, geometry, result)
        found = _prepare(key, problem, x)
    prepared, shape, strides = found
    y = torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)
    saved = torch.empty_like(y) if save_acc else None
    if prepared is not None:
        outputs = (y,) if saved is None else (y, saved)
        prepared(x, w, *outputs, *operands, *captures)
    return y, saved


def problem_of(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str | None,
    save_acc: bool,
    geometry: tuple[Any, ...],
    result: Sequence[int] | None,
) -> ConvProblem:
    """The product with its epilogue; without one where ``function`` is None."""
    if result is None:
        bare = forward_problem(x, w, *geometry)
    else:
        bare = dgrad_problem(x, w, result, geometry)
    if function is None:
        return bare
    spec = EpilogueSpec(
        function,
        tuple(t.dtype for t in operands),
        tuple(tuple(t.expand(bare.result_shape).stride()) for t in operands),
        tuple(t.dtype for t in captures),
        tuple(tuple(t.shape) for t in captures),
        tuple(tuple(t.stride()) for t in captures),
        save_acc,
    )
    return replace(bare, epilogue=spec)


def _prepare(
    key: Any, problem: ConvProblem, x: Tensor
) -> tuple[Runner | None, tuple[int, ...], tuple[int, ...]]:
    prepared = None if 0 in problem.result_shape else runner(problem, x.device)
    found = (prepared, problem.result_shape, problem.result_strides)
    if prepared is None or prepared.asked.final:
        FORWARD[key] = found
    return found


def captures_of(function: str) -> bool:
    """Whether an epilogue reads captured tensors."""
    return bool(program_of(function).captures)


def prepared_forward(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    function: str | None,
    geometry: tuple[Any, ...],
    result: list[int] | None = None,
    squeezed: bool = False,
) -> tuple[Callable[..., Tensor] | None, bool]:
    """The launch alone, for tensors like these and no gradient; None where PyTorch computes.

    The launch takes (x, w, *operands) and reads them by pointer: their shapes are settled.
    The second result says whether this holds for later calls too.

    Args:
        x, w, operands, function, geometry: of the call.
        result: spatial extent of a transposed convolution's result; None for a convolution.
        squeezed: the launch's result has no first spatial axis (which is of size one).
    """
    if not uses_triton(x.device) or not has_kernels(x):
        return None, True
    if function is not None and captures_of(function):
        return None, True
    problem = problem_of(x, w, operands, [], function, False, geometry, result)
    if 0 in problem.result_shape or 0 in problem.w_shape or 0 in x.shape:
        return None, True
    prepared = runner(problem, x.device)
    if prepared.executable is None or not prepared.asked.final:
        return None, prepared.asked.final
    return prepared_product(prepared, x, w, geometry[1], squeezed), True


@functools.cache
def as_elements(program: Program) -> Program:
    """The epilogue read from memory: its accumulator is an operand like the others."""
    return ScalarFunction(program, ()).with_roles(acc=Role.ELEMENT).program


def _wanted(program: Program, needs: Sequence[bool]) -> tuple[str, ...]:
    """Names to differentiate by: ``needs`` has acc, then operands, then captures."""
    operands = [a for a in program.arguments if a.role is not Role.COORD]
    wrt = [
        a.name
        for a, need in zip(operands, needs, strict=False)
        if need and a.dtype.is_floating_point
    ]
    for k, load in enumerate(program.loads):
        if needs[len(operands) + load.capture] and load.dtype.is_floating_point:
            wrt.append(f"load:{k}")
    return tuple(wrt)


def read_by_gradients(function: str, needs: Sequence[bool]) -> tuple[bool, ...]:
    """For the accumulator and every operand, whether the gradients wanted of an epilogue read it.

    What they do not read need not be kept, and may change before they are asked for.

    Args:
        function: key of the epilogue.
        needs: for the accumulator, the operands and the captures, whether a gradient is wanted.
    """
    program = program_of(function)
    wrt = _wanted(program, needs)
    live = program.vjp(wrt).live if wrt else ()
    return tuple([a.name in live for a in program.arguments if a.role is not Role.COORD])


def stand_in(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """For an operand of which nothing is read but the shape and the dtype."""
    return like.new_empty((1,) * len(shape), dtype=dtype).expand(shape)


class _Epilogue(library.OpFunction):
    """y = f(product, …); returns (y, acc) when f's gradient reads the accumulator.

    The accumulator is a differentiable output: a second derivative reaches x and w through it.
    """

    @staticmethod
    def forward(
        function: str,
        geometry: tuple[Any, ...],
        result: list[int] | None,
        save_acc: bool,
        count: int,
        x: Tensor,
        w: Tensor,
        *tensors: Tensor,
    ) -> Any:
        operands, captures = list(tensors[:count]), list(tensors[count:])
        if result is None:
            op = CONV_EPILOGUE_ACC if save_acc else CONV_EPILOGUE
            return op.below_autograd(x, w, operands, captures, function, *geometry)
        op = DGRAD_EPILOGUE_ACC if save_acc else DGRAD_EPILOGUE
        return op.below_autograd(x, w, result, operands, captures, function, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, ctx.geometry, ctx.result, ctx.save_acc, ctx.count, x, w, *tensors = inputs
        y, acc = output if ctx.save_acc else (output, None)
        ctx.channels_last = is_channels_last(y)
        ctx.shape = y.shape
        ctx.dtype = y.dtype
        ctx.in_size, ctx.kernel = list(x.shape[2:]), list(w.shape[2:])
        need_x, need_w = ctx.needs_input_grad[5:7]
        needs = [need_x or need_w, *ctx.needs_input_grad[7:]]
        read = [*read_by_gradients(ctx.function, needs)[1:], *[True] * (len(tensors) - ctx.count)]
        ctx.forms = [(t.shape, t.dtype) for t in tensors]
        kept = [t if keep else None for t, keep in zip(tensors, read, strict=True)]
        ctx.save_for_backward(x if need_w else None, w if need_x else None, acc, *kept)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_acc: Tensor | None = None) -> tuple[Any, ...]:
        x, w, acc, *tensors = ctx.saved_tensors
        need_x, need_w, *need_tensors = ctx.needs_input_grad[5:]
        results: tuple[Tensor | None, ...] = (None,) * (1 + len(tensors))
        if grad is not None:
            pairs = zip(tensors, ctx.forms, strict=True)
            tensors = [stand_in(grad, *form) if t is None else t for t, form in pairs]
            # Where the derivative does not read the accumulator any tensor stands in for it.
            first = acc if acc is not None else grad
            results = pull_back(
                as_elements(program_of(ctx.function)),
                ctx.shape,
                [first, *tensors[: ctx.count]],
                tensors[ctx.count :],
                [grad],
                [need_x or need_w, *need_tensors],
                ctx.channels_last,
            )
        through, *rest = results
        rest = list(unshared(rest, (grad,)))
        if through is not None and grad_acc is not None:
            through = through + grad_acc
        elif through is None:
            through = grad_acc
        grad_x = grad_w = None
        if through is not None and ctx.result is None:
            grad_x, grad_w = gradients(
                through, x, w, need_x, need_w, ctx.in_size, ctx.kernel, ctx.geometry
            )
        elif through is not None:
            if need_x:
                grad_x = CONV(through, w, *ctx.geometry)
            if need_w:
                grad_w = CONV_WGRAD(x, through, ctx.kernel, *ctx.geometry)
        return (None,) * 5 + (grad_x, grad_w, *rest)


def _differentiable(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    geometry: tuple[Any, ...],
    result: list[int] | None,
) -> Tensor:
    """Save the accumulator only where the derivative that may be asked for reads it."""
    needs = [x.requires_grad or w.requires_grad]
    needs += [t.requires_grad for t in (*operands, *captures)]
    if torch._C._are_functorch_transforms_active():
        # What an outer transform differentiates by does not show at this level.
        needs = [True] * len(needs)
    save_acc = read_by_gradients(function, needs)[0]
    found = _Epilogue.run(
        function, geometry, result, save_acc, len(operands), x, w, *operands, *captures
    )
    return found[0] if save_acc else found


Tensors = list[Tensor]


def _conv_epilogue(x: Tensor, w: Tensor, o: Tensors, c: Tensors, f: str, *g: Any) -> Tensor:
    return _epilogue_impl(x, w, o, c, f, False, g)[0]


def _conv_epilogue_acc(x: Tensor, w: Tensor, o: Tensors, c: Tensors, f: str, *g: Any) -> Any:
    return _epilogue_impl(x, w, o, c, f, True, g)


def _dgrad_epilogue(
    x: Tensor, w: Tensor, result: list[int], o: Tensors, c: Tensors, f: str, *g: Any
) -> Tensor:
    return _epilogue_impl(x, w, o, c, f, False, g, result)[0]


def _dgrad_epilogue_acc(
    x: Tensor, w: Tensor, result: list[int], o: Tensors, c: Tensors, f: str, *g: Any
) -> Any:
    return _epilogue_impl(x, w, o, c, f, True, g, result)


_EPILOGUE = f"Tensor[] operands, Tensor[] captures, str function, {GEOMETRY}"
CONV_EPILOGUE = library.define(
    "conv_epilogue",
    f"(Tensor input, Tensor weight, {_EPILOGUE}) -> Tensor",
    _conv_epilogue,
    lambda x, w, o, c, f, *g: conv_fake(x, w, *g),
    lambda x, w, o, c, f, *g: _differentiable(x, w, o, c, f, g, None),
)
CONV_EPILOGUE_ACC = library.define(
    "conv_epilogue_acc",
    f"(Tensor input, Tensor weight, {_EPILOGUE}) -> (Tensor, Tensor)",
    _conv_epilogue_acc,
    lambda x, w, o, c, f, *g: (conv_fake(x, w, *g), conv_fake(x, w, *g)),
    lambda x, w, o, c, f, *g: _Epilogue.run(f, g, None, True, len(o), x, w, *o, *c),
)
DGRAD_EPILOGUE = library.define(
    "conv_dgrad_epilogue",
    f"(Tensor input, Tensor weight, SymInt[] result, {_EPILOGUE}) -> Tensor",
    _dgrad_epilogue,
    lambda x, w, r, o, c, f, *g: dgrad_fake(x, w, r, *g),
    lambda x, w, r, o, c, f, *g: _differentiable(x, w, o, c, f, g, r),
)
DGRAD_EPILOGUE_ACC = library.define(
    "conv_dgrad_epilogue_acc",
    f"(Tensor input, Tensor weight, SymInt[] result, {_EPILOGUE}) -> (Tensor, Tensor)",
    _dgrad_epilogue_acc,
    lambda x, w, r, o, c, f, *g: (dgrad_fake(x, w, r, *g), dgrad_fake(x, w, r, *g)),
    lambda x, w, r, o, c, f, *g: _Epilogue.run(f, g, r, True, len(o), x, w, *o, *c),
)
