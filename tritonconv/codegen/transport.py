"""Graphs as plain data, so that programs can travel to another process.

A graph of PyTorch's does not pickle, as its operators are looked up, not defined. Packed, every
node is a record and every operator its name.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..runtime.errors import bad_value


@dataclass(frozen=True)
class _Ref:
    """Stands for the node of that number."""

    number: int


@dataclass(frozen=True)
class PackedNode:
    """One node with names and numbers in place of operators and nodes."""

    op: str
    name: str
    target: str
    args: Any
    kwargs: Any
    meta: tuple[Any, ...]
    """The dtype, in a tuple; empty when the node has none."""


def pack_graph(graph: fx.Graph) -> tuple[PackedNode, ...]:
    """The graph as data that pickles."""
    numbers = {node: number for number, node in enumerate(graph.nodes)}
    return tuple(
        PackedNode(
            node.op,
            node.name,
            _name_of(node.target),
            _pack_value(node.args, numbers),
            _pack_value(node.kwargs, numbers),
            (node.meta["dtype"],) if "dtype" in node.meta else (),
        )
        for node in graph.nodes
    )


def unpack_graph(packed: tuple[PackedNode, ...]) -> fx.Graph:
    """The graph of :func:`pack_graph`."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for entry in packed:
        node = graph.create_node(
            entry.op,
            _named(entry.target) if entry.op == "call_function" else entry.target,
            _unpack_value(entry.args, nodes),
            _unpack_value(entry.kwargs, nodes),
            entry.name,
        )
        if entry.meta:
            node.meta["dtype"] = entry.meta[0]
        nodes.append(node)
    return graph


def _name_of(target: Any) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}::{target._opname}.{target._overloadname}"
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", "")
    if module is None or "<" in name:
        raise bad_value("program", "operators with a name", repr(target))
    return f"{module}:{name}"


def _named(text: str) -> Any:
    namespace, _, operator = text.partition("::")
    if operator:
        name, _, overload = operator.rpartition(".")
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)
    module, _, attribute = text.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _pack_value(value: Any, numbers: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return _Ref(numbers[value])
    if isinstance(value, dict):
        return {key: _pack_value(item, numbers) for key, item in value.items()}
    if isinstance(value, list):
        return [_pack_value(item, numbers) for item in value]
    if isinstance(value, tuple):
        return tuple(_pack_value(item, numbers) for item in value)
    return value


def _unpack_value(value: Any, nodes: list[fx.Node]) -> Any:
    if isinstance(value, _Ref):
        return nodes[value.number]
    if isinstance(value, dict):
        return {key: _unpack_value(item, nodes) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpack_value(item, nodes) for item in value]
    if isinstance(value, tuple):
        return tuple(_unpack_value(item, nodes) for item in value)
    return value


__all__ = ["PackedNode", "pack_graph", "unpack_graph"]
