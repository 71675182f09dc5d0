"""Convolutions with float8 operands or a float8 result, and what makes float8 tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..runtime.errors import bad_type, bad_value
from . import arguments, ops, pytorch
from .arguments import IntOrInts
from .epilogue import apply_to_whole, made_in_compiled_code
from .problem import FAST_ACCUM, FLOAT8, output_size
from .scaled_epilogue import LARGEST, known_epilogue, scaled_captures, scaled_key
from .scaled_ops import CONV_QUANTIZED

Tensor = torch.Tensor

_WIDE = (torch.float16, torch.bfloat16, torch.float32)
_TINY = 2.0**-100
"""The least scale: its reciprocal is a number, and a tensor of zeros has one."""


def scaled_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    *,
    scale_input: Tensor | None = None,
    scale_weight: Tensor | None = None,
    scale_output: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
    epilogue: Callable[..., Any] | None = None,
    epilogue_args: Sequence[Tensor] = (),
) -> Tensor:
    """1-D convolution of float8 tensors, or with a float8 result; forward only.

    Args:
        input: (N, C, L) or (C, L).
        weight: (M, C / groups, K).
        bias: (M,).
        stride, padding, dilation, groups: see :func:`conv1d`.
        scale_input, scale_weight, scale_output, out_dtype, use_fast_accum, epilogue,
            epilogue_args: see :func:`scaled_conv2d`.

    Returns:
        (N, M, P) in ``out_dtype``.

    Raises:
        ArgumentValueError, ArgumentTypeError: an argument is not as described; nothing ran.
        NoGradientError: some input requires a gradient.

    Example:
        >>> import torch, tritonconv as tc
        >>> x, scale_x = tc.quantize_per_tensor(torch.randn(2, 16, 32))
        >>> w, scale_w = tc.quantize_per_channel(torch.randn(8, 16, 3))
        >>> tc.scaled_conv1d(x, w, scale_input=scale_x, scale_weight=scale_w).shape
        torch.Size([2, 8, 30])
    """
    return _scaled_convolve(
        1,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        scale_input,
        scale_weight,
        scale_output,
        out_dtype,
        use_fast_accum,
        epilogue,
        epilogue_args,
    )


def scaled_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    *,
    scale_input: Tensor | None = None,
    scale_weight: Tensor | None = None,
    scale_output: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
    epilogue: Callable[..., Any] | None = None,
    epilogue_args: Sequence[Tensor] = (),
) -> Tensor:
    """2-D convolution of float8 tensors, or with a float8 result; forward only.

    With s the scales of input, weight and output, y is in turn

        a = s_input · s_weight[o] · Σ_{c,r,s} x[n, c, …] · w[o, c, r, s]
        y = f(a + b[o], …)
        y = clamp(y / s_output, −448, 448)      where the result is float8

    all in float32, inside the kernel. The result is rounded to nearest. A number too large for
    float8 becomes ±448 and infinity too, unlike by a cast of some releases of PyTorch, of which it
    becomes NaN; NaN stays NaN. Scales are read on the device: nothing waits for them, and a CUDA
    graph follows scales that change.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides, fastest with channels last. float8_e4m3fn
            with its scales; or float16, bfloat16, float32 without any, for a float8 result: the
            first layer of a chain.
        weight: (M, C / groups, R, S), dtype of the input; see :func:`quantize_per_channel`.
        bias: (M,), float16, bfloat16 or float32, in units of the unscaled result.
        stride, padding, dilation, groups: see :func:`conv2d`.
        scale_input: float32 tensor of one element that the input is to be multiplied by.
        scale_weight: float32 tensor of one element, or (M,): one for each output channel.
        scale_output: float32 tensor of one element that a float8 result is to be multiplied by,
            ``scale_input`` of the next layer; by default one.
        out_dtype: bfloat16, float16, float32 or float8_e4m3fn. By default float8_e4m3fn where
            ``scale_output`` is given, else bfloat16.
        use_fast_accum: let a Hopper GPU keep sums in about 14 bits; by default at most 128
            products are added so. Others add in float32 always.
        epilogue: see :func:`conv2d`; its value is scaled and has the bias, and is quantised after.
        epilogue_args: tensors broadcastable to the output, read at the same element.

    Kernels serve it from sm_89 on (sm_80, sm_86: PyTorch's convolution on widened operands, as
    for depthwise problems of float8 operands).

    Returns:
        (N, M, P, Q) in ``out_dtype``, in the memory format of the input.

    Raises:
        ArgumentValueError, ArgumentTypeError: an argument is not as described; nothing ran.
        NoGradientError: some input requires a gradient.

    Example:
        >>> import torch, tritonconv as tc
        >>> x, scale_x = tc.quantize_per_tensor(torch.randn(2, 16, 8, 8))
        >>> w, scale_w = tc.quantize_per_channel(torch.randn(8, 16, 3, 3))
        >>> y = tc.scaled_conv2d(x, w, scale_input=scale_x, scale_weight=scale_w,
        ...                      scale_output=torch.tensor(0.1), epilogue=torch.relu)
        >>> y.shape, y.dtype
        (torch.Size([2, 8, 6, 6]), torch.float8_e4m3fn)
    """
    return _scaled_convolve(
        2,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        scale_input,
        scale_weight,
        scale_output,
        out_dtype,
        use_fast_accum,
        epilogue,
        epilogue_args,
    )


def scaled_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrInts = 1,
    padding: IntOrInts | str = 0,
    dilation: IntOrInts = 1,
    groups: int = 1,
    *,
    scale_input: Tensor | None = None,
    scale_weight: Tensor | None = None,
    scale_output: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
    epilogue: Callable[..., Any] | None = None,
    epilogue_args: Sequence[Tensor] = (),
) -> Tensor:
    """3-D convolution of float8 tensors, or with a float8 result; forward only.

    Args:
        input: (N, C, D, H, W) or (C, D, H, W).
        weight: (M, C / groups, Q, R, S).
        bias: (M,).
        stride, padding, dilation, groups: see :func:`conv3d`.
        scale_input, scale_weight, scale_output, out_dtype, use_fast_accum, epilogue,
            epilogue_args: see :func:`scaled_conv2d`.

    Returns:
        (N, M, O, P, Q) in ``out_dtype``.

    Raises:
        ArgumentValueError, ArgumentTypeError: an argument is not as described; nothing ran.
        NoGradientError: some input requires a gradient.
    """
    return _scaled_convolve(
        3,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        scale_input,
        scale_weight,
        scale_output,
        out_dtype,
        use_fast_accum,
        epilogue,
        epilogue_args,
    )


def quantize_per_tensor(input: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A tensor as float8_e4m3fn and one scale: ``input ≈ scale · result``.

    Args:
        input: float16, bfloat16 or float32; its memory format is kept.
        scale: float32 tensor of one element, as measured on representative inputs: what is too
            large for it becomes ±448. By default the largest element fits exactly.

    Returns:
        The float8 tensor and its scale, on the input's device; nothing waits for it.

    Raises:
        ArgumentTypeError, ArgumentValueError: the dtype of the input, or what the scale is.

    Example:
        >>> import torch, tritonconv as tc
        >>> q, scale = tc.quantize_per_tensor(torch.tensor([-1.0, 0.5, 2.0]))
        >>> q.float() * scale
        tensor([-1.0000,  0.5000,  2.0000])
    """
    _check_wide("input", input)
    if scale is None:
        largest = input.abs().amax() if input.numel() else input.new_zeros(())
        scale = (largest.float() / LARGEST).clamp(min=_TINY)
    else:
        scale = _scalar("scale", scale, input.device)
    return _quantize(input, scale), scale


