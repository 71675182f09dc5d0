"""The way of a call: prepared ones at once, others through checks, normalising and an operator.

One-dimensional maps are taken as maps of height one, by views: their problems, kernels and tuned
entries are those of two dimensions. A transposed convolution is the adjoint of a convolution, its
input's gradient product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..runtime import library, tables
from ..runtime.errors import bad_type, bad_value
from . import arguments, fused_ops, ops
from .arguments import IntOrInts, default_precision
from .epilogue import (
    apply_to_whole,
    epilogue_captures,
    epilogue_key,
    made_in_compiled_code,
    static_identity,
)
from .problem import output_size
from .training_calls import Products, prepared_products
from .training_epilogues import FusedProducts, prepared_fused_products

Tensor = torch.Tensor


def convolve(
    rank: int,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: IntOrInts,
    padding: IntOrInts | str,
    output_padding: IntOrInts | None,
    dilation: IntOrInts,
    groups: int,
    epilogue: Callable[..., Any] | None,
    epilogue_args: Sequence[Tensor],
    precision: str | None,
) -> Tensor:
    """Any of the public functions: of ``rank`` axes, transposed where ``output_padding`` is given.

    The other arguments are as users give them; see :func:`tritonconv.conv2d`.
    """
    if not torch.compiler.is_compiling():
        if torch._C._is_any_autocast_enabled() and _are_plain(x, w, bias):
            # Once cast, autocast changes nothing more: the key of a call need not tell of it.
            x, w, bias = arguments.autocast(x, w, bias)
        key = _call_key(
            rank,
            x,
            w,
            bias,
            stride,
            padding,
            output_padding,
            dilation,
            groups,
            epilogue,
            epilogue_args,
            precision,
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
    arguments.check_tensors(x, w, bias, rank)
    x, w, bias = arguments.autocast(x, w, bias)
    given = x, w
    arguments.check_operands(x, w, bias, rank, groups, output_padding is not None)
    strides = arguments.ints(stride, rank, "stride", 1)
    dilations = arguments.ints(dilation, rank, "dilation", 1)
    size, pads = _size_and_pads(x, w, strides, padding, output_padding, dilations)
    precision = arguments.precision_of(precision, x.dtype)
    if not isinstance(epilogue_args, (tuple, list)):
        raise bad_type("epilogue_args", "a tuple of tensors", type(epilogue_args).__name__)
    if epilogue is None and epilogue_args:
        raise bad_value("epilogue_args", "none without an epilogue", f"{len(epilogue_args)}")
    if epilogue_args:
        filters = w.shape[0] if output_padding is None else w.shape[1] * groups
        arguments.check_epilogue_args(x, (x.shape[0], filters, *size), epilogue_args)
    if rank == 1:
        x, w = x.unsqueeze(2), w.unsqueeze(2)
        size, strides, pads, dilations = [1, *size], [1, *strides], [0, 0, *pads], [1, *dilations]
    geometry = (strides, pads, dilations, groups, precision)
    result = None if output_padding is None else size
    if key is not None and not unbatched:
        # The first call too: what is saved for backward is alike in a checkpoint's second run.
        products = _remember_products(
            key, rank, x, w, bias, epilogue, epilogue_args, result, geometry
        )
        if products is not None:
            return products(*given, *([] if bias is None else [bias]), *epilogue_args)
    if epilogue is None and bias is None:
        y, function = _product(x, w, result, geometry), None
    else:
        y, function = _fused(rank, x, w, bias, result, geometry, epilogue, epilogue_args)
    if key is not None and not unbatched:
        recorded = y.requires_grad
        _remember(key, rank, x, w, bias, epilogue_args, function, result, geometry, recorded)
    if rank == 1:
        y = y.squeeze(2)
    return y.squeeze(0) if unbatched else y


def _size_and_pads(
    x: Tensor,
    w: Tensor,
    stride: list[int],
    padding: IntOrInts | str,
    output_padding: IntOrInts | None,
    dilation: list[int],
) -> tuple[list[int], list[int]]:
    """The output's spatial extent and flat (low, high) padding of the (adjoint) convolution."""
    given, kernel = x.shape[2:], w.shape[2:]
    if output_padding is None:
        pads = arguments.pads(padding, kernel, stride, dilation)
        size = list(output_size(given, kernel, stride, ops.pairs(pads), dilation))
        expected = f"a padded map at least as large as the dilated kernel {tuple(kernel)}"
    else:
        pads, more = arguments.transposed_pads(padding, output_padding, stride, dilation)
        size = arguments.transposed_size(given, kernel, stride, pads[::2], more, dilation)
        expected = "a map that is not empty, nor its result after the padding is taken away"
    for extent, got in zip(size, given, strict=True):
        if extent < 1 or (output_padding is not None and got < 1):
            raise bad_value("input", expected, tuple(x.shape))
    return size, pads


