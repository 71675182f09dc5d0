"""Convolution modules: drop-in replacements of ``torch.nn`` over the library's functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch.nn.modules.conv import _ConvNd

from ..conv import api
from ..runtime.errors import bad_type

Tensor = torch.Tensor


class Fused(_ConvNd):
    """What the six modules have in common: an epilogue and a precision."""

    _function: ClassVar[Callable[..., Tensor]]
    epilogue: Callable[..., Any] | None
    precision: str | None

    def __init__(
        self,
        *args: Any,
        epilogue: Callable[..., Any] | None = None,
        precision: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.epilogue = epilogue
        self.precision = precision

    def extra_repr(self) -> str:
        """The constructor's arguments, with the epilogue's name."""
        text = super().extra_repr()
        if self.epilogue is not None:
            text += f", epilogue={getattr(self.epilogue, '__name__', self.epilogue)}"
        return text


class PlainConv(Fused):
    """What the convolutions have in common."""

    def forward(self, input: Tensor | tuple[Tensor, Tensor], *epilogue_args: Tensor) -> Tensor:
        """Convolve; ``epilogue_args`` are the operands of the epilogue.

        A pair of inputs stands for its concatenation; see :func:`tritonconv.conv2d`.
        """
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            if isinstance(input, (tuple, list)):
                input = torch.cat(tuple(input), 1)
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return type(self)._function(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            epilogue=self.epilogue,
            epilogue_args=epilogue_args,
            precision=self.precision,
        )


class TransposedConv(Fused):
    """What the transposed convolutions have in common."""

    def forward(
        self, input: Tensor, output_size: Sequence[int] | None = None, *epilogue_args: Tensor
    ) -> Tensor:
        """Convolve with the adjoint.

        Args:
            input: of the convolution.
            output_size: which of the sizes that the convolution maps to the input's the result
                has; by default what ``output_padding`` says.
            epilogue_args: operands of the epilogue.
        """
        output_padding: Any = self.output_padding
        if output_size is not None:
            if isinstance(output_size, Tensor):
                raise bad_type(
                    "output_size", "sizes or None, before the epilogue's operands", "a tensor"
                )
            output_padding = self._output_padding(  # type: ignore[operator]
                input,
                list(output_size),
                self.stride,
                self.padding,
                self.kernel_size,
                len(self.kernel_size),
                self.dilation,
            )
        return type(self)._function(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
            epilogue=self.epilogue,
            epilogue_args=epilogue_args,
            precision=self.precision,
        )


class Conv1d(PlainConv, torch.nn.Conv1d):
    """``torch.nn.Conv1d`` on generated kernels: same constructor, parameters and state_dict.

    Args:
        padding: as in ``torch.nn.Conv1d``, or ``"causal"``: see :func:`tritonconv.conv1d`.
        epilogue: scalar function applied to every output element inside the kernel; see
            :func:`tritonconv.conv2d`. It is no part of the state_dict.
        precision: how float32 products are formed; see :func:`tritonconv.conv2d`.

    Shape:
        (N, C, L) or (C, L) to (N, M, P); further inputs of ``forward`` are the epilogue's
        operands, broadcastable to the output.

    Example:
        >>> import torch, tritonconv as tc
        >>> layer = tc.nn.Conv1d(3, 8, 3, padding="causal", dilation=2)
        >>> layer(torch.randn(1, 3, 16)).shape
        torch.Size([1, 8, 16])
    """

    _function = staticmethod(api.conv1d)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        causal = isinstance(padding, str) and padding == "causal"
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            0 if causal else padding,
            *args,
            **kwargs,
        )
        if causal:
            self.padding = "causal"
            before = self.dilation[0] * (self.kernel_size[0] - 1)
            self._reversed_padding_repeated_twice = [before, 0]


class Conv2d(PlainConv, torch.nn.Conv2d):
    """``torch.nn.Conv2d`` on generated kernels: same constructor, parameters and state_dict.

    Args:
        epilogue: scalar function applied to every output element inside the kernel; see
            :func:`tritonconv.conv2d`. It is no part of the state_dict.
        precision: how float32 products are formed; see :func:`tritonconv.conv2d`.

    Shape:
        (N, C, H, W) or (C, H, W) to (N, M, P, Q); further inputs of ``forward`` are the
        epilogue's operands, broadcastable to the output.

    Example:
        >>> import torch, tritonconv as tc
        >>> layer = tc.nn.Conv2d(3, 8, 3, padding="same", epilogue=torch.relu)
        >>> layer(torch.randn(1, 3, 16, 16)).min() >= 0
        tensor(True)
    """

    _function = staticmethod(api.conv2d)


class Conv3d(PlainConv, torch.nn.Conv3d):
    """``torch.nn.Conv3d`` on generated kernels: same constructor, parameters and state_dict.

    Args:
        epilogue, precision: see :class:`Conv2d`.

    Shape:
        (N, C, D, H, W) or (C, D, H, W) to (N, M, O, P, Q); further inputs of ``forward`` are the
        epilogue's operands, broadcastable to the output.
    """

    _function = staticmethod(api.conv3d)


class ConvTranspose1d(TransposedConv, torch.nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` over :func:`tritonconv.conv_transpose1d`.

    Same constructor, parameters and state_dict.

    Args:
        epilogue, precision: see :class:`Conv2d`.

    Shape:
        (N, C, L) or (C, L) to (N, M, P).
    """

    _function = staticmethod(api.conv_transpose1d)


class ConvTranspose2d(TransposedConv, torch.nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` over :func:`tritonconv.conv_transpose2d`.

    Same constructor, parameters and state_dict; ``forward`` takes ``output_size`` likewise, and
    the epilogue's operands behind it.

    Args:
        epilogue, precision: see :class:`Conv2d`.

    Shape:
        (N, C, H, W) or (C, H, W) to (N, M, P, Q).

    Example:
        >>> import torch, tritonconv as tc
        >>> up = tc.nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, epilogue=torch.relu)
        >>> up(torch.randn(1, 8, 5, 5), output_size=(10, 10)).shape
        torch.Size([1, 4, 10, 10])
    """

    _function = staticmethod(api.conv_transpose2d)


class ConvTranspose3d(TransposedConv, torch.nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` over :func:`tritonconv.conv_transpose3d`.

    Same constructor, parameters and state_dict.

    Args:
        epilogue, precision: see :class:`Conv2d`.

    Shape:
        (N, C, D, H, W) or (C, D, H, W) to (N, M, O, P, Q).
    """

    _function = staticmethod(api.conv_transpose3d)


CONVERTED: dict[type[_ConvNd], type[Fused]] = {
    torch.nn.Conv1d: Conv1d,
    torch.nn.Conv2d: Conv2d,
    torch.nn.Conv3d: Conv3d,
    torch.nn.ConvTranspose1d: ConvTranspose1d,
    torch.nn.ConvTranspose2d: ConvTranspose2d,
    torch.nn.ConvTranspose3d: ConvTranspose3d,
}
"""The module that takes the place of each of PyTorch's."""
