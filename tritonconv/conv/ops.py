"""PyTorch operators of convolution and their derivatives.

The three products are closed under differentiation: each gradient of one is another of them, so
three operators give every order.

    y = conv(x, w):    grad_x = dgrad(g, w),   grad_w = wgrad(g, x)
    x = dgrad(g, w):   grad_g = conv(u, w),    grad_w = wgrad(g, u)
    w = wgrad(g, x):   grad_g = conv(x, v),    grad_x = dgrad(g, v)

A fourth, ``gradients(g, x, w)``, is the pair (dgrad(g, w), wgrad(g, x)): where PyTorch's kernel was
chosen for both, one call of it computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..runtime import library, tables
from ..runtime.backend import uses_triton
from ..runtime.compat import cudnn_settings
from ..runtime.settings import settings
from . import dispatch, pytorch
from .dispatch import Runner, runner
from .prepared_products import Gradients, Product, prepared_gradients, prepared_product
from .problem import ConvProblem, Direction, EpilogueSpec, dense_strides, output_size

Tensor = torch.Tensor

GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups, str precision"


def pairs(padding: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(low, high) per axis from the flat list that operators take."""
    return tuple(zip(padding[::2], padding[1::2], strict=True))


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are fastest in memory, gaps after a pixel's channels allowed.

    A slice of the channels of a channels_last tensor is one too. Where a size of one leaves the
    layout open, the strides say which was meant; of a single element they say nothing.
    """
    return (
        x.dim() > 2
        and x.stride(1) == 1
        and x.stride(-1) >= x.shape[1]
        and (x.shape[1] > 1 or x.numel() > x.shape[0])
    )


def result_channels_last(x: Tensor, w: Tensor) -> bool:
    """Results keep the input's memory format; a map of one channel follows its weight too."""
    if is_channels_last(x):
        return True
    return x.shape[1] == 1 and is_channels_last(w) and not w.is_contiguous()


def empty(shape: Sequence[Any], dtype: torch.dtype, device: Any, channels_last: bool) -> Tensor:
    """A fresh dense tensor in either memory format."""
    form = torch.contiguous_format
    if channels_last:
        form = pytorch.CHANNELS_LAST.get(len(shape), form)
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=form)


FORWARD: dict[Any, tuple[Runner | None, tuple[int, ...], tuple[int, ...]]] = {}
"""Products with an epilogue."""
_PRODUCTS: dict[Any, Product] = {}
_GRADIENTS: dict[Any, Gradients] = {}


_prepared_epoch = -1
_MAX_PREPARED = 4096


def refresh() -> None:
    """Drop every prepared call when tables or settings have changed, or there are too many."""
    global _prepared_epoch
    full = len(FORWARD) + len(_PRODUCTS) + len(_GRADIENTS) > _MAX_PREPARED
    if full or _prepared_epoch != tables.epoch():
        _prepared_epoch = tables.epoch()
        FORWARD.clear()
        _PRODUCTS.clear()
        _GRADIENTS.clear()
        dispatch.forget()


def note(problem: ConvProblem) -> None:
    """Let a recording see a problem that PyTorch serves (CPU tensors)."""
    operator = dispatch.OPERATORS.get((problem.direction, len(problem.in_size)))
    if operator is not None and tables.is_recording():
        tables.note(operator, problem)


def has_kernels(t: Tensor) -> bool:
    """Whether kernels serve maps of so many axes; PyTorch computes the others."""
    return (Direction.FORWARD, t.dim() - 2) in dispatch.OPERATORS