def _product(x: Tensor, w: Tensor, result: list[int] | None, geometry: tuple[Any, ...]) -> Tensor:
    """The bare product; ``result`` is the spatial extent that a transposed one is to have."""
    if result is None:
        return ops.CONV(x, w, *geometry)
    return ops.CONV_DGRAD(x, w, result, *geometry)


def _fused_product(
    x: Tensor,
    w: Tensor,
    operands: list[Tensor],
    captures: list[Tensor],
    function: str,
    result: list[int] | None,
    geometry: tuple[Any, ...],
) -> Tensor:
    """The product with the epilogue of this key."""
    if result is None:
        return fused_ops.CONV_EPILOGUE(x, w, operands, captures, function, *geometry)
    return fused_ops.DGRAD_EPILOGUE(x, w, result, operands, captures, function, *geometry)


def _fused(
    rank: int,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    result: list[int] | None,
    geometry: tuple[Any, ...],
    epilogue: Callable[..., Any] | None,
    epilogue_args: Sequence[Tensor],
) -> tuple[Tensor, str]:
    lifted = rank == 1
    if torch.compiler.is_compiling() and made_in_compiled_code(epilogue):
        y = _product(x, w, result, geometry)
        if lifted:
            y = y.squeeze(2)
        y = apply_to_whole(epilogue, y, bias, epilogue_args)
        return y.unsqueeze(2) if lifted else y, ""
    dtypes = tuple([operand.dtype for operand in epilogue_args])
    key = epilogue_key(epilogue, bias is not None, dtypes, x.dtype, rank, lifted)
    captures = epilogue_captures(epilogue, bias is not None, dtypes, x.dtype, rank, lifted)
    for index, capture in enumerate(captures):
        if capture.device != x.device:
            name = f"captured tensor {index}"
            raise bad_value(name, f"the input's device {x.device}", capture.device)
    operands = _operands(rank, bias, epilogue_args)
    return _fused_product(x, w, operands, captures, key, result, geometry), key


def _operands(rank: int, bias: Tensor | None, epilogue_args: Sequence[Tensor]) -> list[Tensor]:
    """Operands of the epilogue with all axes of the (lifted) output, the bias first."""
    operands = [] if bias is None else [bias.reshape(1, -1, *[1] * max(rank, 2))]
    for operand in epilogue_args:
        lead = rank + 2 - operand.dim()
        if lead:
            operand = operand.reshape((1,) * lead + tuple(operand.shape))
        operands.append(operand.unsqueeze(2) if rank == 1 else operand)
    return operands


_PREPARED: dict[Any, PreparedCall] = {}
_MAX_PREPARED = 4096


def _remember_products(
    key: Any,
    rank: int,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    epilogue: Callable[..., Any] | None,
    epilogue_args: Sequence[Tensor],
    result: list[int] | None,
    geometry: tuple[Any, ...],
) -> Products | FusedProducts | None:
    """Prepare a call with gradients; None where there are none, or operators are to compute it."""
    read = ([] if bias is None else [bias]) + list(epilogue_args)
    needs = [x.requires_grad or w.requires_grad, *[t.requires_grad for t in read]]
    if not (any(needs) and torch.is_grad_enabled()):
        return None
    function = None
    if read or epilogue is not None:
        dtypes = tuple([operand.dtype for operand in epilogue_args])
        function = epilogue_key(epilogue, bias is not None, dtypes, x.dtype, rank, rank == 1)
        if fused_ops.captures_of(function):
            return None
    operands = _operands(rank, bias, epilogue_args)
    products: Products | FusedProducts | None
    if epilogue is None:
        added = None if function is None else (function, operands[0])
        products = prepared_products(x, w, geometry, result, rank == 1, added)
    else:
        assert function is not None
        products = prepared_fused_products(
            x, w, operands, function, needs, geometry, result, rank == 1
        )
    if products is not None:
        _store(key, PreparedCall(rank, result, geometry, None, products, products.epoch))
    return products


