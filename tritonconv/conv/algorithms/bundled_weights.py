"""The gradient of the weight of narrow groups: small bundles, all taps of one in a warp.

Few multiply-adds stand against two large tensors: a warp keeps the sums of a bundle of two or four
groups for several taps, all where registers allow, so that the gradient of the output is read once.
A second kernel keeps the diagonal blocks. Infinities and NaN stay within their groups, which differ
in the filters or the channels of a block.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
import triton

from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm
from ...runtime.plan import LaunchPlan, Workspace
from ...runtime.space import ConfigSpace, Footprint
from ..problem import ConvProblem, Direction
from .bundled import bundled_problem, bundles, not_bundled
from .common import sum_partials_call, unsupported_product
from .footprints_walked import walked_footprint
from .implicit_gemm import PRODUCT_SOURCES
from .tiles import around, power_of_two
from .walked_spaces import tap_counts, warps_of, ways
from .walked_wgrad import WalkedConfig, walked_plan

_WIDEST = 64
"""Channels or filters of a bundle: beyond these nearly all of the product is in vain."""


@dataclass(frozen=True)
class BundledWeightsConfig(WalkedConfig):
    """How a bundle's product is walked, and the number of groups in a bundle."""

    bundle: int = 1


class BundledWeights(Algorithm):
    """Walked product over bundles of narrow groups, and the sum of its diagonal blocks."""

    name: ClassVar[str] = "bundled_weights"
    config_type = BundledWeightsConfig
    sources = (*PRODUCT_SOURCES, "bundled", "bundled_direct", "walked_spaces", "walked_wgrad")

    def supports(self, problem: ConvProblem) -> str | None:
        """Gradients of the weight of several narrow groups, in a number that can be bundled."""
        if problem.direction is not Direction.WGRAD:
            return "not a gradient of the weight"
        return not_bundled(problem) or unsupported_product(problem)

    def space(self, problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[BundledWeightsConfig]:
        """Small bundles and many taps first."""
        return ConfigSpace.listed(_configs(problem, device))

    def plan(self, problem: ConvProblem, config: BundledWeightsConfig) -> LaunchPlan:
        """Every split of the product to float32, and the sum of what lies inside the groups."""
        wider = bundled_problem(problem, config.bundle)
        product = walked_plan(wider, config, whole=False)
        (call,) = product.calls
        splits, partials = (
            call.grid[2],
            problem.out_channels * wider.taps * wider.channels_per_group,
        )
        total = sum_partials_call(problem, splits, partials, bundle=config.bundle, block=128)
        space = Workspace("partial", (splits, partials), torch.float32)
        return LaunchPlan((call, total), {**product.dtypes, "partial": torch.float32}, (space,))

    def footprint(
        self, problem: ConvProblem, config: BundledWeightsConfig, device: DeviceFacts
    ) -> Footprint:
        """Of the bundle's product."""
        found = walked_footprint(bundled_problem(problem, config.bundle), config, device)
        return dataclasses.replace(found, launches=2)


def _configs(problem: ConvProblem, device: DeviceFacts) -> list[BundledWeightsConfig]:
    counts = sorted(tap_counts(problem), reverse=True)
    small = problem.dtype.itemsize == 2
    if len(problem.kernel) == 3 or not small:
        # Bounds on three axes, or wide elements, leave no registers for a plane of taps.
        counts.sort(key=lambda taps: taps > 3)
    steps = ((64, 2), (32, 3), (64, 3), (32, 2)) if small else ((32, 2), (16, 3), (32, 3))
    found: list[BundledWeightsConfig] = []
    for bundle in bundles(problem):
        rows = power_of_two(bundle * problem.filters_per_group, 16, 128)
        columns = power_of_two(bundle * problem.channels_per_group, 16, 128)
        wider = bundled_problem(problem, bundle)
        for taps in counts:
            warps = warps_of(rows, columns, taps, device)
            if found and (warps > 4 or max(rows, columns) > _WIDEST):
                continue
            # About ten warps a multiprocessor: more would only write more partial sums.
            programs = wider.groups * problem.taps // taps * warps
            split = max(1, triton.cdiv(10 * device.sm_count, programs))
            for block_k, stages in steps:
                walk, images = ways(wider, block_k)[0]
                found += [
                    BundledWeightsConfig(
                        rows,
                        columns,
                        block_k,
                        warps,
                        stages,
                        split_k=count,
                        taps=taps,
                        walk=walk,
                        images=images,
                        cached=cached,
                        bundle=bundle,
                    )
                    for cached in ((0, 1) if taps > 1 else (0,))
                    for count in around(split)
                ]
    return found
