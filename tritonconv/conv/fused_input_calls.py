"""Calls with a prologue, with two inputs or with statistics: checks, normalising, the operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..runtime.backend import uses_triton
from ..runtime.errors import bad_type, bad_value
from . import arguments, ops
from .arguments import IntOrInts
from .epilogue import apply_to_whole, epilogue_captures, epilogue_key, made_in_compiled_code
from .fused_input_ops import CONV_FUSED, apply_elementwise, serves, statistics_dtype
from .problem import output_size
from .prologue import bind_prologue

Tensor = torch.Tensor
Inputs = Tensor | tuple[Tensor, Tensor]


def convolve_fused(
    rank: int,
    input: Inputs,
    w: Tensor,
    bias: Tensor | None,
    stride: IntOrInts,
    padding: IntOrInts | str,
    dilation: IntOrInts,
    groups: int,
    epilogue: Callable[..., Any] | None,
    epilogue_args: Sequence[Tensor],
    precision: str | None,
    prologue: Callable[..., Any] | None,
    prologue_args: Sequence[Tensor],
    stats: bool,
) -> tuple[Tensor, ...]:
    """The output, and with ``stats`` mean and biased variance of its channels.

    The other arguments are as users give them; see :func:`tritonconv.conv2d`.
    """
    inputs = _checked_inputs(input, rank)
    unbatched = inputs[0].dim() == rank + 1
    if unbatched:
        inputs = [t.unsqueeze(0) for t in inputs]
    inputs, w, bias = _checked_operands(inputs, w, bias, rank, groups)
    x = inputs[0]
    strides = arguments.ints(stride, rank, "stride", 1)
    dilations = arguments.ints(dilation, rank, "dilation", 1)
    pads = arguments.pads(padding, w.shape[2:], strides, dilations)
    size = list(output_size(x.shape[2:], w.shape[2:], strides, ops.pairs(pads), dilations))
    if min(size) < 1:
        expected = f"a padded map at least as large as the dilated kernel {tuple(w.shape[2:])}"
        raise bad_value("input", expected, tuple(x.shape))
    precision = arguments.precision_of(precision, x.dtype)
    if not isinstance(epilogue_args, (tuple, list)):
        raise bad_type("epilogue_args", "a tuple of tensors", type(epilogue_args).__name__)
    if epilogue is None and epilogue_args:
        raise bad_value("epilogue_args", "none without an epilogue", f"{len(epilogue_args)}")
    arguments.check_epilogue_args(x, (x.shape[0], w.shape[0], *size), epilogue_args)
    if not isinstance(prologue_args, (tuple, list)):
        raise bad_type("prologue_args", "a sequence of tensors", type(prologue_args).__name__)
    if prologue is None and prologue_args:
        raise bad_value("prologue_args", "none without a prologue", f"{len(prologue_args)}")
    if prologue is not None and len(inputs) == 2:
        raise bad_value("prologue", "None with two inputs", "a function")
    if prologue is not None and made_in_compiled_code(prologue):
        inputs = [apply_to_whole(prologue, x, None, _over_channels(prologue_args, rank))]
        prologue = None
    late = epilogue is not None and made_in_compiled_code(epilogue)
    function, operands, captures = "", [], []
    if not late and (epilogue is not None or bias is not None):
        asked = (
            epilogue,
            bias is not None,
            tuple([operand.dtype for operand in epilogue_args]),
            x.dtype,
            rank,
            rank == 1,
        )
        function, captures = epilogue_key(*asked), epilogue_captures(*asked)
        for index, capture in enumerate(captures):
            if capture.device != x.device:
                name = f"captured tensor {index}"
                raise bad_value(name, f"the input's device {x.device}", capture.device)
        operands = _operands(rank, bias, epilogue_args)
    before = ""
    reads: list[Tensor] = []
    if prologue is not None:
        before, reads = bind_prologue(prologue, prologue_args, x, rank)
    if rank == 1:
        inputs, w = [t.unsqueeze(2) for t in inputs], w.unsqueeze(2)
        strides, pads, dilations = [1, *strides], [0, 0, *pads], [1, *dilations]
    geometry = (strides, pads, dilations, groups, precision)
    if before and uses_triton(x.device) and not serves(inputs[0], groups, w.shape[1]):
        # Narrow groups have kernels of their own: the prologue is a launch before them.
        inputs, before, reads = [apply_elementwise(before, inputs[0], reads)], "", []
    results = CONV_FUSED(
        inputs, w, reads, before, operands, captures, function, False, stats and not late, *geometry
    )
    y = results[0].squeeze(2) if rank == 1 else results[0]
    if late:
        y = apply_to_whole(epilogue, y, bias, epilogue_args)
        if stats:
            wide = y.to(statistics_dtype(y.dtype))
            var, mean = torch.var_mean(wide, [0, *range(2, y.dim())], correction=0)
            results = [y, mean, var]
    y = y.squeeze(0) if unbatched else y
    return (y, *results[1:])


def _checked_inputs(input: Any, rank: int) -> list[Tensor]:
    """One or two tensors with a batch axis or, all of them, without."""
    inputs = list(input) if isinstance(input, (tuple, list)) else [input]
    if not 1 <= len(inputs) <= 2:
        raise bad_value("input", "a tensor or two", f"{len(inputs)} tensors")
    for t in inputs:
        if not isinstance(t, Tensor):
            raise bad_type("input", "a tensor or two", type(t).__name__)
        if t.dim() not in (rank + 1, rank + 2):
            expected = f"{rank + 2} dimensions (batch, channels, *spatial)"
            raise bad_value("input", expected, tuple(t.shape))
    if len(inputs) == 2:
        first, second = inputs
        at = first.dim() - rank - 1
        same = first.dim() == second.dim()
        same = same and first.shape[:at] == second.shape[:at]
        if not same or first.shape[at + 1 :] != second.shape[at + 1 :]:
            got = f"{tuple(first.shape)} and {tuple(second.shape)}"
            raise bad_value("input", "two tensors that differ in their channels only", got)
    return inputs


def _checked_operands(
    inputs: list[Tensor], w: Tensor, bias: Tensor | None, rank: int, groups: int
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Inputs, weight and bias under autocast; refuses what does not go together."""
    arguments.check_tensors(inputs[0], w, bias, rank)
    x, w, bias = arguments.autocast(inputs[0], w, bias)
    if len(inputs) == 1:
        arguments.check_operands(x, w, bias, rank, groups, False)
        return [x], w, bias
    if groups != 1:
        raise bad_value("groups", "1 with two inputs", groups)
    second = arguments.autocast(inputs[1], w, None)[0]
    channels = x.shape[1] + second.shape[1]
    if w.dim() == rank + 2:
        if w.shape[1] != channels:
            expected = f"{w.shape[1]} channels in both together (weight {tuple(w.shape)})"
            raise bad_value("input", expected, f"{x.shape[1]} + {second.shape[1]}")
        arguments.check_operands(x, w[:, : x.shape[1]], bias, rank, 1, False)
    else:
        arguments.check_operands(x, w, bias, rank, 1, False)
    if second.dtype != x.dtype:
        raise bad_type("input", f"two tensors of one dtype ({x.dtype})", second.dtype)
    if second.device != x.device:
        raise bad_value("input", f"two tensors on one device ({x.device})", second.device)
    return [x, second], w, bias


def _over_channels(operands: Sequence[Tensor], rank: int) -> list[Tensor]:
    """Operands of a prologue with vectors over channels ready to broadcast."""
    return [t.reshape(-1, *[1] * rank) if t.dim() == 1 else t for t in operands]


def _operands(rank: int, bias: Tensor | None, epilogue_args: Sequence[Tensor]) -> list[Tensor]:
    from .calls import _operands as lifted

    return lifted(rank, bias, epilogue_args)
