"""Launch plans of layer normalisation."""

from __future__ import annotations

from typing import Any

import torch

from ..runtime.device import DeviceFacts
from ..runtime.plan import KernelCall, LaunchPlan, Slot, Workspace
from . import layer_kernels
from .layer_problem import LayerNormProblem, Split, Tile, forward_tile, gradient_split


def _dtypes(problem: LayerNormProblem) -> dict[str, torch.dtype]:
    dtypes = dict.fromkeys(("input", "grad_input"), problem.dtype)
    dtypes |= dict.fromkeys(("output", "grad"), problem.output)
    dtypes["stats"] = torch.float32
    for name, dtype in (("weight", problem.weight), ("bias", problem.bias)):
        if dtype is not None:
            dtypes |= {name: dtype, f"grad_{name}": dtype}
    return dtypes


def _constexprs(problem: LayerNormProblem, tile: Tile) -> dict[str, Any]:
    return {
        "WEIGHT": problem.weight is not None,
        "MASKED": tile.masked(problem),
        "WIDE": problem.wide,
        "CHUNKS": tile.chunks,
        "BLOCK_R": tile.block_r,
        "LANES": tile.lanes,
        "SHARED": tile.num_warps > tile.block_r,
        "UNIT": problem.unit,
    }


def forward_plan(
    problem: LayerNormProblem, stats: bool = True, tile: Tile | None = None
) -> LaunchPlan:
    """Normalise every row.

    Slots: input, output, stats (if ``stats``), weight, bias.
    """
    tile = tile or forward_tile(problem)
    call = KernelCall(
        layer_kernels.layer_norm_kernel,
        (-(-problem.rows // tile.block_r), 1, 1),
        (
            Slot("input"),
            Slot("output"),
            Slot("stats" if stats else "output"),
            Slot("weight" if problem.weight is not None else "input"),
            Slot("bias" if problem.bias is not None else "input"),
            problem.rows,
            problem.columns,
            1.0 / problem.columns,
            problem.eps,
        ),
        {"BIAS": problem.bias is not None, "STATS": stats, **_constexprs(problem, tile)},
        num_warps=tile.num_warps,
    )
    return LaunchPlan((call,), _dtypes(problem))


def backward_plan(
    problem: LayerNormProblem,
    device: DeviceFacts,
    needed: tuple[bool, bool, bool],
    split: Split | None = None,
) -> LaunchPlan:
    """Gradients of input, weight and bias, those that are needed.

    Slots: input, grad, stats, weight; grad_input, grad_weight, grad_bias.
    """
    split = split or gradient_split(problem, device)
    need_x, need_weight, need_bias = needed
    tile, parts, columns = split.tile, split.parts, problem.columns
    reduced = need_weight or need_bias
    wanted = {"GRAD_WEIGHT": need_weight, "GRAD_BIAS": need_bias}
    calls = [
        KernelCall(
            layer_kernels.layer_norm_gradients_kernel,
            (parts, 1, 1),
            (
                Slot("grad"),
                Slot("input"),
                Slot("stats"),
                Slot("weight" if problem.weight is not None else "input"),
                Slot("grad_input" if need_x else "input"),
                Slot("parts" if reduced else "input"),
                problem.rows,
                columns,
                -(-problem.rows // tile.block_r),
                parts,
                1.0 / columns,
            ),
            {"GRAD_X": need_x, "STAGES": split.stages, **wanted, **_constexprs(problem, tile)},
            num_warps=tile.num_warps,
        )
    ]
    spaces: tuple[Workspace, ...] = ()
    dtypes = _dtypes(problem)
    if reduced:
        spaces = (Workspace("parts", (2, parts, columns), torch.float32),)
        dtypes["parts"] = torch.float32
        merge = KernelCall(
            layer_kernels.layer_norm_sums_kernel,
            (-(-columns // split.merge_c), 1, 1),
            (
                Slot("parts"),
                Slot("grad_weight" if need_weight else "parts"),
                Slot("grad_bias" if need_bias else "parts"),
                columns,
                parts,
            ),
            {**wanted, "BLOCK_R": split.merge_r, "BLOCK_C": split.merge_c},
            num_warps=8 if split.merge_r >= 128 else 4,
        )
        calls.append(merge)
    return LaunchPlan(tuple(calls), dtypes, spaces)


__all__ = ["backward_plan", "forward_plan"]
