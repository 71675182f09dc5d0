"""Mean and variance of every channel of an output, merged from those of its tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from ...runtime.plan import KernelCall, Slot
from ..fused_problem import FusedProblem
from .common import TileConfig, pixels_of, spatial_arguments, widen


@triton.jit
def _merge_statistics_kernel(
    mean_ptr,
    square_ptr,
    out_mean_ptr,
    out_var_ptr,
    batch,
    out_size,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and biased variance of every channel from those of its tiles (Chan et al.).

    Σ (v − μ)² = Σ_tiles (squares + count · (mean − μ)²): nothing large is subtracted.
    """
    if WIDE:
        batch = widen(batch)
    pixels = pixels_of(batch, out_size)
    tiles = tl.cdiv(pixels, TILE)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < CHANNELS
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for begin in range(0, tiles, BLOCK_T):
        tile = begin + tl.arange(0, BLOCK_T)
        count = tl.maximum(tl.minimum(pixels - tile * TILE, TILE), 0).to(tl.float32)
        mask = (tile < tiles)[:, None] & mask_c[None, :]
        at = tile[:, None] * CHANNELS + c[None, :]
        total += tl.load(mean_ptr + at, mask=mask, other=0.0) * (count / pixels)[:, None]
    mean = tl.sum(total, axis=0)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for begin in range(0, tiles, BLOCK_T):
        tile = begin + tl.arange(0, BLOCK_T)
        count = tl.maximum(tl.minimum(pixels - tile * TILE, TILE), 0).to(tl.float32)
        mask = (tile < tiles)[:, None] & mask_c[None, :]
        at = tile[:, None] * CHANNELS + c[None, :]
        distance = tl.load(mean_ptr + at, mask=mask, other=0.0) - mean[None, :]
        squares = tl.load(square_ptr + at, mask=mask, other=0.0)
        total += tl.where(mask, squares + count[:, None] * distance * distance, 0.0)
    tl.store(out_mean_ptr + c, mean, mask=mask_c)
    tl.store(out_var_ptr + c, tl.sum(total, axis=0) / pixels, mask=mask_c)


def merge_call(problem: FusedProblem, config: TileConfig) -> KernelCall:
    """The launch that merges what the tiles of a product left in ``tile_mean``, ``tile_square``."""
    tiles = triton.cdiv(problem.out_pixels, config.block_m)
    block_t = min(2048, triton.next_power_of_2(tiles))
    block_c = min(4 if block_t > 256 else 16, triton.next_power_of_2(problem.out_channels))
    return KernelCall(
        _merge_statistics_kernel,
        (triton.cdiv(problem.out_channels, block_c), 1, 1),
        (
            Slot("tile_mean"),
            Slot("tile_square"),
            Slot("mean"),
            Slot("var"),
            problem.batch,
            spatial_arguments(problem)[2],
        ),
        {
            "CHANNELS": problem.out_channels,
            "TILE": config.block_m,
            "WIDE": problem.wide,
            "BLOCK_T": block_t,
            "BLOCK_C": block_c,
        },
        num_warps=8 if block_t * block_c >= 4096 else 4,
    )
