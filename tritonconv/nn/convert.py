"""Convert the convolutions of an existing model in place, and back.

A module keeps its identity: only its class changes, so parameters, hooks, state_dict keys, the
optimizer's references and modules that are shared stay what they were.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ..conv.problem import DTYPES
from ..runtime.errors import bad_type, bad_value
from .conv import CONVERTED, Fused
from .fold import CLASS, Chain, chains, fold_into


@dataclass(frozen=True)
class Converted:
    """A convolution that runs on the library's kernels now.

    Attributes:
        name: path of the module in the model.
        folded: paths of the modules that its epilogue took over.
        reason: with ``fold=True``, why the epilogue took over no more than that.
        kind: name of its class in ``tritonconv.nn``.
    """

    name: str
    folded: tuple[str, ...] = ()
    reason: str = ""
    kind: str = "Conv2d"


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
            now = " + ".join([f"tritonconv.nn.{done.kind}", *done.folded])
            rows.append((done.name or "(model)", now, done.reason))
        rows += [(left.name or "(model)", left.kind, left.reason) for left in self.kept]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        rows.insert(1, ("-" * widths[0], "-" * widths[1], "-" * len("note")))
        lines = [f"{name:<{widths[0]}}  {now:<{widths[1]}}  {note}" for name, now, note in rows]
        lines.append(f"{len(self.converted)} converted, {len(self.kept)} kept")
        return "\n".join(line.rstrip() for line in lines)


def _why_kept(module: nn.Module) -> str | None:
    """Why a convolution cannot be converted; None when it can."""
    kind = type(module)
    if isinstance(module, LazyModuleMixin):
        return "lazy: call the model once before converting it"
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized"
    if kind not in CONVERTED:
        base = next((base.__name__ for base in kind.__mro__ if base in CONVERTED), "_ConvNd")
        return f"subclass of {base}: {kind.__module__}.{kind.__qualname__}"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if module._parameters.get("weight") is None:
        return "its weight is computed, no parameter (weight norm, spectral norm, pruning)"
    if module.weight.dtype not in DTYPES.values():
        return f"no kernel for dtype {module.weight.dtype}"
    return None


def convert(model: nn.Module, *, fold: bool = False) -> ConversionReport:
    """Run the convolutions of a model on the library's kernels, in place.

    Every convolution of ``torch.nn``, of one to three axes and transposed, becomes the module of
    that name in :mod:`tritonconv.nn` with the same parameters, hooks, mode and place in the
    state_dict. :func:`revert` undoes it.

    Args:
        model: changed in place; its module objects stay the same.
        fold: also compute a following batch norm in eval mode and a following activation
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
    names: dict[Fused, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Fused):
            # Our own layers are no news, but something may be folded into them.
            if fold and type(module) in CONVERTED.values():
                names[module] = name
            continue
        if not isinstance(module, _ConvNd):
            continue
        reason = _why_kept(module)
        if reason is not None:
            kept.append(Kept(name, type(module).__name__, reason))
            continue
        module.__dict__.update({CLASS: type(module), "epilogue": None, "precision": None})
        module.__class__ = CONVERTED[type(module)]
        assert isinstance(module, Fused)
        names[module] = name
    found, untraced = chains(model) if fold else ({}, "")
    converted = []
    paths = {module: path for path, module in model.named_modules()}
    for module, name in names.items():
        kind = type(module).__name__
        chain = Chain((), "")
        if fold:
            untold = untraced or "not reached by the model's forward"
            chain = found.get(module, Chain((), untold))
        if chain.modules:
            fold_into(module, chain.modules)
        folded = tuple(paths[m] for m in chain.modules)
        converted.append(Converted(name, folded, chain.end, kind))
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
        former = module.__dict__.pop(CLASS, None)
        if former is None:
            continue
        if isinstance(module, Fused):
            module.__dict__.pop("_fold", None)
            if issubclass(former, Fused):
                module.epilogue = None
            else:
                del module.epilogue, module.precision
        module.__class__ = former
    return model


__all__ = ["ConversionReport", "Converted", "Kept", "convert", "revert"]
