"""Layer normalisation modules, over the last axes or over the channels of a map."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..norm.layer_api import layer_norm
from ..runtime.errors import bad_value

Tensor = torch.Tensor


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` by :func:`tritonconv.layer_norm`.

    Constructor, parameters and state_dict are PyTorch's. Half precision is read and written as it
    is; the arithmetic is in float32.

    Args:
        normalized_shape, eps, elementwise_affine, bias: see ``torch.nn.LayerNorm``.

    Shape:
        (*, *normalized_shape) to the same. Under autocast the result has autocast's dtype, where
        PyTorch's has float32.

    Example:
        >>> import torch, tritonconv as tc
        >>> norm, x = tc.nn.LayerNorm(96), torch.randn(2, 7, 96)
        >>> torch.allclose(norm(x), torch.nn.LayerNorm(96)(x), atol=1e-5)
        True
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise over the last axes."""
        return layer_norm(input, self.normalized_shape, *_parameters(self), self.eps)


class _ChannelNorm(torch.nn.LayerNorm):
    """What the modules of one, two and three spatial axes have in common."""

    _dims: ClassVar[int]

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_channels, eps, affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise every pixel over its channels."""
        if input.dim() != self._dims:
            raise bad_value("input", f"{self._dims} dimensions", tuple(input.shape))
        pixels = input.movedim(1, -1)
        return layer_norm(pixels, self.normalized_shape, *_parameters(self), self.eps).movedim(
            -1, 1
        )


class LayerNorm1d(_ChannelNorm):
    """Layer normalisation over the channels of a signal; see :class:`LayerNorm2d`.

    Shape:
        (N, C, L) to the same.
    """

    _dims = 3


class LayerNorm2d(_ChannelNorm):
    """Layer normalisation over the channels of an image, pixel by pixel, as in ConvNeXt.

    A channels_last map is read where it lies; any other is copied to channels_last first.

    Args:
        num_channels: C.
        eps: added to the variance.
        affine: whether there is a weight for every channel.
        bias: whether there is a bias beside the weight.

    Shape:
        (N, C, H, W) to the same, in channels_last. Under autocast the result has autocast's dtype.

    Example:
        >>> import torch, tritonconv as tc
        >>> norm, x = tc.nn.LayerNorm2d(8), torch.randn(2, 8, 5, 5)
        >>> plain = torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), (8,), eps=1e-6)
        >>> torch.allclose(norm(x), plain.permute(0, 3, 1, 2), atol=1e-5)
        True
    """

    _dims = 4


class LayerNorm3d(_ChannelNorm):
    """Layer normalisation over the channels of a volume; see :class:`LayerNorm2d`.

    Shape:
        (N, C, D, H, W) to the same.
    """

    _dims = 5


def _parameters(module: torch.nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias, past ``Module.__getattr__``, which looks into three dictionaries."""
    parameters = module._parameters
    try:
        return parameters["weight"], parameters["bias"]
    except KeyError:  # parametrized, pruned, replaced
        return module.weight, module.bias  # type: ignore[return-value]


LAYER_NORMS = (LayerNorm, LayerNorm1d, LayerNorm2d, LayerNorm3d)
"""Our classes."""

_NAMED: dict[str, type[torch.nn.LayerNorm]] = {"LayerNorm": LayerNorm, "LayerNorm2d": LayerNorm2d}
_PACKAGES = ("timm", "torchvision")


def converted_layer_norm(kind: type[torch.nn.Module]) -> type[torch.nn.LayerNorm] | None:
    """Our class for a layer norm of PyTorch's, timm's or torchvision's; None for any other."""
    if kind is torch.nn.LayerNorm:
        return LayerNorm
    theirs = issubclass(kind, torch.nn.LayerNorm) and kind.__module__.split(".")[0] in _PACKAGES
    return _NAMED.get(kind.__name__) if theirs else None


__all__ = [
    "LAYER_NORMS",
    "LayerNorm",
    "LayerNorm1d",
    "LayerNorm2d",
    "LayerNorm3d",
    "converted_layer_norm",
]
