"""Prepared calls of layer normalisation, in the manner of those of batch normalisation.

In plain eager code a call that came before is found by one key, and its gradient by a smaller one.
Everything else goes through the operators: ``torch.compile``, transforms, subclasses of tensors,
gradients of gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..runtime import library
from ..runtime.launch import Executable
from ..runtime.recording import epoch
from .layer_ops import (
    empty_output,
    empty_statistics,
    gradients,
    prepared_backward,
    prepared_forward,
)

Tensor = torch.Tensor

_TYPES = library.PLAIN_TYPES


class Step:
    """A normalisation of contiguous tensors of one kind, ready to run.

    Attributes:
        epoch: the state of tables and settings that this holds for.
    """

    def __init__(
        self,
        recorded: Executable,
        alone: Executable,
        x: Tensor,
        dims: int,
        eps: float,
        dtype: torch.dtype,
        made: int,
    ) -> None:
        """Bind a call.

        Args:
            recorded: launch over (input, output, stats, weight, bias).
            alone: the same without stats, for calls that record no gradient.
            x: an input of this kind.
            dims: how many of its last axes are normalised over.
            eps: added to the variance.
            dtype: of the result.
            made: the epoch of settings when the launches were looked for.
        """
        self.epoch = made
        self.recorded = recorded
        self.alone = alone
        self.device = x.device
        self.dims = dims
        self.eps = eps
        self.dtype = dtype
        self.backward: dict[Any, Executable | None] = {}

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Run on tensors that match the key."""
        if torch.is_grad_enabled() and (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
        ):
            result: Tensor = _run(x, weight, bias, self)
            return result
        y = empty_output(x, self.dtype)
        self._launch(self.alone, [x, y], weight, bias)
        return y

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The result, and what its gradient needs of every row."""
        y, stats = empty_output(x, self.dtype), empty_statistics(x, self.dims)
        self._launch(self.recorded, [x, y, stats], weight, bias)
        return y, stats

    def _launch(
        self, launch: Executable, tensors: list[Tensor], weight: Tensor | None, bias: Tensor | None
    ) -> None:
        tensors += [t for t in (weight, bias) if t is not None]
        if not launch.at([t.data_ptr() for t in tensors], self.device):
            launch(*tensors)


class _Step(torch.autograd.Function):
    """A prepared normalisation; its gradient is prepared too, and that one's is the operators'."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, step: Step
    ) -> Tensor:
        y, stats = step.forward(x, weight, bias)
        ctx.step = step
        ctx.save_for_backward(x, stats, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        step: Step = ctx.step
        needed = ctx.needs_input_grad[:3]
        saved = ctx.saved_tensors
        x, stats, weight, bias = saved
        if (
            not torch.is_grad_enabled()
            and library.plain(grad)
            and all(t is None or (type(t) in _TYPES and not t.is_neg()) for t in saved)
            and x.is_contiguous()
            and stats.is_contiguous()
            and (grad.dtype, grad.shape) == (step.dtype, x.shape)
        ):
            grad = grad.contiguous()
            # Hooks of saved tensors may hand back other kinds of them.
            kinds = [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in saved]
            key = (needed, *kinds)
            if step.epoch == epoch():
                if key not in step.backward:
                    step.backward[key] = _prepare(step, needed, grad, x, weight, bias)
                launch = step.backward[key]
                if launch is not None:
                    return _launch(step, launch, needed, grad, x, stats, weight, bias)
        results = gradients(grad, x, stats, step.dims, weight, bias, step.eps, list(needed))
        return (*results, None)


# What Function.apply does beside is an inspection of the signature and a look for transforms,
# under which no call is prepared.
_run: Callable[..., Any] = super(torch.autograd.Function, _Step).apply


def _prepare(
    step: Step,
    needed: tuple[bool, ...],
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Executable | None:
    """The launch of these gradients; None where there is none for them."""
    if not any(needed) or x.device != step.device:
        return None
    return prepared_backward(grad, x, step.dims, weight, bias, needed).executable


def _launch(
    step: Step,
    launch: Executable,
    needed: tuple[bool, ...],
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Any, ...]:
    """The gradients of a call that was prepared for them."""
    results: list[Tensor | None] = [
        torch.empty_like(t) if wanted and t is not None else None
        for wanted, t in zip(needed, (x, weight, bias), strict=True)
    ]
    tensors = [t for t in (x, grad, stats, weight, *results) if t is not None]
    if not launch.at([t.data_ptr() for t in tensors], step.device):
        launch(*tensors)
    return (*results, None)


_STEPS: dict[Any, Step] = {}
_MAX_STEPS = 4096


def call_key(
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Any:
    """What a contiguous input's checks and launches depend on; None where it is not plain."""
    if not library.plain(x):
        return None
    vectors: list[Any] = []
    for t in (weight, bias):
        if t is None:
            vectors.append(None)
        elif type(t) not in _TYPES or t.is_neg():
            return None
        else:
            vectors += (t.shape, t.stride(), t.dtype, t.device)
    return (x.shape, x.dtype, x.device, shape, eps, dtype, *vectors)


def prepared(key: Any) -> Step | None:
    """What was prepared for calls of this key, if it still holds."""
    step = _STEPS.get(key)
    return step if step is not None and step.epoch == epoch() else None


def prepare(
    key: Any,
    x: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Step | None:
    """Prepare calls like one that was checked; None where operators are to compute it."""
    made = epoch()
    recorded, alone = (
        prepared_forward(x, dims, weight, bias, eps, dtype, stats).executable
        for stats in (True, False)
    )
    if recorded is None or alone is None:
        return None
    if len(_STEPS) >= _MAX_STEPS:
        _STEPS.clear()
    step = _STEPS[key] = Step(recorded, alone, x, dims, eps, dtype, made)
    return step


__all__ = ["Step", "call_key", "prepare", "prepared"]
