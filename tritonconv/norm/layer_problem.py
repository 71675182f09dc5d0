"""What the kernels see of a layer normalisation, a matrix of rows, and how they walk it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..runtime.device import DeviceFacts
from .problem import power_of_two

MAX_COLUMNS = 8192
"""Values of a row that one program holds; PyTorch computes wider ones."""
_MAX_ROWS = 256  # of a tile


@dataclass(frozen=True)
class LayerNormProblem:
    """One layer normalisation.

    Attributes:
        rows, columns: of the matrix; a row is what is normalised.
        dtype: of the input and its gradient.
        output: dtype of the result and of the gradient that comes back.
        weight, bias: dtypes of the parameters; None where there are none.
        eps: added to the variance.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    output: torch.dtype
    weight: torch.dtype | None = None
    bias: torch.dtype | None = None
    eps: float = 1e-5

    @property
    def unit(self) -> int:
        """What the width is a multiple of, where Triton does not see it by itself."""
        unit = math.gcd(self.columns, 16)
        return unit if unit < 16 else 1

    @property
    def wide(self) -> bool:
        """Whether offsets pass 32 bits, tiles that overhang the end included."""
        return 2 * self.rows * self.columns >= 2**31

    @property
    def vector(self) -> int:
        """Values that a thread loads at once: 16 bytes of the narrower map, if rows allow it."""
        size = min(self.dtype.itemsize, self.output.itemsize)
        return min(16 // size, math.gcd(self.columns, 16))


@dataclass(frozen=True)
class Tile:
    """A tile of (chunks, block_r, lanes): chunks times lanes columns of block_r rows."""

    chunks: int
    block_r: int
    lanes: int
    num_warps: int

    def masked(self, problem: LayerNormProblem) -> bool:
        """Whether some tile overhangs the matrix."""
        return bool(problem.rows % self.block_r or self.chunks * self.lanes != problem.columns)


@dataclass(frozen=True)
class Split:
    """How a gradient is shared out.

    Attributes:
        tile: what a program takes at a time.
        parts: programs, each with a run of tiles and a row of sums for the parameters.
        stages: tiles that are under way at a time, plus one.
        merge_r, merge_c: rows and columns of the parts that the second launch adds at a time.
    """

    tile: Tile
    parts: int
    stages: int
    merge_r: int
    merge_c: int


def _tile(problem: LayerNormProblem, elements: int, values: int) -> Tile:
    """A tile of some values, or of one row that has more; ``values`` of them to a thread."""
    block_c = power_of_two(problem.columns)
    lanes = min(block_c, 32 * problem.vector)
    block_r = min(max(1, elements // block_c), _MAX_ROWS, power_of_two(problem.rows))
    num_warps = min(16, max(1, block_c * block_r // (32 * values)))
    return Tile(block_c // lanes, block_r, lanes, num_warps)


def forward_tile(problem: LayerNormProblem) -> Tile:
    """Tiles of four warps: one tile to a program, many programs at a time."""
    return _tile(problem, 4096, 32)


def gradient_split(problem: LayerNormProblem, device: DeviceFacts) -> Split:
    """Sixteen warps for every multiprocessor, each program with two tiles under way.

    A thread has up to 16 values of either map and as many sums for either parameter: 128 registers,
    with which a multiprocessor holds 16 warps. One tile more under way would take a few more.
    Rows of 257 to 4096 columns come two at a time to programs of few warps, which share a row:
    many small programs were faster there than few large ones, on an H100 (46 and 35 us for 384
    columns, 33 and 27 for 768).
    """
    if problem.columns <= 256:
        tile, per_unit = _tile(problem, 4096, 16), 2
    else:
        # Values of float32 take twice the registers on their way.
        values = 16 if min(problem.dtype.itemsize, problem.output.itemsize) < 4 else 8
        tile = _tile(problem, min(2 * power_of_two(problem.columns), 8192), values)
        tile = replace(tile, num_warps=min(16, max(4, tile.num_warps)))
        per_unit = 16 // tile.num_warps
    steps = -(-problem.rows // tile.block_r)
    parts = max(1, min(per_unit * device.sm_count, steps))
    elements = tile.chunks * tile.block_r * tile.lanes
    read = problem.dtype.itemsize + problem.output.itemsize
    stages = 1 + min(64 * 1024, device.shared_bytes // 2) // (elements * read)
    stages = max(2, min(3, stages))
    return Split(tile, parts, stages, min(256, power_of_two(parts)), 16)


__all__ = [
    "MAX_COLUMNS",
    "LayerNormProblem",
    "Split",
    "Tile",
    "forward_tile",
    "gradient_split",
]
