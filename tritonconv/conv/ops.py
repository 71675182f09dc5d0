"""PyTorch operators of convolution and their derivatives.

The three products are closed under differentiation: each gradient of one is another of them, so
three operators give every order. A fused epilogue adds one more operator whose backward runs the
function's generated derivative (``tritonconv::elementwise``) and then the two product gradients.

    y = conv(x, w):    grad_x = dgrad(g, w),   grad_w = wgrad(g, x)
    x = dgrad(g, w):   grad_g = conv(u, w),    grad_w = wgrad(g, u)
    w = wgrad(g, x):   grad_g = conv(x, v),    grad_x = dgrad(g, v)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..codegen.elementwise import pull_back
from ..codegen.program import Program, Role, ScalarFunction
from ..codegen.registry import program_of
from ..runtime import library, tables
from ..runtime.backend import uses_triton
from ..runtime.compat import cudnn_settings
from ..runtime.settings import settings
from . import dispatch, pytorch
from .dispatch import Runner, runner
from .epilogue import apply_with_torch
from .problem import ConvProblem, Direction, EpilogueSpec, dense_strides, output_size

Tensor = torch.Tensor

_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups, str precision"


def pairs(padding: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(low, high) per axis from the flat list that operators take."""
    return tuple(zip(padding[::2], padding[1::2], strict=True))


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are fastest in memory, gaps after a pixel's channels allowed.

    A slice of the channels of a channels_last tensor is one too. Where a size of one leaves the
    layout open, the strides say which was meant.
    """
    return x.dim() > 2 and x.stride(1) == 1 and x.stride(-1) >= x.shape[1]


def _result_channels_last(x: Tensor, w: Tensor) -> bool:
    """Results keep the input's memory format; a map of one channel follows its weight too."""
    return is_channels_last(x) or (x.shape[1] == 1 and is_channels_last(w))


def _empty(shape: Sequence[Any], dtype: torch.dtype, device: Any, channels_last: bool) -> Tensor:
    form = torch.contiguous_format
    if channels_last:
        form = {3: form, 4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=form)


_FORWARD: dict[Any, tuple[Runner | None, tuple[int, ...], tuple[int, ...]]] = {}
_BACKWARD: dict[Any, tuple[Runner, tuple[int, ...], tuple[int, ...]]] = {}


_prepared_epoch = -1
_MAX_PREPARED = 4096


def refresh() -> None:
    """Drop every prepared call when tables or settings have changed, or there are too many."""
    global _prepared_epoch
    full = len(_FORWARD) + len(_BACKWARD) > _MAX_PREPARED
    if full or _prepared_epoch != tables.epoch():
        _prepared_epoch = tables.epoch()
        _FORWARD.clear()
        _BACKWARD.clear()
        dispatch.forget()


def _note(problem: ConvProblem) -> None:
    """Let a recording see a problem that PyTorch serves (CPU tensors)."""
    if tables.is_recording() and len(problem.in_size) == 2:
        tables.note(dispatch.OPERATORS[problem.direction, 2], problem)


def _forward_problem(
    x: Tensor,
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str,
    epilogue: EpilogueSpec | None = None,
) -> ConvProblem:
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
        y_strides=dense_strides(y_shape, _result_channels_last(x, w)),
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
    found = _FORWARD.get(key)
    if found is None:
        found = _prepare_forward(key, x, w, stride, padding, dilation, groups, precision)
    prepared, shape, strides = found
    if prepared is None:
        return _product_with_torch(x, w, stride, padding, dilation, groups, precision)
    if prepared.executable is None:
        named = {"input": x, "weight": w}
        return prepared.algorithm.compute(prepared.problem, named)  # type: ignore[attr-defined]
    y = torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)
    prepared.executable(x, w, y)
    return y


def _product_with_torch(
    x: Tensor,
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str,
) -> Tensor:
    """PyTorch's product in the memory format that the fake promises."""
    channels_last = _result_channels_last(x, w)
    size = output_size(x.shape[2:], w.shape[2:], stride, pairs(padding), dilation)
    shape = (x.shape[0], w.shape[0], *size)
    if 0 in shape or 0 in w.shape:
        return _empty(shape, x.dtype, x.device, channels_last).zero_()
    if x.is_cuda:
        with cudnn_settings(allow_tf32=precision == "tf32", deterministic=not settings.atomics):
            y = pytorch.forward(x, w, None, stride, pairs(padding), dilation, groups)
    else:
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
) -> tuple[Runner | None, tuple[int, ...], tuple[int, ...]]:
    problem = _forward_problem(x, w, stride, padding, dilation, groups, precision)
    triton = uses_triton(x.device) and 0 not in problem.y_shape and 0 not in problem.w_shape
    triton = triton and len(problem.in_size) == 2
    if not triton:
        _note(problem)
        return None, problem.y_shape, problem.y_strides
    found = _FORWARD[key] = (runner(problem, x.device), problem.y_shape, problem.y_strides)
    return found


