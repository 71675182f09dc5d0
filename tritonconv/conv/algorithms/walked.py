"""The gradient of the weight by programs that walk images, planes or rows of the map."""

from __future__ import annotations

from typing import ClassVar

from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm
from ...runtime.plan import LaunchPlan
from ...runtime.space import ConfigSpace, Footprint
from ..problem import ConvProblem, Direction
from .common import unsupported_product
from .footprints_walked import walked_footprint
from .walked_spaces import walked_space
from .walked_wgrad import WalkedConfig, walked_plan

_LEAST_CHANNELS = 8
"""Fewer channels of a group waste most of a tile: their taps are flattened elsewhere."""


class Walked(Algorithm):
    """Implicit product of the weight's gradient whose steps need no division per pixel."""

    name: ClassVar[str] = "walked"
    config_type = WalkedConfig
    sources = ("common", "product_wgrad", "tiles", "walked_spaces", "walked_wgrad")

    def supports(self, problem: ConvProblem) -> str | None:
        """Gradients of the weight with several channels in a group."""
        if problem.direction is not Direction.WGRAD:
            return "not a gradient of the weight"
        if problem.depthwise:
            return "one channel per group (depthwise)"
        if problem.channels_per_group < _LEAST_CHANNELS:
            return f"fewer than {_LEAST_CHANNELS} channels in a group"
        return unsupported_product(problem)

    def space(self, problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[WalkedConfig]:
        """Tiles, taps that share a tile of the gradient, and how pixels are divided."""
        return walked_space(problem, device)

    def plan(self, problem: ConvProblem, config: WalkedConfig) -> LaunchPlan:
        """One launch, or two where the pixels are split."""
        return walked_plan(problem, config)

    def footprint(
        self, problem: ConvProblem, config: WalkedConfig, device: DeviceFacts
    ) -> Footprint:
        """Of the product; the sum of partial results is a second launch."""
        return walked_footprint(problem, config, device)
