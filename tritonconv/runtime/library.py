"""Registering operators with PyTorch: schema, implementation, fake, autograd.

``define``/``impl`` costs a tenth of ``torch.library.custom_op`` per call. Autograd is a Python
kernel for the Autograd key around a ``torch.autograd.Function``, so that operators are
differentiable wherever they are called from: eager code, ``torch.compile``, ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("tritonconv", "DEF")


def define(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any],
) -> Any:
    """Define ``tritonconv::name`` and return its overload.

    Args:
        name: operator name.
        schema: arguments and results in PyTorch's schema language, without the name.
        implementation: computes the result for CPU and CUDA tensors.
        fake: computes shapes, dtypes and strides for ``torch.compile``.
        autograd: kernel for the Autograd key, called with the operator's arguments when some
            input requires a gradient; typically ends in ``Function.apply``.
    """
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"tritonconv::{name}", fake, lib=LIBRARY)
    overload = getattr(torch.ops.tritonconv, name).default

    def autograd_kernel(*args: Any) -> Any:
        if torch.is_grad_enabled() and _requires_grad(args):
            return autograd(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    LIBRARY.impl(name, autograd_kernel, "Autograd")
    return overload


def _requires_grad(args: tuple[Any, ...]) -> bool:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if arg.requires_grad:
                return True
        elif isinstance(arg, (list, tuple)) and _requires_grad(tuple(arg)):
            return True
    return False


def below_autograd(overload: Any, *args: Any) -> Any:
    """Call an operator's implementation from inside its ``Function.forward``."""
    with torch._C._AutoDispatchBelowAutograd():
        return overload(*args)
