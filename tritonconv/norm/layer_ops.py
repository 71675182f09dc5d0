"""PyTorch operators of layer normalisation.

``layer_norm`` returns beside its result what its gradient needs of every row;
``layer_norm_backward`` is that gradient, and has one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..runtime import library
from ..runtime.device import device_facts
from ..runtime.launch import Executable
from . import layer_reference as reference
from .launches import PREPARED, WITH_TORCH, Prepared, kind, named, refresh, serves
from .layer_plans import backward_plan, forward_plan
from .layer_problem import MAX_COLUMNS, LayerNormProblem
from .problem import DTYPES
from .reference import wide_dtype

Tensor = torch.Tensor


def empty_output(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty result: rows one after the other, as the kernels write them."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def empty_statistics(x: Tensor, dims: int) -> Tensor:
    """Memory for mean and 1 / √(var + eps) of every row."""
    rows = math.prod(x.shape[: x.dim() - dims])
    return torch.empty((2, rows), dtype=wide_dtype(x.dtype), device=x.device)


def _served(
    x: Tensor, dims: int, output: torch.dtype, weight: Tensor | None, bias: Tensor | None
) -> bool:
    """Whether the kernels take these tensors, the input being made contiguous."""
    return (
        output in DTYPES
        and math.prod(x.shape[x.dim() - dims :]) <= MAX_COLUMNS
        and serves(x, (weight, bias))
    )


def _problem(
    x: Tensor,
    dims: int,
    output: torch.dtype,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> LayerNormProblem:
    return LayerNormProblem(
        math.prod(x.shape[: x.dim() - dims]),
        math.prod(x.shape[x.dim() - dims :]),
        x.dtype,
        output,
        None if weight is None else weight.dtype,
        None if bias is None else bias.dtype,
        float(eps),
    )


def prepared_forward(
    x: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    stats: bool = True,
) -> Prepared:
    """The launch that normalises contiguous inputs of this kind.

    Tensors: input, output, stats if they are asked for, and those there are of weight and bias.
    """
    refresh()
    key = ("layer", x.shape, x.dtype, x.device, dims, kind(weight), kind(bias), eps, dtype, stats)
    found = PREPARED.get(key)
    if found is None:
        found = WITH_TORCH
        if _served(x, dims, dtype, weight, bias):
            plan = forward_plan(_problem(x, dims, dtype, weight, bias, eps), stats)
            names = named(input=x, output=x, stats=x if stats else None, weight=weight, bias=bias)
            found = Prepared(Executable(plan, tuple(names)))
        PREPARED[key] = found
    return found


def prepared_backward(
    grad: Tensor,
    x: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    needed: Sequence[bool],
) -> Prepared:
    """The launches of the gradients that are needed, for contiguous tensors of this kind.

    Tensors: input, grad, stats, the weight if there is one, and the gradients of input, weight and
    bias that are needed.
    """
    refresh()
    output = grad.dtype
    key = (
        "layer backward",
        x.shape,
        x.dtype,
        x.device,
        dims,
        kind(weight),
        kind(bias),
        output,
        *needed,
    )
    found = PREPARED.get(key)
    if found is None:
        found = WITH_TORCH
        if _served(x, dims, output, weight, bias):
            need_x, need_weight, need_bias = needed
            problem = _problem(x, dims, output, weight, bias, 0.0)
            plan = backward_plan(problem, device_facts(x.device), (need_x, need_weight, need_bias))
            names = named(
                input=x,
                grad=grad,
                stats=x,
                weight=weight,
                grad_input=x if need_x else None,
                grad_weight=x if need_weight else None,
                grad_bias=x if need_bias else None,
            )
            found = Prepared(Executable(plan, tuple(names)))
        PREPARED[key] = found
    return found


def _forward(
    x: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    launch = prepared_forward(x, dims, weight, bias, eps, dtype).executable
    if launch is None:
        y, stats = reference.normalise(x, dims, weight, bias, eps, dtype)
        return empty_output(x, dtype).copy_(y), stats
    x = x.contiguous()
    y, stats = empty_output(x, dtype), empty_statistics(x, dims)
    launch(x, y, stats, *[t for t in (weight, bias) if t is not None])
    return y, stats


def _forward_fake(
    x: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return empty_output(x, dtype), empty_statistics(x, dims)


class _Forward(library.OpFunction):
    """The statistics are constants to autograd: the gradient that reads them knows them."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        y, stats = LAYER_NORM.below_autograd(*args)
        return y, stats

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.dims, weight, bias, ctx.eps, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, output[1], weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 6
        asked = ctx.needs_input_grad
        needed = [asked[0], asked[2], asked[3]]
        x, stats, weight, bias = ctx.saved_tensors
        dx, dw, db = gradients(grad, x, stats, ctx.dims, weight, bias, ctx.eps, needed)
        return dx, None, dw, db, None, None


