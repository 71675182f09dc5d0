"""The specification of layer normalisation in plain PyTorch, differentiable to any order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .reference import wide_dtype

Tensor = torch.Tensor


def _rows(x: Tensor, dims: int) -> tuple[int, ...]:
    """Sizes of a number for every row against the input."""
    return (*x.shape[: x.dim() - dims], *[1] * dims)


def statistics(x: Tensor, dims: int, eps: float) -> Tensor:
    """(2, rows): mean and 1 / √(var + eps) over the last ``dims`` axes, at least in float32."""
    axes = list(range(x.dim() - dims, x.dim()))
    if not x.numel():  # of which PyTorch warns
        return x.new_zeros((2, x.shape[: x.dim() - dims].numel()), dtype=wide_dtype(x.dtype))
    var, mean = torch.var_mean(x.to(wide_dtype(x.dtype)), axes, correction=0)
    return torch.stack([mean.reshape(-1), torch.rsqrt(var + eps).reshape(-1)])


def normalise(
    x: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """weight · (x − mean) / √(var + eps) + bias in ``dtype``, and the :func:`statistics`."""
    wide = wide_dtype(x.dtype)
    stats = statistics(x, dims, eps)
    mean, rstd = (t.reshape(_rows(x, dims)) for t in stats.unbind(0))
    y = (x.to(wide) - mean) * rstd
    if weight is not None:
        y = y * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(dtype), stats


def gradients(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of input, weight and bias, those that are needed, in their dtypes."""
    wide = wide_dtype(x.dtype)
    outer = list(range(x.dim() - dims))
    inner = list(range(x.dim() - dims, x.dim()))
    mean, rstd = (t.reshape(_rows(x, dims)) for t in stats.unbind(0))
    normal = (x.to(wide) - mean) * rstd
    g = grad.to(wide)
    results = []
    if needed[0]:
        scaled = g if weight is None else g * weight.to(wide)
        slope = (scaled * normal).mean(inner, True)
        dx = (scaled - scaled.mean(inner, True) - normal * slope) * rstd
        results.append(dx.to(x.dtype))
    if needed[1]:
        assert weight is not None
        product = g * normal
        results.append((product.sum(outer) if outer else product).to(weight.dtype))
    if needed[2]:
        assert bias is not None
        # A sum over no axes would be one over all of them.
        results.append((g.sum(outer) if outer else g).to(bias.dtype))
    return results


__all__ = ["gradients", "normalise", "statistics"]
