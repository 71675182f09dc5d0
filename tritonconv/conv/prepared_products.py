"""Products of one kind of tensors as eager calls make them: what is constant is worked out once.

Where kernels of this library were chosen a prepared product is their launch; where PyTorch's was,
the same calls as ``algorithms/aten.py`` makes, without its work per call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..codegen.elementwise import apply_into
from ..codegen.ir import Role
from ..codegen.program import ScalarFunction
from ..codegen.registry import program_of
from ..runtime.compat import cudnn_settings
from ..runtime.settings import settings
from .dispatch import ATEN, Runner
from .problem import FLOAT8, ConvProblem, Direction
from .pytorch import CHANNELS_LAST

Tensor = torch.Tensor
Product = Callable[..., Any]
"""A product of two tensors; the operands of its epilogue follow them.

Where the epilogue saves the accumulator the result is a pair, the accumulator with all axes.
"""
Gradients = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

_convolution = torch.ops.aten.convolution.default
_convolution_backward = torch.ops.aten.convolution_backward.default


def prepared_product(
    found: Runner, first: Tensor, second: Tensor, padding: Sequence[int], squeezed: bool = False
) -> Product:
    """What computes the product of tensors like these two, with the problem's epilogue if any.

    Operands of the epilogue follow the two tensors, as a call gives them: their own axes and
    strides are not looked at, as the problem says where their elements are.

    Args:
        found: the problem of these tensors with its final choice; its epilogue captures nothing.
        first, second: the product's operands, with all axes of the problem.
        padding: flat (low, high) of the convolution as the operators take it.
        squeezed: the product's operands and result lack the first spatial axis, of size one.
    """
    problem, executable = found.problem, found.executable
    if executable is not None:
        shape, strides = problem.result_shape, problem.result_strides
        if squeezed:
            shape, strides = (*shape[:2], *shape[3:]), (*strides[:2], *strides[3:])
        dtype, device = problem.result_dtype, first.device
        if problem.epilogue is not None and problem.epilogue.save_acc:
            whole = problem.result_shape, problem.result_strides

            def launch_both(a: Tensor, b: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor]:
                out = torch.empty_strided(shape, strides, dtype=dtype, device=device)
                acc = torch.empty_strided(*whole, dtype=dtype, device=device)
                executable(a, b, out, acc, *operands)
                return out, acc

            return launch_both

        def launch(a: Tensor, b: Tensor, *operands: Tensor) -> Tensor:
            out = torch.empty_strided(shape, strides, dtype=dtype, device=device)
            executable(a, b, out, *operands)
            return out

        return launch
    if found.algorithm is ATEN and problem.dtype is not FLOAT8 and _is_symmetric(padding):
        product = _pytorch_product(problem, first, second)
    else:
        names = found.slots

        def product(a: Tensor, b: Tensor) -> Tensor:
            named = {names[0]: a, names[1]: b}
            return found.algorithm.compute(problem, named)  # type: ignore[attr-defined]

    if problem.epilogue is not None:
        return _with_epilogue(product, problem, squeezed)
    if not squeezed:
        return product

    def without_axis(a: Tensor, b: Tensor) -> Tensor:
        out = product(a.unsqueeze(2), b.unsqueeze(2))
        # No view: what a Function returns may be changed in place.
        return torch.ops.aten._unsafe_view.default(out, (*out.shape[:2], *out.shape[3:]))

    return without_axis


def _with_epilogue(product: Product, problem: ConvProblem, squeezed: bool) -> Product:
    """A bare product of operands with all axes, and the problem's epilogue behind it."""
    spec = problem.epilogue
    assert spec is not None
    function = ScalarFunction(program_of(spec.function), ()).with_roles(acc=Role.ELEMENT).program
    shape, strides, dtype = problem.result_shape, problem.result_strides, problem.result_dtype
    without = (*shape[:2], *shape[3:]), (*strides[:2], *strides[3:])

    def fused(a: Tensor, b: Tensor, *operands: Tensor) -> Any:
        if squeezed:
            a, b = a.unsqueeze(2), b.unsqueeze(2)
            out = torch.empty_strided(*without, dtype=dtype, device=a.device)
            target = out.as_strided(shape, strides)
        else:
            out = target = torch.empty_strided(shape, strides, dtype=dtype, device=a.device)
        elements = map(_spread, operands, spec.element_strides)
        acc = product(a, b)
        apply_into(function, target, [acc, *elements], ())
        return (out, acc) if spec.save_acc else out

    def _spread(operand: Tensor, strides: tuple[int, ...]) -> Tensor:
        return operand.as_strided(shape, strides)

    return fused


