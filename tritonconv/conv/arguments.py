"""Arguments of the public convolution functions: checked before any launch, and normalised."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from ..runtime.compat import tf32_allowed
from ..runtime.errors import bad_type, bad_value
from .problem import FLOAT8, PRECISIONS

Tensor = torch.Tensor
IntOrInts = int | Sequence[int]


def ints(value: IntOrInts, rank: int, name: str, least: int) -> list[int]:
    """One integer per axis from one integer or a sequence of them."""
    if isinstance(value, (tuple, list)):
        values = [integer(v, name, rank) for v in value] * (rank if len(value) == 1 else 1)
        if len(values) != rank:
            raise bad_value(name, _integers(rank), value)
    else:
        values = [integer(value, name, rank)] * rank
    if min(values) < least:
        raise bad_value(name, f"integers >= {least}", value)
    return values


def integer(value: Any, name: str, rank: int = 1) -> int:
    """An integer of any library's: NumPy's too, but no float and no tensor."""
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]  # a symbolic integer stands for one
    if isinstance(value, Tensor) or not hasattr(value, "__index__"):
        raise bad_type(name, _integers(rank), type(value).__name__)
    return operator.index(value)


def _integers(rank: int) -> str:
    return "an integer" if rank == 1 else f"an integer or {rank} integers"


def pads(
    padding: IntOrInts | str, kernel: Sequence[int], stride: list[int], dilation: list[int]
) -> list[int]:
    """Flat (low, high) per axis of a convolution.

    ``"same"`` puts the odd element at the end, as PyTorch does; ``"causal"``, of one axis, puts
    everything before the first element.
    """
    rank = len(kernel)
    if not isinstance(padding, str):
        return [pad for both in ints(padding, rank, "padding", 0) for pad in (both, both)]
    if padding == "valid":
        return [0] * (2 * rank)
    totals = [step * (taps - 1) for taps, step in zip(kernel, dilation, strict=True)]
    if padding == "causal" and rank == 1:
        return [totals[0], 0]
    if padding != "same":
        words = "'same' or 'valid'" if rank > 1 else "'same', 'valid' or 'causal'"
        raise bad_value("padding", f"integers, {words}", repr(padding))
    if any(hop != 1 for hop in stride):
        raise bad_value("padding", "stride 1 with 'same'", f"stride {tuple(stride)}")
    return [pad for total in totals for pad in (total // 2, total - total // 2)]


def transposed_pads(
    padding: IntOrInts | str, output_padding: IntOrInts, stride: list[int], dilation: list[int]
) -> tuple[list[int], list[int]]:
    """Flat (low, high) padding of the convolution whose adjoint this is, and the output padding.

    An output padding below the stride is what the convolution's rounded division leaves over;
    a larger one (where the dilation allows it) is less padding at the end.
    """
    rank = len(stride)
    if isinstance(padding, str):
        raise bad_value("padding", "integers for a transposed convolution", repr(padding))
    both = ints(padding, rank, "padding", 0)
    more = ints(output_padding, rank, "output_padding", 0)
    flat = []
    for pad, extra, hop, step in zip(both, more, stride, dilation, strict=True):
        if extra >= max(hop, step):
            raise bad_value(
                "output_padding",
                f"less than the stride {tuple(stride)} or the dilation {tuple(dilation)}",
                output_padding,
            )
        flat += [pad, pad if extra < hop else pad - extra]
    return flat, more


def transposed_size(
    in_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Spatial extent of a transposed convolution's output; ``padding`` has one number per axis."""
    return [
        (size - 1) * hop - 2 * pad + step * (taps - 1) + more + 1
        for size, taps, hop, pad, more, step in zip(
            in_size, kernel, stride, padding, output_padding, dilation, strict=True
        )
    ]


def precision_of(precision: str | None, dtype: torch.dtype) -> str:
    """How products of this dtype are formed."""
    if precision is not None and precision not in PRECISIONS:
        raise bad_value("precision", " | ".join(PRECISIONS), repr(precision))
    if dtype is not torch.float32:
        return "ieee"
    return default_precision() if precision is None else precision


@torch.compiler.assume_constant_result
def default_precision() -> str:
    """What PyTorch's own settings say about float32 products."""
    return "tf32" if tf32_allowed() else "ieee"


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(x: Tensor, w: Tensor, bias: Tensor | None, rank: int) -> None:
    """Refuse what is no tensor, or an input of another number of axes."""
    for name, tensor in (("input", x), ("weight", w), ("bias", bias)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name != "bias"):
            raise bad_type(name, "a tensor", type(tensor).__name__)
    if x.dim() != rank + 2:
        raise bad_value(
            "input", f"{rank + 2} dimensions (batch, channels, *spatial)", tuple(x.shape)
        )


def check_operands(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    rank: int,
    groups: int,
    transposed: bool,
    float8: bool = False,
) -> None:
    """Refuse shapes, dtypes and devices that do not go together; ``float8`` where it is served."""
    first, second = ("in", "out") if transposed else ("out", "in")
    if w.dim() != rank + 2:
        axes = f"{first}_channels, {second}_channels / groups, *kernel"
        raise bad_value("weight", f"{rank + 2} dimensions ({axes})", tuple(w.shape))
    groups = integer(groups, "groups")
    if groups < 1 or w.shape[0] % groups:
        raise bad_value("groups", f"a positive divisor of {first}_channels = {w.shape[0]}", groups)
    channels, filters = w.shape[1] * groups, w.shape[0]
    if transposed:
        channels, filters = filters, channels
    if x.shape[1] != channels:
        raise bad_value(
            "input",
            f"{channels} channels (weight {tuple(w.shape)}, groups {groups})",
            f"{x.shape[1]} channels in {tuple(x.shape)}",
        )
    if x.dtype not in _DTYPES and not (float8 and x.dtype is FLOAT8):
        raise bad_type("input", "float16, bfloat16, float32 or float64", x.dtype)
    for name, tensor in (("weight", w), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise bad_type(name, f"the input's dtype {x.dtype}", tensor.dtype)
        if tensor.device != x.device:
            raise bad_value(name, f"the input's device {x.device}", tensor.device)
    if bias is not None and tuple(bias.shape) != (filters,):
        raise bad_value("bias", f"shape ({filters},)", tuple(bias.shape))
    if min(w.shape[2:]) < 1:
        raise bad_value("weight", "a kernel of at least one tap per axis", tuple(w.shape))


def check_epilogue_args(x: Tensor, shape: Sequence[int], epilogue_args: Sequence[Tensor]) -> None:
    """Refuse operands of an epilogue that do not broadcast to the output's ``shape``."""
    for index, operand in enumerate(epilogue_args):
        name = f"epilogue_args[{index}]"
        if not isinstance(operand, Tensor):
            raise bad_type(name, "a tensor (a Python number belongs into the function)", operand)
        if operand.device != x.device:
            raise bad_value(name, f"the input's device {x.device}", operand.device)
        lead = len(shape) - operand.dim()
        if lead < 0 or any(
            have != 1 and have != want
            for have, want in zip(operand.shape, shape[max(lead, 0) :], strict=False)
        ):
            raise bad_value(name, f"a shape broadcastable to {shape}", tuple(operand.shape))


def autocast(x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast operands take its dtype, as PyTorch's own convolution does."""
    if x.device.type not in ("cpu", "cuda") or not torch.is_autocast_enabled(x.device.type):
        return x, w, bias
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.dtype in _DTYPES and t.dtype != torch.float64 else t

    return cast(x), cast(w), None if bias is None else cast(bias)
