"""Collect the problems that a model meets in one training step, and find models by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from tritonconv.runtime.errors import bad_value
from tritonconv.runtime.operators import Operator, Problem
from tritonconv.runtime.tables import recording

from .tune import unique_pairs

Pair = tuple[Operator, Problem]


def resolve(name: str) -> Any:
    """Import what ``package.module:attribute`` names.

    Raises:
        ArgumentValueError: the name has another form, or there is no such module or attribute.

    Example:
        >>> resolve("math:gcd")(4, 6)
        2
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise bad_value("name", "package.module:callable", repr(name))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise bad_value("name", f"an importable module in {name!r}", str(error)) from None
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise bad_value("name", f"an attribute of {module_name}", repr(attribute))
        value = getattr(value, part)
    return value


def build_model(name: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Call what ``name`` names and require a module from it.

    Raises:
        ArgumentValueError: the name leads nowhere, takes other arguments, or gives no module.
    """
    factory = resolve(name)
    arguments = dict(arguments or {})
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise bad_value("model arguments", f"those of {name}", f"{arguments} ({error})") from None
    model = factory(**arguments)
    if not isinstance(model, nn.Module):
        raise bad_value("model", f"an nn.Module from {name}", type(model).__name__)
    return model


def collect(step: Callable[[], None]) -> list[Pair]:
    """Run ``step`` once and list the distinct problems it met, in order."""
    with recording() as met:
        step()
    return unique_pairs(met)


def harvest(
    model: nn.Module,
    inputs: torch.Tensor,
    *,
    amp: torch.dtype | None = None,
    backward: bool = True,
) -> list[Pair]:
    """Run a model forward and backward once and list the problems it met.

    The model's parameters, buffers and gradients are as before when this returns.

    Args:
        model: any module of one tensor, in the mode (training or evaluation) of interest.
        inputs: a batch, on the model's device.
        amp: dtype of an autocast region around the forward pass; None for none.
        backward: also run the backward pass, from the sum of the squares of the outputs.
    """
    device = inputs.device.type
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    region = nullcontext() if amp is None else torch.autocast(device, dtype=amp)

    def step() -> None:
        with torch.set_grad_enabled(backward), region:
            output = model(inputs)
        if backward:
            losses = [t.float().square().sum() for t in _tensors(output) if t.requires_grad]
            if losses:
                torch.stack(losses).sum().backward()

    try:
        return collect(step)
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]