def _conv_fake(
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    precision: str,
) -> Tensor:
    size = output_size(x.shape[2:], w.shape[2:], stride, pairs(padding), dilation)
    shape = (x.shape[0], w.shape[0], *size)
    return _empty(shape, x.dtype, x.device, _result_channels_last(x, w))


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
    channels_last = _result_channels_last(grad, w)
    if 0 in shape or 0 in grad.shape or 0 in w.shape:
        return _empty(shape, grad.dtype, grad.device, channels_last).zero_()
    refresh()
    if not uses_triton(grad.device) or len(in_size) != 2:
        if tables.is_recording():
            x_side = (shape, dense_strides(shape, channels_last))
            w_side = (w.shape, w.stride())
            geometry = (stride, padding, dilation, groups, precision)
            _note(_gradient_problem(Direction.DGRAD, x_side, w_side, grad, *geometry))
        out = pytorch.dgrad(grad, w, in_size, stride, pairs(padding), dilation, groups)
        return _as_format(out, channels_last)
    key = (
        "d",
        grad.shape,
        grad.stride(),
        w.shape,
        w.stride(),
        grad.dtype,
        grad.device,
        *in_size,
        *stride,
        *padding,
        *dilation,
        groups,
        precision,
    )
    found = _BACKWARD.get(key)
    if found is None:
        strides = dense_strides(shape, channels_last)
        problem = _gradient_problem(
            Direction.DGRAD,
            (shape, strides),
            (w.shape, w.stride()),
            grad,
            stride,
            padding,
            dilation,
            groups,
            precision,
        )
        found = _BACKWARD[key] = (runner(problem, grad.device), shape, strides)
    prepared, shape, strides = found
    if prepared.executable is None:
        named = {"grad_output": grad, "weight": w}
        result = prepared.algorithm.compute(prepared.problem, named)  # type: ignore[attr-defined]
        return _as_format(result, channels_last)
    x = torch.empty_strided(shape, strides, dtype=grad.dtype, device=grad.device)
    prepared.executable(grad, w, x)
    return x


def _as_format(t: Tensor, channels_last: bool) -> Tensor:
    if channels_last and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return t.contiguous()


def _dgrad_fake(
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
    return _empty(shape, grad.dtype, grad.device, _result_channels_last(grad, w))


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
    channels_last = is_channels_last(x)
    if 0 in shape or 0 in grad.shape or 0 in x.shape:
        return _empty(shape, grad.dtype, grad.device, channels_last).zero_()
    refresh()
    if not uses_triton(grad.device) or len(kernel) != 2:
        if tables.is_recording():
            x_side = (x.shape, x.stride())
            w_side = (shape, dense_strides(shape, channels_last))
            geometry = (stride, padding, dilation, groups, precision)
            _note(_gradient_problem(Direction.WGRAD, x_side, w_side, grad, *geometry))
        out = pytorch.wgrad(grad, x, kernel, stride, pairs(padding), dilation, groups)
        return _as_format(out, channels_last)
    key = (
        "w",
        grad.shape,
        grad.stride(),
        x.shape,
        x.stride(),
        grad.dtype,
        grad.device,
        *kernel,
        *stride,
        *padding,
        *dilation,
        groups,
        precision,
    )
    found = _BACKWARD.get(key)
    if found is None:
        strides = dense_strides(shape, channels_last)
        problem = _gradient_problem(
            Direction.WGRAD,
            (x.shape, x.stride()),
            (shape, strides),
            grad,
            stride,
            padding,
            dilation,
            groups,
            precision,
        )
        found = _BACKWARD[key] = (runner(problem, grad.device), shape, strides)
    prepared, shape, strides = found
    if prepared.executable is None:
        named = {"grad_output": grad, "input": x}
        result = prepared.algorithm.compute(prepared.problem, named)  # type: ignore[attr-defined]
        return _as_format(result, channels_last)
    w = torch.empty_strided(shape, strides, dtype=grad.dtype, device=grad.device)
    prepared.executable(grad, x, w)
    return w


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
    return _empty(shape, grad.dtype, grad.device, is_channels_last(x))


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
        grad_x = CONV_DGRAD(grad, w, ctx.in_size, *ctx.geometry) if need_x else None
        grad_w = CONV_WGRAD(grad, x, ctx.kernel, *ctx.geometry) if need_w else None
        return (grad_x, grad_w) + (None,) * len(ctx.geometry)


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


CONV = library.define(
    "conv",
    f"(Tensor input, Tensor weight, {_GEOMETRY}) -> Tensor",
    _conv,
    _conv_fake,
    _Conv.run,
)
CONV_DGRAD = library.define(
    "conv_dgrad",
    f"(Tensor grad_output, Tensor weight, SymInt[] in_size, {_GEOMETRY}) -> Tensor",
    _dgrad,
    _dgrad_fake,
    _Dgrad.run,
)
CONV_WGRAD = library.define(
    "conv_wgrad",
    f"(Tensor grad_output, Tensor input, SymInt[] kernel, {_GEOMETRY}) -> Tensor",
    _wgrad,
    _wgrad_fake,
    _Wgrad.run,
)


def _epilogue_impl(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    save_acc: bool,
    geometry: tuple[Any, ...],
) -> tuple[Tensor, Tensor | None]:
    stride, padding, dilation, groups, precision = geometry
    refresh()
    if not uses_triton(x.device) or x.dim() != 4:
        if tables.is_recording():
            _note(_epilogue_problem(x, w, operands, captures, function, save_acc, geometry))
        acc = _product_with_torch(x, w, *geometry)
        y = apply_with_torch(function, acc, operands, captures)
        return torch.empty_like(acc).copy_(y), acc
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
        function,
        save_acc,
        *[(t.dtype, t.shape, t.stride()) for t in operands],
        *[(t.dtype, t.shape, t.stride()) for t in captures],
    )
    found = _FORWARD.get(key)
    if found is None:
        found = _prepare_epilogue(key, x, w, operands, captures, function, save_acc, geometry)
    prepared, shape, strides = found
    y = torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)
    saved = torch.empty_like(y) if save_acc else None
    if prepared is not None:
        outputs = (y,) if saved is None else (y, saved)
        prepared(x, w, *outputs, *operands, *captures)
    return y, saved


