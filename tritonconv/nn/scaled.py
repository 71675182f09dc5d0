"""Inference modules of float8 convolutions, made from trained ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch.nn.modules.conv import _ConvNd

from ..conv import scaled
from ..runtime.errors import bad_type, bad_value

Tensor = torch.Tensor


class ScaledConv(torch.nn.Module):
    """What the three modules have in common; made by :meth:`from_float`."""

    _function: ClassVar[Callable[..., Tensor]]
    _plain: ClassVar[type[_ConvNd]]
    weight: Tensor
    bias: Tensor | None
    scale_weight: Tensor
    scale_input: Tensor
    scale_output: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scale_weight: Tensor,
        bias: Tensor | None,
        scale_input: Tensor,
        scale_output: Tensor | None,
        out_dtype: torch.dtype | None,
        epilogue: Callable[..., Any] | None,
        **geometry: Any,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale_weight", scale_weight)
        self.register_buffer("bias", bias)
        self.register_buffer("scale_input", scale_input)
        self.register_buffer("scale_output", scale_output)
        self.out_dtype = out_dtype
        self.epilogue = epilogue
        self.geometry = geometry

    @classmethod
    def from_float(
        cls,
        conv: _ConvNd,
        scale_input: Tensor | float,
        *,
        scale_output: Tensor | float | None = None,
        out_dtype: torch.dtype | None = None,
        epilogue: Callable[..., Any] | None = None,
    ) -> Self:
        """Quantise a convolution's weight, one scale for each output channel.

        Args:
            conv: ``torch.nn.Conv1d``, ``2d``, ``3d`` or ours, zero-padded. It is not changed.
            scale_input: scale of the inputs to come: their largest magnitude, as seen on
                representative data, over 448.
            scale_output: that of the result, where the next layer takes float8.
            out_dtype: of the result; see :func:`tritonconv.scaled_conv2d`.
            epilogue: scalar function; by default that of ``conv``, if it has one.

        Raises:
            ArgumentTypeError: ``conv`` is no convolution of this number of axes.
            ArgumentValueError: it pads with something else than zeros.
        """
        if not isinstance(conv, cls._plain):
            raise bad_type("conv", f"a {cls._plain.__name__}", type(conv).__name__)
        if conv.padding_mode != "zeros":
            raise bad_value("conv", "padding_mode 'zeros'", repr(conv.padding_mode))
        weight, scales = scaled.quantize_per_channel(conv.weight)
        device = weight.device

        def scale(value: Tensor | float) -> Tensor:
            return torch.as_tensor(value, dtype=torch.float32, device=device).detach().clone()

        return cls(
            weight,
            scales,
            None if conv.bias is None else conv.bias.detach().clone(),
            scale(scale_input),
            None if scale_output is None else scale(scale_output),
            out_dtype,
            getattr(conv, "epilogue", None) if epilogue is None else epilogue,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
        )

    def forward(self, input: Tensor, *epilogue_args: Tensor) -> Tensor:
        """Convolve float8, or what is quantised to it first; where it needs a gradient, refuse."""
        if input.dtype is not self.weight.dtype:
            input, _ = scaled.quantize_per_tensor(input, self.scale_input)
        return type(self)._function(
            input,
            self.weight,
            self.bias,
            **self.geometry,
            scale_input=self.scale_input,
            scale_weight=self.scale_weight,
            scale_output=self.scale_output,
            out_dtype=self.out_dtype,
            epilogue=self.epilogue,
            epilogue_args=epilogue_args,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to a device; the dtypes of a whole model are not for what is quantised."""

        def moved(t: Tensor) -> Tensor:
            result = fn(t)
            return result if result.dtype is t.dtype else t.to(result.device)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        """Shape of the weight, geometry, dtype of the result, the epilogue's name."""
        text = f"{tuple(self.weight.shape)}, "
        text += ", ".join(f"{name}={value}" for name, value in self.geometry.items())
        if self.out_dtype is not None:
            text += f", out_dtype={self.out_dtype}"
        if self.epilogue is not None:
            text += f", epilogue={getattr(self.epilogue, '__name__', self.epilogue)}"
        return text


class ScaledConv1d(ScaledConv):
    """A float8 ``Conv1d`` for inference: see :class:`ScaledConv2d`."""

    _function = staticmethod(scaled.scaled_conv1d)
    _plain = torch.nn.Conv1d


class ScaledConv2d(ScaledConv):
    """A float8 ``Conv2d`` for inference, made by :meth:`from_float`.

    Weight, bias and scales are buffers. Its input is float8 that was quantised with
    ``scale_input``, or a wider float, which is quantised first: that costs a pass over memory,
    which a chain of layers saves by giving each the ``scale_output`` of the one before.

    Shape:
        (N, C, H, W) or (C, H, W) to (N, M, P, Q); further inputs of ``forward`` are the
        epilogue's operands.

    Example:
        >>> import torch, tritonconv as tc
        >>> conv, x = torch.nn.Conv2d(16, 8, 3, padding=1), torch.randn(2, 16, 8, 8)
        >>> small = tc.nn.ScaledConv2d.from_float(conv, x.abs().max() / 448, epilogue=torch.relu)
        >>> error = (small(x).float() - conv(x).relu()).norm() / conv(x).relu().norm()
        >>> bool(error < 0.05)
        True
    """

    _function = staticmethod(scaled.scaled_conv2d)
    _plain = torch.nn.Conv2d


class ScaledConv3d(ScaledConv):
    """A float8 ``Conv3d`` for inference: see :class:`ScaledConv2d`."""

    _function = staticmethod(scaled.scaled_conv3d)
    _plain = torch.nn.Conv3d
