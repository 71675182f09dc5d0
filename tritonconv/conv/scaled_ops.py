"""The operator of convolutions with float8 operands or a float8 result: forward only."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..runtime import library, tables
from ..runtime.backend import uses_triton
from ..runtime.errors import TritonConvError
from .dispatch import Runner, runner
from .epilogue import apply_with_torch
from .fused_ops import problem_of
from .ops import (
    FORWARD,
    GEOMETRY,
    empty,
    has_kernels,
    note,
    pairs,
    product_with_torch,
    refresh,
    result_channels_last,
)
from .problem import FLOAT8, ConvProblem, output_size

Tensor = torch.Tensor


class NoGradientError(TritonConvError, NotImplementedError):
    """A gradient was asked for of an operator that has none; none is ever left out silently."""


@functools.cache
def float8_kernels(device: torch.device) -> bool:
    """Whether the device converts float8: NVIDIA GPUs from sm_89 on, AMD's through float16."""
    if device.type != "cuda" or torch.version.hip:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _quantized(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    out_dtype: torch.dtype,
    *geometry: Any,
) -> Tensor:
    stride, padding, dilation, groups, precision = geometry
    triton = uses_triton(x.device) and has_kernels(x) and float8_kernels(x.device)
    if not triton or 0 in x.shape or 0 in w.shape:
        if tables.is_recording():
            note(_problem(x, w, operands, captures, function, out_dtype, geometry))
        return _with_torch(x, w, operands, captures, function, out_dtype, geometry)
    refresh()
    key = (
        "quantized",
        x.shape,
        x.stride(),
        w.shape,
        w.stride(),
        x.dtype,
        x.device,
        *stride,
        *padding,
        *dilation,
        groups,
        precision,
        function,
        out_dtype,
        *[(t.dtype, t.shape, t.stride()) for t in operands],
        *[(t.dtype, t.shape, t.stride()) for t in captures],
    )
    found = FORWARD.get(key)
    if found is None:
        problem = _problem(x, w, operands, captures, function, out_dtype, geometry)
        found = _prepare(key, problem, x)
    prepared, shape, strides = found
    y = torch.empty_strided(shape, strides, dtype=out_dtype, device=x.device)
    if prepared is not None:
        prepared(x, w, y, *operands, *captures)
    return y


def _prepare(
    key: Any, problem: ConvProblem, x: Tensor
) -> tuple[Runner | None, tuple[int, ...], tuple[int, ...]]:
    prepared = None if 0 in problem.y_shape else runner(problem, x.device)
    found = (prepared, problem.y_shape, problem.y_strides)
    if prepared is None or prepared.asked.final:
        FORWARD[key] = found
    return found


def _problem(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    out_dtype: torch.dtype,
    geometry: tuple[Any, ...],
) -> ConvProblem:
    bare = problem_of(x, w, operands, captures, function, False, geometry, None)
    return replace(bare, out_dtype=out_dtype)


def _with_torch(
    x: Tensor,
    w: Tensor,
    operands: Sequence[Tensor],
    captures: Sequence[Tensor],
    function: str,
    out_dtype: torch.dtype,
    geometry: tuple[Any, ...],
) -> Tensor:
    """PyTorch's product of the widened operands; bfloat16 and TF32 hold every float8 number.

    A bfloat16 product is rounded before the scales: good enough for results that are no finer.
    """
    stride, padding, dilation, groups, precision = geometry
    if x.dtype is FLOAT8:
        coarse = out_dtype in (torch.bfloat16, FLOAT8)
        wide = torch.bfloat16 if coarse and x.device.type != "cpu" else torch.float32
        x, w, precision = x.to(wide), w.to(wide), "tf32"
    acc = product_with_torch(x, w, stride, padding, dilation, groups, precision)
    y = apply_with_torch(function, acc.float(), operands, captures)
    return torch.empty_like(acc, dtype=out_dtype).copy_(y)


def _quantized_fake(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    out_dtype: torch.dtype,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    precision: str,
) -> Tensor:
    size = output_size(x.shape[2:], w.shape[2:], stride, pairs(padding), dilation)
    shape = (x.shape[0], w.shape[0], *size)
    return empty(shape, out_dtype, x.device, result_channels_last(x, w))


class _ForwardOnly(library.OpFunction):
    """What a ``torch.func`` transform sees: whether it differentiates shows in backward only."""

    @staticmethod
    def forward(count: int, rest: tuple[Any, ...], x: Tensor, w: Tensor, *tensors: Tensor) -> Any:
        operands, captures = list(tensors[:count]), list(tensors[count:])
        return CONV_QUANTIZED.below_autograd(x, w, operands, captures, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _refuse()


def _refuse() -> None:
    raise NoGradientError(
        "a convolution with float8 operands or a float8 result has no gradient, but some input "
        "requires one: call it under torch.no_grad(), or detach the input"
    )


def _no_gradient(
    x: Tensor, w: Tensor, operands: list[Tensor], captures: list[Tensor], *rest: Any
) -> Any:
    if not torch._C._are_functorch_transforms_active():
        _refuse()
    return _ForwardOnly.run(len(operands), rest, x, w, *operands, *captures)


CONV_QUANTIZED = library.define(
    "conv_quantized",
    "(Tensor input, Tensor weight, Tensor[] operands, Tensor[] captures, str function, "
    f"ScalarType out_dtype, {GEOMETRY}) -> Tensor",
    _quantized,
    _quantized_fake,
    _no_gradient,
)
