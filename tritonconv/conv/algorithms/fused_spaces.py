"""The configs of forward products that are fused with what surrounds them, likely ones first."""

from __future__ import annotations

import math
from dataclasses import replace

from ...runtime.device import DeviceFacts
from ...runtime.space import ConfigSpace, PowerOfTwo
from ..fused_problem import FusedProblem
from .common import TileConfig
from .tiles import tile_space


def fused_space(problem: FusedProblem, device: DeviceFacts) -> ConfigSpace[TileConfig]:
    """Tiles, warps and stages of a fused product."""
    space = tile_space(problem, device)
    if problem.second_channels:
        space = _of_pairs(space, problem)
    d = space.default
    if d.block_m < 64:
        return space  # few tiles: small ones, which have registers to spare
    if problem.prologue is not None:
        first = _under_prologue(d)
    else:
        first = _plain(d)
    shapes = dict.fromkeys([_shape(d), *first] if problem.prologue is None else [*first, _shape(d)])
    likely = [
        replace(d, block_m=m, block_n=n, block_k=k, num_warps=w, num_stages=s)
        for m, n, k, w, s in shapes
    ]
    return space.preferring([*likely, *space.plausible])


def _of_pairs(space: ConfigSpace[TileConfig], problem: FusedProblem) -> ConfigSpace[TileConfig]:
    """A depth that divides the channels of both inputs: one loop runs over both, without masks."""
    depth = math.gcd(problem.first_channels, problem.second_channels, space.default.block_k)
    if depth < 16 or depth == space.default.block_k:
        return space
    parameters = tuple(
        PowerOfTwo(p.name, min(depth, p.low), p.high)
        if p.name == "block_k" and isinstance(p, PowerOfTwo)
        else p
        for p in space.parameters
    )
    default, deeper = (replace(space.default, block_k=k) for k in (depth, 2 * depth))
    # Deeper steps are fewer, of which some are in part of zeros.
    rivals = tuple(dict.fromkeys((deeper, space.default)))
    return replace(space, parameters=parameters, default=default, plausible=rivals)


Shape = tuple[int, int, int, int, int]
"""Rows, columns, depth, warps and stages."""


def _shape(config: TileConfig) -> Shape:
    return config.block_m, config.block_n, config.block_k, config.num_warps, config.num_stages


def _under_prologue(d: TileConfig) -> list[Shape]:
    """64 rows on four warps first.

    The operand passes through registers, and so do the vectors that the prologue reads: a quarter
    of the depth per thread for each of them. On tiles of 128 rows and eight warps a multiprocessor
    holds two programs of at most 128 registers, and a third vector makes it one (an H100: 86 µs
    with two, 115 µs with three). Programs of four warps go in smaller steps: three of 168
    registers, four of 128.
    """
    n, k = d.block_n, d.block_k
    return [
        (64, n, k, 4, 3),
        (64, n, k, 4, 4),
        (64, n, k // 2, 4, 4),
        (128, n, k, 8, 3),
        (128, n, k // 2, 4, 4),
        (64, n, k, 4, 2),
        (128, n, k, 4, 3),
        (128, n, k // 2, 8, 4),
        (64, n // 2, k, 4, 3),
        (64, 2 * n, k, 4, 3),
    ]


def _plain(d: TileConfig) -> list[Shape]:
    """The tile of a plain product, and what surrounds it."""
    m, n, k, w, _ = _shape(d)
    return [
        (m, n, k, w, 4),
        (m, n, k, 12 - w, 3),
        (64, n, k, 4, 4),
        (64, n, k, 4, 3),
        (2 * m, n, k, 8, 3),
        (2 * m, n, k, 4, 3),
        (m, n, k // 2, w, 4),
        (m, 2 * n, k, 8, 3),
    ]
