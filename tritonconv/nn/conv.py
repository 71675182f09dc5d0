"""Convolution modules: drop-in replacements of ``torch.nn`` over the library's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..conv.api import conv2d

Tensor = torch.Tensor


class Conv2d(torch.nn.Conv2d):
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

    def forward(self, input: Tensor, *epilogue_args: Tensor) -> Tensor:
        """Convolve; ``epilogue_args`` are the operands of the epilogue."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return conv2d(
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

    def extra_repr(self) -> str:
        """The constructor's arguments, with the epilogue's name."""
        text = super().extra_repr()
        if self.epilogue is not None:
            text += f", epilogue={getattr(self.epilogue, '__name__', self.epilogue)}"
        return text
