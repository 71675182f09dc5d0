"""PyTorch operators of batch normalisation.

``batch_norm_statistics`` reads a map once and moves the running statistics; it has no gradient.
``batch_norm_apply`` normalises by given statistics, and where these are said to be of the map
itself its gradient goes through them too. ``batch_norm_backward`` is that gradient, and has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..runtime import library
from ..runtime.device import device_facts
from ..runtime.launch import Executable
from . import reference
from .launches import (
    PREPARED,
    WITH_TORCH,
    Prepared,
    empty_like,
    kind,
    layout,
    named,
    problem_of,
    refresh,
    serves,
)
from .plans import apply_plan, backward_plan, statistics_plan

Tensor = torch.Tensor


def _statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    momentum: float | None,
) -> tuple[Tensor, Tensor]:
    found = prepared_statistics(x, running_mean, running_var, tracked, momentum)
    if momentum is None and tracked is not None:
        tracked.add_(1)
    if found.executable is None:
        return _statistics_with_torch(x, running_mean, running_var, tracked, momentum)
    (x,) = found.dense(x)  # type: ignore[assignment]
    mean = torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
    var = torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
    changed = [t for t in (running_mean, running_var, tracked) if t is not None]
    found.executable(x, mean, var, *changed)
    torch.autograd.graph.increment_version(changed)
    return mean, var


def prepared_statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    momentum: float | None,
) -> Prepared:
    """The launch that computes the statistics of a map of this kind.

    Tensors: input, mean, var, and those there are of running_mean, running_var and tracked.
    """
    refresh()
    running = (running_mean, running_var)
    key = (
        "statistics",
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        kind(running_mean),
        kind(running_var),
        None if tracked is None else (tracked.dtype, tracked.device, tracked.numel()),
        momentum,
    )
    found = PREPARED.get(key)
    if found is None:
        found = WITH_TORCH
        counts = tracked is None or (
            tracked.dtype is torch.int64 and tracked.device == x.device and tracked.numel() == 1
        )
        if counts and serves(x, running):
            last, form, copied = layout(x)
            plan = statistics_plan(
                problem_of(x, last),
                device_facts(x.device),
                None
                if running_mean is None or running_var is None
                else (running_mean.dtype, running_var.dtype),
                momentum,
                tracked is not None,
            )
            names = named(
                input=x,
                mean=x,
                var=x,
                running_mean=running_mean,
                running_var=running_var,
                tracked=tracked,
            )
            found = Prepared(Executable(plan, tuple(names)), form, copied)
        PREPARED[key] = found
    return found


def _statistics_with_torch(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    momentum: float | None,
) -> tuple[Tensor, Tensor]:
    mean, var = reference.statistics(x)
    factor: Any = momentum
    if tracked is not None:
        if momentum is None:
            factor = 1.0 / tracked.to(mean.dtype)
        else:
            tracked.add_(1)
    if running_mean is not None and running_var is not None:
        count = x.numel() // max(x.shape[1], 1)
        unbiased = var * (count / max(count - 1, 1))
        for running, new in ((running_mean, mean), (running_var, unbiased)):
            running.copy_(running.to(new.dtype) * (1.0 - factor) + new * factor)
    return mean, var


def _statistics_fake(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    momentum: float | None,
) -> tuple[Tensor, Tensor]:
    dtype = reference.wide_dtype(x.dtype)
    return x.new_empty((x.shape[1],), dtype=dtype), x.new_empty((x.shape[1],), dtype=dtype)


class _Statistics(library.OpFunction):
    """The statistics are constants to autograd: the gradient of what reads them knows them."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        mean, var = BATCH_NORM_STATISTICS.below_autograd(*args)
        return mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, ...]:
        return (None,) * 5


