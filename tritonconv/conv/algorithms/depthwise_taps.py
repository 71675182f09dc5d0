"""Which taps of a filter meet which outputs of a tile: the schedule behind the depthwise kernels.

Along one axis a tile owns a few neighbouring outputs. Every position that they read, counted from
the first one's, is read once and serves all (output, tap) pairs that it belongs to. The gradient
of the input is such a stencil too: it reads the gradient of the output, and a stride shows as
outputs that meet only every other tap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..problem import ConvProblem, Direction
from .common import lifted


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a stencil, with the tile that a thread owns along it.

    Attributes:
        taps, stride, padding, dilation: of the convolution.
        gradient: the stencil of the input's gradient.
        tile: outputs of a tile; a multiple of the stride for a gradient.
        size, out: positions that are read, and outputs.
        shift: the most by which a program moves its reads up, to sum later taps of the filter.
    """

    taps: int
    stride: int
    padding: int
    dilation: int
    gradient: bool
    tile: int
    size: int
    out: int
    shift: int = 0

    @property
    def step(self) -> int:
        """Positions from one tile's first to the next one's."""
        return self.tile // self.stride if self.gradient else self.tile * self.stride

    @property
    def tiles(self) -> int:
        """Tiles that cover the outputs."""
        return -(-self.out // self.tile)

    @property
    def even(self) -> bool:
        """Whether every output of every tile exists."""
        return self.out % self.tile == 0

    def reads(self) -> dict[int, list[tuple[int, int]]]:
        """Offset of every position that is read -> the (output, tap) pairs that it serves."""
        found: dict[int, list[tuple[int, int]]] = {}
        for output in range(self.tile):
            for tap in range(self.taps):
                if not self.gradient:
                    offset = output * self.stride + tap * self.dilation - self.padding
                else:
                    offset, rest = divmod(output + self.padding - tap * self.dilation, self.stride)
                    if rest:
                        continue
                found.setdefault(offset, []).append((output, tap))
        return dict(sorted(found.items()))

    def below(self, offset: int) -> bool:
        """Whether the position at an offset comes before the first one for some tile."""
        return offset < 0

    def above(self, offset: int) -> bool:
        """Whether the position at an offset comes after the last one for some tile."""
        return (self.tiles - 1) * self.step + offset + self.shift >= self.size


@dataclass(frozen=True)
class Step:
    """Positions that are read one after the other, and what they serve.

    A single one (``count`` 1), or the turns of a loop: turn i reads at ``offset + i·hop`` and
    serves the pairs (output, tap + i·tap_hop).
    """

    offset: int
    pairs: tuple[tuple[int, int], ...]
    count: int = 1
    hop: int = 0
    tap_hop: int = 0

    @property
    def last(self) -> int:
        """The offset of the last turn."""
        return self.offset + (self.count - 1) * self.hop


def schedule(axis: Axis, unroll: bool) -> tuple[Step, ...]:
    """The reads of an axis as single steps, the regular ones as a loop unless ``unroll``."""
    single = tuple(Step(offset, tuple(pairs)) for offset, pairs in axis.reads().items())
    if unroll or len(single) < 3:
        return single
    steps: list[Step] = []
    for step in single:
        joined = _joined(steps[-1], step) if steps else None
        if joined is None:
            steps.append(step)
        else:
            steps[-1] = joined
    return tuple(steps)


def _joined(step: Step, more: Step) -> Step | None:
    """One more turn of a loop, where its pairs go on as those before."""
    if [output for output, _ in step.pairs] != [output for output, _ in more.pairs]:
        return None
    taps = {b - a for (_, a), (_, b) in zip(step.pairs, more.pairs, strict=True)}
    if len(taps) != 1:
        return None
    hop, tap_hop = more.offset - step.offset, taps.pop()
    if step.count > 1:
        hop, rest = divmod(hop, step.count)
        tap_hop, more_rest = divmod(tap_hop, step.count)
        if rest or more_rest or (hop, tap_hop) != (step.hop, step.tap_hop):
            return None
    return Step(step.offset, step.pairs, step.count + 1, hop, tap_hop)


def axes(problem: ConvProblem, tile: Sequence[int]) -> tuple[Axis, Axis, Axis]:
    """Depth, height and width of a problem's stencil, for tiles of these sizes.

    The gradient of the weight walks over the forward stencil.
    """
    gradient = problem.direction is Direction.DGRAD
    sizes = (problem.out_size, problem.in_size) if gradient else (problem.in_size, problem.out_size)
    found = [
        Axis(*values)
        for values in zip(
            lifted(problem.kernel, 1),
            lifted(problem.stride, 1),
            lifted(problem.padding, 0),
            lifted(problem.dilation, 1),
            (gradient,) * 3,
            tile,
            lifted(sizes[0], 1),
            lifted(sizes[1], 1),
            strict=True,
        )
    ]
    return found[0], found[1], found[2]
