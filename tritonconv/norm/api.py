"""Batch normalisation, a residual and an activation in few passes over memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..runtime.errors import bad_type, bad_value
from . import calls
from .activation import activation_key
from .ops import BATCH_NORM_APPLY, BATCH_NORM_STATISTICS
from .reference import wide_dtype

Tensor = torch.Tensor


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    activation: Callable[..., Any] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(F.batch_norm(input, …) + residual)``, differentiable twice.

    In training one kernel reads the input for the statistics and another one normalises, adds and
    activates; the gradient takes two more, which compute the activation's derivative from the
    input again, so that nothing but the input is kept for it.

    Args:
        input: (N, C) or (N, C, *spatial).
        running_mean, running_var: (C,); moved in training, used otherwise.
        weight, bias: (C,), of a dtype of their own.
        training: whether the statistics are the batch's.
        momentum: the share of the batch in the running statistics; None is one over
            ``num_batches_tracked``, the average of all batches.
        eps: added to the variance.
        num_batches_tracked: int64 scalar, one more with every call in training.
        activation: scalar function of a number, which reads no tensors and no coordinates.
        residual: of the input's shape, added before the activation.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        ArgumentValueError, ArgumentTypeError: an argument is not as described; nothing ran.

    Example:
        >>> import torch
        >>> from tritonconv.norm.api import batch_norm
        >>> x = torch.randn(4, 3, 5, 5)
        >>> y = batch_norm(x, None, None, training=True, activation=torch.relu)
        >>> plain = torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True))
        >>> torch.allclose(y, plain, atol=1e-5)
        True
    """
    result = normalise(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        num_batches_tracked,
        activation,
        residual,
    )
    if result is None:
        expected = "a function of one number that reads no tensor and no coordinate"
        raise bad_value("activation", expected, activation)
    return result


def normalise(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
    activation: Callable[..., Any] | None,
    residual: Tensor | None,
) -> Tensor | None:
    """:func:`batch_norm`; None, and nothing ran, where these kernels cannot call the activation."""
    given = (input, running_mean, running_var, weight, bias, training, momentum, eps)
    key: Any = None
    if not torch.compiler.is_compiling():
        key = calls.call_key(*given, num_batches_tracked, activation, residual)
        step = None if key is None else calls.prepared(key)
        if step is not None:
            return step(
                input, running_mean, running_var, num_batches_tracked, weight, bias, residual
            )
    _check(input, running_mean, running_var, weight, bias, training, residual)
    function = activation_key(activation, wide_dtype(input.dtype))
    if function is None:
        return None
    if running_mean is None:
        num_batches_tracked = None
    if key is not None:
        # The first call too: a checkpoint's second run must save what its first one did.
        step = calls.prepare(key, *given, num_batches_tracked, activation, function, residual)
        if step is not None:
            return step(
                input, running_mean, running_var, num_batches_tracked, weight, bias, residual
            )
    return _with_operators(*given, num_batches_tracked, function, residual)


def _with_operators(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    tracked: Tensor | None,
    function: str,
    residual: Tensor | None,
) -> Tensor:
    if residual is not None and residual.dtype is not input.dtype:
        residual = residual.to(input.dtype)
    if training:
        if momentum is None and tracked is None:
            momentum = 0.0
        mean, var = BATCH_NORM_STATISTICS(
            input.detach() if input.requires_grad else input,
            running_mean,
            running_var,
            tracked,
            momentum,
        )
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean, running_var
    arguments = (input, mean, var, weight, bias, residual, function, eps, training)
    result: Tensor = BATCH_NORM_APPLY(*arguments)
    return result


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    residual: Tensor | None,
) -> None:
    if not isinstance(x, Tensor):
        raise bad_type("input", "a tensor", type(x).__name__)
    if x.dim() < 2:
        raise bad_value("input", "at least two dimensions (batch, channels)", tuple(x.shape))
    if not x.is_floating_point():
        raise bad_type("input", "a floating dtype", x.dtype)
    if training and x.numel() == x.shape[1]:
        raise bad_value("input", "more than one value per channel when training", tuple(x.shape))
    if (running_mean is None) != (running_var is None):
        raise bad_value("running_var", "both running statistics or neither", "one of them")
    if not training and running_mean is None:
        raise bad_value("running_mean", "running statistics outside of training", None)
    vectors = (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    )
    for name, t in vectors:
        if t is None:
            continue
        if t.dim() != 1 or t.shape[0] != x.shape[1]:
            raise bad_value(name, f"({x.shape[1]},), one number per channel", tuple(t.shape))
        if t.device != x.device:
            raise bad_value(name, f"the input's device {x.device}", t.device)
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise bad_type("residual", "a tensor or None", type(residual).__name__)
        if residual.shape != x.shape:
            raise bad_value(
                "residual", f"the input's shape {tuple(x.shape)}", tuple(residual.shape)
            )
        if residual.device != x.device:
            raise bad_value("residual", f"the input's device {x.device}", residual.device)


__all__ = ["batch_norm", "normalise"]
