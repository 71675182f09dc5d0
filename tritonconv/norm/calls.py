"""Prepared calls of batch normalisation: one look-up, two bound launches, one autograd function.

The operators ask at every call, and three times a layer and step, what their tensors are; a layer
of a model gives the same answers at every step. In plain eager code a call that came before is
found by one key, and its gradient by a smaller one. Everything else goes through the operators:
first calls, ``torch.compile``, transforms, subclasses of tensors, gradients of gradients.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from ..runtime import library
from ..runtime.launch import Executable
from ..runtime.recording import epoch
from .activation import never_changes
from .ops import gradients, prepared_apply, prepared_backward, prepared_statistics

Tensor = torch.Tensor

_TYPES = library.PLAIN_TYPES
_FUNCTIONS = (types.BuiltinFunctionType, types.FunctionType, types.NoneType)
_ROW = 4  # numbers of float32 in 16 bytes, to which the rows of the statistics are aligned


class Step:
    """A normalisation of tensors of one kind, ready to run.

    Attributes:
        epoch: the state of tables and settings that this holds for.
    """

    def __init__(
        self,
        statistics: Executable | None,
        apply: Executable,
        x: Tensor,
        cumulative: bool,
        function: str,
        eps: float,
        made: int,
    ) -> None:
        """Bind a call.

        Args:
            statistics: launch over (input, mean, var, those that move); None outside of training.
            apply: launch over (input, output, mean, var, weight, bias, residual).
            x: an input of this kind.
            cumulative: whether the counter of calls is moved in front of the statistics.
            function: key of the activation.
            eps: added to the variance.
            made: the epoch of settings when the launches were looked for.
        """
        self.epoch = made
        self.statistics = statistics
        self.apply = apply
        self.device = x.device
        self.channels = x.shape[1]
        self.size = (2, -(-self.channels // _ROW) * _ROW)
        self.cumulative = cumulative
        self.function = function
        self.eps = eps
        self.backward: dict[Any, Executable | None] = {}

    def __call__(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        tracked: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        """Run on tensors that match the key."""
        if running_mean is None:
            tracked = None
        running = (running_mean, running_var, tracked)
        if torch.is_grad_enabled() and (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        ):
            result: Tensor = _run(x, weight, bias, residual, self, running)
            return result
        return self.forward(x, weight, bias, residual, running)[0]

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running: tuple[Tensor | None, Tensor | None, Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """The result, and in training the rows of mean and variance."""
        device, data = self.device, x.data_ptr()
        rows = None
        if self.statistics is None:
            assert running[0] is not None and running[1] is not None
            mean, var = running[0], running[1]
            at_mean, at_var = mean.data_ptr(), var.data_ptr()
        else:
            changed = [t for t in running if t is not None]
            if self.cumulative:
                changed[-1].add_(1)
            rows = torch.empty(self.size, dtype=torch.float32, device=device)
            at_mean = rows.data_ptr()
            at_var = at_mean + 4 * self.size[1]
            pointers = [data, at_mean, at_var, *[t.data_ptr() for t in changed]]
            if not self.statistics.at(pointers, device):
                mean, var = self.split(rows)
                self.statistics(x, mean, var, *changed)
            if changed:
                torch.autograd.graph.increment_version(changed)
        y = torch.empty_like(x)
        others = [t for t in (weight, bias, residual) if t is not None]
        pointers = [data, y.data_ptr(), at_mean, at_var, *[t.data_ptr() for t in others]]
        if not self.apply.at(pointers, device):
            if rows is not None:
                mean, var = self.split(rows)
            self.apply(x, y, mean, var, *others)
        return y, rows

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance as the kernels take them."""
        mean, var = rows[:, : self.channels].unbind(0)
        return mean, var


