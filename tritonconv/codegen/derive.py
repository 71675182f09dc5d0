"""Derivatives of programs: ``torch.func.vjp`` of the graph, traced again."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from ..runtime.errors import bad_type, bad_value
from .ir import Argument, Output, Role, Traced, compute_dtype, evaluate, load_again, trace_graph
from .lowering import decompositions
from .simplify import canonical

_Program = TypeVar("_Program", bound=Traced)


def call_differentiably(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a node's operator; one whose derivative PyTorch lacks is called in parts."""
    target: Any = node.target
    if target is torch.ops.aten.hardsigmoid_backward.default:
        target = decompositions()[target]
    return target(*args, **kwargs)


def _positions(program: Traced, wrt: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """Positions of the arguments and numbers of the loads that ``wrt`` names, validated."""
    names = [a.name for a in program.arguments]
    arguments, loads = [], []
    choices = [*names, *(f"load:{k}" for k in range(len(program.loads)))]
    if not wrt or len(set(wrt)) != len(wrt):
        raise bad_value("wrt", "distinct names, at least one", wrt)
    for name in wrt:
        if name not in choices:
            raise bad_value("wrt", f"names among {', '.join(choices)}", repr(name))
        if name in names:
            position = names.index(name)
            dtype = program.arguments[position].dtype
            arguments.append(position)
        else:
            slot = int(name.removeprefix("load:"))
            dtype = program.loads[slot].dtype
            loads.append(slot)
        if not dtype.is_floating_point:
            raise bad_type(f"wrt: {name}", "a floating point argument or load", dtype)
    return arguments, loads


def _linear_index(program: Traced, slot: int, index: list[Tensor]) -> Tensor:
    """Row-major position in the capture of the element that a load reads."""
    shape = program.captures[program.loads[slot].capture].shape
    dtype = torch.int64 if math.prod(shape) >= 2**31 else torch.int32
    total = torch.zeros((), dtype=dtype)
    for d, i in enumerate(index):
        total = total + i.to(dtype) * math.prod(shape[d + 1 :])
    return total


def vjp_program(program: _Program, wrt: tuple[str, ...]) -> _Program:
    """The program of :meth:`tritonconv.codegen.ScalarFunction.vjp`."""
    wrt_arguments, wrt_loads = _positions(program, wrt)
    floating = [k for k, o in enumerate(program.outputs) if o.dtype.is_floating_point]
    taken = {a.name for a in program.arguments}
    cotangents = []
    for k in floating:
        output = program.outputs[k]
        name, number = f"grad_{output.name}", 1
        while name in taken:
            number += 1
            name = f"grad_{output.name}_{number}"
        taken.add(name)
        cotangents.append(Argument(name, compute_dtype(output.dtype), Role.ELEMENT))
    outputs: list[Output] = []
    for name in wrt:
        if name.startswith("load:"):
            load = program.loads[int(name.removeprefix("load:"))]
            size = math.prod(program.captures[load.capture].shape)
            outputs.append(Output(f"d_{name}", load.dtype))
            outputs.append(Output(f"i_{name}", torch.int64 if size >= 2**31 else torch.int32))
        else:
            dtype = next(a.dtype for a in program.arguments if a.name == name)
            outputs.append(Output(f"d_{name}", dtype))

    def run(*scalars: Tensor) -> tuple[Any, ...]:
        arguments = scalars[: len(program.arguments)]
        grads = scalars[len(program.arguments) :]
        values: dict[int, Tensor] = {}
        indices: dict[int, list[Tensor]] = {}

        def record(node: fx.Node, index: list[Any]) -> Tensor:
            slot: Any = node.args[1]
            values[slot], indices[slot] = load_again(node, index), index
            return values[slot]

        evaluate(program.graph, arguments, record)
        # A load that simplification removed contributes nothing.
        alive = [slot for slot in wrt_loads if slot in values]

        def primal(*operands: Tensor) -> tuple[Tensor, ...]:
            supplied = list(arguments)
            for position, operand in zip(wrt_arguments, operands, strict=False):
                supplied[position] = operand
            hoisted = dict(values)
            hoisted.update(zip(alive, operands[len(wrt_arguments) :], strict=True))
            results = evaluate(
                program.graph,
                supplied,
                lambda node, _: hoisted[node.args[1]],  # type: ignore[index]
                call_differentiably,
            )
            return tuple(results[k] for k in floating)

        points = [arguments[p] for p in wrt_arguments] + [values[s] for s in alive]
        if points and floating:
            results, pull = torch.func.vjp(primal, *points)  # type: ignore[misc]
            seeds = tuple(g.to(r.dtype) for g, r in zip(grads, results, strict=True))
            pulled = pull(seeds)
        else:
            pulled = tuple(torch.zeros_like(p) for p in points)
        by_argument = dict(zip(wrt_arguments, pulled, strict=False))
        by_load = dict(zip(alive, pulled[len(wrt_arguments) :], strict=True))
        names = [a.name for a in program.arguments]
        found: list[Tensor] = []
        for name in wrt:
            if name.startswith("load:"):
                slot = int(name.removeprefix("load:"))
                if slot in by_load:
                    found += [by_load[slot], _linear_index(program, slot, indices[slot])]
                else:
                    zero = torch.zeros((), dtype=program.loads[slot].dtype)
                    found += [zero, torch.zeros((), dtype=torch.int32)]
            else:
                found.append(by_argument[names.index(name)])
        return tuple(
            value if value.dtype == output.dtype else value.to(output.dtype)
            for value, output in zip(found, outputs, strict=True)
        )

    arguments = (*program.arguments, *cotangents)
    # Where gradients are off, as in every plain backward, PyTorch takes formulas that have no
    # derivative themselves (SiLU's); this program is kept, and may be differentiated later.
    with torch.enable_grad():
        graph = trace_graph(run, [a.dtype for a in arguments])
    return replace(
        program,
        order=program.order + 1,
        arguments=arguments,
        outputs=tuple(outputs),
        graph=canonical(graph, str(program.origin)),
        narrow=False,
        lineage=(*program.lineage, ", ".join(wrt)),
        _derived={},
    )
