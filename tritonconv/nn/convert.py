"""Convert the convolutions and norms of an existing model in place, and back.

A module keeps its identity: only its class changes, so parameters, hooks, state_dict keys, the
optimizer's references and modules that are shared stay what they were.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ..conv.problem import DTYPES
from ..runtime.errors import bad_type, bad_value
from .activate import TAKEN, followers, take_over
from .conv import CONVERTED, Fused
from .fold import ACTIVATIONS, CLASS, Chain, _hooked, _inner_activation, chains, fold_into
from .graphed import Graphed, graph, ungraph
from .layer_norm import LAYER_NORMS, converted_layer_norm
from .norm import NORMS, Activated, converted_norm


@dataclass(frozen=True)
class Converted:
    """A convolution or norm that runs on the library's kernels now.

    Attributes:
        name: path of the module in the model.
        folded: paths of the modules whose work it does too.
        reason: why it took over no more than that; of a convolution with ``fold=True`` only.
        kind: name of its class in ``tritonconv.nn``.
    """

    name: str
    folded: tuple[str, ...] = ()
    reason: str = ""
    kind: str = "Conv2d"


@dataclass(frozen=True)
class Kept:
    """A convolution or norm that stays as it is, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert` did; ``print(report)`` shows it as a table.

    Attributes:
        converted: layers that run on the library's kernels now.
        kept: layers that do not.
        cuda_graph: whether training steps of the model are captured as CUDA graphs.
        reason: why they are not, though it was asked.
    """

    converted: tuple[Converted, ...]
    kept: tuple[Kept, ...]
    cuda_graph: bool = False
    reason: str = ""

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
        if self.cuda_graph:
            lines.append("training steps on a GPU run as CUDA graphs")
        elif self.reason:
            lines.append(f"no CUDA graphs: {self.reason}")
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


def _why_norm_kept(module: nn.Module) -> str | None:
    """Why a batch norm cannot be converted; None when it can."""
    kind = type(module)
    if isinstance(module, LazyModuleMixin):
        return "lazy: call the model once before converting it"
    if isinstance(module, nn.SyncBatchNorm):
        return "its statistics are of several processes"
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized"
    if converted_norm(kind) is None:
        return f"subclass of a batch norm: {kind.__module__}.{kind.__qualname__}"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if kind not in NORMS:
        drop, act = getattr(module, "drop", None), _inner_activation(module)
        if type(drop) not in (type(None), nn.Identity):
            return f"has {type(drop).__name__} in it"
        if act is not None and (type(act) not in ACTIVATIONS or _hooked(act)):
            return f"has {type(act).__name__} in it, hooked or not known"
    return None


def _convert_norm(module: nn.Module) -> None:
    kind = type(module)
    act = None if kind in NORMS else _inner_activation(module)
    activation = None if act is None else ACTIVATIONS[type(act)](act)
    module.__dict__.update({CLASS: kind, "activation": activation})
    module.__class__ = converted_norm(kind)  # type: ignore[assignment]


def _why_layer_norm_kept(module: nn.Module) -> str | None:
    """Why a layer norm cannot be converted; None when it can."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized"
    if converted_layer_norm(kind) is None:
        return f"subclass of a layer norm: {kind.__module__}.{kind.__qualname__}"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return None


def convert(
    model: nn.Module,
    *,
    fold: bool = False,
    batch_norm: bool = False,
    layer_norm: bool = False,
    cuda_graph: bool = False,
) -> ConversionReport:
    """Run the convolutions of a model on the library's kernels, in place; norms on request.

    Every convolution of ``torch.nn``, of one to three axes and transposed, and with ``batch_norm``
    every batch norm, becomes the module of that name in :mod:`tritonconv.nn` with the same
    parameters, hooks, mode and place in the state_dict. A converted batch norm also does the work
    of an activation module behind it where ``torch.fx`` proves that nothing else reads its result,
    in training mode and in eval mode;
    both modes stay open. :func:`revert` undoes it. What replaces batch norms by modules of its own,
    such as ``SyncBatchNorm.convert_sync_batchnorm``, comes before: it knows of no activation.

    Args:
        model: changed in place; its module objects stay the same.
        fold: also compute a following batch norm in eval mode and a following activation
            module inside the convolution. Weights and state_dict stay as they are: the batch
            norm's scale and shift are applied to the accumulator, and follow later changes of its
            parameters and statistics. That nothing else reads the intermediate results is proven
            by ``torch.fx``; where the model cannot be traced, by tracing its submodules, each
            taken to be called as a whole. The model must stay in eval mode until it is reverted.
        batch_norm: whether batch norms that are not folded are converted too. Off by
            default: steps gain with ``cuda_graph``; without, the host's time outweighs that.
        layer_norm: whether layer norms are converted too, PyTorch's and those of timm and
            torchvision. Off by default: under autocast their results are no longer float32.
        cuda_graph: whether ``model(...)`` in training mode, and its backward pass, run as CUDA
            graphs, so that the host no longer limits them; the loop around it stays what it was.
            The first call of a kind (shapes, strides, dtypes, autocast, modes of submodules, which
            parameters take gradients) is captured, which takes some steps' time and the memory of
            one step; eight kinds are kept. Running statistics, random numbers and gradients are
            those of the steps that were asked for. What a graph cannot do runs eagerly and says
            why, once: :func:`cuda_graph_report`. After ``model.compile()`` what
            ``torch.compile`` makes of it is captured. What the model's Python code does beside,
            such as printing, happens at captures only. Guide: "Training steps as CUDA graphs".

    Returns:
        What was converted and folded, what was not, and why.

    Raises:
        ArgumentTypeError: ``model`` is no module.
        ArgumentValueError: ``fold`` of a model in training mode, or with ``cuda_graph``, which is
            about training; nothing was changed.

    Example:
        >>> import torch, tritonconv as tc
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> print(tc.nn.convert(model, batch_norm=True))
        module  now                            note
        ------  -----------------------------  ----
        0       tritonconv.nn.Conv2d
        1       tritonconv.nn.BatchNorm2d + 2
        2 converted, 0 kept
        >>> print(tc.nn.convert(tc.nn.revert(model), fold=True))
        module  now                           note
        ------  ----------------------------  ----
        0       tritonconv.nn.Conv2d + 1 + 2
        1 converted, 0 kept
        >>> model(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 8, 6, 6])
        >>> type(tc.nn.revert(model)[0]).__module__
        'torch.nn.modules.conv'
        >>> model = model.train()
        >>> report = tc.nn.convert(model, batch_norm=True, cuda_graph=True)
        >>> report.cuda_graph
        True
        >>> model(torch.randn(2, 3, 8, 8)).sum().backward()  # two graphs, if it is on a GPU
    """
    if not isinstance(model, nn.Module):
        raise bad_type("model", "a torch.nn.Module", type(model).__name__)
    if fold and model.training:
        raise bad_value(
            "fold", "a model in eval mode (model.eval()) with fold=True", "training mode"
        )
    if fold and cuda_graph:
        raise bad_value("cuda_graph", "False with fold=True, which is for eval mode", "True")
    # Captures hold the kernels of before; what has them gets its own class back meanwhile.
    graphed = [again for module in model.modules() if (again := ungraph(module))]
    if fold:
        for module in model.modules():  # what an earlier call made of them cannot be folded
            if isinstance(module, Activated):
                _revert_norm(module)
    rows: dict[nn.Module, Converted | Kept] = {}
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
            rows[module] = Kept(name, type(module).__name__, reason)
            continue
        module.__dict__.update({CLASS: type(module), "epilogue": None, "precision": None})
        module.__class__ = CONVERTED[type(module)]
        assert isinstance(module, Fused)
        names[module] = name
    found, untraced = chains(model) if fold else ({}, "")
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
        rows[module] = Converted(name, folded, chain.end, kind)
    if batch_norm:
        rows |= _convert_norms(model, paths)
    if layer_norm:
        rows |= _convert_layer_norms(paths)
    for again in graphed:
        again()
    reason = graph(model) if cuda_graph else ""
    ordered = [rows[module] for module in model.modules() if module in rows]
    return ConversionReport(
        tuple(row for row in ordered if isinstance(row, Converted)),
        tuple(row for row in ordered if isinstance(row, Kept)),
        isinstance(model, Graphed),
        reason,
    )


def _convert_norms(
    model: nn.Module, paths: dict[nn.Module, str]
) -> dict[nn.Module, Converted | Kept]:
    """Convert the batch norms that were not folded, and give them the activations behind them."""
    rows: dict[nn.Module, Converted | Kept] = {}
    fresh: list[nn.Module] = []
    open_to: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, Activated):
            # Our own layers are no news, but may have an activation behind them.
            if type(module) in NORMS.values() and module.activation is None:
                open_to.append(module)
            continue
        if not isinstance(module, _BatchNorm) or CLASS in module.__dict__:
            continue
        reason = _why_norm_kept(module)
        if reason is not None:
            rows[module] = Kept(paths[module], type(module).__name__, reason)
            continue
        _convert_norm(module)
        fresh.append(module)
        if module.activation is None:
            open_to.append(module)
    found, untraced = followers(model, set(open_to)) if open_to else ({}, "")
    for module in dict.fromkeys((*fresh, *open_to)):
        taken, reason = None, ""
        if module in open_to:
            taken, reason = found.get(module, (None, untraced))
        if taken is not None:
            assert isinstance(module, Activated)
            take_over(module, taken)
        if taken is not None or module in fresh:
            folded = () if taken is None else (paths[taken],)
            rows[module] = Converted(paths[module], folded, reason, type(module).__name__)
    return rows


def _convert_layer_norms(paths: dict[nn.Module, str]) -> dict[nn.Module, Converted | Kept]:
    """Convert the layer norms among the modules of a model."""
    rows: dict[nn.Module, Converted | Kept] = {}
    for module, path in paths.items():
        if not isinstance(module, nn.LayerNorm) or type(module) in LAYER_NORMS:
            continue
        reason = _why_layer_norm_kept(module)
        if reason is not None:
            rows[module] = Kept(path, type(module).__name__, reason)
            continue
        module.__dict__[CLASS] = type(module)
        module.__class__ = converted_layer_norm(type(module))  # type: ignore[assignment]
        rows[module] = Converted(path, kind=type(module).__name__)
    return rows


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
        ungraph(module)
        if isinstance(module, Activated):
            _revert_norm(module)
            continue
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


def _revert_norm(module: Activated) -> None:
    """Give a batch norm its former class, and the activation that it took over its own."""
    taken = module.__dict__.pop(TAKEN, None)
    if taken is not None:
        taken.__class__ = taken.__dict__.pop(CLASS, type(taken))
    former = module.__dict__.pop(CLASS, None)
    if former is None:
        return
    if issubclass(former, Activated):
        module.activation = None
    else:
        del module.activation
    module.__class__ = former


__all__ = ["ConversionReport", "Converted", "Kept", "convert", "revert"]
