"""Launch plans of batch normalisation, from a view and what the call has and asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..codegen.registry import program_of
from ..runtime.device import DeviceFacts
from ..runtime.plan import KernelCall, LaunchPlan, Slot, Workspace
from . import kernels
from .activation import derivative_of
from .problem import (
    Elementwise,
    NormView,
    Reduction,
    elementwise_config,
    reduction_config,
    reduction_steps,
    reduction_width,
)

Dtype = torch.dtype | None


@dataclass(frozen=True)
class NormProblem:
    """One normalisation: its map, the dtypes of what it reads, its activation.

    Attributes:
        view: the map.
        dtype: of input, result and gradients.
        weight, bias: dtypes of the parameters; None where there are none.
        statistics: dtype of mean and variance.
        residual: whether something is added before the activation.
        function: key of the activation's program; empty for none.
        eps: added to the variance.
        batch: whether the statistics are those of the map itself.
    """

    view: NormView
    dtype: torch.dtype
    weight: Dtype = None
    bias: Dtype = None
    statistics: torch.dtype = torch.float32
    residual: bool = False
    function: str = ""
    eps: float = 1e-5
    batch: bool = True


def _slots(problem: NormProblem, *names: str) -> dict[str, Slot]:
    """Slots by name; what a call does not have is the input's, and is not read."""
    have = {"weight": problem.weight, "bias": problem.bias, "residual": problem.residual}
    return {name: Slot(name if have.get(name, True) else "input") for name in names}


def _dtypes(problem: NormProblem) -> dict[str, torch.dtype]:
    dtypes = dict.fromkeys(("input", "output", "grad", "residual", "grad_input"), problem.dtype)
    dtypes |= {"grad_residual": problem.dtype}
    dtypes |= {"mean": problem.statistics, "var": problem.statistics}
    for name, dtype in (("weight", problem.weight), ("bias", problem.bias)):
        if dtype is not None:
            dtypes |= {name: dtype, f"grad_{name}": dtype}
    return dtypes


def _tile_constexprs(view: NormView, config: Reduction) -> dict[str, Any]:
    """What a sum's kernel is specialised on beside the problem."""
    if view.last:
        masked = view.rows % config.block_r or view.channels % config.block_c
    else:
        masked = view.images % config.block_r or view.pixels % config.block_c
    return {
        "LAST": view.last,
        "SINGLE": config.parts == 1,
        "MASKED": bool(masked),
        "WIDE": view.wide,
        "BLOCK_R": config.block_r,
        "BLOCK_C": config.block_c,
        "WIDTH": reduction_width(view, config),
        "MERGE": config.merge,
        "STAGES": config.stages,
        "UNIT": view.unit,
    }


