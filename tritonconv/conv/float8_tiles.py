"""Tiles of float8 products: those that ran best on an H100 stand first in their spaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..runtime.device import DeviceFacts
from ..runtime.operators import Config
from .algorithms.common import TileConfig
from .problem import FAST_ACCUM, FLOAT8, ConvProblem


def float8_tiles(default: Config, problem: ConvProblem, device: DeviceFacts) -> Sequence[Config]:
    """The default of a float8 product and what to try after it; nothing for other products.

    Sums that the instruction keeps have one accumulator: a tile of 128 x 128 fits on four warps,
    two of which share a multiprocessor. Sums added up in float32 have two, for which half the rows
    leave registers. Steps of few bytes want one more stage.

    Args:
        default: of the algorithm's space.
        problem: the product.
        device: where it runs; known of sm_90 only.
    """
    if problem.dtype is not FLOAT8 or device.arch != "sm_90":
        return ()
    if not isinstance(default, TileConfig) or default.split_k > 1 or default.block_m < 128:
        return ()
    shapes = _wide(default, problem) if default.block_n >= 128 else _narrow(default, problem)
    return [
        replace(default, block_m=m, block_n=n, num_warps=w, num_stages=s) for m, n, w, s in shapes
    ]


Shape = tuple[int, int, int, int]
"""Rows, columns, warps and stages."""


def _wide(default: TileConfig, problem: ConvProblem) -> list[Shape]:
    n = default.block_n
    if problem.precision == FAST_ACCUM:
        return [(128, n, 4, 3), (128, 2 * n, 8, 3), (64, n, 4, 4), (128, n, 8, 3), (128, n, 4, 4)]
    return [(64, n, 4, 4), (128, n, 4, 3), (64, n, 4, 3), (128, n // 2, 4, 4), (128, n, 8, 3)]


def _narrow(default: TileConfig, problem: ConvProblem) -> list[Shape]:
    n = default.block_n
    if problem.precision == FAST_ACCUM:
        return [(128, n, 4, 4), (128, n, 4, 3), (256, n, 8, 3), (256, n, 4, 3), (64, n, 4, 4)]
    return [(128, n, 4, 4), (256, n, 8, 3), (128, n, 4, 3), (64, n, 4, 4), (256, n, 8, 4)]
