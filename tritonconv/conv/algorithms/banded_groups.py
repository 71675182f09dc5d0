"""Narrow groups at a stride of one: units of neighbouring pixels, blocks of groups, weights banded.

Products per tap over bundles of groups read every pixel once per tap: nine times for 3 × 3, which
at the speed of the L2 cache is what they take. A unit of 2 × 2 pixels reads a window of 4 × 4
once, four values for each it writes; two groups of eight channels are 32 bytes of a pixel, which
is what memory moves at least. The zeros between groups and beside the band are four fifths of the
arithmetic, of which there is plenty.
"""

from __future__ import annotations

from typing import ClassVar

from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm
from ...runtime.plan import LaunchPlan
from ...runtime.space import ConfigSpace, Footprint
from ..problem import ConvProblem, Direction
from .banded_group_plans import BandedGroupsConfig, product_plan, wgrad_plan
from .banded_group_spaces import banded_groups_footprint, banded_groups_space, block_counts


class BandedGroups(Algorithm):
    """All three products of a grouped convolution of stride one with narrow groups."""

    name: ClassVar[str] = "banded_groups"
    config_type = BandedGroupsConfig
    sources = (
        "banded_geometry",
        "banded_group_plans",
        "banded_group_products",
        "banded_group_spaces",
        "banded_group_weights",
        "banded_windows",
        "common",
    )

    def supports(self, problem: ConvProblem) -> str | None:
        """Several narrow groups, several taps, channels next to each other in memory."""
        if problem.groups == 1:
            return "groups == 1"
        if problem.dtype.itemsize != 2:
            return f"dtype {problem.dtype} (banded products serve float16 and bfloat16)"
        if any(hop != 1 for hop in problem.stride):
            return "stride != 1"
        if problem.taps == 1:
            return "one tap, which is a plain matrix product"
        for tensor, strides in (("input", problem.x_strides), ("output", problem.y_strides)):
            if strides[1] != 1:
                return f"channels of the {tensor} are not neighbours in memory"
        if not block_counts(problem):
            return (
                "groups too wide, too narrow, or in a number that makes no block of whole vectors"
            )
        return None

    def space(self, problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[BandedGroupsConfig]:
        """Blocks of groups, boxes of pixels, tiles of units."""
        return banded_groups_space(problem, device)

    def footprint(
        self, problem: ConvProblem, config: BandedGroupsConfig, device: DeviceFacts
    ) -> Footprint:
        """Of the product."""
        return banded_groups_footprint(problem, config, device)

    def plan(self, problem: ConvProblem, config: BandedGroupsConfig) -> LaunchPlan:
        """A small kernel beside the product in every direction."""
        if problem.direction is Direction.WGRAD:
            return wgrad_plan(problem, config)
        return product_plan(problem, config)


_MOST_CHANNELS = 8
_PIXELS = 50_000


def bands_clearly_better(problem: ConvProblem) -> bool:
    """Whether an untuned call of a problem that is served should run in bands.

    On an H100, 32 groups of 4 channels on 64 maps of 56² and of 8 on 28² ran 1.3 to 1.5 times as
    fast as PyTorch under 3 × 3 filters, forward and gradient of the input; 16 channels on 14² are
    as fast, wider ones on smaller maps slower. PyTorch's gradient of the weight is as fast at 8
    channels where its sums have a fixed order, as ours have (docs/benchmarks).
    """
    most = max(problem.channels_per_group, problem.filters_per_group)
    return (
        problem.direction is not Direction.WGRAD
        and most <= _MOST_CHANNELS
        and problem.taps >= 9
        and problem.out_pixels >= _PIXELS
    )
