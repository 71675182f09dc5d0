"""The specification of convolution in plain PyTorch, differentiable by PyTorch to any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import pytorch
from .epilogue import evaluate_with_torch

Tensor = torch.Tensor


def conv(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    epilogue: Callable[..., Any] | None = None,
    epilogue_args: Sequence[Tensor] = (),
) -> Tensor:
    """y[n, o, p] = f(bias[o] + Σ_{c,r} x[n, c, p·stride + r·dilation − pad] · w[o, c, r], …).

    Args:
        x: (N, C, *spatial).
        w: (M, C / groups, *kernel).
        bias: (M,) or None.
        stride, dilation: one integer per axis.
        padding: (low, high) per axis.
        groups: number of channel groups.
        epilogue: scalar function f, or None for the identity.
        epilogue_args: operands of f, broadcastable to the output.
    """
    y = pytorch.forward(x, w, None, stride, padding, dilation, groups)
    if bias is None and epilogue is None:
        return y
    return evaluate_with_torch(epilogue, y, bias, epilogue_args)
