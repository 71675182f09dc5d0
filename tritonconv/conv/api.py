"""Public convolution functions: validation, normalisation, and the way into the operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..runtime import library, tables
from ..runtime.compat import tf32_allowed
from ..runtime.errors import bad_type, bad_value
from . import fused_ops, ops
from .epilogue import (
    apply_to_whole,
    epilogue_captures,
    epilogue_key,
    made_in_compiled_code,
    static_identity,
)
from .problem import PRECISIONS, output_size

Tensor = torch.Tensor
IntOrInts = int | Sequence[int]


def _ints(value: IntOrInts, rank: int, name: str, least: int) -> list[int]:
    if isinstance(value, int):
        values = [value] * rank
    elif isinstance(value, (tuple, list)) and all(
        isinstance(v, (int, torch.SymInt)) for v in value
    ):
        values = list(value) * (rank if len(value) == 1 else 1)
        if len(values) != rank:
            raise bad_value(name, f"an integer or {rank} integers", value)
    else:
        raise bad_type(name, f"an integer or {rank} integers", type(value).__name__)
    if min(values) < least:
        raise bad_value(name, f"integers >= {least}", value)
    return values


def _pads(
    padding: IntOrInts | str, kernel: Sequence[int], stride: list[int], dilation: list[int]
) -> list[int]:
    """Flat (low, high) per axis; 'same' puts the odd element at the end, as PyTorch does."""
    rank = len(kernel)
    if isinstance(padding, str):
        if padding == "valid":
            return [0] * (2 * rank)
        if padding != "same":
            raise bad_value("padding", "integers, 'same' or 'valid'", repr(padding))
        if any(hop != 1 for hop in stride):
            raise bad_value("padding", "stride 1 with 'same'", f"stride {tuple(stride)}")
        flat = []
        for taps, step in zip(kernel, dilation, strict=True):
            total = step * (taps - 1)
            flat += [total // 2, total - total // 2]
        return flat
    return [pad for both in _ints(padding, rank, "padding", 0) for pad in (both, both)]


def _precision(precision: str | None, dtype: torch.dtype) -> str:
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


def _check_tensors(x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("input", x), ("weight", w), ("bias", bias)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name != "bias"):
            raise bad_type(name, "a tensor", type(tensor).__name__)


def _check(x: Tensor, w: Tensor, bias: Tensor | None, rank: int, groups: int) -> None:
    if w.dim() != rank + 2:
        axes = "out_channels, in_channels / groups, *kernel"
        raise bad_value("weight", f"{rank + 2} dimensions ({axes})", tuple(w.shape))
    if not isinstance(groups, int):
        raise bad_type("groups", "an integer", type(groups).__name__)
    if groups < 1 or w.shape[0] % groups:
        raise bad_value("groups", f"a positive divisor of out_channels = {w.shape[0]}", groups)
    if x.shape[1] != w.shape[1] * groups:
        raise bad_value(
            "input",
            f"{w.shape[1] * groups} channels (weight {tuple(w.shape)}, groups {groups})",
            f"{x.shape[1]} channels in {tuple(x.shape)}",
        )
    if x.dtype not in _DTYPES:
        raise bad_type("input", "float16, bfloat16, float32 or float64", x.dtype)
    for name, tensor in (("weight", w), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise bad_type(name, f"the input's dtype {x.dtype}", tensor.dtype)
        if tensor.device != x.device:
            raise bad_value(name, f"the input's device {x.device}", tensor.device)
    if bias is not None and tuple(bias.shape) != (w.shape[0],):
        raise bad_value("bias", f"shape ({w.shape[0]},)", tuple(bias.shape))


def _autocast(x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast operands take its dtype, as PyTorch's own convolution does."""
    if x.device.type not in ("cpu", "cuda") or not torch.is_autocast_enabled(x.device.type):
        return x, w, bias
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.dtype in _DTYPES and t.dtype != torch.float64 else t

    return cast(x), cast(w), None if bias is None else cast(bias)


