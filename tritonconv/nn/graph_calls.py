"""What a captured call depends on: the kind of its arguments, the state of the module, the modes.

A CUDA graph repeats launches on fixed addresses. A call may replay one only if everything that
could lead to other launches is as it was, so all of it is part of the key that captures are found
by; and what a graph would leave out without a word, such as hooks of submodules, is a reason to run
eagerly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as globally
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext

from ..runtime.library import PLAIN_TYPES
from ..runtime.recording import is_recording
from ..runtime.settings import settings

Tensor = torch.Tensor
_Call = tuple[Sequence[Any], Mapping[str, Any]]

SCALARS = frozenset((bool, int, float, str, type(None)))
CONSTANTS = SCALARS | {torch.dtype, torch.device, torch.Size}
"""What arguments and results may hold beside tensors."""

NO_GRAD = "gradients are not recorded"
EVALUATION = "the module is in eval mode"
NO_TENSOR = "there is no tensor among its arguments"
NO_GPU = "its tensors are on {}"
CAPTURING = "a CUDA graph is being captured"
TRACING = "the call is traced, transformed or watched by a mode"
HOOKED_GRADIENTS = "hooks of saved tensors are active (checkpointing, offloading)"


class Unfit(Exception):
    """A call that no graph can hold.

    Attributes:
        reason: why.
        lasting: whether it holds for all calls of the module.
    """

    def __init__(self, reason: str, lasting: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting


@dataclass(frozen=True)
class Survey:
    """The state of a module and all modules in it.

    Attributes:
        parameters: each once.
        buffers: each once.
        flags: types, modes and plain attributes; which parameters take gradients.
        storages: where parameters and buffers are, and their form.
    """

    parameters: tuple[Tensor, ...]
    buffers: tuple[Tensor, ...]
    flags: tuple[Any, ...]
    storages: tuple[Any, ...]


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules, each once; several times as fast as ``Module.modules``."""
    found: dict[int, nn.Module] = {}
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) not in found:
            found[id(module)] = module
            stack.extend(m for m in module.__dict__["_modules"].values() if m is not None)
    return list(found.values())


def survey(model: nn.Module, device: torch.device) -> Survey:
    """Look at a module before a call.

    Raises:
        Unfit: it has something that a graph on ``device`` would leave out, or cannot reach.
    """
    flags: list[Any] = []
    parameters: dict[int, Tensor] = {}
    buffers: dict[int, Tensor] = {}
    for module in modules_of(model):
        state = module.__dict__
        flags.append(type(module))
        if module is not model and (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
        ):
            raise Unfit(f"a {type(module).__name__} in it has hooks, which a graph would not call")
        for value in state.values():
            kind = type(value)
            if kind in SCALARS:
                flags.append(value)
            elif kind is Tensor:
                flags.append(id(value))
        for parameter in state["_parameters"].values():
            if parameter is not None:
                parameters[id(parameter)] = parameter
        for buffer in state["_buffers"].values():
            if buffer is not None:
                buffers[id(buffer)] = buffer
    storages: list[Any] = []
    for group, what in ((parameters, "parameter"), (buffers, "buffer")):
        for t in group.values():
            if type(t) not in PLAIN_TYPES:
                raise Unfit(f"a {what} of it is a {type(t).__name__}")
            if t.device != device:
                raise Unfit(f"a {what} of it is on {t.device}, the input on {device}")
            storages += (t.data_ptr(), t.shape, t.stride())
            flags.append(t.requires_grad)
            if t._backward_hooks and what == "parameter":
                raise Unfit("a parameter of it has hooks, which would be called twice")
    return Survey(
        tuple(parameters.values()), tuple(buffers.values()), tuple(flags), tuple(storages)
    )