def prepared_gradients(
    by_x: Runner, by_w: Runner, grad: Tensor, x: Tensor, w: Tensor, padding: Sequence[int]
) -> Gradients | None:
    """Both gradients of the forward product by one call, where that is what two would compute.

    That is where PyTorch's kernel was chosen for both and one memory format suits all operands:
    else the format that PyTorch computes in may depend on which gradient is asked for.
    """
    dgrad, wgrad = by_x.problem, by_w.problem
    if by_x.algorithm is not ATEN or by_w.algorithm is not ATEN or dgrad.dtype is FLOAT8:
        return None
    if not _is_symmetric(padding) or not _of_one_format(grad, x, w):
        return None
    allow_tf32 = _allow_tf32(dgrad)
    stride, pads, dilation = list(dgrad.stride), list(dgrad.padding), list(dgrad.dilation)
    zeros, groups = [0] * len(pads), dgrad.groups
    x_strides, w_strides, mask = dgrad.x_strides, wgrad.w_strides, [True, True, False]

    def both(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        with cudnn_settings(allow_tf32=allow_tf32, deterministic=not settings.atomics):
            grad_x, grad_w, _ = _convolution_backward(
                grad, x, w, None, stride, pads, dilation, False, zeros, groups, mask
            )
        if grad_x.stride() != x_strides:
            grad_x = _laid_out(grad_x, x_strides)
        if grad_w.stride() != w_strides:
            grad_w = _laid_out(grad_w, w_strides)
        return grad_x, grad_w

    return both


def _pytorch_product(problem: ConvProblem, first: Tensor, second: Tensor) -> Product:
    allow_tf32 = _allow_tf32(problem)
    stride, pads, dilation = list(problem.stride), list(problem.padding), list(problem.dilation)
    zeros, groups = [0] * len(pads), problem.groups
    strides = problem.result_strides
    if problem.direction is Direction.FORWARD:

        def forward(x: Tensor, w: Tensor) -> Tensor:
            with cudnn_settings(allow_tf32=allow_tf32, deterministic=not settings.atomics):
                if torch._C._is_any_autocast_enabled():
                    # A backward inside of a region would be computed in its dtype: the gradient of
                    # a transposed convolution is this operator, which autocast casts for.
                    with torch._C._DisableAutocast():
                        y = _convolution(x, w, None, stride, pads, dilation, False, zeros, groups)
                else:
                    y = _convolution(x, w, None, stride, pads, dilation, False, zeros, groups)
            return y if y.stride() == strides else _laid_out(y, strides)

        return forward
    # A gradient's shape and memory format are told by a tensor of which nothing is read.
    shape = problem.result_shape
    if problem.direction is Direction.DGRAD:
        form = _format_of(first)

        def dgrad(grad: Tensor, w: Tensor) -> Tensor:
            x = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=form)
            with cudnn_settings(allow_tf32=allow_tf32, deterministic=not settings.atomics):
                found = _convolution_backward(
                    grad,
                    x,
                    w,
                    None,
                    stride,
                    pads,
                    dilation,
                    False,
                    zeros,
                    groups,
                    [True, False, False],
                )[0]
            return found if found.stride() == strides else _laid_out(found, strides)

        return dgrad
    form = _weight_format(second)

    def wgrad(grad: Tensor, x: Tensor) -> Tensor:
        w = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=form)
        with cudnn_settings(allow_tf32=allow_tf32, deterministic=not settings.atomics):
            found = _convolution_backward(
                grad, x, w, None, stride, pads, dilation, False, zeros, groups, [False, True, False]
            )[1]
        return found if found.stride() == strides else _laid_out(found, strides)

    return wgrad


def _is_symmetric(padding: Sequence[int]) -> bool:
    return min(padding) >= 0 and padding[::2] == padding[1::2]


def _format_of(t: Tensor) -> torch.memory_format:
    """The memory format in which PyTorch's kernel is asked for a gradient of such an operand."""
    form = CHANNELS_LAST.get(t.dim())
    if form is not None and t.is_contiguous(memory_format=form):
        return form
    return torch.contiguous_format


def _weight_format(x: Tensor) -> torch.memory_format:
    return _format_of(x) if x.stride(1) == 1 else torch.contiguous_format


def _of_one_format(grad: Tensor, x: Tensor, w: Tensor) -> bool:
    form = _format_of(grad)
    if form is not _weight_format(x) or not w.is_contiguous(memory_format=form):
        return False
    if form is torch.contiguous_format:
        return x.is_contiguous()
    # Sizes of one can leave a layout open: then the operands themselves must not say another.
    return not (x.is_contiguous() and w.is_contiguous())


def _laid_out(result: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The result with the strides that the problem promises, where sizes above one have others."""
    pairs = zip(result.shape, result.stride(), strides, strict=True)
    if all(size == 1 or have == want for size, have, want in pairs):
        return result
    return result.new_empty_strided(result.shape, strides).copy_(result)


def _allow_tf32(problem: ConvProblem) -> bool | None:
    return problem.precision == "tf32" if problem.dtype is torch.float32 else None
