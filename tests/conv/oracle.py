"""What a result is compared with: plain PyTorch in float64, within the library's one budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonconv.conv.epilogue import COORDINATES
from tritonconv.runtime.accuracy import check

Function = Callable[..., Tensor]


def assert_accurate(result: Tensor, exact: Tensor, plain: Tensor, what: object = "") -> None:
    """``result`` errs at most as the budget allows for its dtype."""
    assert result.shape == exact.shape, f"{what}: {tuple(result.shape)} for {tuple(exact.shape)}"
    assert result.dtype == plain.dtype, f"{what}: {result.dtype} for {plain.dtype}"
    verdict = check(result, exact, plain, dtype=result.dtype)
    assert verdict.ok, f"{what}: {verdict}"


def plain_conv(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    epilogue: Function | None = None,
    epilogue_args: Sequence[Tensor] = (),
    precision: str | None = None,
    function: Function = F.conv2d,
    **options: Any,
) -> Tensor:
    """``tc.conv2d`` written with PyTorch: the epilogue works on whole tensors.

    Another ``function`` of ``torch.nn.functional`` makes it another of ours.
    """
    y = function(x, w, bias, **options)
    if epilogue is None:
        return y
    names = getattr(epilogue, "__kwdefaults__", None) or {}
    code = getattr(epilogue, "__code__", None)
    asked = code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount] if code else ()
    coordinates = {
        name: torch.arange(y.shape[axis], device=y.device).reshape(
            [-1 if k == axis else 1 for k in range(y.dim())]
        )
        for axis, name in enumerate(COORDINATES[y.dim() - 2])
        if name in asked and name not in names
    }
    return epilogue(y, *epilogue_args, **coordinates).to(y.dtype)


def cotangent(like: Tensor, seed: int = 1) -> Tensor:
    """A fixed random tensor of the shape and dtype of another."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)


def gradients(fn: Function, inputs: Sequence[Tensor], order: int) -> list[Tensor]:
    """The result and its gradients up to an order, contracted with fixed random tensors.

    The second order differentiates by the inputs and by the first order's cotangent.
    """
    leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in inputs]
    leaves = [t.requires_grad_() for t in leaves]
    y = fn(*leaves)
    found = [y.detach()]
    v = cotangent(y).requires_grad_()
    first = torch.autograd.grad(y, leaves, v, create_graph=order > 1)
    found += [g.detach() for g in first]
    if order > 1:
        mixed = sum((g * cotangent(g, seed=2 + k)).sum() for k, g in enumerate(first))
        second = torch.autograd.grad(mixed, [*leaves, v], materialize_grads=True)
        found += [g.detach() for g in second]
    return found


def assert_gradients(
    ours: Function,
    plain: Function,
    inputs: Sequence[Tensor],
    order: int = 2,
    names: Sequence[str] = (),
) -> None:
    """Result, first and second gradients of ``ours`` against ``plain``, all within budget.

    Args:
        ours, plain: functions of the inputs.
        inputs: floating tensors, all differentiated by.
        order: 1 or 2.
        names: of the inputs, for the message.
    """
    found = gradients(ours, inputs, order)
    reference = gradients(plain, inputs, order)
    exact = gradients(plain, [t.double() for t in inputs], order)
    names = list(names) or [str(k) for k in range(len(inputs))]
    labels = ["result", *(f"d/{n}" for n in names), *(f"dd/{n}" for n in (*names, "cotangent"))]
    for label, a, b, c in zip(labels, found, exact, reference, strict=False):
        assert_accurate(a, b, c, label)