def _store(key: Any, call: PreparedCall) -> None:
    if len(_PREPARED) >= _MAX_PREPARED:
        _PREPARED.clear()
    _PREPARED[key] = call


def _remember(
    key: Any,
    rank: int,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    epilogue_args: Sequence[Tensor],
    function: str | None,
    result: list[int] | None,
    geometry: tuple[Any, ...],
    recorded: bool,
) -> None:
    """Prepare the next call of this kind; not where an epilogue captures tensors of its own."""
    if function is not None and fused_ops.captures_of(function):
        return
    forward, final = None, True
    if not (recorded and torch.is_grad_enabled()):
        operands = _operands(rank, bias, epilogue_args)
        forward, final = fused_ops.prepared_forward(
            x, w, operands, function, geometry, result, squeezed=rank == 1
        )
    if not final:
        return
    _store(key, PreparedCall(rank, result, geometry, function, forward, tables.epoch()))


@dataclass(frozen=True)
class PreparedCall:
    """A call that passed validation before: what is left to do for tensors of the same kind.

    The key says whether gradients are recorded, so a prepared call need not ask again.

    Attributes:
        rank: number of spatial axes.
        result: spatial extent of a transposed convolution's result, else None.
        geometry: stride, padding, dilation, groups, precision as the operators take them.
        function: key of the epilogue's program, or None for the bare product.
        forward: the whole call, where one is prepared: a kernel launch, or with gradients what
            records them too.
        epoch: the state of tables and settings that this holds for.
    """

    rank: int
    result: list[int] | None
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
        if self.rank == 1:
            x, w = x.unsqueeze(2), w.unsqueeze(2)
        if self.function is None:
            y = _product(x, w, self.result, self.geometry)
        else:
            operands = _operands(self.rank, bias, epilogue_args)
            y = _fused_product(x, w, operands, [], self.function, self.result, self.geometry)
        return y.squeeze(2) if self.rank == 1 else y


def _are_plain(x: Tensor, w: Tensor, bias: Tensor | None) -> bool:
    """Whether these are tensors that a prepared call may take; others wait for the checks."""
    types = library.PLAIN_TYPES
    return type(x) in types and type(w) in types and (bias is None or type(bias) in types)


def _call_key(
    rank: int,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: IntOrInts,
    padding: IntOrInts | str,
    output_padding: IntOrInts | None,
    dilation: IntOrInts,
    groups: int,
    epilogue: Callable[..., Any] | None,
    epilogue_args: Sequence[Tensor],
    precision: str | None,
) -> Any:
    """What validation and dispatch of a call depend on; None where it cannot be known cheaply."""
    if not library.plain(x) or type(w) not in library.PLAIN_TYPES or w.is_neg():
        return None
    if type(epilogue_args) not in (tuple, list):
        return None
    function = None if epilogue is None else static_identity(epilogue)
    if function is None and epilogue is not None:
        return None
    if precision is None and x.dtype is torch.float32:
        precision = default_precision()
    gradients = x.requires_grad or w.requires_grad
    extra: Any = None
    if bias is not None:
        if type(bias) not in library.PLAIN_TYPES or bias.is_neg():
            return None
        extra = (bias.shape, bias.stride(), bias.dtype, bias.device)
        gradients = gradients or bias.requires_grad
    if epilogue_args:
        if any(type(t) not in library.PLAIN_TYPES or t.is_neg() for t in epilogue_args):
            return None
        extra = (extra, *[(t.shape, t.stride(), t.dtype, t.device) for t in epilogue_args])
        gradients = gradients or any(t.requires_grad for t in epilogue_args)
    recorded = gradients and torch.is_grad_enabled()
    key: tuple[Any, ...] = (
        rank,
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
        output_padding,
        dilation,
        groups,
        function,
        precision,
        recorded,
        extra,
    )
    if epilogue is not None and recorded:
        # Which operands want a gradient decides whether the accumulator is saved.
        pattern = [t.requires_grad for t in (x, w, *epilogue_args)]
        key = (*key, bias is not None and bias.requires_grad, *pattern)
    try:
        hash(key)
    except TypeError:  # strides and the like given as lists
        return None
    return key
