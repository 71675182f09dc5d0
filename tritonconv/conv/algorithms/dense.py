"""Dense implicit matrix product: every ungrouped convolution, in all three directions."""

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


class Dense(Algorithm):
    """Implicit GEMM with groups == 1."""

    name: ClassVar[str] = "dense"
    config_type = TileConfig
    sources = PRODUCT_SOURCES

    def supports(self, problem: ConvProblem) -> str | None:
        """Ungrouped problems in a dtype of the generated kernels."""
        if problem.groups != 1:
            return "groups != 1"
        return unsupported_product(problem)

    def space(self, problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[TileConfig]:
        """Tiles, warps and stages; splits of the sum."""
        return tile_space(problem, device, split_sum=True)

    def plan(self, problem: ConvProblem, config: TileConfig) -> LaunchPlan:
        """One launch, or two where a second kernel adds the parts of a sum."""
        return plan_of(problem, config)

    def footprint(self, problem: ConvProblem, config: TileConfig, device: DeviceFacts) -> Footprint:
        """Of the product; a kernel that adds parts of a sum is a second launch."""
        return product_footprint(problem, config, device)
