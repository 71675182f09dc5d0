"""Convolutions that also return mean and variance of every channel of their output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .arguments import IntOrInts
from .fused_input_calls import convolve_fused

Tensor = torch.Tensor


def conv1d_with_stats(
    input: Tensor | tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    *,
    epilogue: Callable[..., Any] | None = None,
    epilogue_args: Sequence[Tensor] = (),
    precision: str | None = None,
    prologue: Callable[..., Any] | None = None,
    prologue_args: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """1-D convolution that also returns the statistics of its output's channels.

    Args:
        input, weight, bias, stride, padding, dilation, groups, epilogue, epilogue_args, precision,
            prologue, prologue_args: see :func:`tritonconv.conv1d`.

    Returns:
        The output, and mean and biased variance (M,) of its channels; see
        :func:`conv2d_with_stats`.
    """
    output, mean, var = convolve_fused(
        1,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        epilogue,
        epilogue_args,
        precision,
        prologue,
        prologue_args,
        True,
    )
    return output, mean, var


def conv2d_with_stats(
    input: Tensor | tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    *,
    epilogue: Callable[..., Any] | None = None,
    epilogue_args: Sequence[Tensor] = (),
    precision: str | None = None,
    prologue: Callable[..., Any] | None = None,
    prologue_args: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """2-D convolution that also returns the statistics of its output's channels.

    They are those of the values that are stored (rounded to the input's dtype), over batch and
    map, as batch normalisation takes them in training: each tile sums up its own mean and squared
    distances from it while it is in registers, and a second small kernel merges the tiles in a
    fixed order. The output is not read again, nothing large is subtracted from anything large, and
    a repeated call gives the same bits. All three results are differentiable, twice.

    Args:
        input, weight, bias, stride, padding, dilation, groups, epilogue, epilogue_args, precision,
            prologue, prologue_args: see :func:`tritonconv.conv2d`.

    Returns:
        The output, and mean and biased variance (M,) in float32 (float64 of a float64 output).

    Raises:
        ArgumentValueError, ArgumentTypeError: an argument is not as described; nothing ran.

    Example:
        >>> import torch, tritonconv as tc
        >>> x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> y, mean, var = tc.conv2d_with_stats(x, w, padding=1)
        >>> torch.allclose(mean, y.mean((0, 2, 3)), atol=1e-5)
        True
    """
    output, mean, var = convolve_fused(
        2,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        epilogue,
        epilogue_args,
        precision,
        prologue,
        prologue_args,
        True,
    )
    return output, mean, var


def conv3d_with_stats(
    input: Tensor | tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    *,
    epilogue: Callable[..., Any] | None = None,
    epilogue_args: Sequence[Tensor] = (),
    precision: str | None = None,
    prologue: Callable[..., Any] | None = None,
    prologue_args: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """3-D convolution that also returns the statistics of its output's channels.

    Args:
        input, weight, bias, stride, padding, dilation, groups, epilogue, epilogue_args, precision,
            prologue, prologue_args: see :func:`tritonconv.conv3d`.

    Returns:
        The output, and mean and biased variance (M,) of its channels; see
        :func:`conv2d_with_stats`.
    """
    output, mean, var = convolve_fused(
        3,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        epilogue,
        epilogue_args,
        precision,
        prologue,
        prologue_args,
        True,
    )
    return output, mean, var