def _apply(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    function: str,
    eps: float,
    batch: bool,
) -> Tensor:
    found = prepared_apply(x, mean, var, weight, bias, residual, function, eps, batch)
    if found.executable is None:
        y = reference.normalise(x, mean, var, weight, bias, residual, function, eps)
        return empty_like(x).copy_(y)
    if True in found.copied:
        x, residual = found.dense(x, residual)  # type: ignore[assignment]
    y = torch.empty_like(x)
    found.executable(x, y, mean, var, *[t for t in (weight, bias, residual) if t is not None])
    return y


def prepared_apply(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    function: str,
    eps: float,
    batch: bool,
) -> Prepared:
    """The launch that normalises a map of this kind.

    Tensors: input, output, mean, var, and those there are of weight, bias and residual.
    """
    refresh()
    key = (
        "apply",
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        kind(mean),
        kind(var),
        kind(weight),
        kind(bias),
        None if residual is None else residual.stride(),
        function,
        eps,
    )
    found = PREPARED.get(key)
    if found is None:
        found = WITH_TORCH
        if serves(x, (mean, var, weight, bias)):
            last, form, copied = layout(x, residual)
            plan = apply_plan(
                problem_of(x, last, mean, weight, bias, residual, function, eps, batch)
            )
            names = named(
                input=x, output=x, mean=x, var=x, weight=weight, bias=bias, residual=residual
            )
            found = Prepared(Executable(plan, tuple(names)), form, copied)
        PREPARED[key] = found
    return found


def _apply_fake(x: Tensor, *others: Any) -> Tensor:
    return empty_like(x)


