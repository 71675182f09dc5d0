"""Implicit matrix products for the three convolution directions, one kernel for every rank.

Kernels are written for three spatial axes: a map of fewer has depth (and height) one, whose sizes
and filter geometry are constants that the compiler removes.

Technique: implicit GEMM as CUTLASS describes it (https://github.com/NVIDIA/cutlass).
"""

from __future__ import annotations

from ...runtime.plan import LaunchPlan
from ..problem import ConvProblem, Direction
from .common import TileConfig
from .product_dgrad import dgrad_plan
from .product_forward import forward_plan
from .product_wgrad import reduction_call, wgrad_plan

PRODUCT_SOURCES = (
    "../../runtime/last_arrival",
    "common",
    "implicit_gemm",
    "product_dgrad",
    "product_forward",
    "product_wgrad",
    "split",
    "tiles",
)
"""What an algorithm that runs implicit products in any direction depends on."""


def plan_of(problem: ConvProblem, config: TileConfig) -> LaunchPlan:
    """Plan of whichever direction the problem asks for."""
    if problem.direction is Direction.FORWARD:
        return forward_plan(problem, config)
    if problem.direction is Direction.DGRAD:
        return dgrad_plan(problem, config)
    return wgrad_plan(problem, config)


__all__ = ["dgrad_plan", "forward_plan", "plan_of", "reduction_call", "wgrad_plan"]