def _epilogue_problem(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    save_acc: bool,
    geometry: tuple[Any, ...],
) -> ConvProblem:
    bare = _forward_problem(x, w, *geometry)
    spec = EpilogueSpec(
        function,
        tuple(t.dtype for t in operands),
        tuple(tuple(t.expand(bare.y_shape).stride()) for t in operands),
        tuple(t.dtype for t in captures),
        tuple(tuple(t.shape) for t in captures),
        tuple(tuple(t.stride()) for t in captures),
        save_acc,
    )
    return replace(bare, epilogue=spec)


def _prepare_epilogue(
    key: Any,
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    save_acc: bool,
    geometry: tuple[Any, ...],
) -> tuple[Runner | None, tuple[int, ...], tuple[int, ...]]:
    problem = _epilogue_problem(x, w, operands, captures, function, save_acc, geometry)
    empty = 0 in problem.y_shape
    found = (None if empty else runner(problem, x.device), problem.y_shape, problem.y_strides)
    _FORWARD[key] = found
    return found


def _conv_epilogue(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    *geometry: Any,
) -> Tensor:
    return _epilogue_impl(x, w, operands, captures, function, False, geometry)[0]


def captures_of(function: str) -> bool:
    """Whether an epilogue reads captured tensors."""
    return bool(program_of(function).captures)


def prepared_forward(
    x: Tensor, w: Tensor, operands: list[Tensor], function: str | None, geometry: tuple[Any, ...]
) -> Callable[..., Tensor] | None:
    """The launch alone, for tensors like these and no gradient; None where PyTorch computes.

    The result takes (x, w, *operands) and reads operands by pointer: their shapes are settled.
    """
    if not uses_triton(x.device) or x.dim() != 4:
        return None
    if function is None:
        problem = _forward_problem(x, w, *geometry)
    else:
        problem = _epilogue_problem(x, w, operands, [], function, False, geometry)
        if program_of(function).captures:
            return None
    shape, strides, dtype, device = problem.y_shape, problem.y_strides, x.dtype, x.device
    if 0 in shape or 0 in problem.w_shape:
        return None
    executable = runner(problem, device).executable
    if executable is None:
        return None

    def forward(x: Tensor, w: Tensor, *operands: Tensor) -> Tensor:
        y = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        executable(x, w, y, *operands)
        return y

    return forward


def _conv_epilogue_fake(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    *geometry: Any,
) -> Tensor:
    return _conv_fake(x, w, *geometry)


