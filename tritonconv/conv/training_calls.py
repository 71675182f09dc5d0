"""Prepared calls with gradients: a call of a kind met before, and its backward, in few steps.

The operators of ``ops.py`` look at all arguments of every product. What they find is the same for
all tensors of one kind, so a prepared call keeps it: one ``autograd.Function`` that runs bound
products forward and backward. Whatever is not plain eager code with what was prepared for (a
second derivative asked for, tensors of another kind out of saved-tensor hooks, a change of the
tables in between) takes the operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..runtime import library, tables
from ..runtime.backend import uses_triton
from ..runtime.errors import bad_type
from . import ops
from .dispatch import runner
from .fused_ops import problem_of
from .prepared_products import Product, prepared_gradients, prepared_product
from .problem import ConvProblem

Tensor = torch.Tensor
_Gradients = Callable[[Tensor, Any, Any], tuple[Tensor | None, Tensor | None]]
_MAX_KINDS = 64


def kind_of(t: Tensor) -> tuple[Any, ...]:
    """What a prepared call depends on."""
    return t.shape, t.stride(), t.dtype, t.device


def is_plain(t: Tensor | None) -> bool:
    """Whether a saved tensor is there as it was, or is not needed."""
    return t is None or (type(t) in library.PLAIN_TYPES and not t.is_neg())


class Products:
    """The product of one kind of tensors, with a bias or without, and its gradients, prepared.

    Attributes:
        forward: computes the product of tensors of this kind, of which the bias is the third.
        epoch: the state of tables and settings that this holds for.
    """

    def __init__(
        self,
        forward: Product,
        squeezed: bool,
        result: list[int] | None,
        geometry: tuple[Any, ...],
        in_size: list[int],
        kernel: list[int],
        summed: tuple[int, ...],
        epoch: int,
    ) -> None:
        """Keep what the operators need.

        Args:
            forward: computes the product.
            squeezed: tensors lack the first spatial axis of the problems, which is of size one.
            result: spatial extent of a transposed convolution's result; None for a convolution.
            geometry: stride, padding, dilation, groups, precision as the operators take them.
            in_size, kernel: spatial extents of input and weight, with all axes of the problems.
            summed: axes of a result that the gradient of a bias is summed over.
            epoch: of tables and settings when the product was looked for.
        """
        self.forward = forward
        self.epoch = epoch
        self._squeezed = squeezed
        self._result = result
        self._geometry = geometry
        self._in_size = in_size
        self._kernel = kernel
        self._summed = summed
        self._prepared: dict[Any, _Gradients] = {}

    def __call__(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product, differentiably; with a bias where that is what was prepared."""
        y: Tensor = _Product.run(self, x, w, bias)
        return y

    def bias_gradient(self, grad: Tensor) -> Tensor:
        """Gradient by the bias, (filters,), differentiable and in the result's dtype.

        It is the sum that ``codegen.elementwise.pull_back`` makes for the operators.
        """
        total = grad.sum(self._summed).to(grad.dtype)  # autocast, if on in a backward, widens sums
        # What is left besides the filters are axes of one element.
        return total if total.dim() == 1 else total.reshape(grad.shape[1])

    def gradients(
        self, grad: Tensor, x: Tensor | None, w: Tensor | None, need_x: bool, need_w: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients by x (which needs w) and by w (which needs x)."""
        if (
            not torch.is_grad_enabled()
            and library.plain(grad)
            and self.epoch == tables.epoch()
            and is_plain(x)
            and is_plain(w)
        ):
            key = (
                grad.shape,
                grad.stride(),
                grad.dtype,
                grad.device,
                None if x is None else kind_of(x),
                None if w is None else kind_of(w),
                need_x,
                need_w,
            )
            found = self._prepared.get(key)
            if found is None:
                found = self._prepare(key, grad, x, w, need_x, need_w)
            if found is not None:
                return found(grad, x, w)
        return self._by_operators(grad, x, w, need_x, need_w)

    def _lifted(self, t: Tensor) -> Tensor:
        return t.unsqueeze(2) if self._squeezed else t

    def _by_operators(
        self, grad: Tensor, x: Tensor | None, w: Tensor | None, need_x: bool, need_w: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """By the operators, which serve everything and are differentiable in turn."""
        by_x = by_w = None
        grad, geometry = self._lifted(grad), self._geometry
        if need_x and w is not None:
            if self._result is None:
                by_x = ops.CONV_DGRAD(grad, self._lifted(w), self._in_size, *geometry)
            else:
                by_x = ops.CONV(grad, self._lifted(w), *geometry)
        if need_w and x is not None:
            pair = grad, self._lifted(x)
            first, second = pair if self._result is None else pair[::-1]
            by_w = ops.CONV_WGRAD(first, second, self._kernel, *geometry)
        if self._squeezed:
            by_x = None if by_x is None else by_x.squeeze(2)
            by_w = None if by_w is None else by_w.squeeze(2)
        return by_x, by_w

    def _prepare(
        self,
        key: Any,
        grad: Tensor,
        x: Tensor | None,
        w: Tensor | None,
        need_x: bool,
        need_w: bool,
    ) -> _Gradients | None:
        """Bind the gradients' products; None where the operators are to compute them."""
        if any(t is not None and 0 in t.shape for t in (grad, x, w)):
            return None
        for name, t in (("input", x), ("weight", w)):  # hooks may have changed them
            if t is not None and (t.dtype is not grad.dtype or t.device != grad.device):
                kept = f"{grad.dtype} on {grad.device}, as the gradient"
                raise bad_type(f"saved {name}", kept, f"{t.dtype} on {t.device}")
        ops.refresh()
        g = self._lifted(grad)
        geometry, padding, device = self._geometry, self._geometry[1], grad.device
        by_x = by_w = both = None
        asked = []
        if need_x and w is not None:
            second = self._lifted(w)
            if self._result is None:
                problem = ops.dgrad_problem(g, second, self._in_size, geometry)
            else:
                problem = ops.forward_problem(g, second, *geometry)
            asked.append(runner(problem, device))
            by_x = prepared_product(asked[-1], g, second, padding, self._squeezed)
        if need_w and x is not None:
            pair = g, self._lifted(x)
            first, second = pair if self._result is None else pair[::-1]
            problem = ops.wgrad_problem(first, second, self._kernel, geometry)
            asked.append(runner(problem, device))
            by_w = prepared_product(asked[-1], first, second, padding, self._squeezed)
        if not all(found.asked.final for found in asked):
            return None
        if by_x is not None and by_w is not None and self._result is None and not self._squeezed:
            assert x is not None and w is not None
            both = prepared_gradients(asked[0], asked[1], grad, x, w, padding)
        found = both or self._one_by_one(by_x, by_w)
        if len(self._prepared) >= _MAX_KINDS:
            self._prepared.clear()
        self._prepared[key] = found
        return found

    def _one_by_one(self, by_x: Product | None, by_w: Product | None) -> _Gradients:
        if self._result is None:

            def gradients(grad: Tensor, x: Any, w: Any) -> tuple[Tensor | None, Tensor | None]:
                return (
                    None if by_x is None else by_x(grad, w),
                    None if by_w is None else by_w(grad, x),
                )

            return gradients

        def transposed(grad: Tensor, x: Any, w: Any) -> tuple[Tensor | None, Tensor | None]:
            return (
                None if by_x is None else by_x(grad, w),
                None if by_w is None else by_w(x, grad),
            )

        return transposed


def prepared_products(
    x: Tensor,
    w: Tensor,
    geometry: tuple[Any, ...],
    result: list[int] | None,
    squeezed: bool,
    bias: tuple[str, Tensor] | None = None,
) -> Products | None:
    """The product of tensors like these, prepared; None where the operators are to compute it.

    Args:
        x, w: operands with all axes of the problem.
        geometry: stride, padding, dilation, groups, precision as the operators take them.
        result: spatial extent of a transposed convolution's result; None for a convolution.
        squeezed: the calls' tensors lack the first spatial axis, which is of size one.
        bias: key of the epilogue that adds it, and it with all axes of the result.
    """
    epoch = tables.epoch()
    function, operands = (None, []) if bias is None else (bias[0], [bias[1]])
    found = bound_forward(x, w, operands, function, False, geometry, result, squeezed)
    if found is None:
        return None
    forward, problem = found
    sizes = list(x.shape[2:]), list(w.shape[2:])
    shape = list(problem.result_shape)
    if squeezed:
        del shape[2]
    # Axes of one element are left out, as the operators do: an order of sums may depend on it.
    summed = tuple(axis for axis, size in enumerate(shape) if size > 1 and axis != 1)
    return Products(forward, squeezed, result, geometry, *sizes, summed or (0,), epoch)


def bound_forward(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    function: str | None,
    save_acc: bool,
    geometry: tuple[Any, ...],
    result: list[int] | None,
    squeezed: bool,
) -> tuple[Product, ConvProblem] | None:
    """The product of tensors like these and its problem; None where the operators compute it.

    Args:
        x, w: operands with all axes of the problem.
        operands: of the epilogue, with all axes of the result.
        function: key of the epilogue, which captures nothing; None for the bare product.
        save_acc: the product gives the accumulator as well.
        geometry, result, squeezed: as for :func:`prepared_products`.
    """
    if not uses_triton(x.device) or not ops.has_kernels(x) or 0 in x.shape or 0 in w.shape:
        return None
    ops.refresh()
    problem = problem_of(x, w, operands, [], function, save_acc, geometry, result)
    if 0 in problem.result_shape:
        return None
    found = runner(problem, x.device)
    if not found.asked.final:
        return None
    return prepared_product(found, x, w, geometry[1], squeezed), problem


class _Product(library.OpFunction):
    """y = the product of x and w, and a bias if there is one; called in plain eager code only."""

    @staticmethod
    def forward(ctx: Any, products: Products, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.products = products
        _, need_x, need_w, _ = ctx.needs_input_grad
        # What the other operand's gradient does not need is not kept alive, nor ever the bias.
        ctx.save_for_backward(x if need_w else None, w if need_x else None)
        return products.forward(x, w) if bias is None else products.forward(x, w, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        _, need_x, need_w, need_bias = ctx.needs_input_grad
        products = ctx.products
        by_x = by_w = None
        if need_x or need_w:
            by_x, by_w = products.gradients(grad, x, w, need_x, need_w)
        return None, by_x, by_w, products.bias_gradient(grad) if need_bias else None
