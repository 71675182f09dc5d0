"""Geometry and launch plans of banded products over blocks of narrow groups."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ...runtime.operators import Config
from ...runtime.plan import KernelCall, LaunchPlan, Slot, Workspace
from ..problem import ConvProblem
from . import banded_group_products, banded_group_weights
from .banded_geometry import BandedConfig, Roles, checks_of, roles_of, window_of
from .common import (
    epilogue_arguments,
    lifted,
    precision_constexprs,
    slot_dtypes,
    spatial_strides,
)


@dataclass(frozen=True)
class BandedGroupsConfig(Config):
    """Box of a unit, tile of units, groups of a block, and how the product is executed.

    Attributes:
        run_d, run_h, run_w: pixels of a unit.
        bundle: groups of a block.
        units: of a tile, or of one step of a weight gradient's sum.
        block_k: elements of a window in one step; of a tile of columns for the weight's gradient.
        split: parts of the sum over units, for the gradient of the weight.
        images: images over which a tile of a weight gradient's units may reach.
        cached: whether windows pass the L1 cache, where those of neighbouring units overlap, in
            copies of 8 bytes; those of 16 bypass it.
    """

    run_d: int
    run_h: int
    run_w: int
    bundle: int
    units: int
    block_k: int
    num_warps: int
    num_stages: int
    split: int = 1
    images: int = 1
    cached: int = 0

    @property
    def run(self) -> tuple[int, int, int]:
        """Pixels of a unit per axis."""
        return self.run_d, self.run_h, self.run_w


@functools.lru_cache(maxsize=1024)
def block_problem(problem: ConvProblem, bundle: int) -> ConvProblem:
    """The dense convolution of one block of ``bundle`` groups, with the whole tensors' strides."""
    return dataclasses.replace(
        problem,
        in_channels=bundle * problem.channels_per_group,
        out_channels=bundle * problem.filters_per_group,
        groups=1,
        epilogue=None,
    )


