"""Few input channels (a first layer): the whole window is the reduction, so no lane is padding.

With C = 3 a reduction over channels alone would fill 3 of 16 lanes of a matrix instruction; over
the flattened window a 7×7 stem fills 147 of 160.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm
from ...runtime.plan import LaunchPlan
from ..problem import ConvProblem, Direction
from .common import TileConfig, unsupported_dtype
from .implicit_gemm import wgrad_plan
from .tiles import tile_configs
from .windows import window_configs, window_forward_plan

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

    def configs(self, problem: ConvProblem, device: DeviceFacts) -> Sequence[TileConfig]:
        """Tiles over the flattened window."""
        if problem.direction is Direction.WGRAD:
            return tile_configs(problem, device)
        return window_configs(problem)

    def plan(self, problem: ConvProblem, config: TileConfig) -> LaunchPlan:
        """One launch forward; the weight's columns are the flattened window already."""
        if problem.direction is Direction.WGRAD:
            return wgrad_plan(problem, config)
        return window_forward_plan(problem, config)
