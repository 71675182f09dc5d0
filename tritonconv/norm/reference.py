"""The specification of batch normalisation in plain PyTorch, differentiable to any order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..codegen import ScalarFunction
from ..codegen.registry import program_of
from .activation import derivative_of

Tensor = torch.Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics are computed."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, at least in float32."""
    axes = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(x.to(wide_dtype(x.dtype)), axes, correction=0)
    return mean, var


def activated(function: str, z: Tensor) -> Tensor:
    """A registered activation of a whole tensor; the program itself is in float32."""
    if not function:
        return z
    result = ScalarFunction(program_of(function), ())(z)
    assert isinstance(result, Tensor)
    return result


def normalise(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    function: str,
    eps: float,
) -> Tensor:
    """f(weight · (x − mean) / √(var + eps) + bias + residual), in the dtype of x."""
    wide = wide_dtype(x.dtype)
    vector = (1, -1, *[1] * (x.dim() - 2))
    scale = torch.rsqrt(var.to(wide) + eps)
    if weight is not None:
        scale = scale * weight.to(wide)
    z = (x.to(wide) - mean.to(wide).reshape(vector)) * scale.reshape(vector)
    if bias is not None:
        z = z + bias.to(wide).reshape(vector)
    if residual is not None:
        z = z + residual.to(wide)
    return activated(function, z).to(x.dtype)


def gradients(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    function: str,
    eps: float,
    batch: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The gradients in plain PyTorch; ``mean`` and ``var`` are functions of x if it says so."""
    wide = wide_dtype(x.dtype)
    vector = (1, -1, *[1] * (x.dim() - 2))
    axes = [0, *range(2, x.dim())]
    rstd = torch.rsqrt(var.to(wide) + eps)
    normal = (x.to(wide) - mean.to(wide).reshape(vector)) * rstd.reshape(vector)
    g = grad.to(wide)
    if function:
        z = normal if weight is None else normal * weight.to(wide).reshape(vector)
        if bias is not None:
            z = z + bias.to(wide).reshape(vector)
        if residual is not None:
            z = z + residual.to(wide)
        found = derivative_of(function)(z, g)
        assert isinstance(found, Tensor)
        g = found
    results = []
    if needed[0]:
        scale = rstd if weight is None else rstd * weight.to(wide)
        dx = g
        if batch:
            dx = dx - g.mean(axes, True) - normal * (g * normal).mean(axes, True)
        results.append((dx * scale.reshape(vector)).to(x.dtype))
    if needed[1]:
        assert weight is not None
        results.append((g * normal).sum(axes).to(weight.dtype))
    if needed[2]:
        assert bias is not None
        results.append(g.sum(axes).to(bias.dtype))
    if needed[3]:
        results.append(g.to(x.dtype))
    return results


__all__ = ["activated", "gradients", "normalise", "statistics", "wide_dtype"]
