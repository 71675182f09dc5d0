"""Registering operators with PyTorch: schema, implementation, fake, autograd.

``define``/``impl`` costs a tenth of ``torch.library.custom_op`` per call. Autograd is a Python
kernel for the Autograd key around a ``torch.autograd.Function``, so that operators are
differentiable wherever they are called from: eager code, ``torch.compile``, ``torch.func``.

What ``torch.compile`` generates calls ``torch.ops.tritonconv.NAME.default``. Where nobody could
notice, that call goes straight to the implementation: PyTorch's dispatcher would enter Python
twice, for the Autograd key and for the device's, and make the arguments anew each time.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from .errors import TritonConvError, bad_value

LIBRARY = torch.library.Library("tritonconv", "DEF")


class ForwardModeError(TritonConvError, NotImplementedError):
    """Forward-mode differentiation was asked for; a tangent is never dropped silently."""


# Results follow the strides of the inputs: compiled code must not choose others than the fakes saw.
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)


PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def plain(x: Any) -> bool:
    """Whether a call on this tensor can skip PyTorch's dispatcher without anyone noticing.

    True in ordinary eager code: no ``torch.compile``, no dispatch mode (fake tensors, selective
    checkpointing, profiling modes), no ``torch.func`` transform, no forward-mode level, no tensor
    subclass, no lazily negated view. A hop through the dispatcher into a Python kernel costs the
    host 10 µs.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in PLAIN_TYPES
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not x.is_meta
        and not x.is_neg()  # memory that holds the negative: the dispatcher resolves it
    )


def _has_memory(t: Any) -> bool:
    """Whether a tensor is its numbers in memory, and no stand-in for others.

    What a transform saved stays wrapped when its pull-back is called outside of the transform.
    """
    return (
        type(t) in PLAIN_TYPES
        and not t.is_meta
        and not t.is_neg()
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


class Op:
    """An operator of this library: callable like its overload, cheaper where that is allowed."""

    def __init__(
        self, overload: Any, implementation: Callable[..., Any], autograd: Callable[..., Any]
    ) -> None:
        self.overload = overload
        self.dispatched = overload.op
        """The way through PyTorch's dispatcher, always."""
        self.implementation = implementation
        self.autograd = autograd
        # Where the tensors are is known from the schema: looking at every argument of every call
        # for one would cost more than the rest of the dispatch.
        kinds = [str(argument.type) for argument in overload._schema.arguments]
        self.count = len(kinds)
        self.tensors = tuple(k for k, kind in enumerate(kinds) if kind == "Tensor")
        self.optional = tuple(k for k, kind in enumerate(kinds) if kind == "Optional[Tensor]")
        self.lists = tuple(k for k, kind in enumerate(kinds) if kind == "List[Tensor]")

    def __call__(self, *args: Any) -> Any:
        """Run the operator, differentiably."""
        if torch.compiler.is_compiling():
            return self.overload(*args)
        if torch._C._are_functorch_transforms_active():
            # Transforms nest around an autograd.Function, not around a kernel of the Autograd key.
            _refuse_tangents(str(self.overload), args)
            return self.autograd(*args)
        if not self._plain(args):
            return self.dispatched(*args)
        if torch.is_grad_enabled() and self._requires_grad(args):
            return self.autograd(*args)
        return self.implementation(*args)

    def below_autograd(self, *args: Any) -> Any:
        """Run the implementation from inside the operator's own ``Function.forward``."""
        if not torch._C._are_functorch_transforms_active() and self._plain(args):
            return self.implementation(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.dispatched(*args)

    def shorten(self) -> None:
        """Let calls of the overload skip PyTorch's dispatcher where it would change nothing.

        That is in plain code that records no gradient, as in the code that ``torch.compile`` makes.
        Whoever looks at operators (modes, transforms, tracing, subclasses) still meets this one.
        Called before the overload is in any dictionary: its hash is that of what it calls.
        """
        dispatched, count, implementation = self.dispatched, self.count, self.implementation
        plain, requires_grad = self._plain, self._requires_grad

        def call(*args: Any, **kwargs: Any) -> Any:
            if (
                kwargs
                or len(args) != count
                or torch._C._are_functorch_transforms_active()
                or torch._C._len_torch_function_stack()
                or not plain(args)
                or (torch.is_grad_enabled() and requires_grad(args))
            ):
                return dispatched(*args, **kwargs)
            return implementation(*args)

        call.__name__, call.__module__ = dispatched.__name__, dispatched.__module__
        self.overload._op = call

    def _plain(self, args: Sequence[Any]) -> bool:
        """:func:`plain` for all tensors of a call, outside ``torch.compile`` and ``torch.func``."""
        if torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0:
            return False
        for k in self.tensors:
            if not _has_memory(args[k]):
                return False
        for k in self.optional:
            if args[k] is not None and not _has_memory(args[k]):
                return False
        for k in self.lists:
            for tensor in args[k]:
                if not _has_memory(tensor):
                    return False
        return True

    def _requires_grad(self, args: Sequence[Any]) -> bool:
        for k in self.tensors:
            if args[k].requires_grad:
                return True
        for k in self.optional:
            if args[k] is not None and args[k].requires_grad:
                return True
        for k in self.lists:
            for tensor in args[k]:
                if tensor.requires_grad:
                    return True
        return False


def define(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any],
) -> Op:
    """Define ``tritonconv::name``.

    Args:
        name: operator name.
        schema: arguments and results in PyTorch's schema language, without the name.
        implementation: computes the result for CPU and CUDA tensors.
        fake: computes shapes, dtypes and strides for ``torch.compile``.
        autograd: kernel for the Autograd key, called with the operator's arguments when some
            input requires a gradient; typically ends in :meth:`OpFunction.run`.
    """
    LIBRARY.define(f"{name}{schema}", tags=_TAGS)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"tritonconv::{name}", fake, lib=LIBRARY)
    op = Op(getattr(torch.ops.tritonconv, name).default, implementation, autograd)
    op.shorten()

    def autograd_kernel(*args: Any) -> Any:
        _refuse_tangents(name, args)
        if torch.is_grad_enabled() and op._requires_grad(args):
            return autograd(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.dispatched(*args)

    LIBRARY.impl(name, autograd_kernel, "Autograd")
    torch.library.register_vmap(
        f"tritonconv::{name}", functools.partial(_one_by_one, name, op.overload), lib=LIBRARY
    )
    return op


class OpFunction(torch.autograd.Function):
    """Base of the operators' autograd functions."""

    @classmethod
    def run(cls, *args: Any) -> Any:
        """``apply`` without its per-call inspection of the signature: all arguments are given."""
        if torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *args: Any) -> Any:
        """Batching rule: one call per batch element, and say so."""
        return _one_by_one(cls.__name__.lstrip("_"), cls.apply, info, in_dims, *args)