def _conv(
    rank: int,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: IntOrInts,
    padding: IntOrInts | str,
    dilation: IntOrInts,
    groups: int,
    epilogue: Callable[..., Any] | None,
    epilogue_args: Sequence[Tensor],
    precision: str | None,
) -> Tensor:
    if not torch.compiler.is_compiling():
        key = _call_key(
            x, w, bias, stride, padding, dilation, groups, epilogue, epilogue_args, precision
        )
        if key is not None:
            call = _PREPARED.get(key)
            if call is not None and call.epoch == tables.epoch():
                return call(x, w, bias, epilogue_args)
    else:
        key = None
    unbatched = isinstance(x, Tensor) and x.dim() == rank + 1
    if unbatched:
        x = x.unsqueeze(0)
    if not isinstance(x, Tensor):
        raise bad_type("input", "a tensor", type(x).__name__)
    if x.dim() != rank + 2:
        raise bad_value(
            "input", f"{rank + 2} dimensions (batch, channels, *spatial)", tuple(x.shape)
        )
    _check_tensors(x, w, bias)
    x, w, bias = _autocast(x, w, bias)
    _check(x, w, bias, rank, groups)
    strides = _ints(stride, rank, "stride", 1)
    dilations = _ints(dilation, rank, "dilation", 1)
    kernel = w.shape[2:]
    if min(kernel) < 1:
        raise bad_value("weight", "a kernel of at least one tap per axis", tuple(w.shape))
    pads = _pads(padding, kernel, strides, dilations)
    size = output_size(x.shape[2:], kernel, strides, ops.pairs(pads), dilations)
    for extent in size:
        if extent < 1:
            raise bad_value(
                "input",
                f"a padded map at least as large as the dilated kernel {tuple(kernel)}",
                tuple(x.shape),
            )
    geometry = (strides, pads, dilations, groups, _precision(precision, x.dtype))
    if not isinstance(epilogue_args, (tuple, list)):
        raise bad_type("epilogue_args", "a tuple of tensors", type(epilogue_args).__name__)
    if epilogue is None and epilogue_args:
        raise bad_value("epilogue_args", "none without an epilogue", f"{len(epilogue_args)}")
    if epilogue is None and bias is None:
        y = ops.CONV(x, w, *geometry)
        function = None
    else:
        y, function = _fused(rank, x, w, bias, geometry, size, epilogue, epilogue_args)
    if key is not None and not unbatched:
        _remember(key, rank, x, w, bias, epilogue_args, function, geometry, y.requires_grad)
    return y.squeeze(0) if unbatched else y


_PREPARED: dict[Any, PreparedCall] = {}
_MAX_PREPARED = 4096


def _remember(
    key: Any,
    rank: int,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    epilogue_args: Sequence[Tensor],
    function: str | None,
    geometry: tuple[Any, ...],
    recorded: bool,
) -> None:
    """Prepare the next call of this kind; not where an epilogue captures tensors of its own."""
    if function is not None and fused_ops.captures_of(function):
        return
    forward, final = None, True
    if not (recorded and torch.is_grad_enabled()):
        operands = _operands(rank, bias, epilogue_args)
        forward, final = fused_ops.prepared_forward(x, w, operands, function, geometry)
    if not final:
        return
    if len(_PREPARED) >= _MAX_PREPARED:
        _PREPARED.clear()
    _PREPARED[key] = PreparedCall(rank, geometry, function, forward, tables.epoch())


@dataclass(frozen=True)
class PreparedCall:
    """A call that passed validation before: what is left to do for tensors of the same kind.

    The key says whether gradients are recorded, so a prepared call need not ask again.

    Attributes:
        rank: number of spatial axes.
        geometry: stride, padding, dilation, groups, precision as the operators take them.
        function: key of the epilogue's program, or None for the bare product.
        forward: the kernel launch of a call without gradients, where one is prepared.
        epoch: the state of tables and settings that this holds for.
    """

    rank: int
    geometry: tuple[Any, ...]
    function: str | None
    forward: Callable[..., Tensor] | None
    epoch: int

    def __call__(
        self, x: Tensor, w: Tensor, bias: Tensor | None, epilogue_args: Sequence[Tensor]
    ) -> Tensor:
        """Run on tensors that match the key."""
        if self.forward is not None:
            if bias is None:
                return self.forward(x, w, *epilogue_args)
            return self.forward(x, w, bias, *epilogue_args)
        if self.function is None:
            return ops.CONV(x, w, *self.geometry)
        operands = _operands(self.rank, bias, epilogue_args)
        return fused_ops.CONV_EPILOGUE(x, w, operands, [], self.function, *self.geometry)


def _call_key(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: IntOrInts,
    padding: IntOrInts | str,
    dilation: IntOrInts,
    groups: int,
    epilogue: Callable[..., Any] | None,
    epilogue_args: Sequence[Tensor],
    precision: str | None,
) -> Any:
    """What validation and dispatch of a call depend on; None where it cannot be known cheaply."""
    if not library.plain(x) or type(w) not in library.PLAIN_TYPES:
        return None
    if type(epilogue_args) not in (tuple, list):
        return None
    if torch._C._is_any_autocast_enabled():
        return None
    function = None if epilogue is None else static_identity(epilogue)
    if function is None and epilogue is not None:
        return None
    if precision is None and x.dtype is torch.float32:
        precision = default_precision()
    gradients = x.requires_grad or w.requires_grad
    extra: Any = None
    if bias is not None:
        if type(bias) not in library.PLAIN_TYPES:
            return None
        extra = (bias.shape, bias.stride(), bias.dtype, bias.device)
        gradients = gradients or bias.requires_grad
    if epilogue_args:
        if any(type(t) not in library.PLAIN_TYPES for t in epilogue_args):
            return None
        extra = (extra, *[(t.shape, t.stride(), t.dtype, t.device) for t in epilogue_args])
        gradients = gradients or any(t.requires_grad for t in epilogue_args)
    key = (
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        w.shape,
        w.stride(),
        w.dtype,
        w.device,
        stride,
        padding,
        dilation,
        groups,
        function,
        precision,
        gradients and torch.is_grad_enabled(),
        extra,
    )
    try:
        hash(key)
    except TypeError:  # strides and the like given as lists
        return None
    return key


