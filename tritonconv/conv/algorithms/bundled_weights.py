"""The gradient of the weight of narrow groups: bundles that fill the widest matrix instructions.

Bundles of 64 channels were measured to be the fastest although seven eighths of their product are
in vain: 46 µs where a warp that keeps all taps of two groups takes 87. Small bundles come after
them. A second kernel keeps the diagonal blocks. Infinities and NaN stay within their groups, which
differ in the filters or the channels of a block.
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
"""Channels and filters of a bundle that fill the matrix instructions of a warp group."""


def weight_bundles(problem: ConvProblem) -> tuple[int, ...]:
    """Numbers of groups that can make a bundle, the smallest first; pairs of groups of 32 too."""
    widths = (problem.channels_per_group, problem.filters_per_group)
    if max(widths) == _WIDEST // 2 and problem.groups % 2 == 0:
        return (2,) if min(widths) >= _WIDEST // 4 else ()
    return bundles(problem)


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
        if problem.groups > 1 and not problem.depthwise and weight_bundles(problem):
            return unsupported_product(problem)
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
    found = _wide_configs(problem, device)
    counts = sorted(tap_counts(problem), reverse=True)
    small = problem.dtype.itemsize == 2
    if len(problem.kernel) == 3 or not small:
        # Bounds on three axes, or wide elements, leave no registers for a plane of taps.
        counts.sort(key=lambda taps: taps > 3)
    steps = ((64, 2), (32, 3), (64, 3), (32, 2)) if small else ((32, 2), (16, 3), (32, 3))
    for bundle in weight_bundles(problem):
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
    return list(dict.fromkeys(found))


def _wide_configs(problem: ConvProblem, device: DeviceFacts) -> list[BundledWeightsConfig]:
    """Bundles of 64 and 128 channels with a row of taps, about two programs a multiprocessor."""
    widths = {n: n * problem.channels_per_group for n in weight_bundles(problem)}
    filters = problem.filters_per_group
    if problem.dtype.itemsize != 2 or problem.x_strides[1] != 1 or problem.y_strides[1] != 1:
        return []
    wide = [n for n, width in widths.items() if width <= _WIDEST and n * filters <= _WIDEST]
    if not wide or max(widths[wide[-1]], wide[-1] * filters) <= _WIDEST // 2:
        return []
    row = max(taps for taps in tap_counts(problem) if taps <= 3)
    tried = [(wide[-1], row, warps, stages) for warps, stages in ((4, 3), (8, 3), (4, 2))]
    tried += [(wide[-1], taps, 8, 2) for taps in tap_counts(problem) if taps > row]
    if 2 * wide[-1] in widths:
        tried += [(2 * wide[-1], taps, 8, 3 if taps == 1 else 2) for taps in (1, row)]
    found = []
    for number, (bundle, taps, warps, stages) in enumerate(tried):
        rows = power_of_two(bundle * filters, 16, 128)
        columns = power_of_two(widths[bundle], 16, 128)
        wider = bundled_problem(problem, bundle)
        walk, images = ways(wider, 64)[0]
        split = max(1, round(2.2 * device.sm_count * taps / (wider.groups * problem.taps)))
        # Other splits for the first kind only.
        shares = (1.0, 0.5, 0.67, 1.38, 2.0) if number == 0 else (1.0, 0.5)
        found += [
            BundledWeightsConfig(
                rows,
                columns,
                64,
                warps,
                stages,
                split_k=max(1, int(share * split)),
                taps=taps,
                walk=walk,
                images=images,
                bundle=bundle,
            )
            for share in shares
        ]
    return found
