"""Prepared calls with an epilogue and gradients: as ``training_calls.py`` prepares bare products.

The launch of ``y = f(product, …)`` is bound, so is that of f's derivative, which gives the gradient
of the product and of f's operands, and so are the two products of the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..codegen.elementwise import pull_back
from ..codegen.prepared_pull_back import PullBack, prepared_pull_back
from ..codegen.registry import program_of
from ..runtime import library, tables
from . import ops
from .fused_ops import as_elements, read_by_gradients, stand_in
from .training_calls import Products, bound_forward, is_plain, kind_of

Tensor = torch.Tensor
_MAX_KINDS = 64


class FusedProducts:
    """The product of one kind of tensors with an epilogue, and its gradients, prepared.

    Attributes:
        forward: computes (y, accumulator), or y alone where no gradient reads the accumulator.
        products: the gradients of the bare product.
        save_acc: whether ``forward`` gives the accumulator.
        kept: for every operand of the epilogue, whether a gradient reads it.
        squeezed: tensors lack the first spatial axis of the problem, which is of size one.
        epoch: the state of tables and settings that this holds for.
    """

    def __init__(
        self,
        products: Products,
        function: str,
        read: Sequence[bool],
        squeezed: bool,
        shapes: Sequence[torch.Size],
        channels_last: bool,
    ) -> None:
        """Keep what the operators need.

        Args:
            products: with the fused forward product.
            function: key of the epilogue.
            read: for the accumulator and every operand, whether a gradient reads it; the forward
                product gives the accumulator where one does.
            squeezed: tensors lack that axis.
            shapes: of the epilogue's operands with all axes of the result.
            channels_last: memory format of the result.
        """
        self.products = products
        self.forward = products.forward
        self.save_acc, *self.kept = read
        self.epoch = products.epoch
        self._program = as_elements(program_of(function))
        self.squeezed = squeezed
        self._shapes = tuple(shapes)
        self._channels_last = channels_last
        self._pulls: dict[Any, PullBack] = {}

    def __call__(self, x: Tensor, w: Tensor, *operands: Tensor) -> Tensor:
        """The result, differentiably."""
        found = _FusedProduct.run(self, x, w, *operands)
        y: Tensor = found[0] if self.save_acc else found
        return y

    def pull_back(
        self, grad: Tensor, acc: Tensor | None, operands: Sequence[Tensor], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients by the accumulator, with all axes, and by the epilogue's operands.

        Args:
            grad: of the result.
            acc: the accumulator, where it was saved.
            operands: of the epilogue, as a call gives them.
            needed: for the accumulator and every operand, whether its gradient is wanted.
        """
        given = grad
        if self.squeezed:
            grad = grad.unsqueeze(2)
        # Where the derivative does not read the accumulator any tensor stands in for it.
        first = grad if acc is None else acc
        found = None
        if (
            not torch.is_grad_enabled()
            and library.plain(grad)
            and is_plain(acc)
            and all(map(is_plain, operands))
        ):
            key = (kind_of(grad), kind_of(first), *map(kind_of, operands), *needed)
            found = self._pulls.get(key)
            if found is None:
                found = self._prepare(key, grad, first, operands, needed)
        if found is not None:
            first_grad, *rest = found(first, *operands, grad)
        else:
            elements = [first, *self._lifted(operands)]
            first_grad, *rest = pull_back(
                self._program, grad.shape, elements, (), [grad], needed, self._channels_last
            )
        pairs = zip(rest, operands, strict=True)
        results: list[Tensor | None] = [first_grad]
        for value, operand in pairs:
            if value is grad and given.shape == operand.shape:
                value = given
            elif value is grad and not torch.is_grad_enabled():
                # A view would hide from autograd, which adds in place, that the memory is shared.
                value = value.reshape(operand.shape).clone()
            elif value is not None and value.shape != operand.shape:
                value = value.reshape(operand.shape)
            results.append(value)
        return results

    def _lifted(self, operands: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(operands, self._shapes, strict=True)
        return [t if t.shape == shape else t.reshape(shape) for t, shape in pairs]

    def _prepare(
        self,
        key: Any,
        grad: Tensor,
        first: Tensor,
        operands: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> PullBack | None:
        """Bind the derivative; None where the operators are to compute it."""
        elements = [first, *self._lifted(operands)]
        found = prepared_pull_back(self._program, elements, grad, needed, self._channels_last)
        if found is not None:
            if len(self._pulls) >= _MAX_KINDS:
                self._pulls.clear()
            self._pulls[key] = found
        return found


def prepared_fused_products(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    function: str,
    needs: Sequence[bool],
    geometry: tuple[Any, ...],
    result: list[int] | None,
    squeezed: bool,
) -> FusedProducts | None:
    """The product with an epilogue, prepared; None where the operators are to compute it.

    Args:
        x, w: operands with all axes of the problem.
        operands: of the epilogue, with all axes of the result.
        function: key of the epilogue, which captures nothing.
        needs: for the product and every operand, whether a gradient is wanted.
        geometry: stride, padding, dilation, groups, precision as the operators take them.
        result: spatial extent of a transposed convolution's result; None for a convolution.
        squeezed: the calls' tensors lack the first spatial axis, which is of size one.
    """
    epoch = tables.epoch()
    read = read_by_gradients(function, needs)
    found = bound_forward(x, w, operands, function, read[0], geometry, result, squeezed)
    if found is None:
        return None
    forward, problem = found
    sizes = list(x.shape[2:]), list(w.shape[2:])
    products = Products(forward, squeezed, result, geometry, *sizes, (), epoch)
    y = torch.empty_strided(problem.result_shape, problem.result_strides, device="meta")
    shapes = [t.shape for t in operands]
    last = ops.is_channels_last(y)
    return FusedProducts(products, function, read, squeezed, shapes, last)


class _FusedProduct(library.OpFunction):
    """y = f(product, …); with it the accumulator where the gradient of f reads it.

    The accumulator is a differentiable output: a second derivative reaches x and w through it.
    Called in plain eager code only.
    """

    @staticmethod
    def forward(ctx: Any, fused: FusedProducts, x: Tensor, w: Tensor, *operands: Tensor) -> Any:
        ctx.fused = fused
        need_x, need_w = ctx.needs_input_grad[1:3]
        found = fused.forward(x, w, *operands)
        acc = found[1] if fused.save_acc else None
        # What no gradient reads is not kept alive.
        kept = [t if keep else None for t, keep in zip(operands, fused.kept, strict=True)]
        ctx.forms = [(t.shape, t.dtype) for t in operands]
        ctx.save_for_backward(x if need_w else None, w if need_x else None, acc, *kept)
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_acc: Tensor | None = None) -> tuple[Any, ...]:
        x, w, acc, *operands = ctx.saved_tensors
        _, need_x, need_w, *need_operands = ctx.needs_input_grad
        fused = ctx.fused
        through: Tensor | None = None
        rest: list[Tensor | None] = [None] * len(operands)
        if grad is not None:
            pairs = zip(operands, ctx.forms, strict=True)
            operands = [stand_in(grad, *form) if t is None else t for t, form in pairs]
            needed = (need_x or need_w, *need_operands)
            through, *rest = fused.pull_back(grad, acc, operands, needed)
        if grad_acc is not None:
            through = grad_acc if through is None else through + grad_acc
        by_x = by_w = None
        if through is not None and (need_x or need_w):
            if fused.squeezed:
                through = through.squeeze(2)
            by_x, by_w = fused.products.gradients(through, x, w, need_x, need_w)
        return None, by_x, by_w, *rest


__all__ = ["FusedProducts", "prepared_fused_products"]
