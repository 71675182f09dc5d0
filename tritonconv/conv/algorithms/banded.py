"""Few channels on large maps: units of neighbouring pixels share what they read, weights banded.

A product with 16 channels and filters per tap re-reads the input once per tap and fills a quarter
of a matrix instruction. A unit of 2 × 2 pixels reads a window of 4 × 4 once, contiguous row by
contiguous row, and its pixels' filters together fill the instruction; the zeros of the band cost
less than twice the arithmetic, of which there is plenty.
"""

from __future__ import annotations

from typing import ClassVar

from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm
from ...runtime.plan import LaunchPlan
from ...runtime.space import ConfigSpace, Footprint
from ..problem import ConvProblem, Direction
from .banded_geometry import VECTOR, BandedConfig, is_dense_channels_last, roles_of
from .banded_plans import product_plan, wgrad_plan
from .banded_spaces import banded_footprint, banded_space

MOST_CHANNELS = 64
_PIXELS = 1 << 18


class Banded(Algorithm):
    """All three products of an ungrouped convolution of stride one with few channels."""

    name: ClassVar[str] = "banded"
    config_type = BandedConfig
    sources = (
        "banded_geometry",
        "banded_plans",
        "banded_products",
        "banded_spaces",
        "banded_weights",
        "banded_windows",
        "common",
        "tiles",
    )

    def supports(self, problem: ConvProblem) -> str | None:
        """Rows of the windowed tensor in whole vectors; few channels; several taps."""
        if problem.groups != 1:
            return "groups != 1"
        if problem.dtype.itemsize != 2:
            return f"dtype {problem.dtype} (banded products serve float16 and bfloat16)"
        if any(hop != 1 for hop in problem.stride):
            return "stride != 1"
        if problem.taps == 1:
            return "one tap, which is a plain matrix product"
        for shape, strides, tensor in (
            (problem.x_shape, problem.x_strides, "input"),
            (problem.y_shape, problem.y_strides, "output"),
        ):
            if not is_dense_channels_last(shape, strides):
                return f"the {tensor} is not dense channels_last"
        roles = roles_of(problem)
        if roles.channels % VECTOR:
            return f"{roles.channels} channels in windows, not a multiple of {VECTOR}"
        if max(roles.channels, roles.filters) > MOST_CHANNELS:
            return f"more than {MOST_CHANNELS} channels"
        return None

    def space(self, problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[BandedConfig]:
        """Boxes of pixels, tiles of units, steps."""
        return banded_space(problem, device)

    def footprint(
        self, problem: ConvProblem, config: BandedConfig, device: DeviceFacts
    ) -> Footprint:
        """Of the product."""
        return banded_footprint(problem, config, device)

    def plan(self, problem: ConvProblem, config: BandedConfig) -> LaunchPlan:
        """A small kernel beside the product in every direction."""
        if problem.direction is Direction.WGRAD:
            return wgrad_plan(problem, config)
        return product_plan(problem, config)


def is_clearly_better(problem: ConvProblem) -> bool:
    """Whether an untuned call of a problem that is served should run banded.

    Up to 32 channels a product per tap leaves the matrix instructions mostly empty; a map of a
    quarter million pixels hides the second launch.
    """
    most = max(problem.in_channels, problem.out_channels)
    narrow = min(problem.in_channels, problem.out_channels)
    return (
        narrow >= 8
        and most <= 32
        and problem.kernel[-1] >= 3
        and problem.taps >= 9
        and problem.out_pixels >= _PIXELS
    )