class _Step(torch.autograd.Function):
    """A prepared normalisation; its gradient is prepared too, and that one's is the operators'."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        step: Step,
        running: tuple[Tensor | None, Tensor | None, Tensor | None],
    ) -> Tensor:
        y, rows = step.forward(x, weight, bias, residual, running)
        ctx.step = step
        if not step.function:
            residual = None  # the gradient of a sum does not depend on it
        if rows is None:
            ctx.save_for_backward(x, weight, bias, residual, running[0], running[1])
        else:
            ctx.save_for_backward(x, weight, bias, residual, rows)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        step: Step = ctx.step
        needed = ctx.needs_input_grad[:4]
        x, weight, bias, residual, *rows = ctx.saved_tensors
        saved = (x, weight, bias, residual, *rows)
        if (
            not torch.is_grad_enabled()
            and library.plain(grad)
            and all(t is None or (type(t) in _TYPES and not t.is_neg()) for t in saved)
            and rows[0].is_contiguous()
            and (x.dtype, x.shape) == (grad.dtype, grad.shape)
        ):
            # Hooks of saved tensors may hand back other kinds of them.
            kinds = [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in saved]
            key = (needed, grad.stride(), *kinds)
            found = step.backward.get(key)
            if found is not None and step.epoch == epoch():
                return _launch(step, found, needed, grad, x, weight, bias, residual, rows)
            if found is None and key not in step.backward and step.epoch == epoch():
                _prepare(step, key, needed, grad, x, weight, bias, residual, rows)
        mean, var = rows if step.statistics is None else step.split(rows[0])
        read = (x, mean, var, weight, bias, residual)
        batch = step.statistics is not None
        results = gradients(grad, read, step.function, step.eps, batch, list(needed))
        return (*results, None, None)


# What Function.apply does beside is an inspection of the signature and a look for transforms,
# under which no call is prepared.
_run: Callable[..., Any] = super(torch.autograd.Function, _Step).apply


def _launch(
    step: Step,
    launch: Executable,
    needed: tuple[bool, ...],
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: list[Tensor],
) -> tuple[Any, ...]:
    """The gradients of a call that was prepared for them."""
    need_x, need_weight, need_bias, need_residual = needed
    results: list[Tensor | None] = [
        torch.empty_like(x) if need_x else None,
        torch.empty_like(weight) if need_weight and weight is not None else None,
        torch.empty_like(bias) if need_bias and bias is not None else None,
    ]
    if not step.function:
        results.append(None)
    else:
        results.append(torch.empty_like(x) if need_residual else None)
    at_mean = rows[0].data_ptr()
    at_var = rows[1].data_ptr() if step.statistics is None else at_mean + 4 * step.size[1]
    others = [t for t in (weight, bias, residual, *results) if t is not None]
    pointers = [x.data_ptr(), grad.data_ptr(), at_mean, at_var, *[t.data_ptr() for t in others]]
    if not launch.at(pointers, step.device):
        mean, var = rows if step.statistics is None else step.split(rows[0])
        launch(x, grad, mean, var, *others)
    if need_residual and not step.function:
        results[3] = grad
    return (*results, None, None)


def _prepare(
    step: Step,
    key: Any,
    needed: tuple[bool, ...],
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: list[Tensor],
) -> None:
    """Remember the launch of these gradients; None where there is no one launch for them."""
    through = needed[3] and not step.function
    asked = (*needed[:3], needed[3] and not through)
    launch = None
    if any(asked) and x.device == step.device:
        mean, var = rows if step.statistics is None else step.split(rows[0])
        batch = step.statistics is not None
        function, eps = step.function, step.eps
        found = prepared_backward(
            grad, x, mean, var, weight, bias, residual, function, eps, batch, asked
        )
        if True not in found.copied:
            launch = found.executable
    step.backward[key] = launch


_STEPS: dict[Any, Step] = {}
_MAX_STEPS = 4096


def call_key(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    tracked: Tensor | None,
    activation: Callable[..., Any] | None,
    residual: Tensor | None,
) -> Any:
    """What checks and launches of a call depend on; None where it cannot be known cheaply."""
    if not isinstance(x, Tensor) or not library.plain(x):
        return None
    function: Any = activation
    if type(activation) not in _FUNCTIONS:
        function = never_changes(activation)
        if function is None:
            return None
    extra = None
    if residual is not None:
        if type(residual) not in _TYPES or residual.is_neg():
            return None
        extra = (residual.shape, residual.stride(), residual.dtype, residual.device)
    vectors: list[Any] = []
    for t in (running_mean, running_var, weight, bias, tracked):
        if t is None:
            vectors.append(None)
        elif type(t) not in _TYPES or t.is_neg():
            return None
        else:
            vectors += (t.shape, t.stride(), t.dtype, t.device)
    return (
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        training,
        momentum,
        eps,
        function,
        extra,
        *vectors,
    )


def prepared(key: Any) -> Step | None:
    """What was prepared for calls of this key, if it still holds."""
    step = _STEPS.get(key)
    return step if step is not None and step.epoch == epoch() else None


def prepare(
    key: Any,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    tracked: Tensor | None,
    activation: Callable[..., Any] | None,
    function: str,
    residual: Tensor | None,
) -> Step | None:
    """Prepare calls like one that was checked; None where operators are to compute it."""
    if activation is not None and never_changes(activation) is None:
        return None
    if residual is not None and residual.dtype is not x.dtype:
        return None
    made = epoch()
    statistics, mean, var = None, running_mean, running_var
    cumulative = False
    if training:
        cumulative = momentum is None and tracked is not None
        if momentum is None and tracked is None:
            momentum = 0.0
        found = prepared_statistics(x, running_mean, running_var, tracked, momentum)
        if found.executable is None or True in found.copied:
            return None
        statistics = found.executable
        mean = var = torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
    assert mean is not None and var is not None
    found = prepared_apply(x, mean, var, weight, bias, residual, function, eps, training)
    if found.executable is None or True in found.copied:
        return None
    if len(_STEPS) >= _MAX_STEPS:
        _STEPS.clear()
    step = _STEPS[key] = Step(statistics, found.executable, x, cumulative, function, eps, made)
    return step


__all__ = ["Step", "call_key", "prepare", "prepared"]