def _shared_sum(
    view: NormView, config: Reduction
) -> tuple[tuple[int, ...], int, tuple[Workspace, ...]]:
    """Sizes of the grid's axes, number of programs, and the memory that the parts need."""
    tiles = -(-view.channels // reduction_width(view, config))
    sizes = (
        view.images,
        view.channels,
        view.pixels,
        reduction_steps(view, config),
        config.parts,
        tiles,
    )
    spaces: tuple[Workspace, ...] = ()
    if config.parts > 1:
        size = config.parts * (2 * view.channels + tiles)
        spaces = (
            Workspace("parts", (size,), torch.float32),
            Workspace("arrivals", (tiles,), torch.int32, counters=True),
        )
    return sizes, tiles * config.parts, spaces


def _shared_slots(config: Reduction) -> tuple[Slot, Slot]:
    if config.parts == 1:
        return Slot("input"), Slot("input")
    return Slot("parts"), Slot("arrivals")


def statistics_plan(
    problem: NormProblem,
    device: DeviceFacts,
    running: tuple[torch.dtype, torch.dtype] | None = None,
    momentum: float | None = None,
    tracked: bool = False,
    config: Reduction | None = None,
) -> LaunchPlan:
    """Mean and variance of every channel.

    Args:
        problem: the normalisation.
        device: where.
        running: dtypes of the running statistics, where there are some to move.
        momentum: the share of the new ones; None is one over ``tracked``, which is not changed.
        tracked: whether there is a counter of calls.
        config: how the sum is shared out; by default as suits the map.
    """
    view = problem.view
    config = config or reduction_config(view, device, problem.dtype.itemsize)
    sizes, programs, spaces = _shared_sum(view, config)
    rows = view.rows
    call = KernelCall(
        kernels.statistics_kernel,
        (programs, 1, 1),
        (
            Slot("input"),
            Slot("mean"),
            Slot("var"),
            Slot("running_mean" if running else "input"),
            Slot("running_var" if running else "input"),
            Slot("tracked" if tracked else "input"),
            *_shared_slots(config),
            *sizes,
            1.0 / rows,
            rows / max(rows - 1, 1),
            0.0 if momentum is None else float(momentum),
        ),
        {
            "TRACK": running is not None,
            "COUNT": tracked and momentum is not None,
            "CUMULATIVE": running is not None and momentum is None,
            **_tile_constexprs(view, config),
        },
        num_warps=config.num_warps,
    )
    dtypes = {"input": problem.dtype, "mean": torch.float32, "var": torch.float32}
    if running:
        dtypes |= {"running_mean": running[0], "running_var": running[1]}
    if tracked:
        dtypes["tracked"] = torch.int64
    return LaunchPlan((call,), dtypes | _workspace_dtypes(spaces), spaces)


def _workspace_dtypes(spaces: tuple[Workspace, ...]) -> dict[str, torch.dtype]:
    return {space.name: space.dtype for space in spaces}


def _walk(
    view: NormView, config: Elementwise | None
) -> tuple[tuple[int, int, int], tuple[int, ...], dict[str, Any], int]:
    """Grid, sizes, constexprs and warps of an elementwise kernel."""
    config = config or elementwise_config(view)
    height, width = view.matrix
    grid = (-(-height // config.block_r) * -(-width // config.block_c), 1, 1)
    masked = bool(height % config.block_r or width % config.block_c)
    constexprs = {
        "LAST": view.last,
        "MASKED": masked,
        "WIDE": view.wide,
        "BLOCK_R": config.block_r,
        "BLOCK_C": config.block_c,
        "UNIT": view.unit,
    }
    return grid, (height, width, view.channels), constexprs, config.num_warps


def _parameters(problem: NormProblem) -> dict[str, bool]:
    return {
        "WEIGHT": problem.weight is not None,
        "BIAS": problem.bias is not None,
        "RESIDUAL": problem.residual,
    }


_READ = ("mean", "var", "weight", "bias", "residual")


def apply_plan(problem: NormProblem, config: Elementwise | None = None) -> LaunchPlan:
    """Normalise, add, activate."""
    grid, sizes, constexprs, warps = _walk(problem.view, config)
    slots = _slots(problem, "input", "output", *_READ)
    function = program_of(problem.function).jit if problem.function else None
    call = KernelCall(
        kernels.apply_kernel,
        grid,
        (*slots.values(), *sizes, problem.eps),
        {"FUNCTION": function, **_parameters(problem), **constexprs},
        num_warps=warps,
    )
    return LaunchPlan((call,), _dtypes(problem))


def backward_plan(
    problem: NormProblem,
    device: DeviceFacts,
    needed: tuple[bool, bool, bool, bool],
    config: Reduction | None = None,
    tile: Elementwise | None = None,
) -> LaunchPlan:
    """Gradients of input, weight, bias and residual, those that are needed.

    Slots: grad, input, mean, var, weight, bias, residual; grad_input, grad_weight, grad_bias,
    grad_residual.
    """
    view = problem.view
    need_x, need_weight, need_bias, need_residual = needed
    derivative = derivative_of(problem.function).jit if problem.function else None
    shared: dict[str, Any] = {"DERIVATIVE": derivative, **_parameters(problem)}
    calls: list[KernelCall] = []
    spaces: tuple[Workspace, ...] = ()
    if need_weight or need_bias or (need_x and problem.batch):
        maps = 3 if problem.residual and problem.function else 2
        config = config or reduction_config(view, device, maps * problem.dtype.itemsize)
        sizes, programs, spaces = _shared_sum(view, config)
        spaces = (Workspace("sums", (2, view.channels), torch.float32), *spaces)
        slots = _slots(problem, "grad", "input", *_READ)
        calls.append(
            KernelCall(
                kernels.gradient_sums_kernel,
                (programs, 1, 1),
                (
                    *slots.values(),
                    Slot("sums"),
                    Slot("grad_weight" if need_weight else "sums"),
                    Slot("grad_bias" if need_bias else "sums"),
                    *_shared_slots(config),
                    *sizes,
                    problem.eps,
                ),
                {
                    **shared,
                    "GRAD_WEIGHT": need_weight,
                    "GRAD_BIAS": need_bias,
                    **_tile_constexprs(view, config),
                },
                num_warps=config.num_warps,
            )
        )
    if need_x or need_residual:
        grid, sizes, constexprs, warps = _walk(view, tile)
        slots = _slots(problem, "grad", "input", *_READ)
        calls.append(
            KernelCall(
                kernels.gradients_kernel,
                grid,
                (
                    *slots.values(),
                    Slot("sums" if need_x and problem.batch else "input"),
                    Slot("grad_input" if need_x else "input"),
                    Slot("grad_residual" if need_residual else "input"),
                    *sizes,
                    problem.eps,
                    1.0 / view.rows,
                ),
                {
                    **shared,
                    "BATCH": problem.batch,
                    "GRAD_X": need_x,
                    "GRAD_RESIDUAL": need_residual,
                    **constexprs,
                },
                num_warps=warps,
            )
        )
    dtypes = _dtypes(problem) | _workspace_dtypes(spaces)
    return LaunchPlan(tuple(calls), dtypes, spaces)


__all__ = ["NormProblem", "apply_plan", "backward_plan", "statistics_plan"]
