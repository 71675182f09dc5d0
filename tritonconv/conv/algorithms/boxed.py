"""Dense products over boxes of pixels that the copy engine of a GPU fetches (sm_90 on).

Channels are fastest in memory and stride is one, so that what a filter's tap reads of a box of
pixels is that box moved: one instruction of one thread, which fills with zeros what leaves the map.
The other kernels compute an address and a mask for every 16 bytes. In the gradient of the weight
zeros meet the elements of a box that overhangs the map: an infinity or NaN there makes NaN.
"""

from __future__ import annotations

from typing import ClassVar

from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm
from ...runtime.plan import LaunchPlan
from ...runtime.space import ConfigSpace, Footprint
from ..problem import ConvProblem, Direction
from .boxed_products import product_plan, wgrad_plan
from .boxed_space import BoxedConfig, boxed_footprint, boxed_space
from .boxed_views import unsuited, weight_rows


class Boxed(Algorithm):
    """Implicit GEMM whose operands the copy engine fetches, in all three directions."""

    name: ClassVar[str] = "boxed"
    config_type = BoxedConfig
    sources = (
        "boxed_products",
        "boxed_space",
        "boxed_views",
        "common",
        "product_wgrad",
        "split",
        "tiles",
    )

    def supports(self, problem: ConvProblem) -> str | None:
        """Ungrouped, stride one, channels fastest and aligned; half precision or TF32."""
        reason = unsuited(problem, tf32=True)
        if reason is None and problem.direction is not Direction.WGRAD and not weight_rows(problem):
            return "weight that is not channels_last"
        return reason

    def space(self, problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[BoxedConfig]:
        """Tiles, shapes of boxes, warps and stages; on a GPU without the engine the default."""
        return boxed_space(problem, device)

    def plan(self, problem: ConvProblem, config: BoxedConfig) -> LaunchPlan:
        """One launch, or two when the pixels of a weight gradient are split."""
        if problem.direction is Direction.WGRAD:
            return wgrad_plan(problem, config)
        return product_plan(problem, config)

    def footprint(
        self, problem: ConvProblem, config: BoxedConfig, device: DeviceFacts
    ) -> Footprint:
        """Of the product; the sum of partial results is a second launch."""
        return boxed_footprint(problem, config, device)
