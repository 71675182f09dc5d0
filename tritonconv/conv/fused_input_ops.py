"""PyTorch operators of convolutions with a prologue, two inputs or statistics of their output.

``tritonconv::conv_fused`` computes, for one or two inputs,

    y = f(conv(g(x), w), …)   or   y = f(conv([x, second], w), …)

and, if asked, mean and biased variance of every channel of y. Its backward is made of operators
that have gradients themselves: generated elementwise functions, and the products of ``ops``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..codegen import Argument, Role, trace
from ..codegen.elementwise import ELEMENTWISE, apply, dtype_codes, pull_back, unshared
from ..codegen.program import Program, ScalarFunction
from ..codegen.registry import program_of, register_program
from ..runtime import library, tables
from ..runtime.backend import uses_triton
from . import ops
from .dispatch import runner
from .epilogue import COORDINATES, apply_with_torch
from .fused_dispatch import FUSED_OPERATORS, fused_problem, fused_runner
from .fused_ops import _wanted, as_elements
from .fused_problem import FusedProblem
from .ops import (
    CONV,
    CONV_DGRAD,
    CONV_WGRAD,
    FORWARD,
    GEOMETRY,
    empty,
    forward_problem,
    is_channels_last,
    product_with_torch,
    refresh,
    result_channels_last,
)
from .problem import Direction, EpilogueSpec, dense_strides, output_size
from .prologue import apply_prologue

Tensor = torch.Tensor
Tensors = list[Tensor]


def serves(x: Tensor, groups: int, channels: int) -> bool:
    """Whether a fused kernel serves inputs like this one better than separate ones.

    Narrow groups have kernels of their own, with which a blocked product cannot compare.
    """
    return (
        uses_triton(x.device)
        and x.dim() - 2 in FUSED_OPERATORS
        and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and (groups == 1 or channels >= 16)
    )


def _spec(
    problem_shape: Sequence[int],
    function: str,
    operands: Tensors,
    captures: Tensors,
    save_acc: bool,
) -> EpilogueSpec:
    return EpilogueSpec(
        function,
        tuple(t.dtype for t in operands),
        tuple(tuple(t.expand(tuple(problem_shape)).stride()) for t in operands),
        tuple(t.dtype for t in captures),
        tuple(tuple(t.shape) for t in captures),
        tuple(tuple(t.stride()) for t in captures),
        save_acc,
    )


def _problem(
    inputs: Tensors,
    w: Tensor,
    reads: Tensors,
    prologue: str,
    operands: Tensors,
    captures: Tensors,
    function: str,
    save_acc: bool,
    stats: bool,
    geometry: tuple[Any, ...],
) -> FusedProblem:
    x = inputs[0]
    bare = forward_problem(x, w, *geometry)
    second = 0
    strides: tuple[int, ...] = ()
    if len(inputs) == 2:
        second, strides = inputs[1].shape[1], tuple(inputs[1].stride())
        bare = replace(bare, in_channels=x.shape[1] + second)
    if function:
        spec = _spec(bare.y_shape, function, operands, captures, save_acc)
        bare = replace(bare, epilogue=spec)
    before = _spec((), prologue, [], reads, False) if prologue else None
    return fused_problem(bare, before, second, strides, stats)


def _fused(
    inputs: Tensors,
    w: Tensor,
    reads: Tensors,
    prologue: str,
    operands: Tensors,
    captures: Tensors,
    function: str,
    save_acc: bool,
    stats: bool,
    *geometry: Any,
) -> Tensors:
    refresh()
    x = inputs[0]
    stride, padding, dilation, groups, precision = geometry
    asked = (inputs, w, reads, prologue, operands, captures, function, save_acc, stats, geometry)
    size = output_size(x.shape[2:], w.shape[2:], stride, ops.pairs(padding), dilation)
    if not serves(x, groups, w.shape[1]) or 0 in (*x.shape, *w.shape, *size):
        if tables.is_recording() and x.dim() - 2 in FUSED_OPERATORS:
            tables.note(FUSED_OPERATORS[x.dim() - 2], _problem(*asked))
        return _with_torch(*asked)
    key = (
        "fused",
        *[(t.shape, t.stride()) for t in inputs],
        w.shape,
        w.stride(),
        x.dtype,
        x.device,
        *stride,
        *padding,
        *dilation,
        groups,
        precision,
        prologue,
        function,
        save_acc,
        stats,
        *[(t.dtype, t.shape, t.stride()) for t in (*reads, *operands, *captures)],
    )
    found = FORWARD.get(key)
    if found is None:
        problem = _problem(*asked)
        found = (fused_runner(problem, x.device), problem.y_shape, problem.y_strides)
        if found[0].asked.final:
            FORWARD[key] = found
    prepared, shape, strides = found
    assert prepared is not None
    y = torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)
    outputs = [y, torch.empty_like(y)] if save_acc else [y]
    if stats:
        outputs += [torch.empty(shape[1], device=x.device, dtype=torch.float32) for _ in "12"]
    prepared(*inputs, w, *outputs, *operands, *captures, *reads)
    return outputs


def _with_torch(
    inputs: Tensors,
    w: Tensor,
    reads: Tensors,
    prologue: str,
    operands: Tensors,
    captures: Tensors,
    function: str,
    save_acc: bool,
    stats: bool,
    geometry: tuple[Any, ...],
) -> Tensors:
    x = inputs[0]
    if prologue:
        x = apply_prologue(prologue, x, reads)
    if len(inputs) == 2:
        x = torch.cat(inputs, 1)
    channels_last = result_channels_last(inputs[0], w)
    acc = product_with_torch(x, w, *geometry)
    y = apply_with_torch(function, acc, operands, captures) if function else acc
    outputs = [empty(acc.shape, acc.dtype, acc.device, channels_last).copy_(y)]
    if save_acc:
        outputs.append(empty(acc.shape, acc.dtype, acc.device, channels_last).copy_(acc))
    if stats:
        wide = y.to(statistics_dtype(y.dtype))
        axes = [0, *range(2, y.dim())]
        outputs += torch.var_mean(wide, axes, correction=0)[::-1]
    return outputs


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of mean and variance of an output."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _fused_fake(
    inputs: Tensors,
    w: Tensor,
    reads: Tensors,
    prologue: str,
    operands: Tensors,
    captures: Tensors,
    function: str,
    save_acc: bool,
    stats: bool,
    *geometry: Any,
) -> Tensors:
    x = inputs[0]
    stride, padding, dilation = geometry[:3]
    size = output_size(x.shape[2:], w.shape[2:], stride, ops.pairs(padding), dilation)
    shape = (x.shape[0], w.shape[0], *size)
    channels_last = result_channels_last(x, w)
    outputs = [empty(shape, x.dtype, x.device, channels_last) for _ in range(1 + save_acc)]
    if stats:
        dtype = statistics_dtype(x.dtype)
        outputs += [x.new_empty((w.shape[0],), dtype=dtype) for _ in "12"]
    return outputs


@functools.cache
def _fold(rank: int, dtype: torch.dtype) -> ScalarFunction:
    """Gradient of y through y itself, its mean and its biased variance."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    names = ("grad", "y", "mean", "grad_of_mean", "grad_of_var", "share")
    arguments = [Argument(name, wide, Role.ELEMENT) for name in names]
    arguments += [Argument(name, torch.int32, Role.COORD) for name in COORDINATES[rank]]
    return trace(_fold_statistics, arguments)


