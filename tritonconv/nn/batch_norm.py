"""Convolution and batch normalisation as one module, which can leave the last step to the next.

In training the convolution's kernel sums up the statistics of what it stores, so that nothing
reads the output again for them; and where another such convolution follows, normalisation and
activation are its prologue, so that the normalised map is never written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ..conv import api, statistics
from ..conv.fused_input_ops import apply_elementwise
from ..conv.prologue import bind_prologue
from ..runtime.errors import bad_type, bad_value
from .conv import Conv1d, Conv2d, Conv3d, PlainConv
from .fold import _hooked

Tensor = torch.Tensor
Scalar = Callable[..., Any]


def _normalise(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (x - mean) * scale + shift


def _activate(activation: Scalar, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Any:
    return activation((x - mean) * scale + shift)


@dataclass(frozen=True)
class Unnormalised:
    """A convolution's output with the normalisation that is still to be applied to it.

    Attributes:
        output: (N, C, *spatial), as the convolution stored it.
        function: the scalar function ``f(x, mean, scale, shift)``, the activation included.
        arguments: mean, scale and shift of every channel.
    """

    output: Tensor
    function: Scalar
    arguments: tuple[Tensor, Tensor, Tensor]

    def normalised(self) -> Tensor:
        """Apply it, in one launch; differentiable twice."""
        x = self.output
        rank = x.dim() - 2
        key, reads = bind_prologue(self.function, self.arguments, x, rank)
        if rank == 1:  # functions of one axis are traced for maps of height one
            return apply_elementwise(key, x.unsqueeze(2), reads).squeeze(2)
        return apply_elementwise(key, x, reads)


def _maps(input: Any) -> list[Tensor]:
    """The tensors of what a module is given; others are left to the convolution to refuse."""
    if isinstance(input, Unnormalised):
        return [input.output]
    given = input if isinstance(input, (tuple, list)) else [input]
    return [t for t in given if isinstance(t, Tensor)]


class _ConvBatchNorm(torch.nn.Module):
    """What the modules of one, two and three axes have in common."""

    _conv: ClassVar[type[PlainConv]]
    _norm: ClassVar[type[torch.nn.modules.batchnorm._BatchNorm]]
    _plain: ClassVar[Callable[..., Tensor]]
    _with_stats: ClassVar[Callable[..., tuple[Tensor, Tensor, Tensor]]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        activation: Scalar | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        precision: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self._take(
            self._conv(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                padding,
                dilation,
                groups,
                bias,
                precision=precision,
                **place,
            ),
            self._norm(out_channels, eps, momentum, affine, track_running_stats, **place),
            activation,
        )

    def _take(self, conv: Any, norm: Any, activation: Scalar | None) -> None:
        self.conv = conv
        self.norm = norm
        self.activation = activation

    @property
    def _function(self) -> Scalar:
        """The scalar function of the activation that the module has now."""
        activation = self.activation
        return _normalise if activation is None else functools.partial(_activate, activation)

    @classmethod
    def of(cls, conv: Any, norm: Any, activation: Scalar | None = None) -> Any:
        """The module of an existing convolution and batch normalisation, which it takes over.

        Args:
            conv: PyTorch's or this library's convolution of the module's number of axes, without
                an epilogue.
            norm: a batch normalisation over its output channels.
            activation: scalar function applied behind.
        """
        kind: Any = cls._conv.__bases__[1]  # PyTorch's
        if not isinstance(conv, kind):
            raise bad_type("conv", f"a {cls._conv.__name__}", type(conv).__name__)
        if not isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
            raise bad_type("norm", "a batch normalisation", type(norm).__name__)
        if isinstance(norm, torch.nn.SyncBatchNorm):
            raise bad_type("norm", "one of this process's batch", type(norm).__name__)
        for name, part in (("conv", conv), ("norm", norm)):
            if _hooked(part):  # neither is called: a hook of theirs would never run
                raise bad_value(name, "one without hooks", part)
        if getattr(conv, "epilogue", None) is not None:
            raise bad_value("conv", "one without an epilogue", conv)
        if norm.num_features != conv.out_channels:
            raise bad_value("norm", f"{conv.out_channels} features", norm.num_features)
        module = cls.__new__(cls)
        torch.nn.Module.__init__(module)
        module._take(conv, norm, activation)
        return module

    def forward(self, input: Tensor | tuple[Tensor, Tensor] | Unnormalised) -> Tensor:
        """Convolve, normalise, activate.

        Args:
            input: (N, C, *spatial), a pair of such tensors in the place of their concatenation, or
                what :meth:`pending` of another module returned.
        """
        result = self.pending(input)
        return result.normalised() if isinstance(result, Unnormalised) else result

    def pending(
        self, input: Tensor | tuple[Tensor, Tensor] | Unnormalised
    ) -> Tensor | Unnormalised:
        """The same with normalisation and activation left to a following module.

        In evaluation they are the convolution's epilogue, and the result is complete.
        """
        conv, norm = self.conv, self.norm
        axes = len(conv.kernel_size) + 2
        for t in _maps(input):
            if t.dim() != axes:  # as of PyTorch's; the channels are looked for at axis 1
                raise bad_value("input", f"{axes} dimensions", tuple(t.shape))
        padding: Any = conv.padding
        if conv.padding_mode != "zeros":
            if isinstance(input, Unnormalised):
                input = input.normalised()
            if isinstance(input, (tuple, list)):
                input = torch.cat(tuple(input), 1)
            input = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = 0
        options: dict[str, Any] = {"precision": getattr(conv, "precision", None)}
        given: Any = input
        if isinstance(input, Unnormalised):
            given = input.output
            options |= {"prologue": input.function, "prologue_args": input.arguments}
        geometry = (conv.stride, padding, conv.dilation, conv.groups)
        if norm.training or norm.running_mean is None:
            y, mean, var = type(self)._with_stats(
                given, conv.weight, conv.bias, *geometry, **options
            )
            self._track(y, mean, var)
            return Unnormalised(y, self._function, (mean, *self._scale_and_shift(var)))
        vector = (-1, *[1] * len(conv.kernel_size))
        arguments = (norm.running_mean, *self._scale_and_shift(norm.running_var))
        return type(self)._plain(
            given,
            conv.weight,
            conv.bias,
            *geometry,
            epilogue=self._function,
            epilogue_args=tuple(t.reshape(vector) for t in arguments),
            **options,
        )

    def _scale_and_shift(self, var: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = self.norm.weight, self.norm.bias
        # PyTorch's does not compute in half precision: eps may be nothing in it.
        scale = torch.rsqrt(var.to(torch.promote_types(var.dtype, torch.float32)) + self.norm.eps)
        shift = torch.zeros_like(scale) if bias is None else bias
        return scale if weight is None else weight * scale, shift

    def _track(self, y: Tensor, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics as PyTorch's batch normalisation does."""
        norm = self.norm
        count = y.numel() // y.shape[1]
        if count <= 1:
            raise bad_value("input", "more than one value per channel in training", tuple(y.shape))
        if not (norm.training and norm.track_running_stats):
            return
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            factor = norm.momentum
            if factor is None:
                factor = 1.0 / norm.num_batches_tracked.to(mean.dtype)
            unbiased = var.detach() * (count / (count - 1))
            for running, new in ((norm.running_mean, mean.detach()), (norm.running_var, unbiased)):
                running.add_((new - running) * factor)

    def extra_repr(self) -> str:
        """The activation's name."""
        if self.activation is None:
            return ""
        return f"activation={getattr(self.activation, '__name__', self.activation)}"