def _one_by_one(name: str, call: Callable[..., Any], info: Any, in_dims: Any, *args: Any) -> Any:
    """Batching rule of every operator: one call per batch element, and say so."""
    warnings.warn(
        f"tritonconv {name} has no batching rule: torch.func.vmap runs it once for each of the "
        f"{info.batch_size} batch elements, one after the other. Where the weight is shared, put "
        "the batch into the input's own batch axis instead.",
        stacklevel=2,
    )

    if info.batch_size == 0:
        raise bad_value("vmap", "a batch of at least one element", "an empty one")

    def pick(arg: Any, dim: Any, index: int) -> Any:
        if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [pick(a, d, index) for a, d in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, index)

    results = [
        call(*[pick(arg, dim, index) for arg, dim in zip(args, in_dims, strict=True)])
        for index in range(info.batch_size)
    ]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    stacked = [torch.stack(column) for column in zip(*results, strict=True)]
    return type(results[0])(stacked), type(results[0])([0] * len(stacked))


def _refuse_tangents(name: str, args: Sequence[Any]) -> None:
    if forward_ad._current_level >= 0 and _has_tangent(args):
        raise ForwardModeError(
            f"{name} has no forward-mode derivative (jvp, jacfwd); "
            "use reverse mode (grad, vjp, jacrev), which composes to any order"
        )


def _has_tangent(args: Sequence[Any]) -> bool:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if forward_ad.unpack_dual(arg).tangent is not None:
                return True
        elif type(arg) in (list, tuple) and _has_tangent(arg):
            return True
    return False