def gradients(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needed: list[bool],
) -> list[Tensor | None]:
    """Gradients of input, weight and bias, those that are needed, differentiably.

    Args:
        grad: of the result.
        x, dims, weight, bias, eps: of the normalisation.
        stats: what it returned beside the result.
        needed: of each of the three, whether it is.
    """
    if not any(needed):
        return [None] * 3
    computed = iter(LAYER_NORM_BACKWARD(grad, x, stats, dims, weight, bias, eps, needed))
    return [next(computed) if wanted else None for wanted in needed]


def _backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needed: Sequence[bool],
) -> list[Tensor]:
    launch = prepared_backward(grad, x, dims, weight, bias, needed).executable
    results = _backward_fake(grad, x, stats, dims, weight, bias, eps, needed)
    if launch is None or stats.dtype is not torch.float32:
        found = reference.gradients(grad, x, stats, dims, weight, bias, needed)
        return [empty.copy_(t) for empty, t in zip(results, found, strict=True)]
    read = [x.contiguous(), grad.contiguous(), stats.contiguous()]
    launch(*read, *([] if weight is None else [weight]), *results)
    return results


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needed: Sequence[bool],
) -> list[Tensor]:
    results = [empty_output(x, x.dtype)] if needed[0] else []
    for wanted, t in zip(needed[1:], (weight, bias), strict=True):
        if wanted:
            assert t is not None
            results.append(empty_output(t, t.dtype))
    return results


class _Backward(library.OpFunction):
    """The gradients of a normalisation; their own are PyTorch's of the formula."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(LAYER_NORM_BACKWARD.below_autograd(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad, x, _, ctx.dims, weight, bias, ctx.eps, ctx.needed = inputs
        ctx.save_for_backward(grad, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        tensors = list(ctx.saved_tensors)
        places = (0, 1, 4, 5)  # of the tensors among the arguments, the statistics left out
        free = [
            k
            for k, place in enumerate(places)
            if tensors[k] is not None and ctx.needs_input_grad[place]
        ]

        def formula(*values: Tensor) -> tuple[Tensor, ...]:
            given = list(tensors)
            for k, value in zip(free, values, strict=True):
                given[k] = value
            grad, x, weight, bias = given
            stats = reference.statistics(x, ctx.dims, ctx.eps)
            return tuple(reference.gradients(grad, x, stats, ctx.dims, weight, bias, ctx.needed))

        results: list[Tensor | None] = [None] * 8
        if free:
            _, pull = torch.func.vjp(formula, *[tensors[k] for k in free])  # type: ignore[misc]
            for k, found in zip(free, pull(tuple(cotangents)), strict=True):
                results[places[k]] = found
        return tuple(results)


LAYER_NORM = library.define(
    "layer_norm",
    "(Tensor input, int dims, Tensor? weight, Tensor? bias, float eps, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _Forward.run,
)
LAYER_NORM_BACKWARD = library.define(
    "layer_norm_backward",
    "(Tensor grad, Tensor input, Tensor stats, int dims, Tensor? weight, Tensor? bias, float eps, "
    "bool[] needed) -> Tensor[]",
    _backward,
    _backward_fake,
    lambda *args: list(_Backward.run(*args)),
)

__all__ = [
    "LAYER_NORM",
    "LAYER_NORM_BACKWARD",
    "empty_output",
    "empty_statistics",
    "gradients",
    "prepared_backward",
    "prepared_forward",
]