def forward_problem(
    x: Tensor,
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str,
    epilogue: EpilogueSpec | None = None,
) -> ConvProblem:
    """The forward product of these tensors as a problem."""
    kernel = tuple(w.shape[2:])
    in_size = tuple(x.shape[2:])
    out_size = output_size(in_size, kernel, stride, pairs(padding), dilation)
    y_shape = (x.shape[0], w.shape[0], *out_size)
    return ConvProblem(
        direction=Direction.FORWARD,
        batch=x.shape[0],
        in_channels=x.shape[1],
        out_channels=w.shape[0],
        groups=groups,
        in_size=in_size,
        out_size=out_size,
        kernel=kernel,
        stride=tuple(stride),
        padding=tuple(padding[::2]),
        dilation=tuple(dilation),
        dtype=x.dtype,
        precision=precision,
        x_strides=tuple(x.stride()),
        w_strides=tuple(w.stride()),
        y_strides=dense_strides(y_shape, result_channels_last(x, w)),
        epilogue=epilogue,
    )


def _gradient_problem(
    direction: Direction,
    x: tuple[Sequence[int], Sequence[int]],
    w: tuple[Sequence[int], Sequence[int]],
    grad: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str,
) -> ConvProblem:
    (x_shape, x_strides), (w_shape, w_strides) = x, w
    return ConvProblem(
        direction=direction,
        batch=x_shape[0],
        in_channels=x_shape[1],
        out_channels=w_shape[0],
        groups=groups,
        in_size=tuple(x_shape[2:]),
        out_size=tuple(grad.shape[2:]),
        kernel=tuple(w_shape[2:]),
        stride=tuple(stride),
        padding=tuple(padding[::2]),
        dilation=tuple(dilation),
        dtype=grad.dtype,
        precision=precision,
        x_strides=tuple(x_strides),
        w_strides=tuple(w_strides),
        y_strides=tuple(grad.stride()),
    )


def dgrad_problem(
    grad: Tensor, w: Tensor, in_size: Sequence[int], geometry: tuple[Any, ...]
) -> ConvProblem:
    """The input's gradient product of these tensors as a problem."""
    shape = (grad.shape[0], w.shape[1] * geometry[3], *in_size)
    strides = dense_strides(shape, result_channels_last(grad, w))
    weight = (tuple(w.shape), tuple(w.stride()))
    return _gradient_problem(Direction.DGRAD, (shape, strides), weight, grad, *geometry)


