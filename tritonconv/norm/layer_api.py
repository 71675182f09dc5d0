"""Layer normalisation that reads and writes half precision and computes in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..runtime.errors import bad_type, bad_value
from . import layer_calls as calls
from .layer_ops import LAYER_NORM

Tensor = torch.Tensor


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.layer_norm`` in one launch, its gradients in two; differentiable twice.

    The arithmetic is in float32 (float64 for float64). Under ``torch.autocast`` the result has
    autocast's dtype whatever the input's; PyTorch computes there on a float32 copy of the input
    and returns float32, which the next matrix product casts back.

    Rows of up to 8192 values run on these kernels; wider ones, and CPU tensors, take PyTorch's
    operators. To normalise over the channels of (N, C, *spatial), pass ``input.movedim(1, -1)``:
    of a channels_last map that is a view, and nothing is copied.

    Args:
        input: (*, *normalized_shape), float32, float16, bfloat16 or float64. One that is not
            contiguous is copied.
        normalized_shape: the last axes of the input, over which mean and variance are taken.
        weight, bias: of that shape and of any floating dtype, each its own.
        eps: added to the variance.

    Returns:
        A contiguous tensor of the input's shape; of its dtype, or under autocast of autocast's.

    Raises:
        ArgumentValueError, ArgumentTypeError: an argument is not as described; nothing ran.

    Example:
        >>> import torch, tritonconv as tc
        >>> x, weight, bias = torch.randn(4, 7, 96), torch.randn(96), torch.randn(96)
        >>> y = tc.layer_norm(x, (96,), weight, bias)
        >>> torch.allclose(y, torch.nn.functional.layer_norm(x, (96,), weight, bias), atol=1e-5)
        True
    """
    if not isinstance(input, Tensor):
        raise bad_type("input", "a tensor", type(input).__name__)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    dtype = _result_dtype(input)
    if not input.is_contiguous():
        _check(input, shape, weight, bias)
        input = input.contiguous()
    key = None
    if not torch.compiler.is_compiling():
        key = calls.call_key(input, shape, weight, bias, eps, dtype)
        step = None if key is None else calls.prepared(key)
        if step is not None:
            return step(input, weight, bias)
    _check(input, shape, weight, bias)
    if key is not None:
        # The first call too: a checkpoint's second run must save what its first one did.
        step = calls.prepare(key, input, len(shape), weight, bias, eps, dtype)
        if step is not None:
            return step(input, weight, bias)
    result: Tensor = LAYER_NORM(input, len(shape), weight, bias, eps, dtype)[0]
    return result


def _result_dtype(x: Tensor) -> torch.dtype:
    """Of the result: the input's, or what autocast asks for, which leaves float64 alone."""
    dtype, kind = x.dtype, x.device.type
    if dtype is torch.float64 or kind not in ("cpu", "cuda"):
        return dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype


def _check(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> None:
    if not x.is_floating_point():
        raise bad_type("input", "a floating dtype", x.dtype)
    if not shape:
        raise bad_value("normalized_shape", "at least one axis", shape)
    if tuple(x.shape[-len(shape) :]) != shape:
        raise bad_value("input", f"last axes {shape}, as normalized_shape", tuple(x.shape))
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise bad_type(name, "a tensor or None", type(t).__name__)
        if not t.is_floating_point():
            raise bad_type(name, "a floating dtype", t.dtype)
        if tuple(t.shape) != shape:
            raise bad_value(name, f"{shape}, the normalized_shape", tuple(t.shape))
        if t.device != x.device:
            raise bad_value(name, f"the input's device {x.device}", t.device)


__all__ = ["layer_norm"]