def never(model: nn.Module) -> str:
    """Why calls of this module are never captured, whatever their arguments; empty if they are."""
    for module in modules_of(model):
        name = type(module).__name__
        if isinstance(module, nn.SyncBatchNorm):
            return f"the statistics of {name} are of several processes"
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            return f"{name} works outside of it: convert the module before wrapping it"
        if isinstance(module, torch.jit.ScriptModule):
            return f"{name} is compiled by TorchScript"
        if "_fold" in module.__dict__:
            return "it has folded convolutions, which are for eval mode"
    return ""


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call.

    Attributes:
        leaves: tensors and constants, flattened.
        rebuild: positional and named arguments from such leaves.
        key: what a graph depends on of them.
        device: of the tensors.
    """

    leaves: tuple[Any, ...]
    rebuild: Callable[[Sequence[Any]], _Call]
    key: tuple[Any, ...]
    device: torch.device


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Look at the arguments of a call.

    Raises:
        Unfit: a graph cannot take them.
    """
    form: Any
    if not kwargs and all(type(a) is Tensor or type(a) in SCALARS for a in args):
        leaves, form, rebuild = args, len(args), _positional
    else:
        flat, spec = pytree.tree_flatten((args, kwargs))
        leaves, form = tuple(flat), str(spec)
        rebuild = functools.partial(_unflattened, spec)
    device: torch.device | None = None
    key: list[Any] = [form]
    strange: list[str] = []
    for leaf in leaves:
        kind = type(leaf)
        if kind in PLAIN_TYPES:
            if device is not None and leaf.device != device:
                raise Unfit(f"its arguments are on {device} and {leaf.device}")
            device = leaf.device
            if leaf.layout is not torch.strided or leaf.is_neg() or leaf.is_conj():
                raise Unfit("an argument is a sparse, negated or conjugated tensor")
            key.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad))
            if any(s == 0 and n > 1 for s, n in zip(leaf.stride(), leaf.shape, strict=True)):
                raise Unfit("an argument is an expanded tensor")
        elif kind in CONSTANTS:
            key.append((kind, leaf))
        else:
            strange.append(kind.__name__)
    if device is None:
        raise Unfit(NO_TENSOR)
    if strange:
        raise Unfit(f"an argument holds a {strange[0]}")
    return Arguments(leaves, rebuild, tuple(key), device)


def _positional(leaves: Sequence[Any]) -> _Call:
    return leaves, {}


def _unflattened(spec: pytree.TreeSpec, leaves: Sequence[Any]) -> _Call:
    positional, named = pytree.tree_unflatten(list(leaves), spec)
    return positional, named


def modes(device: torch.device) -> tuple[Any, ...]:
    """The part of a key that is about the program, not about the call.

    Raises:
        Unfit: a mode is on under which nothing is captured.
    """
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or is_recording()
        or torch.is_inference_mode_enabled()
        or any(type(m) is not DeviceContext for m in _get_current_function_mode_stack())
    ):
        raise Unfit(TRACING)
    if torch.is_anomaly_enabled():
        raise Unfit("autograd looks for anomalies")
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        raise Unfit(HOOKED_GRADIENTS)
    if (
        globally._global_forward_hooks
        or globally._global_forward_pre_hooks
        or globally._global_backward_hooks
        or globally._global_backward_pre_hooks
    ):
        raise Unfit("hooks of all modules are registered, which a graph would not call")
    amp = torch.is_autocast_enabled(device.type)
    return (
        # Not the tables' epoch: kernels that were tuned since are no reason to capture again.
        settings.backend,
        settings.deterministic,
        settings.atomics,
        amp and torch.get_autocast_dtype(device.type),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.allow_tf32,
    )


__all__ = [
    "CAPTURING",
    "CONSTANTS",
    "EVALUATION",
    "HOOKED_GRADIENTS",
    "NO_GPU",
    "NO_GRAD",
    "NO_TENSOR",
    "TRACING",
    "Arguments",
    "Survey",
    "Unfit",
    "arguments",
    "modes",
    "modules_of",
    "never",
    "survey",
]
