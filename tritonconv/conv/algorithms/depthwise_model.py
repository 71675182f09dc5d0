"""What a depthwise config costs, counted from its schedule: it orders configs and fills footprints.

Depthwise kernels are bound by the instructions they issue as often as by memory: a thread's tile is
taken apart into multiply-adds, loads, conversions and addresses. The constants are an H100's.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ...runtime.device import DeviceFacts
from ...runtime.space import Footprint
from .depthwise_source import Stencil
from .depthwise_taps import Axis, schedule

_CLOCK = 1.7e9
_MEMORY_RATE = 2.8e12
_CACHE_RATE = 4.5e12
_LAUNCH = 2.0e-6
_REGISTERS = 65536
_LATENCY = 900
"""Cycles until a loaded row is there."""
_WHOLE_LINES = 0.82
"""Tiles whose lanes run over all channels, measured over counted."""
_BEHIND = 1.04
"""Walks that load a row when they need it, likewise."""
_SUMMED = 5e-8
"""Seconds to add the sums of a split."""


@dataclass(frozen=True)
class Shape:
    """What the counts depend on beside the stencil.

    Attributes:
        batch, channels: maps, and channels of the result (of the gradient for a weight's).
        block_p, block_c, vector, warps: tiles and channels of a program, channels of a thread.
        itemsize: bytes of an element.
        packed: weights are read in rows.
        split: programs that share the tiles of a weight gradient.
        flat: lanes run over all channels of a tile first.
    """

    batch: int
    channels: int
    block_p: int
    block_c: int
    vector: int
    warps: int
    itemsize: int
    packed: bool
    split: int
    flat: bool = False


@dataclass(frozen=True)
class Cost:
    """Counts of a whole launch, and what they take.

    Attributes:
        programs: of the grid.
        registers: of a thread, estimated.
        accumulators: of a thread.
        issued: instructions of all warps.
        loaded: bytes that come from beyond the L1 cache.
        stored: bytes written, partial sums twice.
        steps: rows that a program reads, one after the other.
        seconds: predicted.
    """

    programs: int
    registers: int
    accumulators: int
    issued: int
    loaded: int
    stored: int
    steps: int
    seconds: float


@functools.lru_cache(maxsize=4096)
def _counts(axis: Axis) -> tuple[int, int, int, int]:
    """Positions read, (output, tap) pairs, most pairs of a position, extent of what is read."""
    found = axis.reads()
    pairs = [len(served) for served in found.values()]
    reach = max(found, default=0) - min(found, default=0) + 1
    return len(pairs), sum(pairs), max(pairs, default=1), reach


@functools.lru_cache(maxsize=4096)
def _written(axis: Axis, unroll: bool) -> tuple[int, int]:
    """Reads and (output, tap) pairs that the source spells out along an axis."""
    steps = schedule(axis, unroll)
    return len(steps), sum(len(step.pairs) for step in steps)


def compiling(stencil: Stencil) -> int:
    """Memory operations × operations of the source: what the compiler's time grows with."""
    if stencil.walk:
        reads, pairs, _, _ = _counts(stencil.width)
        taps, step = stencil.height.taps, stencil.height.tile
        accesses = step * (reads + stencil.width.tile) + taps * stencil.width.taps
        return accesses * (step * pairs * taps + 8 * accesses)
    unroll = (*stencil.unroll, True)
    (d, h, w) = (
        _written(axis, flag) for (_, axis, _), flag in zip(stencil.axes, unroll, strict=True)
    )
    products = d[1] * h[1] * w[1]
    outputs = stencil.depth.tile * stencil.height.tile * stencil.width.tile
    accesses = d[0] * h[0] * w[0] + outputs
    if stencil.filter == (0, 0):
        # Rows of weights that nothing loops over are loaded once for all outputs.
        once = stencil.depth.taps * stencil.height.taps
        accesses += stencil.width.taps * (once if min(stencil.unroll) else d[1] * h[1])
    return accesses * (products + 8 * accesses)


def _lines(shape: Shape) -> float:
    """Lines of memory that a warp's load touches: a pass each through the L1 cache."""
    across = shape.channels if shape.flat else shape.block_c
    return 32 * shape.vector / across * max(1.0, across * shape.itemsize / 128)


def _resident(registers: int, warps: int) -> int:
    """Programs that the registers of a multiprocessor hold."""
    rounded = -(-min(255, registers) // 8) * 8
    return max(1, min(64, _REGISTERS // (32 * rounded)) // warps)


def _issuing(
    programs: int, warps: int, registers: int, instructions: float, device: DeviceFacts
) -> float:
    """Seconds to issue the instructions of all warps, each so many.

    Few warps hide each other's latencies less: 8, 12 and 16 of a multiprocessor were seen to reach
    0.57, 0.67 and 0.73 of what it can issue.
    """
    resident = _resident(registers, warps)
    each = programs / device.sm_count
    rounds = float(-(-programs // device.sm_count)) if each <= resident else each + 0.3 * resident
    running = min(rounds, resident) * warps
    cycles = rounds * warps * instructions / 4
    return cycles * (running + 6) / running / _CLOCK


def _together(*parts: float) -> float:
    """Times of what overlaps: about the longest, more where others are nearly as long."""
    return 1.05 * sum(part**4 for part in parts) ** 0.25


def _halo(axis: Axis, tiles: int) -> float:
    """Positions that neighbouring tiles read, over those that they own."""
    return ((tiles - 1) * axis.step + _counts(axis)[3]) / (tiles * axis.step)


def cost(stencil: Stencil, shape: Shape, device: DeviceFacts) -> Cost:
    """Counts and prediction of a config."""
    if stencil.walk:
        return _walking(stencil, shape, device)
    d, h, w = stencil.depth, stencil.height, stencil.width
    wgrad = stencil.filter != (0, 0)
    copies = stencil.multiplier if w.gradient else 1
    counts = [_counts(axis) for axis in (d, h, w)]
    pairs = [found[1] for found in counts]
    vector, size = shape.vector, shape.itemsize
    outputs = d.tile * h.tile * w.tile
    convert = 0 if size == 4 else vector
    # Instructions of a thread for one tile. A load may need a predicate and zeros.
    products = pairs[0] * pairs[1] * pairs[2] * vector * copies
    loads = counts[0][0] * counts[1][0] * counts[2][0] * copies
    one = products + loads * (2.5 + convert) + outputs * (vector + 5) + 120
    # Passes through the L1 cache of a warp: of 128 bytes, or of two lines of the cache.
    lines = _lines(shape) if shape.block_c > 1 or shape.flat else w.step * size / 4
    passes = (loads + outputs) * max(1.0, vector * size / 4, lines)
    if wgrad:
        one += outputs * convert
    else:
        weights = copies * w.taps * pairs[0] * pairs[1]
        if min(stencil.unroll):  # rows that several outputs meet are read once
            weights = copies * w.taps * d.taps * h.taps
        if shape.packed:
            one += weights
            passes += weights * vector
        else:  # gathered one by one, and exchanged between lanes where a lane has several
            exchanged = 4 if vector > 1 else 1
            one += weights * vector * (2 + convert) * exchanged
            passes += weights * vector * min(16, shape.block_c) * min(exchanged, 2)

    tiles = shape.batch * d.tiles * h.tiles * w.tiles
    blocks = -(-tiles // shape.block_p)
    blocks_c = -(-shape.channels // shape.block_c)
    if shape.flat:
        blocks, blocks_c = -(-tiles * blocks_c // shape.block_p), 1
    if wgrad:
        planes, rows = stencil.filter
        chunks = -(-planes // d.taps) * -(-rows // h.taps)
        per_split = -(-blocks // max(1, min(shape.split, blocks)))
        splits = -(-blocks // per_split)
        programs = blocks_c * chunks * splits
        turns = per_split
        accumulators = d.taps * h.taps * w.taps * vector
        held = outputs * vector
        end = d.taps * h.taps * w.taps * (20 + 8 * vector)
    else:
        programs, turns, chunks, splits = blocks * blocks_c, 1, 1, 1
        accumulators = outputs * vector
        held = w.taps * vector * counts[1][2]
        end = 0
    registers = accumulators + held + 25 + min(counts[2][0], 16) * max(1, vector * size // 4)
    warps = programs * shape.warps
    issued = warps * (turns * one + end)
    issue = _issuing(programs, shape.warps, registers, turns * one + end, device)
    cache = warps * turns * passes / (device.sm_count * _CLOCK)

    # Of neighbouring tiles, those of one program meet in its L1 cache.
    side = shape.block_p
    if shape.flat:
        side = max(1, side * vector // shape.channels)
    across = min(side, w.tiles)
    down = max(1, min(side // w.tiles, h.tiles))
    halo = _halo(d, 1) * _halo(h, down) * _halo(w, across)
    if shape.block_c > 1 and not shape.flat:
        halo *= max(1.0, 32 / (shape.block_c * size))
    held_c = shape.channels if shape.flat else blocks_c * min(shape.block_c, shape.channels)
    maps = tiles * held_c * size * chunks
    read = int(maps * d.step * h.step * w.step * max(halo, 1.0)) * copies
    written = maps * outputs
    loaded = read + (written if wgrad else 0)
    stored = written
    if wgrad:
        stored = 8 * splits * shape.channels * math.prod(stencil.filter) * w.taps
    memory = (loaded / max(halo, 1.0) / chunks + stored) / _MEMORY_RATE
    seconds = _together(issue, cache, memory, (loaded + stored) / _CACHE_RATE)
    # Between two turns of a loop a program's warps wait together.
    seconds += _LAUNCH * (shape.packed or wgrad) + 0.6 * (turns - 1) * _LATENCY / _CLOCK
    seconds *= 1 + 0.01 * shape.warps
    if shape.flat:
        seconds *= 0.88 if vector * size < 8 else _WHOLE_LINES
    if wgrad:
        seconds += splits * _SUMMED
        if turns < 12 and shape.warps > 1:  # the warps of a program wait for each other's sums
            seconds *= 1.25
    if registers > 255:
        seconds *= 1 + (registers - 255) / 32
    return Cost(
        programs,
        registers,
        accumulators,
        int(issued),
        loaded,
        stored,
        turns * counts[0][0] * counts[1][0],
        seconds,
    )


def _walk_registers(stencil: Stencil, shape: Shape) -> int:
    h, w, step = stencil.height, stencil.width, stencil.height.tile
    wgrad = stencil.filter != (0, 0)
    raw = step * max(1, shape.vector * shape.itemsize // 4)
    held = (h.taps * w.taps + (h.taps - 1 + step) * w.tile) * shape.vector
    return (
        held + (10 if wgrad else 30) + raw * (_counts(w)[0] * (1 + stencil.ahead) + w.tile * wgrad)
    )


def resident_programs(stencil: Stencil, shape: Shape) -> int:
    """Programs of a walk that a multiprocessor holds at a time."""
    return _resident(_walk_registers(stencil, shape), shape.warps)


def _walking(stencil: Stencil, shape: Shape, device: DeviceFacts) -> Cost:
    """Of a kernel that walks down rows: weights, or sums of them, and a window of rows are held."""
    h, w, step = stencil.height, stencil.width, stencil.height.tile
    wgrad = stencil.filter != (0, 0)
    vector, size = shape.vector, shape.itemsize
    reads, pairs, _, _ = _counts(w)
    convert = 0 if size == 4 else vector
    taps = h.taps * w.taps
    moved = (h.taps - 1) * w.tile * vector
    row = pairs * h.taps * vector + reads * (convert + 1.3)
    row += w.tile * (convert + 2 if wgrad else convert / 2 + 2) + 6
    one = step * row + 12 + (moved if wgrad else 0.15 * moved)
    registers = _walk_registers(stencil, shape)
    rows = h.size if wgrad else h.out
    segments = -(-rows // stencil.walk)
    # Rows that are read: of a product also those around its segment.
    walked = rows if wgrad else rows + (segments - 1) * (h.taps - 1)
    turns = -(-walked // (segments * step))
    strips = shape.batch * w.tiles
    if wgrad:
        blocks_c = -(-shape.channels // shape.block_c)
        blocks = -(-strips // shape.block_p)
        each = -(-blocks // max(1, min(shape.split, blocks)))
        splits = -(-blocks // each) * segments
        programs = blocks_c * splits
        start = (h.taps - 1) * w.tile * (vector + 2) + 60
        end = taps * (20 + 8 * vector)
    else:
        programs = -(-strips * shape.channels // (vector * shape.block_p)) * segments
        each, splits = 1, 1
        start, end = taps + 90, 0
    accumulators = taps * vector if wgrad else (h.taps - 1 + step) * w.tile * vector
    instructions = each * (turns * one + start) + end
    warps = programs * shape.warps
    issue = _issuing(programs, shape.warps, registers, instructions, device)
    resident = _resident(registers, shape.warps)
    waves = max(1.0, programs / (resident * device.sm_count))
    waiting = 0.5 if stencil.ahead else 1.0
    latency = waves * (each * turns * waiting + 2) * _LATENCY / _CLOCK
    accesses = step * (reads + w.tile) * turns * each
    passes = accesses * max(1.0, vector * size / 4, _lines(shape))
    passes += 0 if wgrad else taps * vector * 0.5 + taps
    cache = warps * passes / (device.sm_count * _CLOCK)

    side = shape.block_p
    if shape.flat:
        side = max(1, side * vector // shape.channels)
    maps = shape.batch * shape.channels * size * w.out
    loaded = maps * _halo(w, min(side, w.tiles)) * walked
    stored = maps * h.out
    if wgrad:
        loaded += maps * (h.out + (segments - 1) * (h.taps - 1))
        stored = 8 * splits * shape.channels * taps
    compulsory = maps * (h.size + h.out) + (stored if wgrad else 0)
    seconds = _together(
        issue, cache, compulsory / _MEMORY_RATE, (loaded + stored) / _CACHE_RATE, latency
    )
    seconds = (seconds + _LAUNCH) * (1 + 0.01 * shape.warps)
    if not stencil.ahead:
        seconds *= _BEHIND
    if wgrad:
        seconds += splits * _SUMMED
    if registers > 232:
        seconds *= 1 + (registers - 232) / 32
    return Cost(
        programs,
        registers,
        accumulators,
        int(warps * instructions),
        int(loaded),
        int(stored),
        turns * each * step,
        seconds,
    )


def footprint(stencil: Stencil, shape: Shape, device: DeviceFacts) -> Footprint:
    """Of the direct kernel; whatever is issued takes the place of a multiply-add, counts as one."""
    found = cost(stencil, shape, device)
    lanes = 64 if device.arch.startswith("gfx") else 32
    return Footprint(
        programs=found.programs,
        threads=shape.warps * lanes,
        shared_bytes=0,
        accumulators=found.accumulators,
        bytes_loaded=found.loaded,
        bytes_stored=found.stored,
        flops=2 * 32 * found.issued,
        steps=max(1, found.steps),
        in_flight=4,
        launches=1 + (shape.packed or stencil.filter != (0, 0)),
        matrix=False,
    )
