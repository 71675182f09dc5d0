"""PyTorch operators of batch normalisation.

``batch_norm_statistics`` reads a map once and moves the running statistics; it has no gradient.
``batch_norm_apply`` normalises by given statistics, and where these are said to be of the map
itself its gradient goes through them too. ``batch_norm_backward`` is that gradient, and has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..runtime import library
from ..runtime.backend import uses_triton
from ..runtime.device import device_facts
from ..runtime.launch import Executable
from ..runtime.recording import epoch
from . import reference
from .activation import derivative_of
from .plans import (
    NormProblem,
    apply_plan,
    backward_plan,
    statistics_plan,
)
from .problem import DTYPES, channels_innermost, view_of

Tensor = torch.Tensor
Needed = tuple[bool, bool, bool, bool]


@dataclass(frozen=True)
class _Prepared:
    """A launch for tensors of one kind.

    Attributes:
        executable: what runs; None where PyTorch computes.
        channels_last: what a map that is not dense is copied into.
        copied: for every map of the call, the input first, whether it is to be copied.
    """

    executable: Executable | None
    channels_last: bool = False
    copied: tuple[bool, ...] = ()

    def dense(self, *maps: Tensor | None) -> list[Tensor | None]:
        """The maps in one order of memory."""
        if True not in self.copied:
            return list(maps)
        first = maps[0]
        assert first is not None
        form = torch.contiguous_format
        if self.channels_last:
            form = torch.channels_last if first.dim() == 4 else torch.channels_last_3d
        results = [first.contiguous(memory_format=form) if self.copied[0] else first]
        for t, copied in zip(maps[1:], self.copied[1:], strict=True):
            copy = copied and t is not None
            results.append(torch.empty_like(results[0]).copy_(t) if copy else t)  # type: ignore[arg-type]
        return list(results)


_PREPARED: dict[Any, _Prepared] = {}
_MAX_PREPARED = 4096
_epoch = -1
_WITH_TORCH = _Prepared(None)


def _refresh() -> None:
    """Forget what is prepared when settings have changed, or there is too much of it."""
    global _epoch
    if _epoch != epoch() or len(_PREPARED) > _MAX_PREPARED:
        _epoch = epoch()
        _PREPARED.clear()


def _kind(t: Tensor | None) -> Any:
    return None if t is None else (t.dtype, t.stride())


def _wants_channels_last(x: Tensor) -> bool:
    """Whether a map that is dense in no order is copied into channels_last."""
    return x.dim() in (4, 5) and x.stride(1) == 1 and x.shape[1] > 1


def _serves(x: Tensor, vectors: Sequence[Tensor | None]) -> bool:
    return (
        uses_triton(x.device)
        and x.dtype in DTYPES
        and x.numel() > 0
        and all(t is None or t.is_contiguous() for t in vectors)
    )


def _layout(x: Tensor, *others: Tensor | None) -> tuple[bool, bool, tuple[bool, ...]]:
    """Whether channels are innermost, whether a copy is to be channels_last, what is copied."""
    found = channels_innermost(x.shape, x.stride())
    wanted = found
    if found is None:
        wanted = _wants_channels_last(x)
        if x.shape[2:].numel() == 1:
            wanted = True
    copied = [found is None]
    for t in others:
        copied.append(t is not None and channels_innermost(t.shape, t.stride()) is not wanted)
    return bool(wanted), _wants_channels_last(x), tuple(copied)


def _problem(
    x: Tensor,
    last: bool,
    mean: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    function: str = "",
    eps: float = 0.0,
    batch: bool = True,
) -> NormProblem:
    return NormProblem(
        view_of(x.shape, last),
        x.dtype,
        None if weight is None else weight.dtype,
        None if bias is None else bias.dtype,
        torch.float32 if mean is None else mean.dtype,
        residual is not None,
        function,
        eps,
        batch,
    )


def _named(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if t is not None}


def _statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    momentum: float | None,
) -> tuple[Tensor, Tensor]:
    _refresh()
    if momentum is None and tracked is not None:
        tracked.add_(1)
    running = (running_mean, running_var)
    key = (
        "statistics",
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        None if running_mean is None else running_mean.dtype,
        tracked is None,
        momentum,
    )
    found = _PREPARED.get(key)
    if found is None:
        found = _WITH_TORCH
        if _serves(x, running):
            last, form, copied = _layout(x)
            plan = statistics_plan(
                _problem(x, last),
                device_facts(x.device),
                None
                if running_mean is None or running_var is None
                else (running_mean.dtype, running_var.dtype),
                momentum,
                tracked is not None,
            )
            names = _named(
                input=x,
                mean=x,
                var=x,
                running_mean=running_mean,
                running_var=running_var,
                tracked=tracked,
            )
            found = _Prepared(Executable(plan, tuple(names)), form, copied)
        _PREPARED[key] = found
    if found.executable is None:
        return _statistics_with_torch(x, running_mean, running_var, tracked, momentum)
    (x,) = found.dense(x)  # type: ignore[assignment]
    mean = torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
    var = torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
    changed = [t for t in (running_mean, running_var, tracked) if t is not None]
    found.executable(x, mean, var, *changed)
    for t in changed:
        if not t.is_inference():
            torch.autograd.graph.increment_version(t)
    return mean, var


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


def _like(x: Tensor) -> Tensor:
    """An empty result: in the order of a dense input, else as the input is copied."""
    if channels_innermost(x.shape, x.stride()) is not None:
        return torch.empty_like(x)
    form = torch.contiguous_format
    if _wants_channels_last(x):
        form = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.empty_like(x, memory_format=form)


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
    _refresh()
    key = (
        "apply",
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        mean.dtype,
        None if weight is None else weight.dtype,
        None if bias is None else bias.dtype,
        None if residual is None else residual.stride(),
        function,
        eps,
    )
    found = _PREPARED.get(key)
    if found is None:
        found = _WITH_TORCH
        if _serves(x, (mean, var, weight, bias)):
            last, form, copied = _layout(x, residual)
            plan = apply_plan(_problem(x, last, mean, weight, bias, residual, function, eps, batch))
            names = _named(
                input=x, output=x, mean=x, var=x, weight=weight, bias=bias, residual=residual
            )
            found = _Prepared(Executable(plan, tuple(names)), form, copied)
        _PREPARED[key] = found
    if found.executable is None:
        y = reference.normalise(x, mean, var, weight, bias, residual, function, eps)
        return _like(x).copy_(y)
    if True in found.copied:
        x, residual = found.dense(x, residual)  # type: ignore[assignment]
    y = torch.empty_like(x)
    found.executable(x, y, mean, var, *[t for t in (weight, bias, residual) if t is not None])
    return y


def _apply_fake(x: Tensor, *others: Any) -> Tensor:
    return _like(x)


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
        x, mean, var, weight, bias, residual = ctx.saved_tensors
        need_x, _, _, *rest = ctx.needs_input_grad[:6]
        needed = [need_x, *rest]
        through = None
        if needed[3] and not ctx.function:
            through, needed[3] = grad, False
        results: list[Tensor | None] = [None] * 4
        if any(needed):
            found = BATCH_NORM_BACKWARD(
                grad,
                x,
                mean,
                var,
                weight,
                bias,
                residual,
                ctx.function,
                ctx.eps,
                ctx.batch,
                needed,
            )
            computed = iter(found)
            results = [next(computed) if wanted else None for wanted in needed]
        if through is not None:
            results[3] = through
        return (results[0], None, None, *results[1:], None, None, None)


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
    _refresh()
    key = (
        "backward",
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        grad.stride(),
        mean.dtype,
        None if weight is None else weight.dtype,
        None if bias is None else bias.dtype,
        None if residual is None else residual.stride(),
        function,
        eps,
        batch,
        *needed,
    )
    found = _PREPARED.get(key)
    need_x, need_weight, need_bias, need_residual = needed
    if found is None:
        found = _WITH_TORCH
        if _serves(x, (mean, var, weight, bias)):
            last, form, copied = _layout(x, grad, residual)
            problem = _problem(x, last, mean, weight, bias, residual, function, eps, batch)
            asked = (need_x, need_weight, need_bias, need_residual)
            plan = backward_plan(problem, device_facts(x.device), asked)
            names = _named(
                input=x,
                grad=grad,
                mean=mean,
                var=var,
                weight=weight,
                bias=bias,
                residual=residual,
                sums=x,
                grad_input=x if need_x else None,
                grad_weight=x if need_weight else None,
                grad_bias=x if need_bias else None,
                grad_residual=x if need_residual else None,
            )
            found = _Prepared(Executable(plan, tuple(names)), form, copied)
        _PREPARED[key] = found
    if found.executable is None:
        return _backward_with_torch(
            grad, x, mean, var, weight, bias, residual, function, eps, batch, needed
        )
    if True in found.copied:
        x, grad, residual = found.dense(x, grad, residual)  # type: ignore[assignment]
    results = []
    if need_x:
        results.append(torch.empty_like(x))
    for wanted, t in ((need_weight, weight), (need_bias, bias)):
        if wanted:
            assert t is not None
            results.append(torch.empty_like(t))
    if need_residual:
        results.append(torch.empty_like(x))
    sums = torch.empty((2, x.shape[1]), dtype=torch.float32, device=x.device)
    vectors = [t for t in (weight, bias, residual) if t is not None]
    found.executable(x, grad, mean, var, *vectors, sums, *results)
    return results


def _formula(
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
    """The gradients in plain PyTorch; ``mean`` and ``var`` are functions of x if it says so."""
    wide = reference.wide_dtype(x.dtype)
    vector = (1, -1, *[1] * (x.dim() - 2))
    axes = [0, *range(2, x.dim())]
    rstd = torch.rsqrt(var.to(wide) + eps)
    normal = (x.to(wide) - mean.to(wide).reshape(vector)) * rstd.reshape(vector)
    g = grad.to(wide)
    if function:
        z = normal if weight is None else normal * weight.to(wide).reshape(vector)
        if bias is not None:
            z = z + bias.to(wide).reshape(vector)
        if residual is not None:
            z = z + residual.to(wide)
        found = derivative_of(function)(z, g)
        assert isinstance(found, Tensor)
        g = found
    results = []
    if needed[0]:
        scale = rstd if weight is None else rstd * weight.to(wide)
        dx = g
        if batch:
            dx = dx - g.mean(axes, True) - normal * (g * normal).mean(axes, True)
        results.append((dx * scale.reshape(vector)).to(x.dtype))
    if needed[1]:
        assert weight is not None
        results.append((g * normal).sum(axes).to(weight.dtype))
    if needed[2]:
        assert bias is not None
        results.append(g.sum(axes).to(bias.dtype))
    if needed[3]:
        results.append(g.to(x.dtype))
    return results


def _backward_with_torch(
    grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, *rest: Any
) -> list[Tensor]:
    found = _formula(grad, x, mean, var, *rest)
    maps = {0} if rest[-1][0] else set()
    maps |= {len(found) - 1} if rest[-1][3] else set()
    return [_like(x).copy_(t) if k in maps else t for k, t in enumerate(found)]


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
    results = [_like(x)] if needed[0] else []
    for wanted, t in ((needed[1], weight), (needed[2], bias)):
        if wanted:
            assert t is not None
            results.append(torch.empty_like(t))
    return [*results, _like(x)] if needed[3] else results


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
            given = list(tensors)
            for k, value in zip(free, values, strict=True):
                given[k] = value
            if ctx.batch:
                given[2:4] = reference.statistics(given[1])
            return tuple(_formula(*given, ctx.function, ctx.eps, ctx.batch, ctx.needed))

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

__all__ = ["BATCH_NORM_APPLY", "BATCH_NORM_BACKWARD", "BATCH_NORM_STATISTICS"]
