"""The forward product fused with its surroundings: a prologue, two inputs, statistics.

The kernel is the dense product (``product_forward``) with other ends: what it loads passes through
a generated function, or comes from one input after the other; what it stores is also summed up per
tile and channel. Rows are output pixels, columns output channels; the sum runs over channel blocks
(outer) and filter taps (inner).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import triton

from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm
from ...runtime.plan import KernelCall, LaunchPlan, Workspace
from ...runtime.space import ConfigSpace, Footprint
from ..fused_problem import FusedProblem
from .common import TileConfig, slot_dtypes, unsupported_dtype, unsupported_product
from .footprints import product_footprint
from .fused_products import fused_call
from .fused_spaces import fused_space
from .fused_statistics import merge_call


def fused_slots(problem: FusedProblem) -> dict[str, torch.dtype]:
    """The dtype of every slot of a problem, in slot order (inputs, outputs, extras)."""
    slots = slot_dtypes(problem)
    dtypes = {"input": slots.pop("input")}
    if problem.second_channels:
        dtypes["second"] = problem.dtype
    dtypes["weight"], dtypes["output"] = slots.pop("weight"), slots.pop("output")
    if "acc" in slots:
        dtypes["acc"] = slots.pop("acc")
    if problem.stats:
        dtypes |= {"mean": torch.float32, "var": torch.float32}
    dtypes |= slots
    if problem.prologue is not None:
        for index, dtype in enumerate(problem.prologue.capture_dtypes):
            dtypes[f"prologue{index}"] = dtype
    return dtypes


def with_statistics(
    problem: FusedProblem, config: TileConfig, calls: tuple[KernelCall, ...]
) -> LaunchPlan:
    """A plan of launches, the last of them the product, and one that merges its statistics."""
    dtypes = fused_slots(problem)
    if not problem.stats:
        return LaunchPlan(calls, dtypes)
    shape = (triton.cdiv(problem.out_pixels, config.block_m), problem.out_channels)
    spaces = tuple(Workspace(n, shape, torch.float32) for n in ("tile_mean", "tile_square"))
    dtypes |= dict.fromkeys(("tile_mean", "tile_square"), torch.float32)
    return LaunchPlan((*calls, merge_call(problem, config)), dtypes, spaces)


class FusedInput(Algorithm):
    """Implicit product whose ends are fused with what comes before and after."""

    name: ClassVar[str] = "fused_input"
    config_type = TileConfig
    sources = (
        "common",
        "fused_loops",
        "fused_products",
        "fused_spaces",
        "fused_statistics",
        "tiles",
    )

    def supports(self, problem: FusedProblem) -> str | None:
        """Forward products in a dtype of the generated kernels; two inputs have one group."""
        if problem.second_channels and problem.groups != 1:
            return "two inputs in groups"
        return unsupported_dtype(problem) or unsupported_product(problem)

    def space(self, problem: FusedProblem, device: DeviceFacts) -> ConfigSpace[TileConfig]:
        """Tiles, warps and stages."""
        return fused_space(problem, device)

    def plan(self, problem: FusedProblem, config: TileConfig) -> LaunchPlan:
        """One launch, and one that merges the tiles' statistics."""
        return with_statistics(problem, config, (fused_call(problem, config),))

    def footprint(
        self, problem: FusedProblem, config: TileConfig, device: DeviceFacts
    ) -> Footprint:
        """Of the product; what is fused with it is small beside it."""
        return product_footprint(problem, config, device)
