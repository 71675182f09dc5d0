"""Narrow groups in bundles: several groups as one dense product with a block-diagonal weight.

A group of eight channels fills half of the depth, and of the columns, of a matrix instruction, and
reads 16 bytes of a pixel at a time. A bundle of four such groups is a product of 32 channels by 32
filters whose weight is zero between groups: four times the multiply-adds, of which there are few,
for whole tiles and whole sectors of memory. A small kernel spreads the weight first. Where the
input holds infinities or NaN they reach the other groups of their bundle, as zero times them is
NaN.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import triton
import triton.language as tl

from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm
from ...runtime.plan import Arg, KernelCall, LaunchPlan, Slot, Workspace
from ...runtime.space import Choice, ConfigSpace, Footprint
from ..problem import ConvProblem, Direction, dense_strides
from .bundled_direct import direct, direct_plan
from .common import TileConfig, spatial_strides, unsupported_product, widen_all
from .footprints import product_footprint
from .implicit_gemm import PRODUCT_SOURCES, plan_of
from .tiles import tile_space

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


@dataclass(frozen=True)
class BundledConfig(TileConfig):
    """Tile of the bundle's product and the number of groups in a bundle.

    Attributes:
        bundle: groups of a bundle.
        direct: the channels of a bundle are one step of the product, instead of the general one.
    """

    bundle: int = 1
    direct: int = 0


def bundles(problem: ConvProblem) -> tuple[int, ...]:
    """Numbers of groups that can make a bundle, the smallest first."""
    widest = max(problem.channels_per_group, problem.filters_per_group)
    least = min(problem.channels_per_group, problem.filters_per_group)
    if widest >= _NARROW:
        return ()
    return tuple(
        n for n in range(2, _MOST // widest + 1) if problem.groups % n == 0 and n * least >= _LEAST
    )


def not_bundled(problem: ConvProblem) -> str | None:
    """Why a problem has no bundles, or None."""
    if problem.groups == 1:
        return "groups == 1"
    if problem.depthwise:
        return "one channel per group (depthwise)"
    if not bundles(problem):
        return "groups too wide, or in a number that makes no bundle"
    return None


def bundled_problem(problem: ConvProblem, bundle: int) -> ConvProblem:
    """The product over bundles, on the weight as :func:`spread_weight_kernel` lays it out."""
    wider = dataclasses.replace(problem, groups=problem.groups // bundle)
    return dataclasses.replace(wider, w_strides=dense_strides(wider.w_shape, channels_last=True))


class Bundled(Algorithm):
    """Implicit GEMM over bundles of narrow groups, forward and for the gradient of the input."""

    name: ClassVar[str] = "bundled"
    config_type = BundledConfig
    sources = (*PRODUCT_SOURCES, "bundled_direct")

    def supports(self, problem: ConvProblem) -> str | None:
        """Several narrow groups of several channels, in a number that can be bundled."""
        if problem.direction is Direction.WGRAD:
            return "bundles of weight gradients are an algorithm of their own"
        return not_bundled(problem) or unsupported_product(problem)

    def space(self, problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[BundledConfig]:
        """Tiles of the bundle's product; the default bundle has 32 channels and filters."""
        counts = bundles(problem)
        least = min(problem.channels_per_group, problem.filters_per_group)
        default = next((n for n in counts if n * least >= 32), counts[-1])
        inner = tile_space(bundled_problem(problem, default), device)
        general = ConfigSpace(
            BundledConfig,
            (*inner.parameters, Choice("bundle", counts, ordered=True), Choice("direct", (0,))),
            inner.constraints,
            BundledConfig(**inner.default.as_dict(), bundle=default),
        )
        first = _direct_configs(problem, counts, default)
        return ConfigSpace.listed([general.default, *first, *general.configs]) if first else general

    def plan(self, problem: ConvProblem, config: BundledConfig) -> LaunchPlan:
        """The weight spread out and the product; or the product and its diagonal blocks added."""
        if config.direct:
            return direct_plan(
                problem,
                config.bundle,
                config.block_m,
                config.num_warps,
                config.num_stages,
            )
        wider = bundled_problem(problem, config.bundle)
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
        found = product_footprint(wider, config, device)
        return dataclasses.replace(found, launches=found.launches + 1)


def _direct_configs(
    problem: ConvProblem, counts: tuple[int, ...], default: int
) -> list[BundledConfig]:
    """Bundles of about 32 channels first."""
    kept = [n for n in (default, *counts) if direct(problem, n)]
    tiles = ((64, 4, 4), (128, 4, 3), (256, 8, 3))
    pixels = problem.in_pixels if problem.direction is Direction.DGRAD else problem.out_pixels
    most = 128 if problem.dtype.itemsize == 4 else 256
    found = []
    for bundle, (block_m, warps, stages) in itertools.product(dict.fromkeys(kept), tiles):
        depth, columns = bundle * problem.channels_per_group, bundle * problem.filters_per_group
        if problem.direction is Direction.DGRAD:
            depth, columns = columns, depth
        if block_m > most or (block_m > 64 and pixels <= 64 * block_m):
            continue
        if problem.dtype.itemsize == 1 and depth < 32:  # the least of a float8 instruction
            continue
        found.append(BundledConfig(block_m, columns, depth, warps, stages, bundle=bundle, direct=1))
    return found


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
