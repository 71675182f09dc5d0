"""Batch normalisation modules that add and activate in the same kernel."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from ..conv.fused_input_ops import apply_elementwise
from ..conv.prologue import bind_prologue
from ..norm.api import normalise

Tensor = torch.Tensor
Scalar = Callable[..., Any]


class Activated(torch.nn.modules.batchnorm._BatchNorm):
    """What the three modules have in common: an activation and a residual."""

    activation: Scalar | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: Scalar | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise, add ``residual`` if there is one, activate."""
        self._check_input_dim(input)
        training = self.training
        parameters, buffers = self._parameters, self._buffers
        try:  # past Module.__getattr__, which looks into three dictionaries for each of them
            weight, bias = parameters["weight"], parameters["bias"]
            mean, var = buffers["running_mean"], buffers["running_var"]
            tracked = buffers["num_batches_tracked"]
        except KeyError:  # parametrized, pruned, replaced
            weight, bias = self.weight, self.bias
            mean, var = self.running_mean, self.running_var
            tracked = self.num_batches_tracked
        batch = training or (mean is None and var is None)
        moving = training and self.track_running_stats
        if batch and not moving:
            mean = var = None
        y = normalise(
            input,
            mean,
            var,
            weight,
            bias,
            batch,
            self.momentum,
            self.eps,
            tracked if moving else None,
            self.activation,
            residual,
        )
        if y is None:  # what reads tensors or coordinates takes a launch of its own
            assert self.activation is not None
            y = normalise(
                input,
                mean,
                var,
                weight,
                bias,
                batch,
                self.momentum,
                self.eps,
                tracked if moving else None,
                None,
                residual,
            )
            assert y is not None
            return _activated(self.activation, y)
        return y

    def extra_repr(self) -> str:
        """The constructor's arguments, with the activation's name."""
        text = super().extra_repr()
        if self.activation is not None:
            text += f", activation={getattr(self.activation, '__name__', self.activation)}"
        return text


def _activated(activation: Scalar, y: Tensor) -> Tensor:
    """An activation of a whole map, as a function that a convolution's load could have called."""
    shape = y.shape
    if y.dim() < 4:  # functions of one axis are traced for maps of height one
        rank = 1
        x = y.reshape(*shape[:2], 1, -1)
        key, reads = bind_prologue(activation, (), x.squeeze(2), rank)
    else:
        x = y
        key, reads = bind_prologue(activation, (), x, y.dim() - 2)
    return apply_elementwise(key, x, reads).reshape(shape)


class BatchNorm1d(Activated, torch.nn.BatchNorm1d):
    """``activation(torch.nn.BatchNorm1d(x))``; see :class:`BatchNorm2d`.

    Shape:
        (N, C) or (N, C, L) to the same.
    """


class BatchNorm2d(Activated, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` and an activation in as few passes over memory as there can be.

    Constructor, parameters, running statistics and state_dict are PyTorch's. In training one kernel
    reads the input and one writes the result; the gradient takes two more, which compute the
    activation's derivative again instead of keeping its result. All of it can be differentiated
    twice.

    Args:
        num_features, eps, momentum, affine, track_running_stats: see ``torch.nn.BatchNorm2d``.
        activation: scalar function such as ``torch.relu``; no part of the state_dict unless it is
            a module with parameters. One that reads tensors or coordinates takes a launch of its
            own.

    Shape:
        (N, C, H, W) to the same, in the same memory format. A second input of ``forward`` is
        added before the activation: ``activation(norm(x) + residual)``.

    Example:
        >>> import torch, tritonconv as tc
        >>> norm = tc.nn.BatchNorm2d(8, activation=torch.relu)
        >>> x = torch.randn(2, 8, 5, 5)
        >>> plain = torch.nn.BatchNorm2d(8)
        >>> torch.allclose(norm(x), plain(x).relu(), atol=1e-5)
        True
    """


class BatchNorm3d(Activated, torch.nn.BatchNorm3d):
    """``activation(torch.nn.BatchNorm3d(x))``; see :class:`BatchNorm2d`.

    Shape:
        (N, C, D, H, W) to the same.
    """


NORMS: dict[type[torch.nn.Module], type[Activated]] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
}
"""PyTorch's class to ours."""

_NORM_ACT = "BatchNormAct2d"
_NORM_ACTS: dict[type[torch.nn.Module], type[Activated]] = {}


def converted_norm(kind: type[torch.nn.Module]) -> type[Activated] | None:
    """Our class for a batch norm of PyTorch's, or of timm's that activates; None for any other."""
    if kind in NORMS:
        return NORMS[kind]
    named = kind.__name__ == _NORM_ACT and kind.__module__.startswith("timm.")
    if not named or not issubclass(kind, torch.nn.BatchNorm2d):
        return None
    if kind not in _NORM_ACTS:
        namespace = {"__module__": __name__}
        _NORM_ACTS[kind] = type(_NORM_ACT, (Activated, kind), namespace)
    return _NORM_ACTS[kind]


def __getattr__(name: str) -> Any:
    """Our class for timm's batch norm, which pickle asks for by name."""
    if name != _NORM_ACT:
        raise AttributeError(name)
    return converted_norm(getattr(importlib.import_module("timm.layers"), _NORM_ACT))


__all__ = ["NORMS", "Activated", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "converted_norm"]