def _fold_statistics(
    grad: Tensor,
    y: Tensor,
    mean: Tensor,
    grad_of_mean: Tensor,
    grad_of_var: Tensor,
    share: Tensor,
    *coordinates: Tensor,
) -> Tensor:
    """grad + share · (∂mean + 2 (y − mean) ∂var), share being one over the number of pixels."""
    return grad + share * (grad_of_mean + 2.0 * (y - mean) * grad_of_var)


class _Fused(library.OpFunction):
    """Any fused forward product; outputs are y, the saved accumulator, mean and variance.

    All outputs are differentiable: a second derivative passes through the saved ones.
    """

    @staticmethod
    def forward(
        prologue: str,
        function: str,
        flags: tuple[bool, bool],
        counts: tuple[int, int, int],
        geometry: tuple[Any, ...],
        w: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs, reads, operands, captures = _parts(tensors, counts)
        return tuple(
            CONV_FUSED.below_autograd(
                inputs, w, reads, prologue, operands, captures, function, *flags, *geometry
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.prologue, ctx.function, ctx.flags, ctx.counts, ctx.geometry, w, *tensors = inputs
        save_acc, stats = ctx.flags
        y, rest = output[0], list(output[1:])
        acc = rest.pop(0) if save_acc else None
        mean = rest[0] if stats else None
        ctx.channels_last = is_channels_last(y)
        ctx.shape = y.shape
        ctx.save_for_backward(w, y if stats else None, acc, mean, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *more: Tensor | None) -> tuple[Any, ...]:
        w, y, acc, mean, *tensors = ctx.saved_tensors
        save_acc, stats = ctx.flags
        grad_acc = more[0] if save_acc else None
        grad_mean, grad_var = more[-2:] if stats else (None, None)
        need_w, *need = ctx.needs_input_grad[5:]
        inputs, reads, operands, captures = _parts(tensors, ctx.counts)
        need_inputs, need_reads, *need_rest = _parts(need, ctx.counts)
        need_product = need_w or any(need_inputs) or any(need_reads)
        if grad_mean is not None or grad_var is not None:
            grad = _through_statistics(ctx, grad, y, mean, grad_mean, grad_var)
        through = grad
        rest: list[Tensor | None] = [None] * (len(operands) + len(captures))
        if ctx.function and grad is not None:
            through, *rest = pull_back(
                as_elements(program_of(ctx.function)),
                ctx.shape,
                [acc if acc is not None else grad, *operands],
                captures,
                [grad],
                [need_product, *(n for part in need_rest for n in part)],
                ctx.channels_last,
            )
            rest = list(unshared(rest, (grad,)))
        if through is None:
            through = grad_acc
        elif grad_acc is not None:
            through = through + grad_acc
        grads: list[Any] = [None] * (1 + len(inputs) + len(reads))
        if through is not None and need_product:
            grads = _product_gradients(ctx, through, w, inputs, reads, need_w, need)
        return (None,) * 5 + (*grads, *rest)


def _through_statistics(
    ctx: Any,
    grad: Tensor | None,
    y: Tensor,
    mean: Tensor,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
) -> Tensor:
    rank = y.dim() - 2
    vector = (1, -1, *[1] * rank)
    zero = mean.new_zeros((1,) * y.dim())
    pixels = y.numel() // y.shape[1]
    share = torch.full((1,) * y.dim(), 1.0 / max(pixels, 1), dtype=mean.dtype, device=y.device)
    (result,) = apply(
        _fold(rank, y.dtype),
        ctx.shape,
        [
            zero if grad is None else grad,
            y,
            mean.reshape(vector),
            zero if grad_mean is None else grad_mean.reshape(vector),
            zero if grad_var is None else grad_var.reshape(vector),
            share,
        ],
        dtypes=[y.dtype],
        channels_last=ctx.channels_last,
    )
    return result


def _product_gradients(
    ctx: Any,
    through: Tensor,
    w: Tensor,
    inputs: Tensors,
    reads: Tensors,
    need_w: bool,
    need: Sequence[bool],
) -> list[Any]:
    """Gradients of the weight, the inputs and what the prologue reads."""
    geometry, kernel = ctx.geometry, list(w.shape[2:])
    in_size = list(inputs[0].shape[2:])
    grad_w: Tensor | None = None
    if len(inputs) == 2:
        if need_w:
            grad_w = CONV_WGRAD_TWO(through, *inputs, kernel, *geometry)
        halves = w.split([t.shape[1] for t in inputs], 1)
        found = [
            CONV_DGRAD(through, half, in_size, *geometry) if wanted else None
            for half, wanted in zip(halves, need, strict=False)
        ]
        return [grad_w, *found]
    x = inputs[0]
    if not ctx.prologue:
        if need_w:
            grad_w = CONV_WGRAD(through, x, kernel, *geometry)
        return [grad_w, CONV_DGRAD(through, w, in_size, *geometry) if need[0] else None]
    program = program_of(ctx.prologue)
    if need_w:
        grad_w = CONV_WGRAD(through, apply_elementwise(ctx.prologue, x, reads), kernel, *geometry)
    wanted = need[: 1 + len(reads)]
    if not any(wanted):
        return [grad_w, *[None] * (1 + len(reads))]
    behind = CONV_DGRAD(through, w, in_size, *geometry)
    results = pull_back(
        _of_elements(program), x.shape, [x], reads, [behind], wanted, is_channels_last(x)
    )
    return [grad_w, *results]


@functools.cache
def _of_elements(program: Program) -> Program:
    """The prologue of an input that is read from memory."""
    return ScalarFunction(program, ()).with_roles(x=Role.ELEMENT).program


@torch.compiler.assume_constant_result
def _elements_key(prologue: str) -> str:
    """Key of :func:`_of_elements`: a constant where code is compiled, which cannot follow it."""
    return register_program(_of_elements(program_of(prologue)))


def apply_elementwise(prologue: str, x: Tensor, reads: Sequence[Tensor]) -> Tensor:
    """A registered prologue of a whole input, in one differentiable launch."""
    result: Tensor = ELEMENTWISE(
        _elements_key(prologue),
        list(x.shape),
        [x],
        list(reads),
        [0],
        dtype_codes([x.dtype]),
        is_channels_last(x),
    )[0]
    return result


def _parts(values: Sequence[Any], counts: tuple[int, int, int]) -> list[list[Any]]:
    """Inputs, what the prologue reads, the epilogue's operands and captures."""
    bounds = [0, counts[0], counts[0] + counts[1], sum(counts), len(values)]
    return [list(values[a:b]) for a, b in itertools.pairwise(bounds)]


def _differentiable(
    inputs: Tensors,
    w: Tensor,
    reads: Tensors,
    prologue: str,
    operands: Tensors,
    captures: Tensors,
    function: str,
    save_acc: bool,
    stats: bool,
    *geometry: Any,
) -> Tensors:
    """Save the accumulator only where the derivative that may be asked for reads it."""
    asked = save_acc
    if function and not save_acc:
        program = program_of(function)
        needs = [any(t.requires_grad for t in (*inputs, w, *reads))]
        needs += [t.requires_grad for t in (*operands, *captures)]
        if torch._C._are_functorch_transforms_active():
            # What an outer transform differentiates by does not show at this level.
            needs = [True] * len(needs)
        wrt = _wanted(program, needs)
        save_acc = bool(wrt) and "acc" in program.vjp(wrt).live
    found = _Fused.run(
        prologue,
        function,
        (save_acc, stats),
        (len(inputs), len(reads), len(operands)),
        geometry,
        w,
        *inputs,
        *reads,
        *operands,
        *captures,
    )
    return [out for k, out in enumerate(found) if asked or not save_acc or k != 1]


def _wgrad_two(
    grad: Tensor, first: Tensor, second: Tensor, kernel: list[int], *geometry: Any
) -> Tensor:
    """Both halves of the weight's gradient, each written where it belongs."""
    inputs = (first, second)
    channels = [t.shape[1] for t in inputs]
    shape = (grad.shape[1], sum(channels), *kernel)
    channels_last = is_channels_last(first)
    out = empty(shape, grad.dtype, grad.device, channels_last)
    halves = out.split(channels, 1)
    direct = uses_triton(grad.device) and ops.has_kernels(grad)
    for x, half in zip(inputs, halves, strict=True):
        if not direct or 0 in (*x.shape, *half.shape, *grad.shape):
            half.copy_(CONV_WGRAD.implementation(grad, x, kernel, *geometry))
            continue
        given = (tuple(x.shape), tuple(x.stride()))
        place = (tuple(half.shape), tuple(half.stride()))
        problem = ops._gradient_problem(Direction.WGRAD, given, place, grad, *geometry)
        prepared = runner(problem, grad.device)
        if prepared.executable is None:
            half.copy_(CONV_WGRAD.implementation(grad, x, kernel, *geometry))
        else:
            prepared.executable(grad, x, half)
    return out


def _wgrad_two_fake(
    grad: Tensor, first: Tensor, second: Tensor, kernel: list[int], *geometry: Any
) -> Tensor:
    shape = (grad.shape[1], first.shape[1] + second.shape[1], *kernel)
    return empty(shape, grad.dtype, grad.device, is_channels_last(first))


class _WgradTwo(library.OpFunction):
    """w = wgrad(g, [x, second])."""

    @staticmethod
    def forward(
        grad: Tensor, first: Tensor, second: Tensor, kernel: list[int], *geometry: Any
    ) -> Tensor:
        return CONV_WGRAD_TWO.below_autograd(grad, first, second, kernel, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, first, second, _, *ctx.geometry = inputs
        ctx.save_for_backward(grad, first, second)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        grad, first, second = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        results: list[Tensor | None] = [None] * 3
        if need[0]:
            results[0] = conv_two(first, second, cotangent, ctx.geometry)
        halves = cotangent.split([first.shape[1], second.shape[1]], 1)
        for k, (x, half) in enumerate(zip((first, second), halves, strict=True), 1):
            if need[k]:
                results[k] = CONV_DGRAD(grad, half, list(x.shape[2:]), *ctx.geometry)
        return (*results, None) + (None,) * len(ctx.geometry)


def conv_two(first: Tensor, second: Tensor, w: Tensor, geometry: Sequence[Any]) -> Tensor:
    """conv([first, second], w)."""
    result: Tensor = CONV_FUSED([first, second], w, [], "", [], [], "", False, False, *geometry)[0]
    return result


CONV_FUSED = library.define(
    "conv_fused",
    "(Tensor[] inputs, Tensor weight, Tensor[] prologue_reads, str prologue, Tensor[] operands, "
    f"Tensor[] captures, str function, bool save_acc, bool stats, {GEOMETRY}) -> Tensor[]",
    _fused,
    _fused_fake,
    _differentiable,
)
CONV_WGRAD_TWO = library.define(
    "conv_wgrad_two",
    f"(Tensor grad_output, Tensor first, Tensor second, SymInt[] kernel, {GEOMETRY}) -> Tensor",
    _wgrad_two,
    _wgrad_two_fake,
    _WgradTwo.run,
)

__all__ = ["CONV", "CONV_FUSED", "CONV_WGRAD_TWO", "conv_two", "dense_strides", "serves"]
