"""The public convolution functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .arguments import IntOrInts
from .calls import convolve
from .fused_input_calls import convolve_fused

Tensor = torch.Tensor


def _given(operands: object) -> bool:
    """Whether there are any; what is no sequence counts, to be refused where all is checked."""
    return type(operands) not in (tuple, list) or len(operands) > 0  # type: ignore[arg-type]


def conv1d(
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
) -> Tensor:
    """1-D convolution (cross-correlation) with an optional fused epilogue, differentiable twice.

    y[n, o, p] = f(b[o] + Σ_{c,r} x[n, c, p·stride + r·dilation − pad] · w[o, c, r], …)

    It is served as a map of height one, without a copy: its problems and tuned entries are those
    of ``conv2d``.

    Args:
        input: (N, C, L) or (C, L), any strides. A batch of rows with channels last,
            ``rows.transpose(1, 2)`` of (N, L, C), is taken as it is and the result is one too.
        weight: (M, C / groups, K), dtype of the input, any strides.
        bias: (M,), added to the float32 accumulator.
        stride, dilation: an integer.
        padding: an integer, ``"same"`` (stride 1), ``"valid"`` or ``"causal"``: as many zeros as
            the dilated kernel is longer than one element, all before the first element, so that an
            output reads no later input. Nothing is padded in memory.
        groups: divides C and M.
        epilogue: see :func:`conv2d`; its coordinates are ``n``, ``c``, ``w``.
        epilogue_args: tensors broadcastable to the output, read at the same element.
        precision: products of float32 operands; see :func:`conv2d`.
        prologue, prologue_args: see :func:`conv2d`, also for a pair of inputs.

    Returns:
        (N, M, P) in the input's dtype; accumulation is in float32.

    Raises:
        ArgumentValueError, ArgumentTypeError: an argument is not as described; nothing ran.
        UnsupportedOpError, DataDependentControlFlowError: the epilogue cannot be generated.

    Example:
        >>> import torch, tritonconv as tc
        >>> x, w = torch.randn(2, 4, 32), torch.randn(8, 4, 3)
        >>> tc.conv1d(x, w, padding="causal", dilation=4, epilogue=torch.tanh).shape
        torch.Size([2, 8, 32])
    """
    if prologue is not None or _given(prologue_args) or type(input) in (tuple, list):
        return convolve_fused(
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
            False,
        )[0]
    return convolve(
        1,
        input,  # type: ignore[arg-type]  # no tuple: that was asked above
        weight,
        bias,
        stride,
        padding,
        None,
        dilation,
        groups,
        epilogue,
        epilogue_args,
        precision,
    )


def conv2d(
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
) -> Tensor:
    """2-D convolution (cross-correlation) with an optional fused epilogue, differentiable twice.

    y[n, o, p, q] = f(b[o] + Σ_{c,r,s} x[n, c, p·stride + r·dilation − pad, …] · w[o, c, r, s], …)

    Args:
        input: (N, C, H, W) or (C, H, W), any strides; float16, bfloat16, float32 (float64 is
            served by PyTorch's kernel). The result keeps its memory format. A pair of tensors
            stands for ``torch.cat(input, 1)``, which is never written (one group, no prologue);
            memory format and dtype are those of the first.
        weight: (M, C / groups, R, S), dtype of the input, any strides.
        bias: (M,), added to the float32 accumulator (PyTorch's kernel, where it is chosen or
            tensors are on the CPU, rounds the accumulator to the input's dtype first).
        stride, dilation: one integer or two.
        padding: one integer or two, ``"same"`` (stride 1) or ``"valid"``.
        groups: divides C and M.
        epilogue: a Python function of 0-d tensors ``f(y, *epilogue_args)`` applied to every
            output element inside the kernel, after the bias. It may ask for its coordinates by
            keyword-only parameters named ``n``, ``c``, ``h``, ``w`` and read captured tensors at
            computed indices. See the guide on epilogues.
        epilogue_args: tensors broadcastable to the output, read at the same element.
        precision: products of float32 operands: ``"ieee"``, ``"tf32x3"`` (three TF32 products,
            nearly float32) or ``"tf32"``. By default ``"tf32"`` when
            ``torch.backends.cudnn.allow_tf32`` is set and ``torch.get_float32_matmul_precision()``
            is not ``"highest"``, else ``"ieee"``.

        prologue: a Python function of 0-d tensors ``g(x, *prologue_args)`` applied to every input
            element as the kernel loads it; it may ask for coordinates of the input like an
            epilogue. Padding is of its result: an element outside the map contributes 0, not
            ``g(0)``.
        prologue_args: vectors (C,), or tensors broadcastable to the input.

    Returns:
        (N, M, P, Q) in the input's dtype; accumulation is in float32.

    Raises:
        ArgumentValueError, ArgumentTypeError: an argument is not as described; nothing ran.
        UnsupportedOpError, DataDependentControlFlowError: the epilogue cannot be generated.

    Example:
        >>> import torch, tritonconv as tc
        >>> x, w, b = torch.randn(2, 3, 16, 16), torch.randn(8, 3, 3, 3), torch.randn(8)
        >>> skip = torch.randn(2, 8, 16, 16)
        >>> y = tc.conv2d(x, w, b, padding=1, epilogue=lambda y, r: torch.relu(y + r),
        ...               epilogue_args=(skip,))
        >>> y.shape
        torch.Size([2, 8, 16, 16])
    """
    if prologue is not None or _given(prologue_args) or type(input) in (tuple, list):
        return convolve_fused(
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
            False,
        )[0]
    return convolve(
        2,
        input,  # type: ignore[arg-type]  # no tuple: that was asked above
        weight,
        bias,
        stride,
        padding,
        None,
        dilation,
        groups,
        epilogue,
        epilogue_args,
        precision,
    )


def conv3d(
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
) -> Tensor:
    """3-D convolution (cross-correlation) with an optional fused epilogue, differentiable twice.

    Args:
        input: (N, C, D, H, W) or (C, D, H, W), any strides. The result keeps its memory format,
            ``torch.channels_last_3d`` included.
        weight: (M, C / groups, Q, R, S), dtype of the input, any strides.
        bias: (M,), added to the float32 accumulator.
        stride, dilation: one integer or three.
        padding: one integer or three, ``"same"`` (stride 1) or ``"valid"``.
        groups: divides C and M.
        epilogue: see :func:`conv2d`; its coordinates are ``n``, ``c``, ``d``, ``h``, ``w``.
        epilogue_args: tensors broadcastable to the output, read at the same element.
        precision: products of float32 operands; see :func:`conv2d`.
        prologue, prologue_args: see :func:`conv2d`, also for a pair of inputs.

    Returns:
        (N, M, O, P, Q) in the input's dtype; accumulation is in float32.

    Raises:
        ArgumentValueError, ArgumentTypeError: an argument is not as described; nothing ran.
        UnsupportedOpError, DataDependentControlFlowError: the epilogue cannot be generated.

    Example:
        >>> import torch, tritonconv as tc
        >>> x, w, b = torch.randn(1, 2, 6, 8, 8), torch.randn(4, 2, 3, 3, 3), torch.randn(4)
        >>> tc.conv3d(x, w, b, stride=(1, 2, 2), padding=1, epilogue=torch.relu).shape
        torch.Size([1, 4, 6, 4, 4])
    """
    if prologue is not None or _given(prologue_args) or type(input) in (tuple, list):
        return convolve_fused(
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
            False,
        )[0]
    return convolve(
        3,
        input,  # type: ignore[arg-type]  # no tuple: that was asked above
        weight,
        bias,
        stride,
        padding,
        None,
        dilation,
        groups,
        epilogue,
        epilogue_args,
        precision,
    )


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    output_padding: IntOrInts = 0,
    groups: int = 1,
    dilation: IntOrInts = 1,
    *,
    epilogue: Callable[..., Any] | None = None,
    epilogue_args: Sequence[Tensor] = (),
    precision: str | None = None,
) -> Tensor:
    """1-D transposed convolution with an optional epilogue, differentiable twice.

    The adjoint of :func:`conv1d`; see :func:`conv_transpose2d`.

    Args:
        input: (N, C, L) or (C, L), any strides.
        weight: (C, M / groups, K), dtype of the input, any strides.
        bias: (M,).
        stride, padding, output_padding, dilation: an integer; see :func:`conv_transpose2d`.
        groups: divides C and M.
        epilogue: see :func:`conv2d`; its coordinates are ``n``, ``c``, ``w``.
        epilogue_args: tensors broadcastable to the output, read at the same element.
        precision: products of float32 operands; see :func:`conv2d`.

    Returns:
        (N, M, P) with P = (L − 1)·stride − 2·padding + dilation·(K − 1) + output_padding + 1.

    Raises:
        ArgumentValueError, ArgumentTypeError: an argument is not as described; nothing ran.
        UnsupportedOpError, DataDependentControlFlowError: the epilogue cannot be generated.

    Example:
        >>> import torch, tritonconv as tc
        >>> tc.conv_transpose1d(torch.randn(1, 8, 16), torch.randn(8, 4, 4), stride=4).shape
        torch.Size([1, 4, 64])
    """
    return convolve(
        1,
        input,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        dilation,
        groups,
        epilogue,
        epilogue_args,
        precision,
    )


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    output_padding: IntOrInts = 0,
    groups: int = 1,
    dilation: IntOrInts = 1,
    *,
    epilogue: Callable[..., Any] | None = None,
    epilogue_args: Sequence[Tensor] = (),
    precision: str | None = None,
) -> Tensor:
    """2-D transposed convolution with an optional epilogue, differentiable twice.

    The adjoint of :func:`conv2d` by its input: with the same weight, stride, padding, dilation and
    groups ``⟨conv2d(x, w), y⟩ = ⟨x, conv_transpose2d(y, w)⟩``. It runs on the kernels of that
    gradient, and its own gradients on those of the convolution.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides; dtypes as for :func:`conv2d`. The result
            keeps its memory format.
        weight: (C, M / groups, R, S), dtype of the input, any strides.
        bias: (M,).
        stride, dilation: one integer or two.
        padding: one integer or two: what the convolution pads, and the result lacks.
        output_padding: one integer or two, less than the stride or the dilation: rows and columns
            added at the end, to choose between the sizes that the convolution maps to one.
        groups: divides C and M.
        epilogue: a Python function of 0-d tensors ``f(y, *epilogue_args)`` applied to every
            output element, after the bias; see :func:`conv2d`.
        epilogue_args: tensors broadcastable to the output, read at the same element.
        precision: products of float32 operands; see :func:`conv2d`.

    Returns:
        (N, M, P, Q) with P = (H − 1)·stride − 2·padding + dilation·(R − 1) + output_padding + 1.

    Raises:
        ArgumentValueError, ArgumentTypeError: an argument is not as described; nothing ran.
        UnsupportedOpError, DataDependentControlFlowError: the epilogue cannot be generated.

    Example:
        >>> import torch, tritonconv as tc
        >>> x, w = torch.randn(1, 8, 16, 16), torch.randn(8, 4, 2, 2)
        >>> tc.conv_transpose2d(x, w, stride=2, epilogue=torch.relu).shape
        torch.Size([1, 4, 32, 32])
    """
    return convolve(
        2,
        input,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        dilation,
        groups,
        epilogue,
        epilogue_args,
        precision,
    )


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts = 0,
    output_padding: IntOrInts = 0,
    groups: int = 1,
    dilation: IntOrInts = 1,
    *,
    epilogue: Callable[..., Any] | None = None,
    epilogue_args: Sequence[Tensor] = (),
    precision: str | None = None,
) -> Tensor:
    """3-D transposed convolution with an optional epilogue, differentiable twice.

    The adjoint of :func:`conv3d`; see :func:`conv_transpose2d`.

    Args:
        input: (N, C, D, H, W) or (C, D, H, W), any strides.
        weight: (C, M / groups, Q, R, S), dtype of the input, any strides.
        bias: (M,).
        stride, padding, output_padding, dilation: one integer or three; see
            :func:`conv_transpose2d`.
        groups: divides C and M.
        epilogue: see :func:`conv2d`; its coordinates are ``n``, ``c``, ``d``, ``h``, ``w``.
        epilogue_args: tensors broadcastable to the output, read at the same element.
        precision: products of float32 operands; see :func:`conv2d`.

    Returns:
        (N, M, O, P, Q), each axis as in :func:`conv_transpose2d`.

    Raises:
        ArgumentValueError, ArgumentTypeError: an argument is not as described; nothing ran.
        UnsupportedOpError, DataDependentControlFlowError: the epilogue cannot be generated.

    Example:
        >>> import torch, tritonconv as tc
        >>> x, w = torch.randn(1, 8, 4, 4, 4), torch.randn(8, 4, 2, 2, 2)
        >>> tc.conv_transpose3d(x, w, stride=2).shape
        torch.Size([1, 4, 8, 8, 8])
    """
    return convolve(
        3,
        input,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        dilation,
        groups,
        epilogue,
        epilogue_args,
        precision,
    )
