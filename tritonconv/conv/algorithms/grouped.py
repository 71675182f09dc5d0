"""Grouped convolution: one implicit matrix product per group, groups on a grid axis."""

from __future__ import annotations

from typing import ClassVar

from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm
from ...runtime.plan import LaunchPlan
from ...runtime.space import ConfigSpace, Footprint
from ..problem import ConvProblem
from .common import TileConfig, unsupported_product
from .footprints import product_footprint
from .implicit_gemm import PRODUCT_SOURCES, plan_of
from .tiles import tile_space


class Grouped(Algorithm):
    """Implicit GEMM with groups > 1; depthwise problems have an algorithm of their own."""

    name: ClassVar[str] = "grouped"
    config_type = TileConfig
    sources = PRODUCT_SOURCES

    def supports(self, problem: ConvProblem) -> str | None:
        """Several groups of several channels each."""
        if problem.groups == 1:
            return "groups == 1"
        if problem.depthwise:
            return "one channel per group (depthwise)"
        return unsupported_product(problem)

    def space(self, problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[TileConfig]:
        """Tiles bounded by the size of a group."""
        return tile_space(problem, device, split_sum=True)

    def plan(self, problem: ConvProblem, config: TileConfig) -> LaunchPlan:
        """One launch over all groups, or two where a second kernel adds the parts of a sum."""
        return plan_of(problem, config)

    def footprint(self, problem: ConvProblem, config: TileConfig, device: DeviceFacts) -> Footprint:
        """Of the products of all groups."""
        return product_footprint(problem, config, device)
