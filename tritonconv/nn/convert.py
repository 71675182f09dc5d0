"""Convert the convolutions of an existing model in place, and back.

A module keeps its identity: only its class changes, so parameters, hooks, state_dict keys, the
optimizer's references and modules that are shared stay what they were.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ..conv.problem import DTYPES
from ..runtime.errors import TritonConvError, bad_type, bad_value
from .conv import Conv2d

Tensor = torch.Tensor

_CLASS = "_tritonconv_class"
"""Attribute of a converted module: the class that ``revert`` gives back."""


@dataclass(frozen=True)
class Converted:
    """A convolution that runs on the library's kernels now.

    Attributes:
        name: path of the module in the model.
        folded: paths of the modules that its epilogue took over.
        reason: with ``fold=True``, why the epilogue took over no more than that.
    """

    name: str
    folded: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Kept:
    """A convolution that stays as it is, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert` did; ``print(report)`` shows it as a table."""

    converted: tuple[Converted, ...]
    kept: tuple[Kept, ...]

    def __str__(self) -> str:
        rows = [("module", "now", "note")]
        for done in self.converted:
            now = " + ".join(["tritonconv.nn.Conv2d", *done.folded])
            rows.append((done.name or "(model)", now, done.reason))
        rows += [(left.name or "(model)", left.kind, left.reason) for left in self.kept]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        rows.insert(1, ("-" * widths[0], "-" * widths[1], "-" * len("note")))
        lines = [f"{name:<{widths[0]}}  {now:<{widths[1]}}  {note}" for name, now, note in rows]
        lines.append(f"{len(self.converted)} converted, {len(self.kept)} kept")
        return "\n".join(line.rstrip() for line in lines)


# What an activation module computes, as a scalar function for the epilogue.
_ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Callable[[Tensor], Tensor]]] = {
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


class FoldedBatchNorm2d(nn.BatchNorm2d):
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


_FOLDED: dict[type[nn.Module], type[nn.Module]] = {
    kind: type(f"Folded{kind.__name__}", (_FoldedActivation, kind), {"__module__": __name__})
    for kind in _ACTIVATIONS
}
globals().update({kind.__name__: kind for kind in _FOLDED.values()})  # pickle finds them by name
_FOLDED[nn.BatchNorm2d] = FoldedBatchNorm2d


class FoldedConv2d(Conv2d):
    """A convolution that also does the batch norm and the activation behind it."""

    _fold: _Fold

    def forward(self, input: Tensor, *epilogue_args: Tensor) -> Tensor:
        """Convolve, normalise and activate in one kernel."""
        return super().forward(input, *self._fold.operands())

    def extra_repr(self) -> str:
        """The constructor's arguments and what was folded."""
        folded = " + ".join(type(module).__bases__[-1].__name__ for module in self._fold.modules)
        return f"{nn.Conv2d.extra_repr(self)}, folds {folded}"


class _Fold:
    """The epilogue of a folded convolution: ``activation(y · scale + shift)``."""

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        self.modules = modules
        self.norm = next((m for m in modules if isinstance(m, nn.BatchNorm2d)), None)
        self.cached: tuple[Any, tuple[Tensor, Tensor], list[Tensor]] | None = None

    def epilogue(self) -> Callable[..., Tensor]:
        """The scalar function; call before the modules become identities."""
        last = self.modules[-1]
        activate = _ACTIVATIONS[type(last)](last) if type(last) in _ACTIVATIONS else None
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
            return _scale_and_shift(norm)
        key = (norm.eps, *[(id(t), t._version, t.data_ptr(), t.dtype, t.device) for t in present])
        if self.cached is None or self.cached[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                # Held, so that none of the identities and addresses in the key is given away.
                held = [t.detach() for t in present] + present
                self.cached = (key, _scale_and_shift(norm), held)
        return self.cached[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"modules": self.modules, "norm": self.norm, "cached": None}


def _normalise(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return y * scale + shift


def _normalise_and_activate(
    activate: Callable[[Tensor], Tensor], y: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    return activate(y * scale + shift)


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(M, 1, 1) each, at least in float32: batch norm is ``y · scale + shift`` in eval mode."""
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
    return scale.reshape(-1, 1, 1), shift.reshape(-1, 1, 1)


def _why_kept(module: nn.Module) -> str | None:
    """Why a convolution cannot be converted; None when it can."""
    kind = type(module)
    if isinstance(module, LazyModuleMixin):
        return "lazy: call the model once before converting it"
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized"
    if isinstance(module, _ConvTransposeNd):
        return "no kernel yet for transposed convolutions"
    if not isinstance(module, nn.Conv2d):
        return "no kernel yet for this number of axes"
    if kind is not nn.Conv2d:
        return f"subclass of Conv2d: {kind.__module__}.{kind.__qualname__}"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if module._parameters.get("weight") is None:
        return "its weight is computed, no parameter (weight norm, spectral norm, pruning)"
    if module.weight.dtype not in DTYPES.values():
        return f"no kernel for dtype {module.weight.dtype}"
    return None


def convert(model: nn.Module, *, fold: bool = False) -> ConversionReport:
    """Run the 2-D convolutions of a model on the library's kernels, in place.

    Every ``torch.nn.Conv2d`` becomes a :class:`tritonconv.nn.Conv2d` with the same parameters,
    hooks, mode and place in the state_dict. :func:`revert` undoes it.

    Args:
        model: changed in place; its module objects stay the same.
        fold: also compute a following ``BatchNorm2d`` in eval mode and a following activation
            module inside the convolution. Weights and state_dict stay as they are: the batch
            norm's scale and shift are applied to the accumulator, and follow later changes of its
            parameters and statistics. That nothing else reads the intermediate results is proven
            by ``torch.fx``; where the model cannot be traced, by tracing its submodules, each
            taken to be called as a whole. The model must stay in eval mode until it is reverted.

    Returns:
        What was converted and folded, what was not, and why.

    Raises:
        ArgumentTypeError: ``model`` is no module.
        ArgumentValueError: ``fold`` of a model in training mode; nothing was changed.

    Example:
        >>> import torch, tritonconv as tc
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> print(tc.nn.convert(model, fold=True))
        module  now                           note
        ------  ----------------------------  ----
        0       tritonconv.nn.Conv2d + 1 + 2
        1 converted, 0 kept
        >>> model(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 8, 6, 6])
        >>> type(tc.nn.revert(model)[0]).__module__
        'torch.nn.modules.conv'
    """
    if not isinstance(model, nn.Module):
        raise bad_type("model", "a torch.nn.Module", type(model).__name__)
    if fold and model.training:
        raise bad_value(
            "fold", "a model in eval mode (model.eval()) with fold=True", "training mode"
        )
    kept = []
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, _ConvNd) or isinstance(module, Conv2d):
            continue
        reason = _why_kept(module)
        if reason is not None:
            kept.append(Kept(name, type(module).__name__, reason))
            continue
        names[module] = name
        module.__dict__.update({_CLASS: type(module), "epilogue": None, "precision": None})
        module.__class__ = Conv2d
    if not fold:
        return ConversionReport(tuple(map(Converted, names.values())), tuple(kept))
    for name, module in model.named_modules():
        if type(module) is Conv2d:
            names.setdefault(module, name)
    chains, untraced = _chains(model)
    converted = [
        _fold(model, module, name, chains.get(module), untraced) for module, name in names.items()
    ]
    return ConversionReport(tuple(converted), tuple(kept))


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert`: every module has its former class again.

    Args:
        model: a model, converted or not; changed in place.

    Returns:
        The same model.
    """
    if not isinstance(model, nn.Module):
        raise bad_type("model", "a torch.nn.Module", type(model).__name__)
    for module in model.modules():
        former = module.__dict__.pop(_CLASS, None)
        if former is None:
            continue
        if isinstance(module, Conv2d):
            module.__dict__.pop("_fold", None)
            if former is Conv2d:
                module.epilogue = None
            else:
                del module.epilogue, module.precision
        module.__class__ = former
    return model


@dataclass(frozen=True)
class _Chain:
    """What follows a convolution: modules that may be folded, and why the chain ends there."""

    modules: tuple[nn.Module, ...]
    end: str


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _ConvNd) or super().is_leaf_module(m, module_qualified_name)


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


def _chains(model: nn.Module) -> tuple[dict[nn.Module, _Chain], str]:
    """The chain behind every traced convolution, and why the whole model was not traced."""
    paths = Counter(
        module
        for _, module in model.named_modules(remove_duplicate=False)
        if not _container(module)
    )
    chains: dict[nn.Module, _Chain] = {}
    untraced = ""
    for root, graph in _traces(model):
        if isinstance(graph, Exception):
            first = (str(graph).splitlines() or [""])[0]
            untraced = untraced or f"not traced: {type(graph).__name__}: {first[:80]}"
            continue
        calls = Counter(_called(root, node) for node in graph.nodes if node.op == "call_module")
        for node in graph.nodes:
            conv = _called(root, node)
            if type(conv) is not Conv2d:
                continue
            chain = _chain(root, node, conv, calls)
            if root is not model and any(paths[m] > 1 for m in (conv, *chain.modules)):
                chain = _Chain((), "shared with a part of the model that was not traced")
            chains[conv] = chain
    return chains, untraced


def _container(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _called(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _chain(
    root: nn.Module, node: fx.Node, conv: Conv2d, calls: Counter[nn.Module | None]
) -> _Chain:
    """Walk from a convolution to the modules that are the only readers of the one before."""
    found: list[nn.Module] = []
    if conv.epilogue is not None:
        return _Chain((), "has an epilogue already")
    if calls[conv] > 1:
        return _Chain((), f"called {calls[conv]} times")
    if _hooked(conv):
        return _Chain((), "has hooks")
    for kinds in ((nn.BatchNorm2d,), tuple(_ACTIVATIONS)):
        reader = next(iter(node.users), None)
        if len(node.users) != 1 or reader is None:
            return _Chain(tuple(found), f"its result is read {len(node.users)} times")
        module = _called(root, reader)
        if module is None or reader.args != (node,) or reader.kwargs:
            end = "is returned" if reader.op == "output" else f"is read by {_title(reader)}"
            return _Chain(tuple(found), f"its result {end}")
        if type(module) not in kinds:
            if nn.BatchNorm2d in kinds and type(module) in _ACTIVATIONS:
                continue
            return _Chain(tuple(found), f"followed by {type(module).__name__} {reader.target}")
        reason = _why_not_folded(module, conv, calls)
        if reason:
            return _Chain(tuple(found), f"{reader.target} {reason}")
        found.append(module)
        node = reader
    return _Chain(tuple(found), "")


def _title(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _why_not_folded(module: nn.Module, conv: Conv2d, calls: Counter[nn.Module | None]) -> str:
    if calls[module] > 1:
        return f"is called {calls[module]} times"
    if _hooked(module):
        return "has hooks"
    if "forward" in module.__dict__:
        return "has its forward replaced on the instance"
    if isinstance(module, nn.BatchNorm2d):
        if module.training:
            return "is in training mode"
        if module.running_mean is None:
            return "has no running statistics"
        if module.num_features != conv.out_channels:
            return f"normalises {module.num_features} of {conv.out_channels} channels"
        if parametrize.is_parametrized(module):
            return "is parametrized"
    return ""


def _fold(
    model: nn.Module, conv: nn.Module, name: str, chain: _Chain | None, untraced: str
) -> Converted:
    """Give the convolution the epilogue of its chain and make the chain's modules identities."""
    assert isinstance(conv, Conv2d)
    if chain is None:
        return Converted(name, (), untraced or "not reached by the model's forward")
    if not chain.modules:
        return Converted(name, (), chain.end)
    fold = _Fold(chain.modules)
    conv.epilogue = fold.epilogue()
    # Kept out of the module tree: these modules have their own place in it.
    conv.__dict__.update({"_fold": fold})
    conv.__dict__.setdefault(_CLASS, Conv2d)
    conv.__class__ = FoldedConv2d
    paths = {module: path for path, module in model.named_modules()}
    for module in chain.modules:
        module.__dict__[_CLASS] = type(module)
        module.__class__ = _FOLDED[type(module)]
    return Converted(name, tuple(paths[m] for m in chain.modules), chain.end)


__all__ = ["ConversionReport", "Converted", "Kept", "convert", "revert"]