def _conv_epilogue_acc(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:
    y, acc = _epilogue_impl(x, w, operands, captures, function, True, geometry)
    assert acc is not None
    return y, acc


def _conv_epilogue_acc_fake(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:
    return _conv_fake(x, w, *geometry), _conv_fake(x, w, *geometry)


@functools.cache
def _as_elements(program: Program) -> Program:
    """The epilogue read from memory: its accumulator is an operand like the others."""
    return ScalarFunction(program, ()).with_roles(acc=Role.ELEMENT).program


def _wanted(program: Program, needs: Sequence[bool]) -> tuple[str, ...]:
    """Names to differentiate by: ``needs`` has acc, then operands, then captures."""
    operands = [a for a in program.arguments if a.role is not Role.COORD]
    wrt = [
        a.name
        for a, need in zip(operands, needs, strict=False)
        if need and a.dtype.is_floating_point
    ]
    for k, load in enumerate(program.loads):
        if needs[len(operands) + load.capture] and load.dtype.is_floating_point:
            wrt.append(f"load:{k}")
    return tuple(wrt)


class _ConvEpilogue(library.OpFunction):
    """y = f(conv(x, w), …); returns (y, acc) when f's gradient reads the accumulator.

    The accumulator is a differentiable output: a second derivative reaches x and w through it.
    """

    @staticmethod
    def forward(
        function: str,
        geometry: tuple[Any, ...],
        save_acc: bool,
        count: int,
        x: Tensor,
        w: Tensor,
        *tensors: Tensor,
    ) -> Any:
        operands, captures = list(tensors[:count]), list(tensors[count:])
        op = CONV_EPILOGUE_ACC if save_acc else CONV_EPILOGUE
        return op.below_autograd(x, w, operands, captures, function, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, ctx.geometry, ctx.save_acc, ctx.count, x, w, *tensors = inputs
        y, acc = output if ctx.save_acc else (output, None)
        ctx.channels_last = is_channels_last(y)
        ctx.shape = y.shape
        ctx.dtype = y.dtype
        ctx.in_size, ctx.kernel = list(x.shape[2:]), list(w.shape[2:])
        need_x, need_w = ctx.needs_input_grad[4:6]
        ctx.save_for_backward(x if need_w else None, w if need_x else None, acc, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_acc: Tensor | None = None) -> tuple[Any, ...]:
        x, w, acc, *tensors = ctx.saved_tensors
        need_x, need_w, *need_tensors = ctx.needs_input_grad[4:]
        results: tuple[Tensor | None, ...] = (None,) * (1 + len(tensors))
        if grad is not None:
            # Where the derivative does not read the accumulator any tensor stands in for it.
            stand_in = acc if acc is not None else grad
            results = pull_back(
                _as_elements(program_of(ctx.function)),
                ctx.shape,
                [stand_in, *tensors[: ctx.count]],
                tensors[ctx.count :],
                [grad],
                [need_x or need_w, *need_tensors],
                ctx.channels_last,
            )
        through, *rest = results
        if through is not None and grad_acc is not None:
            through = through + grad_acc
        elif through is None:
            through = grad_acc
        grad_x = grad_w = None
        if through is not None:
            if need_x:
                grad_x = CONV_DGRAD(through, w, ctx.in_size, *ctx.geometry)
            if need_w:
                grad_w = CONV_WGRAD(through, x, ctx.kernel, *ctx.geometry)
        return (None, None, None, None, grad_x, grad_w, *rest)


def _epilogue_autograd(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    *geometry: Any,
) -> Tensor:
    program = program_of(function)
    needs = [x.requires_grad or w.requires_grad]
    needs += [t.requires_grad for t in (*operands, *captures)]
    if torch._C._are_functorch_transforms_active():
        # What an outer transform differentiates by does not show at this level.
        needs = [True] * len(needs)
    wrt = _wanted(program, needs)
    save_acc = bool(wrt) and "acc" in program.vjp(wrt).live
    result = _ConvEpilogue.run(
        function, geometry, save_acc, len(operands), x, w, *operands, *captures
    )
    return result[0] if save_acc else result


def _epilogue_acc_autograd(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:
    return _ConvEpilogue.run(function, geometry, True, len(operands), x, w, *operands, *captures)


_EPILOGUE = f"Tensor[] operands, Tensor[] captures, str function, {_GEOMETRY}"
CONV_EPILOGUE = library.define(
    "conv_epilogue",
    f"(Tensor input, Tensor weight, {_EPILOGUE}) -> Tensor",
    _conv_epilogue,
    _conv_epilogue_fake,
    _epilogue_autograd,
)
CONV_EPILOGUE_ACC = library.define(
    "conv_epilogue_acc",
    f"(Tensor input, Tensor weight, {_EPILOGUE}) -> (Tensor, Tensor)",
    _conv_epilogue_acc,
    _conv_epilogue_acc_fake,
    _epilogue_acc_autograd,
)
