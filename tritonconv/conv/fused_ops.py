"""PyTorch operators of a convolution with a fused epilogue, and their derivatives.

The backward of ``y = f(conv(x, w), …)`` runs the generated derivative of f
(``tritonconv::elementwise``) and then the two product gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..codegen.elementwise import pull_back
from ..codegen.ir import Role
from ..codegen.program import Program, ScalarFunction
from ..codegen.registry import program_of
from ..runtime import library, tables
from ..runtime.backend import uses_triton
from .dispatch import Runner, runner
from .epilogue import apply_with_torch
from .ops import (
    CONV_DGRAD,
    CONV_WGRAD,
    FORWARD,
    GEOMETRY,
    conv_fake,
    dgrad_problem,
    forward_problem,
    has_kernels,
    is_channels_last,
    note,
    product_with_torch,
    refresh,
)
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
) -> tuple[Tensor, Tensor | None]:
    stride, padding, dilation, groups, precision = geometry
    refresh()
    if not uses_triton(x.device) or not has_kernels(x):
        if tables.is_recording():
            note(_epilogue_problem(x, w, operands, captures, function, save_acc, geometry))
        acc = product_with_torch(x, w, *geometry)
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
        *[(t.dtype, t.shape, t.stride()) for t in operands],
        *[(t.dtype, t.shape, t.stride()) for t in captures],
    )
    found = FORWARD.get(key)
    if found is None:
        found = _prepare_epilogue(key, x, w, operands, captures, function, save_acc, geometry)
    prepared, shape, strides = found
    y = torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)
    saved = torch.empty_like(y) if save_acc else None
    if prepared is not None:
        outputs = (y,) if saved is None else (y, saved)
        prepared(x, w, *outputs, *operands, *captures)
    return y, saved


def _epilogue_problem(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    save_acc: bool,
    geometry: tuple[Any, ...],
) -> ConvProblem:
    bare = forward_problem(x, w, *geometry)
    spec = EpilogueSpec(
        function,
        tuple(t.dtype for t in operands),
        tuple(tuple(t.expand(bare.y_shape).stride()) for t in operands),
        tuple(t.dtype for t in captures),
        tuple(tuple(t.shape) for t in captures),
        tuple(tuple(t.stride()) for t in captures),
        save_acc,
    )
    return replace(bare, epilogue=spec)


def _prepare_epilogue(
    key: Any,
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    save_acc: bool,
    geometry: tuple[Any, ...],
) -> tuple[Runner | None, tuple[int, ...], tuple[int, ...]]:
    problem = _epilogue_problem(x, w, operands, captures, function, save_acc, geometry)
    empty = 0 in problem.y_shape
    prepared = None if empty else runner(problem, x.device)
    found = (prepared, problem.y_shape, problem.y_strides)
    if prepared is None or prepared.asked.final:
        FORWARD[key] = found
    return found


def _conv_epilogue(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    *geometry: Any,
) -> Tensor:
    return _epilogue_impl(x, w, operands, captures, function, False, geometry)[0]


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
    if result is not None:
        if function is not None:
            return None, True
        problem = dgrad_problem(x, w, result, geometry)
        shape, strides = problem.x_shape, problem.x_strides
    else:
        if function is None:
            problem = forward_problem(x, w, *geometry)
        else:
            problem = _epilogue_problem(x, w, operands, [], function, False, geometry)
            if program_of(function).captures:
                return None, True
        shape, strides = problem.y_shape, problem.y_strides
    dtype, device = x.dtype, x.device
    if 0 in shape or 0 in problem.w_shape or 0 in x.shape:
        return None, True
    prepared = runner(problem, device)
    executable = prepared.executable
    if executable is None or not prepared.asked.final:
        return None, prepared.asked.final
    if squeezed:
        shape, strides = (*shape[:2], *shape[3:]), (*strides[:2], *strides[3:])

    def forward(x: Tensor, w: Tensor, *operands: Tensor) -> Tensor:
        y = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        executable(x, w, y, *operands)
        return y

    return forward, True


def _conv_epilogue_fake(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    *geometry: Any,
) -> Tensor:
    return conv_fake(x, w, *geometry)


def _conv_epilogue_acc(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:
    y, acc = _epilogue_impl(x, w, operands, captures, function, True, geometry)
    assert acc is not None
    return y, acc


def _conv_epilogue_acc_fake(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:
    return conv_fake(x, w, *geometry), conv_fake(x, w, *geometry)


@functools.cache
def _as_elements(program: Program) -> Program:
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


class _ConvEpilogue(library.OpFunction):
    """y = f(conv(x, w), …); returns (y, acc) when f's gradient reads the accumulator.

    The accumulator is a differentiable output: a second derivative reaches x and w through it.
    """

    @staticmethod
    def forward(
        function: str,
        geometry: tuple[Any, ...],
        save_acc: bool,
        count: int,
        x: Tensor,
        w: Tensor,
        *tensors: Tensor,
    ) -> Any:
        operands, captures = list(tensors[:count]), list(tensors[count:])
        op = CONV_EPILOGUE_ACC if save_acc else CONV_EPILOGUE
        return op.below_autograd(x, w, operands, captures, function, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, ctx.geometry, ctx.save_acc, ctx.count, x, w, *tensors = inputs
        y, acc = output if ctx.save_acc else (output, None)
        ctx.channels_last = is_channels_last(y)
        ctx.shape = y.shape
        ctx.dtype = y.dtype
        ctx.in_size, ctx.kernel = list(x.shape[2:]), list(w.shape[2:])
        need_x, need_w = ctx.needs_input_grad[4:6]
        ctx.save_for_backward(x if need_w else None, w if need_x else None, acc, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_acc: Tensor | None = None) -> tuple[Any, ...]:
        x, w, acc, *tensors = ctx.saved_tensors
        need_x, need_w, *need_tensors = ctx.needs_input_grad[4:]
        results: tuple[Tensor | None, ...] = (None,) * (1 + len(tensors))
        if grad is not None:
            # Where the derivative does not read the accumulator any tensor stands in for it.
            stand_in = acc if acc is not None else grad
            results = pull_back(
                _as_elements(program_of(ctx.function)),
                ctx.shape,
                [stand_in, *tensors[: ctx.count]],
                tensors[ctx.count :],
                [grad],
                [need_x or need_w, *need_tensors],
                ctx.channels_last,
            )
        through, *rest = results
        if through is not None and grad_acc is not None:
            through = through + grad_acc
        elif through is None:
            through = grad_acc
        grad_x = grad_w = None
        if through is not None:
            if need_x:
                grad_x = CONV_DGRAD(through, w, ctx.in_size, *ctx.geometry)
            if need_w:
                grad_w = CONV_WGRAD(through, x, ctx.kernel, *ctx.geometry)
        return (None, None, None, None, grad_x, grad_w, *rest)


def _epilogue_autograd(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    *geometry: Any,
) -> Tensor:
    program = program_of(function)
    needs = [x.requires_grad or w.requires_grad]
    needs += [t.requires_grad for t in (*operands, *captures)]
    if torch._C._are_functorch_transforms_active():
        # What an outer transform differentiates by does not show at this level.
        needs = [True] * len(needs)
    wrt = _wanted(program, needs)
    save_acc = bool(wrt) and "acc" in program.vjp(wrt).live
    result = _ConvEpilogue.run(
        function, geometry, save_acc, len(operands), x, w, *operands, *captures
    )
    return result[0] if save_acc else result


def _epilogue_acc_autograd(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:
    return _ConvEpilogue.run(function, geometry, True, len(operands), x, w, *operands, *captures)


_EPILOGUE = f"Tensor[] operands, Tensor[] captures, str function, {GEOMETRY}"
CONV_EPILOGUE = library.define(
    "conv_epilogue",
    f"(Tensor input, Tensor weight, {_EPILOGUE}) -> Tensor",
    _conv_epilogue,
    _conv_epilogue_fake,
    _epilogue_autograd,
)
CONV_EPILOGUE_ACC = library.define(
    "conv_epilogue_acc",
    f"(Tensor input, Tensor weight, {_EPILOGUE}) -> (Tensor, Tensor)",
    _conv_epilogue_acc,
    _conv_epilogue_acc_fake,
    _epilogue_acc_autograd,
)