class ConvBatchNorm1d(_ConvBatchNorm):
    """``activation(BatchNorm1d(Conv1d(x)))``; see :class:`ConvBatchNorm2d`.

    Shape:
        (N, C, L) to (N, M, P).
    """

    _conv = Conv1d
    _norm = torch.nn.BatchNorm1d
    _plain = staticmethod(api.conv1d)
    _with_stats = staticmethod(statistics.conv1d_with_stats)


class ConvBatchNorm2d(_ConvBatchNorm):
    """``activation(BatchNorm2d(Conv2d(x)))`` that writes and reads as little as it can.

    In training the statistics come out of the convolution's kernel, and one launch normalises and
    activates; with :meth:`pending` even that is left to the load of the next convolution. Running
    statistics move as PyTorch's do. In evaluation all of it is the convolution's epilogue.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: see
            :class:`Conv2d`.
        bias: whether the convolution has a bias, which the normalisation takes away again.
        activation: scalar function, such as ``torch.relu``; no part of the state_dict.
        eps, momentum, affine, track_running_stats: see ``torch.nn.BatchNorm2d``.
        precision: see :func:`tritonconv.conv2d`.

    Shape:
        (N, C, H, W) to (N, M, P, Q).

    Example:
        >>> import torch, tritonconv as tc
        >>> first = tc.nn.ConvBatchNorm2d(3, 8, 3, padding=1, activation=torch.relu)
        >>> second = tc.nn.ConvBatchNorm2d(8, 8, 3, padding=1)
        >>> x = torch.randn(2, 3, 16, 16)
        >>> apart = second(first(x))
        >>> together = second(first.pending(x))  # the map between them is not normalised in memory
        >>> torch.allclose(apart, together, atol=1e-4)
        True
    """

    _conv = Conv2d
    _norm = torch.nn.BatchNorm2d
    _plain = staticmethod(api.conv2d)
    _with_stats = staticmethod(statistics.conv2d_with_stats)


class ConvBatchNorm3d(_ConvBatchNorm):
    """``activation(BatchNorm3d(Conv3d(x)))``; see :class:`ConvBatchNorm2d`.

    Shape:
        (N, C, D, H, W) to (N, M, O, P, Q).
    """

    _conv = Conv3d
    _norm = torch.nn.BatchNorm3d
    _plain = staticmethod(api.conv3d)
    _with_stats = staticmethod(statistics.conv3d_with_stats)


__all__ = ["ConvBatchNorm1d", "ConvBatchNorm2d", "ConvBatchNorm3d", "Unnormalised"]