class _Apply(library.OpFunction):
    """y = f(normalised x + residual); of the statistics only the map they are of is known."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        result: Tensor = BATCH_NORM_APPLY.below_autograd(*args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.function, ctx.eps, ctx.batch = inputs
        if not ctx.function:
            tensors[5] = None  # the gradient of a sum does not depend on it
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        need_x, _, _, *rest = ctx.needs_input_grad[:6]
        needed = [need_x, *rest]
        results = gradients(grad, ctx.saved_tensors, ctx.function, ctx.eps, ctx.batch, needed)
        return (results[0], None, None, *results[1:], None, None, None)


def gradients(
    grad: Tensor,
    read: Sequence[Tensor | None],
    function: str,
    eps: float,
    batch: bool,
    needed: list[bool],
) -> list[Tensor | None]:
    """Gradients of input, weight, bias and residual, those that are needed, differentiably.

    Args:
        grad: of the result.
        read: input, mean, var, weight, bias, residual.
        function, eps, batch: of the normalisation.
        needed: of each of the four, whether it is.
    """
    through = None
    if needed[3] and not function:
        through, needed = grad, [*needed[:3], False]
    results: list[Tensor | None] = [None] * 4
    if any(needed):
        computed = iter(BATCH_NORM_BACKWARD(grad, *read, function, eps, batch, needed))
        results = [next(computed) if wanted else None for wanted in needed]
    if through is not None:
        results[3] = through
    return results


def _backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    function: str,
    eps: float,
    batch: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    found = prepared_backward(
        grad, x, mean, var, weight, bias, residual, function, eps, batch, needed
    )
    if found.executable is None:
        return _backward_with_torch(
            grad, x, mean, var, weight, bias, residual, function, eps, batch, needed
        )
    if True in found.copied:
        x, grad, residual = found.dense(x, grad, residual)  # type: ignore[assignment]
    results = []
    if needed[0]:
        results.append(torch.empty_like(x))
    for wanted, t in ((needed[1], weight), (needed[2], bias)):
        if wanted:
            assert t is not None
            results.append(torch.empty_like(t))
    if needed[3]:
        results.append(torch.empty_like(x))
    vectors = [t for t in (weight, bias, residual) if t is not None]
    found.executable(x, grad, mean, var, *vectors, *results)
    return results


def prepared_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    function: str,
    eps: float,
    batch: bool,
    needed: Sequence[bool],
) -> Prepared:
    """The launch that computes the gradients that are needed, for maps of this kind.

    Tensors: input, grad, mean, var, those there are of weight, bias and residual, and the
    gradients of input, weight, bias and residual that are needed.
    """
    refresh()
    key = (
        "backward",
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        grad.stride(),
        kind(mean),
        kind(var),
        kind(weight),
        kind(bias),
        None if residual is None else residual.stride(),
        function,
        eps,
        batch,
        *needed,
    )
    found = PREPARED.get(key)
    need_x, need_weight, need_bias, need_residual = needed
    if found is None:
        found = WITH_TORCH
        if serves(x, (mean, var, weight, bias)):
            last, form, copied = layout(x, grad, residual)
            problem = problem_of(x, last, mean, weight, bias, residual, function, eps, batch)
            asked = (need_x, need_weight, need_bias, need_residual)
            plan = backward_plan(problem, device_facts(x.device), asked)
            names = named(
                input=x,
                grad=grad,
                mean=mean,
                var=var,
                weight=weight,
                bias=bias,
                residual=residual,
                grad_input=x if need_x else None,
                grad_weight=x if need_weight else None,
                grad_bias=x if need_bias else None,
                grad_residual=x if need_residual else None,
            )
            found = Prepared(Executable(plan, tuple(names)), form, copied)
        PREPARED[key] = found
    return found


def _backward_with_torch(
    grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, *rest: Any
) -> list[Tensor]:
    found = reference.gradients(grad, x, mean, var, *rest)
    maps = {0} if rest[-1][0] else set()
    maps |= {len(found) - 1} if rest[-1][3] else set()
    return [empty_like(x).copy_(t) if k in maps else t for k, t in enumerate(found)]


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    function: str,
    eps: float,
    batch: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    results = [empty_like(x)] if needed[0] else []
    for wanted, t in ((needed[1], weight), (needed[2], bias)):
        if wanted:
            assert t is not None
            results.append(torch.empty_like(t))
    return [*results, empty_like(x)] if needed[3] else results


class _Backward(library.OpFunction):
    """The gradients of a normalisation; their own are PyTorch's of the formula."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(BATCH_NORM_BACKWARD.below_autograd(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.function, ctx.eps, ctx.batch, ctx.needed = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        tensors = list(ctx.saved_tensors)
        # The statistics take no gradient of their own: those of the batch are functions of x.
        free = [k for k in (0, 1, 4, 5, 6) if tensors[k] is not None and ctx.needs_input_grad[k]]

        def formula(*values: Tensor) -> tuple[Tensor, ...]:
            given: list[Any] = list(tensors)
            for k, value in zip(free, values, strict=True):
                given[k] = value
            if ctx.batch:
                given[2:4] = reference.statistics(given[1])
            given += [ctx.function, ctx.eps, ctx.batch, ctx.needed]
            return tuple(reference.gradients(*given))

        results: list[Tensor | None] = [None] * 11
        if free:
            _, pull = torch.func.vjp(formula, *[tensors[k] for k in free])  # type: ignore[misc]
            for k, found in zip(free, pull(tuple(cotangents)), strict=True):
                results[k] = found
        return tuple(results)


BATCH_NORM_STATISTICS = library.define(
    "batch_norm_statistics",
    "(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? tracked, "
    "float? momentum) -> (Tensor, Tensor)",
    _statistics,
    _statistics_fake,
    _Statistics.run,
)
_ARGUMENTS = (
    "Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, "
    "str function, float eps, bool batch"
)
BATCH_NORM_APPLY = library.define(
    "batch_norm_apply", f"({_ARGUMENTS}) -> Tensor", _apply, _apply_fake, _Apply.run
)
BATCH_NORM_BACKWARD = library.define(
    "batch_norm_backward",
    f"(Tensor grad, {_ARGUMENTS}, bool[] needed) -> Tensor[]",
    _backward,
    _backward_fake,
    lambda *args: list(_Backward.run(*args)),
)

__all__ = [
    "BATCH_NORM_APPLY",
    "BATCH_NORM_BACKWARD",
    "BATCH_NORM_STATISTICS",
    "gradients",
    "prepared_apply",
    "prepared_backward",
    "prepared_statistics",
]
