"""Collect the problems that a model meets in one training step, and find models by name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import nn

from tritonconv.nn import convert
from tritonconv.runtime.backend import backend
from tritonconv.runtime.errors import bad_value
from tritonconv.runtime.operators import Operator, Problem
from tritonconv.runtime.tables import recording

from .extras import need
from .tune import unique_pairs

Pair = tuple[Operator, Problem]

MODEL_GROUP = "tritonconv.models"
"""Entry point group of short model names."""

_TIMM = "timm:"
_CHANNELS = ("in_channels", "in_chans")
_ARGUMENT_ERROR = re.compile(r"unexpected keyword argument|missing .* required|multiple values")
_LAYOUTS = ("channels_last", "contiguous")
AUTOCAST = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""What runs a model in a dtype: autocast to it, or nothing."""


@dataclass(frozen=True)
class ModelName:
    """A short name of a model, as an installed package registers it.

    Attributes:
        name: what ``--model`` takes.
        target: ``package.module:callable`` that builds it.
        package: the distribution that registers it.
    """

    name: str
    target: str
    package: str


def model_names() -> tuple[ModelName, ...]:
    """Registered short names: entry points of the group ``tritonconv.models``, by name.

    Any package can add its own in its ``pyproject.toml``::

        [project.entry-points."tritonconv.models"]
        my_net = "my_package.nets:build"
    """
    found: dict[str, ModelName] = {}
    for point in entry_points(group=MODEL_GROUP):
        package = point.dist.name if point.dist is not None else "?"
        found.setdefault(point.name, ModelName(point.name, point.value, package))
    return tuple(found[name] for name in sorted(found))


def resolve(name: str) -> Any:
    """Import what a model name means.

    Args:
        name: a registered short name (:func:`model_names`), ``package.module:attribute``, or
            ``timm:NAME`` for a model of the timm package.

    Raises:
        ArgumentValueError: the name leads nowhere.
        MissingExtraError: ``timm:NAME`` without timm.

    Example:
        >>> resolve("math:gcd")(4, 6)
        2
    """
    if name.startswith(_TIMM):
        return _timm_factory(name.removeprefix(_TIMM))
    if ":" not in name:
        known = {model.name: model.target for model in model_names()}
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            names = " | ".join((*known, "package.module:callable", "timm:NAME"))
            raise bad_value("model", names, f"{name!r}{hint}")
        name = known[name]
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise bad_value("model", "package.module:callable", repr(name))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise bad_value("model", f"an importable module in {name!r}", str(error)) from None
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise bad_value("model", f"an attribute of {module_name}", repr(attribute))
        value = getattr(value, part)
    return value


def _timm_factory(name: str) -> Callable[..., Any]:
    timm = need("timm", f"the model name {_TIMM}{name}", "timm")
    if not name or not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; close are {', '.join(close)}" if close else ""
        raise bad_value("model", "timm:NAME of a model that timm knows", f"{name!r}{hint}")

    def build(*, in_chans: int = 3, **options: Any) -> Any:
        return timm.create_model(name, in_chans=in_chans, **options)

    return build


def build_model(
    name: str, arguments: Mapping[str, Any] | None = None, *, channels: int | None = None
) -> nn.Module:
    """Call what ``name`` names and require a module from it.

    Args:
        name: as :func:`resolve` takes it.
        arguments: keyword arguments of the callable.
        channels: channels of the model's input, given to the callable's parameter ``in_channels``
            or ``in_chans`` where it has one that ``arguments`` leaves open.

    Raises:
        ArgumentValueError: the name leads nowhere, takes other arguments, or gives no module.

    Example:
        >>> build_model("torch.nn:Linear", {"in_features": 2, "out_features": 3})
        Linear(in_features=2, out_features=3, bias=True)
    """
    factory = resolve(name)
    arguments = dict(arguments or {})
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        raise bad_value("model", f"a callable from {name}", type(factory).__name__) from None
    if channels is not None:
        takes = next((p for p in _CHANNELS if p in signature.parameters), None)
        if takes is not None:
            arguments.setdefault(takes, channels)
    try:
        signature.bind(**arguments)
        model = factory(**arguments)
    except TypeError as error:
        # From the signature, or from what the callable passes its **options to.
        if not _ARGUMENT_ERROR.search(str(error)):
            raise
        takes_text = f"those of {name}{signature}"
        raise bad_value("model arguments", takes_text, f"{arguments} ({error})") from None
    if not isinstance(model, nn.Module):
        raise bad_value("model", f"an nn.Module from {name}", type(model).__name__)
    return model


def input_channels(model: nn.Module) -> int:
    """Channels of the images a model takes: as it says, else those of its first convolution, or 3.

    Example:
        >>> input_channels(nn.Sequential(nn.ReLU(), nn.Conv2d(5, 8, 3)))
        5
    """
    for attribute in _CHANNELS:
        value = getattr(model, attribute, None)
        if type(value) is int:
            return value
    convolutions = (m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd))
    return next((m.in_channels for m in convolutions), 3)


