"""Which implementation serves a tensor: Triton kernels or plain PyTorch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch

from .compat import interpreting
from .errors import bad_value
from .settings import settings


def backend(name: Literal["auto", "torch", "triton"]) -> AbstractContextManager[None]:
    """Choose the implementation inside a ``with`` block.

    Args:
        name: ``"torch"`` runs the plain PyTorch reference, ``"triton"`` insists on the Triton
            kernels, ``"auto"`` takes Triton for GPU tensors and under ``TRITON_INTERPRET=1``.

    Raises:
        ArgumentValueError: another name.

    Example:
        >>> import torch, tritonconv as tc
        >>> x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> with tc.backend("torch"):
        ...     tc.conv2d(x, w).shape
        torch.Size([1, 4, 6, 6])
    """
    if name not in ("auto", "torch", "triton"):
        raise bad_value("backend", "'auto', 'torch' or 'triton'", repr(name))
    return settings.override(backend=name)


def uses_triton(device: torch.device) -> bool:
    """Whether tensors on ``device`` are served by Triton kernels now.

    Raises:
        ArgumentValueError: Triton was asked for by name and cannot run on the device.
    """
    choice = settings.backend
    if choice == "torch":
        return False
    possible = device.type == "cuda" or (device.type == "cpu" and interpreting())
    if choice == "triton" and not possible:
        raise bad_value(
            "backend", "a GPU tensor (or TRITON_INTERPRET=1) for 'triton'", f"a {device} tensor"
        )
    return possible
