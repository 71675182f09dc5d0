"""Few input channels (a first layer): the whole window is the reduction, so no lane is padding.

With C = 3 a reduction over channels alone would fill 3 of 16 lanes of a matrix instruction; over
the flattened window a 7×7 stem fills 147 of 160.
"""

from __future__ import annotations

from typing import ClassVar

from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm
from ...runtime.plan import LaunchPlan
from ...runtime.space import ConfigSpace, Footprint
from ..problem import ConvProblem, Direction
from .common import TileConfig, unsupported_dtype
from .footprints import product_footprint, window_footprint
from .product_wgrad import wgrad_plan
from .tiles import tile_space
from .windows import window_forward_plan, window_space

MAX_CHANNELS = 8


class FewChannel(Algorithm):
    """Forward and gradient of the weight for at most 8 input channels."""

    name: ClassVar[str] = "few_channel"
    config_type = TileConfig

    def supports(self, problem: ConvProblem) -> str | None:
        """Ungrouped, few input channels, forward or wgrad."""
        if problem.groups != 1:
            return "groups != 1"
        if problem.in_channels > MAX_CHANNELS:
            return f"more than {MAX_CHANNELS} input channels"
        if problem.direction is Direction.DGRAD:
            return "the gradient of the input is a dense product"
        return unsupported_dtype(problem)

    def space(self, problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[TileConfig]:
        """Tiles over the flattened window."""
        if problem.direction is Direction.WGRAD:
            return tile_space(problem, device)
        return window_space(problem, device)

    def plan(self, problem: ConvProblem, config: TileConfig) -> LaunchPlan:
        """One launch forward; the weight's columns are the flattened window already."""
        if problem.direction is Direction.WGRAD:
            return wgrad_plan(problem, config)
        return window_forward_plan(problem, config)

    def footprint(self, problem: ConvProblem, config: TileConfig, device: DeviceFacts) -> Footprint:
        """Of the product over windows."""
        if problem.direction is Direction.WGRAD:
            return product_footprint(problem, config, device)
        return window_footprint(problem, config, device)
