"""One input channel, or up to four: direct kernels whose time is that of the large tensor.

The product has so few multiply-adds per byte that the output (or its gradient), which is up to
hundreds of times the input, sets the time. Small maps of many filters are divided by filters, large
maps by pixels: both are the shape of the tile.
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
from .single_geometry import SingleConfig, dgrad_blocks, is_scalar
from .single_plans import dgrad_plan, forward_plan, wgrad_plan
from .single_spaces import (
    MOST_UNROLLED,
    dgrad_space,
    forward_space,
    single_footprint,
    wgrad_space,
)

MAX_CHANNELS = 4
_SCALAR = "a large window on scalar units, where it only spills registers"


class SingleChannel(Algorithm):
    """All three products of an ungrouped convolution with at most four input channels."""

    name: ClassVar[str] = "single_channel"
    config_type = SingleConfig
    sources = (
        "common",
        "single_flat",
        "single_forward",
        "single_geometry",
        "single_gradients",
        "single_plans",
        "single_run_gradients",
        "single_runs",
        "single_spaces",
        "tiles",
    )

    def supports(self, problem: ConvProblem) -> str | None:
        """Ungrouped and few input channels; windows that a program can hold."""
        if problem.groups != 1:
            return "groups != 1"
        if problem.direction is Direction.DGRAD and problem.epilogue is not None:
            return "the gradient of the input takes no epilogue here"
        if problem.in_channels > MAX_CHANNELS:
            return f"more than {MAX_CHANNELS} input channels"
        if problem.taps * problem.in_channels > MOST_UNROLLED:
            return f"a window of more than {MOST_UNROLLED} elements"
        most = 128 if problem.direction is Direction.FORWARD else 64
        if is_scalar(problem) and problem.taps * problem.in_channels > most:
            return _SCALAR
        if problem.direction is Direction.DGRAD:
            pairs = zip(problem.stride, problem.dilation, strict=True)
            if any(hop > 1 and step > 1 for hop, step in pairs):
                return "stride and dilation on one axis"
            if is_scalar(problem) and math.prod(problem.kernel[-2:]) > 32:
                return _SCALAR
            if not dgrad_blocks(problem):
                return "a window too large for the shared memory of a program"
        return unsupported_dtype(problem)

    def space(self, problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[SingleConfig]:
        """Shapes of the tile, both engines where both make sense."""
        if problem.direction is Direction.FORWARD:
            return forward_space(problem, device)
        if problem.direction is Direction.DGRAD:
            return dgrad_space(problem)
        return wgrad_space(problem, device)

    def footprint(
        self, problem: ConvProblem, config: SingleConfig, device: DeviceFacts
    ) -> Footprint:
        """Of the kernel that reads or writes the large tensor."""
        return single_footprint(problem, config, device)

    def plan(self, problem: ConvProblem, config: SingleConfig) -> LaunchPlan:
        """One launch; two where the gradient of the weight is split."""
        if problem.direction is Direction.FORWARD:
            return forward_plan(problem, config)
        if problem.direction is Direction.DGRAD:
            return dgrad_plan(problem, config)
        return wgrad_plan(problem, config)