def map_units(problem: ConvProblem, run: tuple[int, int, int]) -> int:
    """Units of one image."""
    size = roles_of(problem).unit_size
    return math.prod(-(-pixels // step) for pixels, step in zip(size, run, strict=True))


@dataclass(frozen=True)
class GroupWalk:
    """How the units of a weight gradient's sum are shared among programs.

    Attributes:
        tiles, steps: tiles of the units of ``images`` images, and how often so many images are.
        tiles_per_split, steps_per_split: of one program.
    """

    tiles: int
    steps: int
    tiles_per_split: int
    steps_per_split: int

    @property
    def step_splits(self) -> int:
        """Parts of the images."""
        return -(-self.steps // self.steps_per_split)

    @property
    def splits(self) -> int:
        """All parts of the sum, none of which is empty."""
        return -(-self.tiles // self.tiles_per_split) * self.step_splits


def walk_of(problem: ConvProblem, config: BandedGroupsConfig) -> GroupWalk:
    """Tiles are shared first; then the images of each."""
    tiles = -(-config.images * map_units(problem, config.run) // config.units)
    steps = -(-problem.batch // config.images)
    split = max(1, min(config.split, tiles * steps))
    each = -(-tiles // min(split, tiles))
    parts = max(1, split // -(-tiles // each))
    return GroupWalk(tiles, steps, each, -(-steps // parts))


def product_plan(problem: ConvProblem, config: BandedGroupsConfig) -> LaunchPlan:
    """Two launches: the weights spread to a band for each block, then the product with them."""
    inner = block_problem(problem, config.bundle)
    roles = roles_of(inner)
    window = window_of(inner, config.run)
    blocks = problem.groups // config.bundle
    depth = window.chunks(config.block_k) * config.block_k
    elements = blocks * window.lines * depth * window.block_n
    spread = KernelCall(
        banded_group_products.band_group_weight_kernel,
        (triton.cdiv(elements, 1024), 1, 1),
        (Slot("weight"), Slot("band"), elements, spatial_strides(problem.w_strides)),
        {
            **_weight_constexprs(problem, config),
            "COLUMNS": window.columns,
            "LINES": window.lines,
            "DEPTH": depth,
            "FLIPPED": roles.flipped,
            "BLOCK": 1024,
        },
    )
    epilogue = epilogue_arguments(problem)
    units = problem.batch * map_units(inner, config.run)
    product = KernelCall(
        banded_group_products.banded_groups_kernel,
        (blocks * triton.cdiv(units, config.units), 1, 1),
        (
            Slot(roles.source),
            Slot("band"),
            Slot(roles.units),
            Slot("acc" if epilogue.save_acc else roles.units),
            epilogue.pointers,
            epilogue.strides,
            *_map_arguments(problem, roles),
        ),
        {
            **_product_constexprs(problem, config),
            "EVEN_UNITS": units % config.units == 0,
            "EPILOGUE": epilogue.function,
            "SAVE_ACC": epilogue.save_acc,
        },
        config.num_warps,
        config.num_stages,
    )
    return LaunchPlan(
        (spread, product),
        {**slot_dtypes(problem), "band": problem.dtype},
        (Workspace("band", (elements,), problem.dtype),),
    )


def wgrad_plan(problem: ConvProblem, config: BandedGroupsConfig) -> LaunchPlan:
    """Two launches: pairs of every block and split in float32, then the sum along diagonals."""
    inner = block_problem(problem, config.bundle)
    roles = roles_of(inner)
    window = window_of(inner, config.run)
    walk = walk_of(inner, config)
    blocks = problem.groups // config.bundle
    tiles_k = triton.cdiv(window.lines * window.line, config.block_k)
    depth = tiles_k * config.block_k
    kernel, dilation = lifted(problem.kernel, 1), lifted(problem.dilation, 1)
    product = KernelCall(
        banded_group_weights.banded_groups_wgrad_kernel,
        (blocks * tiles_k, walk.splits, 1),
        (
            Slot(roles.source),
            Slot(roles.units),
            Slot("partial"),
            *_map_arguments(problem, roles),
            walk.tiles,
            walk.steps,
            walk.tiles_per_split,
            walk.steps_per_split,
            walk.step_splits,
        ),
        {
            **_product_constexprs(problem, config),
            "GROUP_CHANNELS": problem.channels_per_group,
            "GROUP_FILTERS": problem.filters_per_group,
            "EVEN_UNITS": config.images * map_units(inner, config.run) % config.units == 0,
            "IMAGES": config.images,
            "EVEN_IMAGES": problem.batch % config.images == 0,
            "SPAN_W": (kernel[2] - 1) * dilation[2],
        },
        config.num_warps,
        config.num_stages,
    )
    block = 16
    total = KernelCall(
        banded_group_weights.group_diagonals_kernel,
        (triton.cdiv(math.prod(problem.w_shape), block), 1, 1),
        (Slot("partial"), Slot("grad_weight"), walk.splits, spatial_strides(problem.w_strides)),
        {
            **_weight_constexprs(problem, config),
            "BLOCKS": blocks,
            "RUN_D": config.run_d,
            "WINDOW_W": window.count[2],
            "DEPTH": depth,
            "BLOCK": block,
            "BLOCK_S": min(256, triton.next_power_of_2(walk.splits * math.prod(config.run))),
        },
    )
    return LaunchPlan(
        (product, total),
        {**slot_dtypes(problem), "partial": torch.float32},
        (Workspace("partial", (walk.splits, blocks, window.block_n, depth), torch.float32),),
    )


def _map_arguments(problem: ConvProblem, roles: Roles) -> tuple[Any, ...]:
    """Batch, sizes of both maps, and their strides."""
    x, y = spatial_strides(problem.x_strides), spatial_strides(problem.y_strides)
    strides = (y, x) if roles.flipped else (x, y)
    return problem.batch, roles.source_size, roles.unit_size, *strides


def _product_constexprs(problem: ConvProblem, config: BandedGroupsConfig) -> dict[str, Any]:
    inner = block_problem(problem, config.bundle)
    roles = roles_of(inner)
    window = window_of(inner, config.run)
    box = BandedConfig(*config.run, 1, 1, config.block_k, 4, 2)
    return {
        "BLOCKS": problem.groups // config.bundle,
        "CHANNELS": roles.channels,
        "FILTERS": roles.filters,
        **{f"LEAD_{axis}": lead for axis, lead in zip("DHW", roles.lead, strict=True)},
        **{f"RUN_{axis}": run for axis, run in zip("DHW", config.run, strict=True)},
        **{f"WINDOW_{axis}": count for axis, count in zip("DHW", window.count, strict=True)},
        "HOP_D": window.hop[0],
        "HOP_H": window.hop[1],
        **checks_of(inner, box),
        "CACHED": bool(config.cached),
        **precision_constexprs(problem),
        "BLOCK_M": config.units,
        "BLOCK_N": window.block_n,
        "BLOCK_K": config.block_k,
    }


def _weight_constexprs(problem: ConvProblem, config: BandedGroupsConfig) -> dict[str, Any]:
    inner = block_problem(problem, config.bundle)
    roles = roles_of(inner)
    window = window_of(inner, config.run)
    kernel, dilation = lifted(problem.kernel, 1), lifted(problem.dilation, 1)
    per_group = problem.channels_per_group, problem.filters_per_group
    channels, filters = per_group[::-1] if roles.flipped else per_group
    return {
        "CHANNELS": roles.channels,
        "FILTERS": roles.filters,
        "GROUP_CHANNELS": channels,
        "GROUP_FILTERS": filters,
        **{f"KERNEL_{axis}": taps for axis, taps in zip("DHW", kernel, strict=True)},
        **{f"DILATION_{axis}": step for axis, step in zip("DHW", dilation, strict=True)},
        "RUN_H": config.run_h,
        "RUN_W": config.run_w,
        "WINDOW_H": window.count[1],
        "HOP_D": window.hop[0],
        "HOP_H": window.hop[1],
        "WIDE": problem.wide,
        "BLOCK_N": window.block_n,
    }
