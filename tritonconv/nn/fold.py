"""Fold eval-mode batch norms and activations into the epilogue of the convolution before them.

``torch.fx`` proves that nothing else reads the results in between; folded modules stay in the model
and become identities, so that parameters and the state_dict stay what they were.
"""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from ..runtime.errors import TritonConvError
from .conv import CONVERTED, Fused, PlainConv, TransposedConv

Tensor = torch.Tensor

CLASS = "_tritonconv_class"
"""Attribute of a converted module: the class that ``revert`` gives back."""

# What an activation module computes, as a scalar function for the epilogue.
ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Callable[[Tensor], Tensor]]] = {
    nn.ReLU: lambda m: F.relu,
    nn.ReLU6: lambda m: F.relu6,
    nn.LeakyReLU: lambda m: functools.partial(F.leaky_relu, negative_slope=m.negative_slope),
    nn.ELU: lambda m: functools.partial(F.elu, alpha=m.alpha),
    nn.SELU: lambda m: F.selu,
    nn.GELU: lambda m: functools.partial(F.gelu, approximate=m.approximate),
    nn.SiLU: lambda m: F.silu,
    nn.Mish: lambda m: F.mish,
    nn.Sigmoid: lambda m: torch.sigmoid,
    nn.Tanh: lambda m: torch.tanh,
    nn.Softplus: lambda m: functools.partial(F.softplus, beta=m.beta, threshold=m.threshold),
    nn.Hardswish: lambda m: F.hardswish,
    nn.Hardsigmoid: lambda m: F.hardsigmoid,
    nn.Hardtanh: lambda m: functools.partial(F.hardtanh, min_val=m.min_val, max_val=m.max_val),
}


class _FoldedBatchNorm(_BatchNorm):
    """A batch norm whose work the preceding convolution does: the identity, in eval mode only."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input; the convolution has normalised it.

        Raises:
            TritonConvError: the module was switched to training mode.
        """
        if self.training:
            raise TritonConvError(
                "a batch norm folded into its convolution was called in training mode: "
                "call tritonconv.nn.revert(model) before training"
            )
        return input


class _FoldedActivation(nn.Module):
    """An activation that the preceding convolution computes: the identity."""

    def forward(self, input: Tensor) -> Tensor:
        return input


class _FoldedConv(PlainConv):
    """A convolution that also does the batch norm and the activation behind it."""

    _fold: Fold

    def forward(self, input: Tensor | tuple[Tensor, Tensor], *epilogue_args: Tensor) -> Tensor:
        """Convolve, normalise and activate in one kernel."""
        return super().forward(input, *self._fold.operands())

    def extra_repr(self) -> str:
        """The constructor's arguments and what was folded."""
        return f"{_ConvNd.extra_repr(self)}, folds {self._fold}"


class _FoldedTransposed(TransposedConv):
    """The same for a transposed convolution."""

    _fold: Fold

    def forward(
        self, input: Tensor, output_size: Sequence[int] | None = None, *epilogue_args: Tensor
    ) -> Tensor:
        """Convolve, normalise and activate."""
        return super().forward(input, output_size, *self._fold.operands())

    def extra_repr(self) -> str:
        """The constructor's arguments and what was folded."""
        return f"{_ConvNd.extra_repr(self)}, folds {self._fold}"


