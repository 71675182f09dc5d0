"""Give batch norms the activation behind them, where nothing else reads what is in between.

``torch.fx`` proves it, in training mode and in eval mode, as a model may do other things in each.
The activation's module stays in the model and becomes the identity.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx, nn

from .fold import (
    ACTIVATIONS,
    CLASS,
    FOLDED,
    _called,
    _container,
    _hooked,
    _only_reader,
    _traces,
)
from .norm import Activated

TAKEN = "_tritonconv_taken"
"""Attribute of a batch norm: the activation module whose work it does."""

_Found = dict[nn.Module, tuple[nn.Module | None, str]]


def followers(model: nn.Module, norms: set[nn.Module]) -> tuple[_Found, str]:
    """The activation module that each of these norms may take over, or why there is none.

    Returns:
        By norm the module or None, and why none; and why the whole model was not traced.
    """
    if not any(type(module) in ACTIVATIONS for module in model.modules()):
        return {}, ""
    by_mode: list[_Found] = []
    untraced = ""
    for training in (True, False):
        with _mode(model, training):
            found, why = _in_this_mode(model, norms)
        by_mode.append(found)
        untraced = untraced or why
    agreed: _Found = {}
    for norm in by_mode[0].keys() | by_mode[1].keys():
        one, other = (found.get(norm, (None, "not reached in one mode")) for found in by_mode)
        if one[0] is other[0]:
            agreed[norm] = one
        else:
            reason = one[1] or other[1] or "followed by another activation in eval mode"
            agreed[norm] = (None, reason)
    return agreed, untraced


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules in one mode, without what a model's own ``train`` may do."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = training
        yield
    finally:
        for module, was in before:
            module.training = was


def _in_this_mode(model: nn.Module, norms: set[nn.Module]) -> tuple[_Found, str]:
    paths = Counter(
        module
        for _, module in model.named_modules(remove_duplicate=False)
        if not _container(module)
    )
    found: _Found = {}
    untraced = ""
    for root, graph in _traces(model):
        if isinstance(graph, Exception):
            first = (str(graph).splitlines() or [""])[0]
            untraced = untraced or f"not traced: {type(graph).__name__}: {first[:80]}"
            continue
        calls = Counter(_called(root, node) for node in graph.nodes if node.op == "call_module")
        for node in graph.nodes:
            norm = _called(root, node)
            if norm is None or norm not in norms:
                continue
            taken, reason = _follower(root, node, norm, calls)
            if taken is not None and root is not model and max(paths[norm], paths[taken]) > 1:
                taken, reason = None, "shared with a part of the model that was not traced"
            found[norm] = (taken, reason)
    return found, untraced


def _follower(
    root: nn.Module, node: fx.Node, norm: nn.Module, calls: Counter[nn.Module | None]
) -> tuple[nn.Module | None, str]:
    if calls[norm] > 1:
        return None, f"called {calls[norm]} times"
    if _hooked(norm):
        return None, "has hooks"
    if len(node.args) != 1 or node.kwargs:
        return None, "called with a residual"
    reader, module, end = _only_reader(root, node)
    if module is None:
        return None, end
    if type(module) not in ACTIVATIONS:
        return None, f"followed by {type(module).__name__} {reader.target}"
    if calls[module] > 1:
        return None, f"{reader.target} is called {calls[module]} times"
    if _hooked(module):
        return None, f"{reader.target} has hooks"
    if "forward" in module.__dict__:
        return None, f"{reader.target} has its forward replaced on the instance"
    return module, ""


def take_over(norm: Activated, module: nn.Module) -> None:
    """Make an activation module part of the norm in front of it."""
    norm.activation = ACTIVATIONS[type(module)](module)
    # Kept out of the module tree: the activation has its own place in it.
    norm.__dict__.setdefault(CLASS, type(norm))
    norm.__dict__[TAKEN] = module
    module.__dict__[CLASS] = type(module)
    module.__class__ = FOLDED[type(module)]


__all__ = ["TAKEN", "followers", "take_over"]