def _operands(rank: int, bias: Tensor | None, epilogue_args: Sequence[Tensor]) -> list[Tensor]:
    """Operands of the epilogue with all axes of the output, the bias first."""
    operands = [] if bias is None else [bias.reshape(1, -1, *[1] * rank)]
    for operand in epilogue_args:
        lead = rank + 2 - operand.dim()
        operands.append(operand.reshape((1,) * lead + tuple(operand.shape)) if lead else operand)
    return operands


def _fused(
    rank: int,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
    size: Sequence[int],
    epilogue: Callable[..., Any] | None,
    epilogue_args: Sequence[Tensor],
) -> tuple[Tensor, str]:
    shape = (x.shape[0], w.shape[0], *size)
    for index, operand in enumerate(epilogue_args):
        name = f"epilogue_args[{index}]"
        if not isinstance(operand, Tensor):
            raise bad_type(name, "a tensor (a Python number belongs into the function)", operand)
        if operand.device != x.device:
            raise bad_value(name, f"the input's device {x.device}", operand.device)
        lead = rank + 2 - operand.dim()
        if lead < 0 or any(
            have != 1 and have != want
            for have, want in zip(operand.shape, shape[max(lead, 0) :], strict=False)
        ):
            raise bad_value(name, f"a shape broadcastable to {shape}", tuple(operand.shape))
    if torch.compiler.is_compiling() and made_in_compiled_code(epilogue):
        y = ops.CONV(x, w, *geometry)
        return apply_to_whole(epilogue, y, bias, epilogue_args), ""
    dtypes = tuple([operand.dtype for operand in epilogue_args])
    key = epilogue_key(epilogue, bias is not None, dtypes, x.dtype, rank)
    captures = epilogue_captures(epilogue, bias is not None, dtypes, x.dtype, rank)
    for index, capture in enumerate(captures):
        if capture.device != x.device:
            name = f"captured tensor {index}"
            raise bad_value(name, f"the input's device {x.device}", capture.device)
    operands = _operands(rank, bias, epilogue_args)
    return fused_ops.CONV_EPILOGUE(x, w, operands, captures, key, *geometry), key


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    *,
    epilogue: Callable[..., Any] | None = None,
    epilogue_args: Sequence[Tensor] = (),
    precision: str | None = None,
) -> Tensor:
    """2-D convolution (cross-correlation) with an optional fused epilogue, differentiable twice.

    y[n, o, p, q] = f(b[o] + Σ_{c,r,s} x[n, c, p·stride + r·dilation − pad, …] · w[o, c, r, s], …)

    Args:
        input: (N, C, H, W) or (C, H, W), any strides; float16, bfloat16, float32 (float64 is
            served by PyTorch's kernel). The result keeps its memory format.
        weight: (M, C / groups, R, S), dtype of the input, any strides.
        bias: (M,), added to the float32 accumulator (PyTorch's kernel, where it is chosen or
            tensors are on the CPU, rounds the accumulator to the input's dtype first).
        stride, dilation: one integer or two.
        padding: one integer or two, ``"same"`` (stride 1) or ``"valid"``.
        groups: divides C and M.
        epilogue: a Python function of 0-d tensors ``f(y, *epilogue_args)`` applied to every
            output element inside the kernel, after the bias. It may ask for its coordinates by
            keyword-only parameters named ``n``, ``c``, ``h``, ``w`` and read captured tensors at
            computed indices. See the guide on epilogues.
        epilogue_args: tensors broadcastable to the output, read at the same element.
        precision: products of float32 operands: ``"ieee"``, ``"tf32x3"`` (three TF32 products,
            nearly float32) or ``"tf32"``. By default ``"tf32"`` when
            ``torch.backends.cudnn.allow_tf32`` is set and ``torch.get_float32_matmul_precision()``
            is not ``"highest"``, else ``"ieee"``.

    Returns:
        (N, M, P, Q) in the input's dtype; accumulation is in float32.

    Raises:
        ArgumentValueError, ArgumentTypeError: an argument is not as described; nothing ran.
        UnsupportedOpError, DataDependentControlFlowError: the epilogue cannot be generated.

    Example:
        >>> import torch, tritonconv as tc
        >>> x, w, b = torch.randn(2, 3, 16, 16), torch.randn(8, 3, 3, 3), torch.randn(8)
        >>> skip = torch.randn(2, 8, 16, 16)
        >>> y = tc.conv2d(x, w, b, padding=1, epilogue=lambda y, r: torch.relu(y + r),
        ...               epilogue_args=(skip,))
        >>> y.shape
        torch.Size([2, 8, 16, 16])
    """
    return _conv(
        2,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        epilogue,
        epilogue_args,
        precision,
    )
