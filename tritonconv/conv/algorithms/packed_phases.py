"""A strided gradient of a few input channels: all phases of the stride are columns of one product.

Phase by phase, three channels fill 3 of the 16 columns of a matrix instruction, and every tap reads
the output's gradient again. The phases of a cell read nearly the same output pixels: a stem 7×7
with stride 2 reads 16 for four phases instead of 49, and its 12 columns share one instruction. Some
cells together, a *unit*, share more: 2×2 of them read 25 output pixels and have 48 columns.
"""

from __future__ import annotations

import math
from typing import ClassVar

from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm
from ...runtime.plan import LaunchPlan
from ...runtime.space import ConfigSpace, Footprint
from ..problem import ConvProblem, Direction
from .common import unsupported_dtype
from .footprints_packed import packed_footprint
from .packed_geometry import PackedConfig
from .packed_products import packed_plan
from .packed_spaces import best_runs, packed_seconds, packed_space, tap_by_tap_seconds

MOST_CHANNELS = 64
"""Elements of a cell: channels times phases of the stride."""
_PIXELS = 1 << 17
_GAIN = 0.75


class PackedPhases(Algorithm):
    """The gradient of the input, or a transposed convolution, with a stride and few channels."""

    name: ClassVar[str] = "packed_phases"
    config_type = PackedConfig
    sources = (
        "banded_windows",
        "common",
        "packed_geometry",
        "packed_products",
        "packed_spaces",
        "tiles",
    )

    def supports(self, problem: ConvProblem) -> str | None:
        """Ungrouped, a stride on some axis, few elements of a cell."""
        if problem.direction is not Direction.DGRAD:
            return "only the gradient of the input has phases"
        if problem.groups != 1:
            return "groups != 1"
        if all(hop == 1 for hop in problem.stride):
            return "stride of one, which has one phase"
        if math.prod(problem.stride) * problem.in_channels > MOST_CHANNELS:
            return f"more than {MOST_CHANNELS} input channels times phases of the stride"
        return unsupported_dtype(problem)

    def space(self, problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[PackedConfig]:
        """Cells of a unit, tiles of units, steps."""
        return packed_space(problem, device)

    def footprint(
        self, problem: ConvProblem, config: PackedConfig, device: DeviceFacts
    ) -> Footprint:
        """Of the product."""
        return packed_footprint(problem, config, device)

    def plan(self, problem: ConvProblem, config: PackedConfig) -> LaunchPlan:
        """A small kernel that packs the weights, and the product."""
        return packed_plan(problem, config)


def packs_clearly_better(problem: ConvProblem) -> bool:
    """Whether an untuned call of a problem that is served should pack its phases.

    Where that is estimated to beat products tap by tap, whose steps load as fast as these; a small
    map does not hide the second launch, and nothing was measured in single precision or where
    channels are far apart.
    """
    return (
        problem.direction is Direction.DGRAD
        and problem.dtype.itemsize == 2
        and problem.y_strides[1] == 1
        and problem.out_channels % 16 == 0
        and not problem.patches
        and problem.out_pixels >= _PIXELS
        and packed_seconds(problem, best_runs(problem)[0]) < _GAIN * tap_by_tap_seconds(problem)
    )