_NORMS: dict[int, type[_BatchNorm]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
"""By the number of spatial axes of the convolution in front."""


def _folded_kind(kind: type[nn.Module]) -> type[nn.Module]:
    base: type[nn.Module] = _FoldedActivation
    if issubclass(kind, _BatchNorm):
        base = _FoldedBatchNorm
    elif issubclass(kind, Fused):
        base = _FoldedConv if issubclass(kind, PlainConv) else _FoldedTransposed
    return type(f"Folded{kind.__name__}", (base, kind), {"__module__": __name__})


FOLDED: dict[type[nn.Module], type[nn.Module]] = {
    kind: _folded_kind(kind) for kind in (*ACTIVATIONS, *_NORMS.values(), *CONVERTED.values())
}
"""The class of a module that was folded, or that others were folded into, by its class before."""
globals().update({kind.__name__: kind for kind in FOLDED.values()})  # pickle finds them by name

_NORM_ACT = "BatchNormAct2d"


_NORM_ACTS: dict[type[nn.Module], type[nn.Module]] = {}


def _folded_norm(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _NORM_ACTS:
        _NORM_ACTS[kind] = _folded_kind(kind)
    return _NORM_ACTS[kind]


def __getattr__(name: str) -> Any:
    """The folded class of timm's batch norm, which pickle asks for by name."""
    if name != f"Folded{_NORM_ACT}":
        raise AttributeError(name)
    return _folded_norm(getattr(importlib.import_module("timm.layers"), _NORM_ACT))


class Fold:
    """The epilogue of a folded convolution: ``activation(y · scale + shift)``."""

    def __init__(self, modules: tuple[nn.Module, ...], rank: int) -> None:
        self.modules = modules
        self.norm = next((m for m in modules if isinstance(m, _BatchNorm)), None)
        self.rank = rank
        self.cached: tuple[Any, tuple[Tensor, Tensor], list[Tensor]] | None = None

    def __str__(self) -> str:
        return " + ".join(type(module).__bases__[-1].__name__ for module in self.modules)

    def epilogue(self) -> Callable[..., Tensor]:
        """The scalar function; call before the modules become identities."""
        last = _inner_activation(self.norm) or self.modules[-1]
        activate = ACTIVATIONS[type(last)](last) if type(last) in ACTIVATIONS else None
        if self.norm is None:
            assert activate is not None
            return activate
        return functools.partial(_normalise_and_activate, activate) if activate else _normalise

    def operands(self) -> tuple[Tensor, ...]:
        """Scale and shift of every channel, computed again when the batch norm has changed."""
        norm = self.norm
        if norm is None:
            return ()
        sources = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        present = [t for t in sources if t is not None]
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in present)
        if differentiable or torch.compiler.is_compiling() or any(map(torch.is_inference, present)):
            return _scale_and_shift(norm, self.rank)
        key = (norm.eps, *[(id(t), t._version, t.data_ptr(), t.dtype, t.device) for t in present])
        if self.cached is None or self.cached[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                # Held, so that none of the identities and addresses in the key is given away.
                held = [t.detach() for t in present] + present
                self.cached = (key, _scale_and_shift(norm, self.rank), held)
        return self.cached[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cached": None}


def _normalise(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return y * scale + shift


def _normalise_and_activate(
    activate: Callable[[Tensor], Tensor], y: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    return activate(y * scale + shift)


def _scale_and_shift(norm: _BatchNorm, rank: int) -> tuple[Tensor, Tensor]:
    """(M, 1, …) each, at least in float32: batch norm is ``y · scale + shift`` in eval mode."""
    assert norm.running_mean is not None and norm.running_var is not None
    mean, variance = norm.running_mean, norm.running_var
    if mean.dtype is not torch.float64:
        mean, variance = mean.float(), variance.float()
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    shape = (-1, *[1] * rank)
    return scale.reshape(shape), shift.reshape(shape)


@dataclass(frozen=True)
class Chain:
    """What follows a convolution: modules that may be folded, and why the chain ends there."""

    modules: tuple[nn.Module, ...]
    end: str


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, (_ConvNd, _BatchNorm, nn.LayerNorm))  # ours look at their tensors
        return leaf or super().is_leaf_module(m, module_qualified_name)


def _traces(model: nn.Module) -> Iterator[tuple[nn.Module, fx.Graph | Exception]]:
    """The model's graph or, where tracing fails, the error and the graphs of its children."""
    try:
        yield model, _Tracer().trace(model)
    except Exception as error:  # forward is the user's code: anything may come
        yield model, error
        for child in model.children():
            # Children of the library itself are leaves of every trace.
            if any(True for _ in child.children()):
                yield from _traces(child)


def chains(model: nn.Module) -> tuple[dict[nn.Module, Chain], str]:
    """The chain behind every traced convolution, and why the whole model was not traced."""
    paths = Counter(
        module
        for _, module in model.named_modules(remove_duplicate=False)
        if not _container(module)
    )
    found: dict[nn.Module, Chain] = {}
    untraced = ""
    for root, graph in _traces(model):
        if isinstance(graph, Exception):
            first = (str(graph).splitlines() or [""])[0]
            untraced = untraced or f"not traced: {type(graph).__name__}: {first[:80]}"
            continue
        calls = Counter(_called(root, node) for node in graph.nodes if node.op == "call_module")
        for node in graph.nodes:
            conv = _called(root, node)
            if not isinstance(conv, Fused) or type(conv) not in FOLDED:
                continue
            chain = _chain(root, node, conv, calls)
            if root is not model and any(paths[m] > 1 for m in (conv, *chain.modules)):
                chain = Chain((), "shared with a part of the model that was not traced")
            found[conv] = chain
    return found, untraced


def _container(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _called(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _chain(root: nn.Module, node: fx.Node, conv: Fused, calls: Counter[nn.Module | None]) -> Chain:
    """Walk from a convolution to the modules that are the only readers of the one before."""
    found: list[nn.Module] = []
    if conv.epilogue is not None:
        return Chain((), "has an epilogue already")
    if calls[conv] > 1:
        return Chain((), f"called {calls[conv]} times")
    if _hooked(conv):
        return Chain((), "has hooks")
    norm = _NORMS[len(conv.kernel_size)]
    for kinds in ((norm,), tuple(ACTIVATIONS)):
        reader, module, end = _only_reader(root, node)
        if module is None:
            return Chain(tuple(found), end)
        known = type(module) in kinds or (norm in kinds and _with_activation(module, norm))
        if not known:
            if norm in kinds and type(module) in ACTIVATIONS:
                continue
            return Chain(tuple(found), f"followed by {type(module).__name__} {reader.target}")
        reason = _why_not_folded(module, conv, calls)
        if reason:
            return Chain(tuple(found), f"{reader.target} {reason}")
        found.append(module)
        node = reader
        if _inner_activation(module) is not None:
            break
    return Chain(tuple(found), "")


def _only_reader(root: nn.Module, node: fx.Node) -> tuple[fx.Node, nn.Module | None, str]:
    """The one module that reads a result and its node; or None, and who reads it instead.

    A plain ``nn.Identity``, as models have them in place of regularisation, hands its input on.
    """
    while True:
        if len(node.users) != 1:
            return node, None, f"its result is read {len(node.users)} times"
        reader = next(iter(node.users))
        module = _called(root, reader)
        if module is None or reader.args != (node,) or reader.kwargs:
            end = "is returned" if reader.op == "output" else f"is read by {_title(reader)}"
            return reader, None, f"its result {end}"
        if type(module) is not nn.Identity or _hooked(module) or "forward" in module.__dict__:
            return reader, module, ""
        node = reader


def _with_activation(module: nn.Module, norm: type[_BatchNorm]) -> bool:
    """Whether this is timm's batch norm that drops and activates behind itself."""
    kind = type(module)
    named = kind.__name__ == _NORM_ACT and kind.__module__.startswith("timm.")
    return named and norm is nn.BatchNorm2d and isinstance(module, nn.BatchNorm2d)


def _inner_activation(module: nn.Module | None) -> nn.Module | None:
    """The activation inside a batch norm of timm's; None where it has none."""
    if isinstance(module, _BatchNorm) and type(module) not in FOLDED:
        act = getattr(module, "act", None)
        return None if type(act) is nn.Identity else act
    return None


def _title(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _why_not_folded(module: nn.Module, conv: Fused, calls: Counter[nn.Module | None]) -> str:
    if calls[module] > 1:
        return f"is called {calls[module]} times"
    if _hooked(module):
        return "has hooks"
    if "forward" in module.__dict__:
        return "has its forward replaced on the instance"
    if isinstance(module, _BatchNorm):
        if module.training:
            return "is in training mode"
        if module.running_mean is None:
            return "has no running statistics"
        if module.num_features != conv.out_channels:
            return f"normalises {module.num_features} of {conv.out_channels} channels"
        if parametrize.is_parametrized(module):
            return "is parametrized"
        drop, act = getattr(module, "drop", None), _inner_activation(module)
        if type(drop) not in (type(None), nn.Identity):
            return f"has {type(drop).__name__} in it"
        if act is not None and (type(act) not in ACTIVATIONS or _hooked(act)):
            return f"has {type(act).__name__} in it, hooked or not known"
    return ""


def fold_into(conv: Fused, modules: tuple[nn.Module, ...]) -> None:
    """Give the convolution the epilogue of a chain and make the chain's modules identities."""
    fold = Fold(modules, len(conv.kernel_size))
    conv.epilogue = fold.epilogue()
    # Kept out of the module tree: these modules have their own place in it.
    conv.__dict__.update({"_fold": fold})
    conv.__dict__.setdefault(CLASS, type(conv))
    conv.__class__ = FOLDED[type(conv)]  # type: ignore[assignment]
    for module in modules:
        kind = type(module)
        module.__dict__[CLASS] = kind
        module.__class__ = FOLDED[kind] if kind in FOLDED else _folded_norm(kind)


__all__ = ["ACTIVATIONS", "CLASS", "FOLDED", "Chain", "Fold", "chains", "fold_into"]