def harvest_named(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    batch: int = 8,
    size: Sequence[int] = (224, 224),
    channels: int | None = None,
    dtypes: Sequence[str] = ("bfloat16",),
    layouts: Sequence[str] = ("channels_last",),
    device: torch.device | str = "cpu",
    by_kernel: bool = False,
) -> list[Pair]:
    """Problems of one training step of a model, by its name.

    A model that calls none of our operators is run as ``tritonconv.nn.convert`` makes it.

    Args:
        name: as :func:`resolve` takes it.
        arguments: of what the name names.
        batch: images.
        size: spatial sizes of an image, two or three.
        channels: of an image; what the model takes when None (:func:`input_channels`).
        dtypes: ``bfloat16`` and ``float16`` through autocast, ``float32`` without.
        layouts: memory formats of model and images.
        device: where the step is run.
        by_kernel: as :func:`harvest` takes it.

    Raises:
        ArgumentValueError: an unknown name, argument, dtype or layout, or no problem was met.

    Example:
        >>> met = harvest_named("attention_unet", {"widths": (4, 8)}, batch=1, size=(16, 16))
        >>> met[0][1].fields()["in_channels"], len(met)
        (1, 21)
    """
    for layout in layouts:
        memory_format(layout, len(size) + 2)
    for dtype in dtypes:
        if dtype not in AUTOCAST:
            raise bad_value("dtype", " | ".join(AUTOCAST), repr(dtype))
    model = build_model(name, arguments, channels=channels).to(device).train()

    def met() -> list[Pair]:
        pairs: list[Pair] = []
        for layout in layouts:
            images = images_for(model, batch, size, channels, layout, device)
            model.to(memory_format=memory_format(layout, images.dim()))  # type: ignore[call-overload]
            for dtype in dtypes:
                pairs += harvest(model, images, amp=AUTOCAST[dtype], by_kernel=by_kernel)
        return pairs

    pairs = met()
    if not pairs:
        convert(model)
        pairs = met()
    if not pairs:
        raise bad_value("model", f"convolutions that tritonconv serves in {name}", "none")
    return list(dict.fromkeys(pairs)) if by_kernel else unique_pairs(pairs)


def collect(step: Callable[[], None], *, by_kernel: bool = False) -> list[Pair]:
    """Run ``step`` once and list the distinct problems it met, in order.

    PyTorch's kernels compute: nothing has to be compiled to learn which problems there are.
    Problems are distinct by their tuned entry, or ``by_kernel``: by all that a kernel depends on.
    """
    with backend("torch"), recording() as met:
        step()
    return list(dict.fromkeys(met)) if by_kernel else unique_pairs(met)


def harvest(
    model: nn.Module,
    inputs: torch.Tensor,
    *,
    amp: torch.dtype | None = None,
    backward: bool = True,
    by_kernel: bool = False,
) -> list[Pair]:
    """Run a model forward and backward once and list the problems it met.

    The model's parameters, buffers and gradients, and the random numbers to come, are as before
    when this returns. Hooks of parameters (an optimiser in the backward pass, a distributed
    reducer) run.

    Args:
        model: any module of one tensor, in the mode (training or evaluation) of interest.
        inputs: a batch, on the model's device.
        amp: dtype of an autocast region around the forward pass; None for none.
        backward: also run the backward pass, from the mean squares of the outputs.
        by_kernel: list problems that share a tuned entry, but not their kernels: those of other
            epilogues.
    """
    device = inputs.device.type
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    region = nullcontext() if amp is None else torch.autocast(device, dtype=amp)

    def step() -> None:
        with torch.set_grad_enabled(backward), region:
            output = model(inputs)
        if backward:
            loss = loss_of(output)
            if loss.requires_grad:
                loss.backward()

    on = [inputs.device] if inputs.is_cuda else []
    try:
        for parameter, _ in gradients:
            parameter.grad = None  # backward adds to what is there, in place
        with torch.random.fork_rng(on):
            return collect(step, by_kernel=by_kernel)
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def loss_of(output: Any) -> torch.Tensor:
    """The mean square of every tensor in a model's output that has a gradient, added."""
    losses = [t.float().square().mean() for t in _tensors(output) if t.requires_grad]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def memory_format(layout: str, axes: int) -> torch.memory_format:
    """The memory format that a layout means for tensors of so many axes.

    Raises:
        ArgumentValueError: an unknown layout.

    Example:
        >>> memory_format("channels_last", 5)
        torch.channels_last_3d
    """
    if layout not in _LAYOUTS:
        raise bad_value("layout", " | ".join(_LAYOUTS), repr(layout))
    if layout == "contiguous":
        return torch.contiguous_format
    return torch.channels_last if axes == 4 else torch.channels_last_3d


def images_for(
    model: nn.Module,
    batch: int,
    size: Sequence[int],
    channels: int | None,
    layout: str,
    device: torch.device | str,
) -> torch.Tensor:
    """Random images (batch, channels, *size) as a model takes them."""
    images = torch.randn((batch, channels or input_channels(model), *size), device=device)
    # A copy, for images of one channel: only their strides say which format is meant.
    form = memory_format(layout, images.dim())
    return torch.empty_like(images, memory_format=form).copy_(images)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]
