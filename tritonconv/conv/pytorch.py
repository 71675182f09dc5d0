"""The three convolution products as PyTorch computes them, for any rank and one-sided padding.

Shared by the specification (``reference.py``) and by the candidate that calls PyTorch's kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
Pads = Sequence[tuple[int, int]]


def _symmetric(padding: Pads) -> tuple[list[int], list[int]]:
    """Split (low, high) pairs into PyTorch's symmetric padding and what ``F.pad`` must add.

    What is to be added at an end is negative where a map is to be cut there.
    """
    common = [max(min(low, high), 0) for low, high in padding]
    extra: list[int] = []
    for (low, high), both in zip(reversed(padding), reversed(common), strict=True):
        extra += [low - both, high - both]
    return common, extra


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The memory format with channels fastest, by the number of dimensions; none for three."""


def _format_of(t: Tensor) -> torch.memory_format:
    """The memory format of a dense tensor: PyTorch allocates a gradient like its operand."""
    form = CHANNELS_LAST.get(t.dim())
    if form is not None and t.is_contiguous(memory_format=form):
        return form
    return torch.contiguous_format


def forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Cross-correlation of ``x`` (N, C, *spatial) with ``w`` (M, C/groups, *kernel)."""
    common, extra = _symmetric(padding)
    if any(extra):
        x = F.pad(x, extra)
    zeros = [0] * len(common)
    # Autocast casts for this operator, not for the gradients': what is computed here was cast where
    # it was asked for, and in a backward that runs inside of a region it must stay as it is.
    region = torch._C._is_any_autocast_enabled()
    with torch._C._DisableAutocast() if region else nullcontext():
        return torch.ops.aten.convolution(
            x, w, bias, list(stride), common, list(dilation), False, zeros, groups
        )


def dgrad(
    grad: Tensor,
    w: Tensor,
    in_size: Sequence[int],
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient of the input: the adjoint of :func:`forward` in ``x``."""
    common, extra = _symmetric(padding)
    grown = [
        size + low + high
        for size, low, high in zip(in_size, extra[::2][::-1], extra[1::2][::-1], strict=True)
    ]
    shape = (grad.shape[0], w.shape[1] * groups, *grown)
    form = _format_of(grad)
    x = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=form)
    zeros = [0] * len(common)
    result = torch.ops.aten.convolution_backward(
        grad,
        x,
        w,
        None,
        list(stride),
        common,
        list(dilation),
        False,
        zeros,
        groups,
        [True, False, False],
    )[0]
    return F.pad(result, [-more for more in extra]) if any(extra) else result


def wgrad(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient of the weight: the adjoint of :func:`forward` in ``w``."""
    common, extra = _symmetric(padding)
    if any(extra):
        x = F.pad(x, extra)
    shape = (grad.shape[1], x.shape[1] // groups, *kernel)
    form = _format_of(x) if x.stride(1) == 1 else torch.contiguous_format
    w = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=form)
    zeros = [0] * len(common)
    return torch.ops.aten.convolution_backward(
        grad,
        x,
        w,
        None,
        list(stride),
        common,
        list(dilation),
        False,
        zeros,
        groups,
        [False, True, False],
    )[1]