def quantize_per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution's weight as float8_e4m3fn with one scale for each output channel.

    Args:
        weight: (M, C / groups, *kernel), float16, bfloat16 or float32.

    Returns:
        The float8 weight, channels last (both operands of a matrix instruction for float8 have to
        lie along the sum), and (M,) scales in float32: ``weight[o] ≈ scales[o] · result[o]``.

    Raises:
        ArgumentTypeError, ArgumentValueError: another dtype, or no convolution's weight.

    Example:
        >>> import torch, tritonconv as tc
        >>> w, scales = tc.quantize_per_channel(torch.randn(8, 4, 3, 3))
        >>> w.dtype, scales.shape
        (torch.float8_e4m3fn, torch.Size([8]))
    """
    _check_wide("weight", weight)
    if weight.dim() < 3 or 0 in weight.shape:
        expected = "a weight (out_channels, in_channels / groups, *kernel) that is not empty"
        raise bad_value("weight", expected, tuple(weight.shape))
    scales = weight.detach().abs().amax(dim=tuple(range(1, weight.dim()))).float() / LARGEST
    scales = scales.clamp(min=_TINY)
    result = _quantize(weight.detach(), scales.reshape(-1, *[1] * (weight.dim() - 1)))
    form = pytorch.CHANNELS_LAST.get(weight.dim())
    if form is None:  # of one axis: PyTorch has no name for it
        return result.transpose(1, -1).contiguous().transpose(1, -1), scales
    return result.contiguous(memory_format=form), scales


def _quantize(t: Tensor, scale: Tensor) -> Tensor:
    return torch.clamp(t.float() * scale.reciprocal(), -LARGEST, LARGEST).to(FLOAT8)


def _scaled_convolve(
    rank: int,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: IntOrInts,
    padding: IntOrInts | str,
    dilation: IntOrInts,
    groups: int,
    scale_input: Tensor | None,
    scale_weight: Tensor | None,
    scale_output: Tensor | None,
    out_dtype: torch.dtype | None,
    use_fast_accum: bool,
    epilogue: Callable[..., Any] | None,
    epilogue_args: Sequence[Tensor],
) -> Tensor:
    unbatched = isinstance(x, Tensor) and x.dim() == rank + 1
    if unbatched:
        x = x.unsqueeze(0)
    arguments.check_tensors(x, w, bias, rank)
    arguments.check_operands(x, w, None, rank, groups, False, float8=True)
    filters = w.shape[0]
    scales = _check_scales(x, filters, scale_input, scale_weight, scale_output)
    out_dtype = _check_out_dtype(x.dtype, out_dtype, scale_output)
    if bias is not None:
        _check_bias(bias, x, filters)
        scales["bias"] = bias
    strides = arguments.ints(stride, rank, "stride", 1)
    dilations = arguments.ints(dilation, rank, "dilation", 1)
    pads = arguments.pads(padding, w.shape[2:], strides, dilations)
    size = output_size(x.shape[2:], w.shape[2:], strides, ops.pairs(pads), dilations)
    for extent in size:
        if extent < 1:
            expected = f"a padded map at least as large as the dilated kernel {tuple(w.shape[2:])}"
            raise bad_value("input", expected, tuple(x.shape))
    if not isinstance(epilogue_args, (tuple, list)):
        raise bad_type("epilogue_args", "a tuple of tensors", type(epilogue_args).__name__)
    if epilogue is None and epilogue_args:
        raise bad_value("epilogue_args", "none without an epilogue", f"{len(epilogue_args)}")
    arguments.check_epilogue_args(x, (x.shape[0], filters, *size), epilogue_args)
    precision = arguments.precision_of(None, x.dtype)
    if x.dtype is FLOAT8 and use_fast_accum:
        precision = FAST_ACCUM
    lifted = rank == 1
    operands = [t.reshape((1,) * (rank + 2 - t.dim()) + tuple(t.shape)) for t in epilogue_args]
    if lifted:
        x, w, operands = x.unsqueeze(2), w.unsqueeze(2), [t.unsqueeze(2) for t in operands]
        strides, pads, dilations = [1, *strides], [0, 0, *pads], [1, *dilations]
    geometry = (strides, pads, dilations, groups, precision)
    if torch.compiler.is_compiling() and made_in_compiled_code(epilogue):
        y = _unfused(x, w, scales, geometry, out_dtype, epilogue, operands, lifted)
    else:
        y = _fused(rank, x, w, scales, geometry, out_dtype, epilogue, operands)
    y = y.squeeze(2) if lifted else y
    return y.squeeze(0) if unbatched else y


def _fused(
    rank: int,
    x: Tensor,
    w: Tensor,
    scales: dict[str, Tensor],
    geometry: tuple[Any, ...],
    out_dtype: torch.dtype,
    epilogue: Callable[..., Any] | None,
    operands: list[Tensor],
) -> Tensor:
    quantised = out_dtype is FLOAT8
    scaling = (
        x.dtype is FLOAT8,
        "bias" in scales,
        quantised,
        "scale_output" in scales,
        w.shape[0],
    )
    dtypes = tuple([operand.dtype for operand in operands])
    order: Sequence[str]
    own: Sequence[Tensor]
    if torch.compiler.is_compiling():
        key, *order = scaled_key(epilogue, scaling, dtypes, rank, rank == 1)
        own = scaled_captures(epilogue, scaling, dtypes, rank, rank == 1)
    else:
        key, order, own = known_epilogue(epilogue, scaling, dtypes, rank, rank == 1)
    captures = [scales[name] if name in scales else own[int(name)] for name in order]
    for index, capture in enumerate(own):
        if capture.device != x.device:
            name = f"captured tensor {index}"
            raise bad_value(name, f"the input's device {x.device}", capture.device)
    return CONV_QUANTIZED(x, w, operands, captures, key, out_dtype, *geometry)


def _unfused(
    x: Tensor,
    w: Tensor,
    scales: dict[str, Tensor],
    geometry: tuple[Any, ...],
    out_dtype: torch.dtype,
    epilogue: Callable[..., Any] | None,
    operands: list[Tensor],
    lifted: bool,
) -> Tensor:
    """The epilogue as code that is being compiled, which fuses it."""
    if x.dtype is FLOAT8:
        bare = {name: scales[name] for name in ("scale_input", "scale_weight")}
        y = _fused(2 if lifted else x.dim() - 2, x, w, bare, geometry, torch.float32, None, [])
    else:
        y = ops.CONV(x, w, *geometry).float()
    if lifted:
        y, operands = y.squeeze(2), [t.squeeze(2) for t in operands]
    bias = scales.get("bias")
    y = apply_to_whole(epilogue, y, bias, operands)
    if out_dtype is FLOAT8:
        y = _quantize(y, scales["scale_output"] if "scale_output" in scales else y.new_ones(()))
    y = y.to(out_dtype)
    return y.unsqueeze(2) if lifted else y


def _check_scales(
    x: Tensor,
    filters: int,
    scale_input: Tensor | None,
    scale_weight: Tensor | None,
    scale_output: Tensor | None,
) -> dict[str, Tensor]:
    """The scales by name: of one element as 0-d tensors, that of the weight as (M,)."""
    given = {"scale_input": scale_input, "scale_weight": scale_weight}
    found = {}
    for name, scale in given.items():
        if x.dtype is not FLOAT8:
            if scale is not None:
                raise bad_value(name, f"none for an input of dtype {x.dtype}", "a scale")
        elif scale is None:
            raise bad_type(name, "a float32 tensor for a float8 input", None)
        elif name == "scale_input":
            found[name] = _scalar(name, scale, x.device)
        else:
            found[name] = _per_channel(name, scale, filters, x.device)
    if scale_output is not None:
        found["scale_output"] = _scalar("scale_output", scale_output, x.device)
    return found


def _check_scale(name: str, scale: Any, device: torch.device) -> None:
    if not isinstance(scale, Tensor):
        raise bad_type(name, "a float32 tensor", type(scale).__name__)
    if scale.dtype is not torch.float32:
        raise bad_type(name, "a float32 tensor", scale.dtype)
    if scale.device != device:
        raise bad_value(name, f"the input's device {device}", scale.device)


def _scalar(name: str, scale: Any, device: torch.device) -> Tensor:
    _check_scale(name, scale, device)
    if scale.numel() != 1:
        raise bad_value(name, "one element", tuple(scale.shape))
    return scale.reshape(())


def _per_channel(name: str, scale: Any, filters: int, device: torch.device) -> Tensor:
    _check_scale(name, scale, device)
    if scale.numel() == 1:
        return scale.reshape(1).expand(filters)
    if scale.shape[0] != filters or scale.numel() != filters:
        raise bad_value(name, f"one element or shape ({filters},)", tuple(scale.shape))
    return scale.reshape(filters)


def _check_out_dtype(
    dtype: torch.dtype, out_dtype: torch.dtype | None, scale_output: Tensor | None
) -> torch.dtype:
    if out_dtype is None:
        out_dtype = torch.bfloat16 if scale_output is None else FLOAT8
    if out_dtype is FLOAT8:
        return out_dtype
    if dtype is not FLOAT8:
        raise bad_value(
            "out_dtype",
            f"{FLOAT8} of a {dtype} input (conv1d, 2d, 3d keep its dtype)",
            out_dtype,
        )
    if out_dtype not in _WIDE:
        raise bad_value("out_dtype", "bfloat16, float16, float32 or float8_e4m3fn", out_dtype)
    if scale_output is not None:
        raise bad_value("scale_output", f"none for a result of dtype {out_dtype}", "a scale")
    return out_dtype


def _check_bias(bias: Tensor, x: Tensor, filters: int) -> None:
    _check_wide("bias", bias)
    if bias.device != x.device:
        raise bad_value("bias", f"the input's device {x.device}", bias.device)
    if tuple(bias.shape) != (filters,):
        raise bad_value("bias", f"shape ({filters},)", tuple(bias.shape))


def _check_wide(name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise bad_type(name, "a tensor", type(t).__name__)
    if t.dtype not in _WIDE:
        raise bad_type(name, "float16, bfloat16 or float32", t.dtype)
