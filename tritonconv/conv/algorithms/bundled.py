"""Narrow groups in bundles: several groups as one dense product with a block-diagonal weight.

A group of eight channels fills half of the depth, and of the columns, of a matrix instruction, and
reads 16 bytes of a pixel at a time. A bundle of four such groups is a product of 32 channels by 32
filters whose weight is zero between groups: four times the multiply-adds, of which there are few,
for whole tiles and whole sectors of memory. A small kernel spreads the weight first.

The gradient of the weight takes the smallest bundles and several taps, all where registers allow,
in one warp, so that the gradient of the output is read once; a second kernel keeps the diagonal
blocks. Where the input holds infinities or NaN they reach the other groups of their bundle, as zero
times them is NaN.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl

from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm
from ...runtime.plan import Arg, KernelCall, LaunchPlan, Slot, Workspace
from ...runtime.space import Choice, ConfigSpace, Footprint
from ..problem import ConvProblem, Direction, dense_strides
from .common import TileConfig, spatial_strides, unsupported_product, widen_all
from .footprints import product_footprint
from .footprints_walked import walked_footprint
from .implicit_gemm import PRODUCT_SOURCES, plan_of
from .tiles import around, power_of_two, tile_space
from .walked_spaces import tap_counts, warps_of, ways
from .walked_wgrad import WalkedConfig, walked_plan

_LEAST, _MOST = 16, 128
"""Channels of a bundle: what fills a matrix instruction, and where zeros outweigh the rest."""
_NARROW = 32
"""Groups of so many channels fill a tile themselves."""


@triton.jit
def spread_weight_kernel(
    w_ptr,
    out_ptr,
    elements,
    w_strides,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    BUNDLE: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[o, (t, r, s), c] = w[o, c % CHANNELS, t, r, s] where c belongs to o's group, else 0."""
    if WIDE:
        w_strides = widen_all(w_strides)
    WIDTH: tl.constexpr = BUNDLE * CHANNELS
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < elements
    c = index % WIDTH
    tap = (index // WIDTH) % (KERNEL_D * KERNEL_H * KERNEL_W)
    o = index // (WIDTH * KERNEL_D * KERNEL_H * KERNEL_W)
    own = (o // FILTERS) % BUNDLE == c // CHANNELS
    offsets = (
        o * w_strides[0]
        + (c % CHANNELS) * w_strides[1]
        + tap // (KERNEL_H * KERNEL_W) * w_strides[2]
        + tap // KERNEL_W % KERNEL_H * w_strides[3]
        + tap % KERNEL_W * w_strides[4]
    )
    tl.store(out_ptr + index, tl.load(w_ptr + offsets, mask=mask & own, other=0.0), mask=mask)


@triton.jit
def diagonal_sum_kernel(
    partial_ptr,
    out_ptr,
    elements,
    partials,
    splits,
    w_strides,
    CHANNELS: tl.constexpr,
    FILTERS: tl.constexpr,
    BUNDLE: tl.constexpr,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out[o, c, t, r, s] = Σ_split partial[split, o, (t, r, s, o's group, c)], in fixed order."""
    if WIDE:
        w_strides = widen_all(w_strides)
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < elements
    c = index % CHANNELS
    tap = (index // CHANNELS) % TAPS
    o = index // (CHANNELS * TAPS)
    group = (o // FILTERS) % BUNDLE
    place = (o * TAPS + tap) * (BUNDLE * CHANNELS) + group * CHANNELS + c
    total = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = (first + tl.arange(0, BLOCK_S))[:, None]
        offsets = split.to(tl.int64) * partials + place[None, :]
        total += tl.load(partial_ptr + offsets, mask=(split < splits) & mask[None, :], other=0.0)
    offsets = (
        o * w_strides[0]
        + c * w_strides[1]
        + tap // (KERNEL_H * KERNEL_W) * w_strides[2]
        + tap // KERNEL_W % KERNEL_H * w_strides[3]
        + tap % KERNEL_W * w_strides[4]
    )
    tl.store(out_ptr + offsets, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class BundledConfig(TileConfig):
    """Tile of the bundle's product and the number of groups in a bundle.

    Attributes:
        taps, walk, images, cached: of the gradient of the weight, as :class:`WalkedConfig` says.
        bundle: groups of one product.
    """

    taps: int = 1
    walk: int = 0
    images: int = 1
    cached: int = 0

    bundle: int = 1

    @property
    def walked(self) -> WalkedConfig:
        """The config of the gradient of the weight."""
        names = (field.name for field in dataclasses.fields(WalkedConfig))
        return WalkedConfig(**{name: getattr(self, name) for name in names})


_UNWALKED = {"taps": 1, "walk": 0, "images": 1, "cached": 0}
"""What only the gradient of the weight chooses."""


def _wgrad_configs(problem: ConvProblem, device: DeviceFacts) -> list[BundledConfig]:
    """Small tiles of one bundle each, in one warp: what fits best first."""
    found: list[BundledConfig] = []
    for bundle in bundles(problem):
        rows = power_of_two(bundle * problem.filters_per_group, 16, _MOST)
        columns = power_of_two(bundle * problem.channels_per_group, 16, _MOST)
        wider = bundled_problem(problem, bundle)
        counts = sorted(tap_counts(problem), reverse=True)
        if len(problem.kernel) == 3:
            # Bounds on three axes leave no registers for the sums of a plane of taps.
            counts.sort(key=lambda taps: taps > 3)
        for taps in counts:
            warps = warps_of(rows, columns, taps)
            if warps > 4:
                continue
            # About ten warps a multiprocessor: more would only write more partial sums.
            programs = wider.groups * problem.taps // taps * warps
            split = max(1, triton.cdiv(10 * device.sm_count, programs))
            for block_k, stages in ((64, 2), (32, 3), (64, 3), (32, 2)):
                for cached in (0, 1) if taps > 1 else (0,):
                    walk, images = ways(wider, block_k)[0]
                    found += [
                        BundledConfig(
                            rows,
                            columns,
                            min(block_k, power_of_two(problem.out_pixels, 16, block_k)),
                            warps,
                            stages,
                            split_k=count,
                            taps=taps,
                            walk=walk,
                            images=images,
                            cached=cached,
                            bundle=bundle,
                        )
                        for count in around(split)
                    ]
    return found


def bundles(problem: ConvProblem) -> tuple[int, ...]:
    """Numbers of groups that can make a bundle, the smallest first."""
    widest = max(problem.channels_per_group, problem.filters_per_group)
    least = min(problem.channels_per_group, problem.filters_per_group)
    if widest >= _NARROW:
        return ()
    return tuple(
        n for n in range(2, _MOST // widest + 1) if problem.groups % n == 0 and n * least >= _LEAST
    )


def bundled_problem(problem: ConvProblem, bundle: int) -> ConvProblem:
    """The product over bundles, on the weight as :func:`spread_weight_kernel` lays it out."""
    wider = dataclasses.replace(problem, groups=problem.groups // bundle)
    return dataclasses.replace(wider, w_strides=dense_strides(wider.w_shape, channels_last=True))


class Bundled(Algorithm):
    """Implicit GEMM over bundles of narrow groups, in all three directions."""

    name: ClassVar[str] = "bundled"
    config_type = BundledConfig
    sources = (*PRODUCT_SOURCES, "walked_spaces", "walked_wgrad")

    def supports(self, problem: ConvProblem) -> str | None:
        """Several narrow groups of several channels, in a number that can be bundled."""
        if problem.groups == 1:
            return "groups == 1"
        if problem.depthwise:
            return "one channel per group (depthwise)"
        if not bundles(problem):
            return "groups too wide, or in a number that makes no bundle"
        return unsupported_product(problem)

    def space(self, problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[BundledConfig]:
        """Tiles of the bundle's product; the default bundle has 32 channels and filters."""
        if problem.direction is Direction.WGRAD:
            return ConfigSpace.listed(_wgrad_configs(problem, device))
        counts = bundles(problem)
        least = min(problem.channels_per_group, problem.filters_per_group)
        default = next((n for n in counts if n * least >= 32), counts[-1])
        inner = tile_space(bundled_problem(problem, default), device)
        return ConfigSpace(
            BundledConfig,
            (
                *inner.parameters,
                *(Choice(name, (value,)) for name, value in _UNWALKED.items()),
                Choice("bundle", counts, ordered=True),
            ),
            inner.constraints,
            BundledConfig(**inner.default.as_dict(), bundle=default),
        )

    def plan(self, problem: ConvProblem, config: BundledConfig) -> LaunchPlan:
        """The weight spread out and the product; or the product and its diagonal blocks added."""
        wider = bundled_problem(problem, config.bundle)
        if problem.direction is Direction.WGRAD:
            return _diagonal(problem, wider, config.bundle, walked_plan(wider, config.walked))
        product = plan_of(wider, config)
        spread = Workspace("spread", wider.w_shape, problem.dtype)
        calls = tuple(_reading(call, "weight", "spread") for call in product.calls)
        elements = wider.w_shape[0] * wider.taps * wider.channels_per_group
        return dataclasses.replace(
            product,
            calls=(
                KernelCall(
                    spread_weight_kernel,
                    (triton.cdiv(elements, 512), 1, 1),
                    (
                        Slot("weight"),
                        Slot("spread"),
                        elements,
                        spatial_strides(problem.w_strides),
                    ),
                    {**_block_constexprs(problem, config.bundle), "BLOCK": 512},
                ),
                *calls,
            ),
            dtypes={**product.dtypes, "spread": problem.dtype},
            workspaces=(spread, *product.workspaces),
        )

    def footprint(
        self, problem: ConvProblem, config: BundledConfig, device: DeviceFacts
    ) -> Footprint:
        """Of the bundle's product; the small kernel beside it is one more launch."""
        wider = bundled_problem(problem, config.bundle)
        if problem.direction is Direction.WGRAD:
            return dataclasses.replace(walked_footprint(wider, config.walked, device), launches=2)
        found = product_footprint(wider, config, device)
        return dataclasses.replace(found, launches=found.launches + 1)


def _block_constexprs(problem: ConvProblem, bundle: int) -> dict[str, Any]:
    depth, height, width = (1,) * (3 - len(problem.kernel)) + problem.kernel
    return {
        "CHANNELS": problem.channels_per_group,
        "FILTERS": problem.filters_per_group,
        "BUNDLE": bundle,
        "KERNEL_D": depth,
        "KERNEL_H": height,
        "KERNEL_W": width,
        "WIDE": problem.wide,
    }


def _reading(call: KernelCall, slot: str, other: str) -> KernelCall:
    """The call with another tensor in the place of one."""

    def swapped(arg: Arg) -> Arg:
        return Slot(other) if arg == Slot(slot) else arg

    return dataclasses.replace(call, args=tuple(swapped(arg) for arg in call.args))


def _diagonal(
    problem: ConvProblem, wider: ConvProblem, bundle: int, product: LaunchPlan
) -> LaunchPlan:
    """Every split of the product to float32, and the sum of what lies inside the groups."""
    call = _reading(product.calls[0], "grad_weight", "partial")
    call = dataclasses.replace(call, constexprs={**call.constexprs, "PARTIAL": True})
    splits = call.grid[2]
    columns = wider.taps * wider.channels_per_group
    elements = problem.out_channels * problem.taps * problem.channels_per_group
    total = KernelCall(
        diagonal_sum_kernel,
        (triton.cdiv(elements, 128), 1, 1),
        (
            Slot("partial"),
            Slot("grad_weight"),
            elements,
            problem.out_channels * columns,
            splits,
            spatial_strides(problem.w_strides),
        ),
        {**_block_constexprs(problem, bundle), "BLOCK": 128, "BLOCK_S": 8},
    )
    return LaunchPlan(
        (call, total),
        {**product.dtypes, "partial": torch.float32},
        (Workspace("partial", (splits, problem.out_channels, columns), torch.float32),),
    )