def wgrad_problem(
    grad: Tensor, x: Tensor, kernel: Sequence[int], geometry: tuple[Any, ...]
) -> ConvProblem:
    """The weight's gradient product of these tensors as a problem."""
    shape = (grad.shape[1], x.shape[1] // geometry[3], *kernel)
    strides = dense_strides(shape, is_channels_last(x))
    given = (tuple(x.shape), tuple(x.stride()))
    return _gradient_problem(Direction.WGRAD, given, (shape, strides), grad, *geometry)


def _conv(
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    precision: str,
) -> Tensor:
    refresh()
    key = (
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
    )
    product = _PRODUCTS.get(key)
    if product is None:
        product = _prepare_forward(key, x, w, stride, padding, dilation, groups, precision)
        if product is None:
            return product_with_torch(x, w, stride, padding, dilation, groups, precision)
    return product(x, w)


def product_with_torch(
    x: Tensor,
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str,
) -> Tensor:
    """PyTorch's product in the memory format that the fake promises."""
    channels_last = result_channels_last(x, w)
    size = output_size(x.shape[2:], w.shape[2:], stride, pairs(padding), dilation)
    shape = (x.shape[0], w.shape[0], *size)
    if 0 in shape or 0 in w.shape:
        return empty(shape, x.dtype, x.device, channels_last).zero_()
    with _pytorch_settings(x, precision):
        y = pytorch.forward(x, w, None, stride, pairs(padding), dilation, groups)
    return _as_format(y, channels_last)


def _prepare_forward(
    key: Any,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    precision: str,
) -> Product | None:
    problem = forward_problem(x, w, stride, padding, dilation, groups, precision)
    triton = uses_triton(x.device) and has_kernels(x)
    triton = triton and 0 not in problem.y_shape and 0 not in problem.w_shape
    if not triton:
        note(problem)
        return None
    found = runner(problem, x.device)
    product = prepared_product(found, x, w, padding)
    if found.asked.final:
        _PRODUCTS[key] = product
    return product


def conv_fake(
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    precision: str,
) -> Tensor:
    """Shape, dtype and strides of the forward product."""
    size = output_size(x.shape[2:], w.shape[2:], stride, pairs(padding), dilation)
    shape = (x.shape[0], w.shape[0], *size)
    return empty(shape, x.dtype, x.device, result_channels_last(x, w))


def _dgrad(
    grad: Tensor,
    w: Tensor,
    in_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    precision: str,
) -> Tensor:
    shape = (grad.shape[0], w.shape[1] * groups, *in_size)
    channels_last = result_channels_last(grad, w)
    geometry = (stride, padding, dilation, groups, precision)
    return _gradient(Direction.DGRAD, grad, w, shape, channels_last, geometry)


def _wgrad(
    grad: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    precision: str,
) -> Tensor:
    shape = (grad.shape[1], x.shape[1] // groups, *kernel)
    geometry = (stride, padding, dilation, groups, precision)
    return _gradient(Direction.WGRAD, grad, x, shape, is_channels_last(x), geometry)


def _gradient(
    direction: Direction,
    grad: Tensor,
    other: Tensor,
    shape: tuple[int, ...],
    channels_last: bool,
    geometry: tuple[Any, ...],
) -> Tensor:
    """Gradient by the input (``other`` is the weight) or by the weight (``other`` the input)."""
    if 0 in shape or 0 in grad.shape or 0 in other.shape:
        return empty(shape, grad.dtype, grad.device, channels_last).zero_()
    refresh()
    stride, padding, dilation, groups, precision = geometry
    key = (
        direction,
        grad.shape,
        grad.stride(),
        other.shape,
        other.stride(),
        grad.dtype,
        grad.device,
        shape,
        *stride,
        *padding,
        *dilation,
        groups,
        precision,
    )
    product = _PRODUCTS.get(key)
    if product is None:
        strides = dense_strides(shape, channels_last)
        result, given = (shape, strides), (tuple(other.shape), tuple(other.stride()))
        x, w = (result, given) if direction is Direction.DGRAD else (given, result)
        problem = _gradient_problem(direction, x, w, grad, *geometry)
        if not uses_triton(grad.device) or not has_kernels(grad):
            note(problem)
            return _gradient_with_torch(problem, grad, other, channels_last, geometry)
        found = runner(problem, grad.device)
        product = prepared_product(found, grad, other, padding)
        if found.asked.final:
            _PRODUCTS[key] = product
    return product(grad, other)


def _gradients(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    refresh()
    key = (
        grad.shape,
        grad.stride(),
        x.shape,
        x.stride(),
        w.shape,
        w.stride(),
        grad.dtype,
        grad.device,
        *stride,
        *padding,
        *dilation,
        groups,
        precision,
    )
    found = _GRADIENTS.get(key)
    if found is not None:
        return found(grad, x, w)
    geometry = (stride, padding, dilation, groups, precision)
    in_size, kernel = list(x.shape[2:]), list(w.shape[2:])
    if (
        not uses_triton(grad.device)
        or not has_kernels(grad)
        or 0 in (*grad.shape, *x.shape, *w.shape)
    ):
        return _dgrad(grad, w, in_size, *geometry), _wgrad(grad, x, kernel, *geometry)
    by_x = runner(dgrad_problem(grad, w, in_size, geometry), grad.device)
    by_w = runner(wgrad_problem(grad, x, kernel, geometry), grad.device)
    found = prepared_gradients(by_x, by_w, grad, x, w, padding)
    if found is None:
        dgrad = prepared_product(by_x, grad, w, padding)
        wgrad = prepared_product(by_w, grad, x, padding)

        def found(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            return dgrad(grad, w), wgrad(grad, x)

    if by_x.asked.final and by_w.asked.final:
        _GRADIENTS[key] = found
    return found(grad, x, w)


def _gradient_with_torch(
    problem: ConvProblem,
    grad: Tensor,
    other: Tensor,
    channels_last: bool,
    geometry: tuple[Any, ...],
) -> Tensor:
    stride, padding, dilation, groups, precision = geometry
    arguments = (stride, pairs(padding), dilation, groups)
    with _pytorch_settings(grad, precision):
        if problem.direction is Direction.DGRAD:
            out = pytorch.dgrad(grad, other, problem.in_size, *arguments)
        else:
            out = pytorch.wgrad(grad, other, problem.kernel, *arguments)
    return _as_format(out, channels_last)


def dgrad_with_torch(
    grad: Tensor, w: Tensor, in_size: Sequence[int], geometry: tuple[Any, ...]
) -> Tensor:
    """PyTorch's gradient of the input in the memory format that the fake promises."""
    problem = dgrad_problem(grad, w, in_size, geometry)
    channels_last = result_channels_last(grad, w)
    if 0 in problem.x_shape or 0 in grad.shape or 0 in w.shape:
        return empty(problem.x_shape, grad.dtype, grad.device, channels_last).zero_()
    return _gradient_with_torch(problem, grad, w, channels_last, geometry)


def _pytorch_settings(t: Tensor, precision: str) -> AbstractContextManager[None]:
    """The asked precision and order of sums, where PyTorch's kernel runs on a GPU."""
    if not t.is_cuda:
        return nullcontext()
    allow_tf32 = precision == "tf32" if t.dtype is torch.float32 else None
    return cudnn_settings(allow_tf32=allow_tf32, deterministic=not settings.atomics)


def _as_format(t: Tensor, channels_last: bool) -> Tensor:
    form = pytorch.CHANNELS_LAST.get(t.dim()) if channels_last else None
    return t.contiguous() if form is None else t.contiguous(memory_format=form)


def dgrad_fake(
    grad: Tensor,
    w: Tensor,
    in_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    precision: str,
) -> Tensor:
    """Shape, dtype and strides of the input's gradient product."""
    shape = (grad.shape[0], w.shape[1] * groups, *in_size)
    return empty(shape, grad.dtype, grad.device, result_channels_last(grad, w))


def _wgrad_fake(
    grad: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    precision: str,
) -> Tensor:
    shape = (grad.shape[1], x.shape[1] // groups, *kernel)
    return empty(shape, grad.dtype, grad.device, is_channels_last(x))


def _gradients_fake(grad: Tensor, x: Tensor, w: Tensor, *geometry: Any) -> tuple[Tensor, Tensor]:
    by_x = dgrad_fake(grad, w, list(x.shape[2:]), *geometry)
    return by_x, _wgrad_fake(grad, x, list(w.shape[2:]), *geometry)


class _Conv(library.OpFunction):
    """y = conv(x, w)."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, *geometry: Any) -> Tensor:
        return CONV.below_autograd(x, w, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, *ctx.geometry = inputs
        ctx.in_size, ctx.kernel = list(x.shape[2:]), list(w.shape[2:])
        # What the other operand's gradient does not need is not kept alive.
        need_x, need_w = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_w else None, w if need_x else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad[:2]
        by_x, by_w = gradients(grad, x, w, need_x, need_w, ctx.in_size, ctx.kernel, ctx.geometry)
        return (by_x, by_w) + (None,) * len(ctx.geometry)


def gradients(
    grad: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    need_x: bool,
    need_w: bool,
    in_size: list[int],
    kernel: list[int],
    geometry: Sequence[Any],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a convolution by x (which needs w) and by w (which needs x), differentiably."""
    if need_x and need_w:
        by_x, by_w = CONV_GRADIENTS(grad, x, w, *geometry)
        return by_x, by_w
    return (
        CONV_DGRAD(grad, w, in_size, *geometry) if need_x else None,
        CONV_WGRAD(grad, x, kernel, *geometry) if need_w else None,
    )


class _Dgrad(library.OpFunction):
    """x = dgrad(g, w): the adjoint of conv in x."""

    @staticmethod
    def forward(grad: Tensor, w: Tensor, in_size: list[int], *geometry: Any) -> Tensor:
        return CONV_DGRAD.below_autograd(grad, w, in_size, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, w, _, *ctx.geometry = inputs
        ctx.kernel = list(w.shape[2:])
        need_grad, need_w = ctx.needs_input_grad[:2]
        ctx.save_for_backward(grad if need_w else None, w if need_grad else None)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        grad, w = ctx.saved_tensors
        need_grad, need_w = ctx.needs_input_grad[:2]
        grad_grad = CONV(cotangent, w, *ctx.geometry) if need_grad else None
        grad_w = CONV_WGRAD(grad, cotangent, ctx.kernel, *ctx.geometry) if need_w else None
        return (grad_grad, grad_w, None) + (None,) * len(ctx.geometry)


class _Wgrad(library.OpFunction):
    """w = wgrad(g, x): the adjoint of conv in w."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor, kernel: list[int], *geometry: Any) -> Tensor:
        return CONV_WGRAD.below_autograd(grad, x, kernel, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, x, _, *ctx.geometry = inputs
        ctx.in_size = list(x.shape[2:])
        need_grad, need_x = ctx.needs_input_grad[:2]
        ctx.save_for_backward(grad if need_x else None, x if need_grad else None)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        grad, x = ctx.saved_tensors
        need_grad, need_x = ctx.needs_input_grad[:2]
        grad_grad = CONV(x, cotangent, *ctx.geometry) if need_grad else None
        grad_x = CONV_DGRAD(grad, cotangent, ctx.in_size, *ctx.geometry) if need_x else None
        return (grad_grad, grad_x, None) + (None,) * len(ctx.geometry)


class _Gradients(library.OpFunction):
    """x, w = dgrad(g, w), wgrad(g, x)."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor, w: Tensor, *geometry: Any) -> tuple[Tensor, Tensor]:
        by_x, by_w = CONV_GRADIENTS.below_autograd(grad, x, w, *geometry)
        return by_x, by_w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        grad, x, w, *ctx.geometry = inputs
        ctx.save_for_backward(grad, x, w)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, by_x: Tensor | None, by_w: Tensor | None) -> tuple[Any, ...]:
        grad, x, w = ctx.saved_tensors
        need_grad, need_x, need_w = ctx.needs_input_grad[:3]
        grad_grad = grad_x = grad_w = None
        if by_x is not None:
            if need_grad:
                grad_grad = CONV(by_x, w, *ctx.geometry)
            if need_w:
                grad_w = CONV_WGRAD(grad, by_x, list(w.shape[2:]), *ctx.geometry)
        if by_w is not None:
            if need_grad:
                more = CONV(x, by_w, *ctx.geometry)
                grad_grad = more if grad_grad is None else grad_grad + more
            if need_x:
                grad_x = CONV_DGRAD(grad, by_w, list(x.shape[2:]), *ctx.geometry)
        return (grad_grad, grad_x, grad_w) + (None,) * len(ctx.geometry)


CONV = library.define(
    "conv",
    f"(Tensor input, Tensor weight, {GEOMETRY}) -> Tensor",
    _conv,
    conv_fake,
    _Conv.run,
)
CONV_DGRAD = library.define(
    "conv_dgrad",
    f"(Tensor grad_output, Tensor weight, SymInt[] in_size, {GEOMETRY}) -> Tensor",
    _dgrad,
    dgrad_fake,
    _Dgrad.run,
)
CONV_WGRAD = library.define(
    "conv_wgrad",
    f"(Tensor grad_output, Tensor input, SymInt[] kernel, {GEOMETRY}) -> Tensor",
    _wgrad,
    _wgrad_fake,
    _Wgrad.run,
)
CONV_GRADIENTS = library.define(
    "conv_gradients",
    f"(Tensor grad_output, Tensor input, Tensor weight, {GEOMETRY}) -> (Tensor, Tensor)",
    _gradients,
    _gradients_fake,
    _Gradients.run,
)
