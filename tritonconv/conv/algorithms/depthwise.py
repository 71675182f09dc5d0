"""Depthwise convolution (one input channel per group): direct kernels, no matrix instructions.

A matrix product would use one lane in sixteen. A thread owns a tile of neighbouring outputs of a
few channels and reads every position once for all outputs that it belongs to
(:mod:`.depthwise_source`). The gradient of the weight sums tiles into float32 partials, which a
second kernel adds in a fixed order.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...runtime.device import DeviceFacts, nominal_device
from ...runtime.operators import Algorithm, Config
from ...runtime.plan import Arg, KernelCall, LaunchPlan, Slot
from ...runtime.space import ConfigSpace, Footprint
from ..problem import ConvProblem, Direction
from .common import epilogue_arguments, lifted, slot_dtypes, unsupported_dtype
from .depthwise_model import Shape, compiling, cost, footprint, resident_programs
from .depthwise_source import Stencil
from .depthwise_taps import Axis, axes
from .depthwise_walk import can_walk, generated_kernel
from .depthwise_weights import packed_strides, packing_call, summing_call, weight_strides
from .footprints import cdiv


@dataclass(frozen=True)
class DepthwiseConfig(Config):
    """Tile of a thread, and the threads of a program.

    Attributes:
        block_c: channels of a program; of a thread where lanes run over all channels.
        vector: channels of a thread.
        tile_h, tile_w: neighbouring outputs of a thread; a strided gradient takes all phases of it.
            Rows of a step where a thread walks.
        num_warps: of a program; what is left of its threads by the channels takes more tiles.
        pack: rearrange the weight first, so that lanes read it together.
        rows: filter rows of a program, of a weight gradient; 0 for all.
        split: programs that share the tiles of a weight gradient.
        flat: lanes run over all channels of a tile first, whatever their number.
        walk: rows that a thread walks down, of the outputs or, for the gradient of the weight, of
            the input; 0 for one tile.
        ahead: a walk loads the rows of the next step before it uses those of this one.
    """

    block_c: int
    vector: int
    tile_h: int
    tile_w: int
    num_warps: int
    pack: int = 0
    rows: int = 0
    split: int = 1
    flat: int = 0
    walk: int = 0
    ahead: int = 0

    @property
    def block_p(self) -> int:
        """Tiles of a program."""
        return max(1, 32 * self.num_warps * self.vector // self.block_c)


class Depthwise(Algorithm):
    """Direct kernels for one input channel per group, any channel multiplier."""

    name: ClassVar[str] = "depthwise"
    config_type = DepthwiseConfig
    sources = (
        "common",
        "depthwise_model",
        "depthwise_source",
        "depthwise_taps",
        "depthwise_walk",
        "depthwise_weights",
    )

    def supports(self, problem: ConvProblem) -> str | None:
        """groups == in_channels > 1."""
        if not problem.depthwise:
            return "not one input channel per group"
        if problem.direction is Direction.DGRAD and problem.epilogue is not None:
            return "the gradient of the input takes no epilogue here"
        return unsupported_dtype(problem) or _too_large(problem)

    def space(self, problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[DepthwiseConfig]:
        """Tiles along the fastest axis of the layout, the most promising first."""
        return _space(problem, device)

    def footprint(
        self, problem: ConvProblem, config: DepthwiseConfig, device: DeviceFacts
    ) -> Footprint:
        """Of the direct kernel, which multiplies on scalar units."""
        return footprint(stencil_of(problem, config), _shape(problem, config), device)

    def plan(self, problem: ConvProblem, config: DepthwiseConfig) -> LaunchPlan:
        """One launch, two with packed weights; two for the gradient of the weight."""
        if problem.direction is Direction.WGRAD:
            return _wgrad(problem, config)
        return _product(problem, config)


@functools.lru_cache(maxsize=256)
def _space(problem: ConvProblem, device: DeviceFacts) -> ConfigSpace[DepthwiseConfig]:
    """Configs by predicted time: first the best of every tile, by turns of every kind of kernel."""
    timed = []
    for config in (*_candidates(problem, device), *_walks(problem, device)):
        stencil = stencil_of(problem, config)
        found = cost(stencil, _shape(problem, config), device)
        slow = max(0, compiling(stencil) - _MOST_COMPILING)
        bad = (found.registers > _MOST_REGISTERS) + (slow > 0)
        timed.append(((bad, slow if bad else 0, found.seconds), config))
    timed.sort(key=lambda row: row[0])
    good = [config for rank, config in timed if not rank[0]] or [timed[0][-1]]
    kinds: dict[tuple[int, ...], list[DepthwiseConfig]] = {}
    for config in good:
        kinds.setdefault(_kind(config), []).append(config)
    if problem.direction is Direction.WGRAD:  # where sums can walk they were measured to be faster
        kinds = dict(sorted(kinds.items(), key=lambda item: item[0], reverse=True))
    turns = _by_turns(list(kinds.values()))
    turns += [
        config for found in itertools.zip_longest(*kinds.values()) for config in found if config
    ]
    return ConfigSpace.listed(list(dict.fromkeys(turns))[:_MOST_CONFIGS])


def _kind(config: DepthwiseConfig) -> tuple[int, int, int]:
    """Which kernel a config is of, and how its lanes lie."""
    return config.flat, min(1, config.walk), config.ahead


def _by_turns(kinds: list[list[DepthwiseConfig]]) -> list[DepthwiseConfig]:
    """The best config of every tile, walked or not, one kind of kernel after the other."""
    seen: set[tuple[int, ...]] = set()
    queues = [iter(members) for members in kinds]
    turns = []
    while queues:
        for queue in list(queues):
            for config in queue:
                tile = (config.tile_h, config.tile_w, config.vector, *_kind(config)[1:])
                if tile not in seen:
                    seen.add(tile)
                    turns.append(config)
                    break
            else:
                queues.remove(queue)
    return turns


@functools.lru_cache(maxsize=1024)
def _too_large(problem: ConvProblem) -> str | None:
    """Why no tile of a problem can be written out; None where the best one can.

    Which config is best depends on the device, but hardly how much there is to write.
    """
    device = nominal_device("sm_90")
    config = _space(problem, device).default
    stencil = stencil_of(problem, config)
    registers = cost(stencil, _shape(problem, config), device).registers
    if registers > _MOST_REGISTERS or compiling(stencil) > 3 * _MOST_COMPILING:
        return "a filter or stride too large to be written out in registers"
    return None


_MOST_CONFIGS = 64
_MOST_WALKED_SUMS = 9
"""Taps: walks of 7×7 sums took 113 to 160 µs where tiles took 82."""
_FEW_TURNS = 8
"""Blocks of tiles of a program: with fewer, twice the programs were always faster."""
_MOST_REGISTERS = 300
_MOST_COMPILING = 220_000
"""Of :func:`compiling`: four seconds of the compiler."""


def _candidates(problem: ConvProblem, device: DeviceFacts) -> list[DepthwiseConfig]:
    """Everything worth a prediction."""
    gradient = problem.direction is Direction.DGRAD
    wgrad = problem.direction is Direction.WGRAD
    size = problem.in_size if gradient else problem.out_size
    height, width = lifted(size, 1)[1:]
    channels = problem.in_channels if gradient else problem.out_channels
    filter_rows = lifted(problem.kernel, 1)[1]
    packs: tuple[int, ...] = (0,)
    if problem.x_layout == "contiguous":
        vectors: tuple[int, ...] = (1,)
        blocks: tuple[int, ...] = (1,)
        tiles_h = _tile_sizes(height, (1, 2, 3, 4, 7, 8, 14))
        tiles_w = _tile_sizes(width, (1, 2, 4, 8) if height == 1 else (1, 2, 4))
    else:
        vectors = _vectors(problem, channels)
        blocks = _channel_blocks(channels)
        tiles_h = _tile_sizes(height, (1, 2, 4))
        tiles_w = _tile_sizes(width, (1, 2, 4, 7, 8, 14, 16))
        if not wgrad:
            packs = (1, 0) if problem.taps <= 9 else (1,)
    rows = (0, cdiv(filter_rows, 2)) if wgrad and filter_rows > 3 else (0,)
    tiles = [
        (vector, tile_h, tile_w)
        for vector, tile_h, tile_w in itertools.product(vectors, tiles_h, tiles_w)
        if vector * tile_h * tile_w <= 64
    ]
    most = max(vector * tile_h * tile_w for vector, tile_h, tile_w in tiles)
    found = []
    for (vector, tile_h, tile_w), block_c, warps, pack, chunk in itertools.product(
        tiles, blocks, (1, 2, 4, 8), packs, rows
    ):
        # Threads with little to do, and programs with less than one tile.
        few = vector * tile_h * tile_w * 4 < min(most, 32) or (warps == 1 and block_c > 32)
        if few or not vector <= block_c <= 32 * warps * vector:
            continue
        # Rows of sums are divided where a thread cannot hold them all, and only there.
        if len(rows) > 1 and (chunk > 0) != (vector * problem.taps > 128):
            continue
        config = DepthwiseConfig(block_c, vector, tile_h, tile_w, warps, pack, chunk)
        if wgrad:
            for split in _splits_worth_trying(problem, config, device):
                found.append(dataclasses.replace(config, split=split))
        else:
            found.append(config)
            if _flat_tiles(problem, config):
                found.append(dataclasses.replace(config, block_c=vector, flat=1))
    return list(dict.fromkeys(found))


def _flat_tiles(problem: ConvProblem, config: DepthwiseConfig) -> bool:
    """Whether lanes over all channels are worth a try: one of several blocks stands for all."""
    channels, block = problem.in_channels, config.block_c
    lanes = problem.filters_per_group == 1 and channels % config.vector == 0 and block > 1
    return lanes and block == _channel_blocks(channels)[0] and config.num_warps in (2, 4)


def _walks(problem: ConvProblem, device: DeviceFacts) -> list[DepthwiseConfig]:
    """Walks down the rows of a map, where a filter and its window fit into registers."""
    depth, height, width = _axes(problem, 1, 1, 0)
    dense = problem.filters_per_group == 1 and width.stride == 1 and not problem.wide
    if problem.x_layout == "contiguous" or not dense or not can_walk(height, depth):
        return []
    wgrad = problem.direction is Direction.WGRAD
    if wgrad and problem.taps > _MOST_WALKED_SUMS:
        return []
    channels = problem.in_channels
    rows = height.size if wgrad else height.out
    vectors = [v for v in (8, 4, 2, 1) if channels % v == 0 and v * problem.dtype.itemsize <= 16]
    vectors = [v for v in vectors if v * problem.taps <= 100 and v > wgrad][:2]
    parts = {cdiv(rows, n) for n in ((1, 2, 4, 7) if wgrad else (1, 2, 4))}
    parts = {part for part in parts if part >= height.taps} or {rows}
    blocks = _channel_blocks(channels) if wgrad else (0,)
    tiles_w = _tile_sizes(width.out, (1, 2, 4, 7, 8))
    if wgrad:  # wide windows of sums leave too few warps, masked columns are work for nothing
        tiles_w = tuple(t for t in (2, 4) if width.out % t == 0) or (2,)
    found = []
    for vector, tile_w, step, walk, warps, block_c, ahead in itertools.product(
        vectors,
        tiles_w,
        (1, 2, 4),
        sorted(parts, reverse=True),
        (1,) if wgrad else (1, 4),
        blocks,
        (0,) if wgrad else (0, 1),
    ):
        held = (problem.taps + (height.taps - 1 + step) * tile_w) * vector
        least, most = (96, 120) if wgrad else (64, 200)  # sums with room for many warps
        if not least <= held <= most or step * tile_w * vector * problem.taps > 1600 or step > walk:
            continue
        if not vector <= (block_c or vector) <= 32 * warps * vector:
            continue
        config = DepthwiseConfig(
            block_c or vector, vector, step, tile_w, warps, int(not wgrad), walk=walk, ahead=ahead
        )
        if not wgrad:
            found.append(dataclasses.replace(config, flat=1))
            continue
        stencil = stencil_of(problem, config)
        programs = cdiv(channels, block_c) * cdiv(rows, walk)
        most = cdiv(_tiles(problem, stencil), config.block_p)
        resident = resident_programs(stencil, _shape(problem, config)) * device.sm_count
        for rounds in (1, 3):
            split = max(1, min(most, rounds * resident // programs))
            found.append(dataclasses.replace(config, split=split))
    return list(dict.fromkeys(found))


def _vectors(problem: ConvProblem, channels: int) -> tuple[int, ...]:
    """Channels of a thread: as many as one load brings, fewer where weights take the registers."""
    wide = 1 if problem.dtype.itemsize == 4 or problem.taps > 9 else 2
    return tuple(v for v in (2 * wide, 4 * wide) if channels % v == 0) or (2 - channels % 2,)


def _tile_sizes(size: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of tiles that waste less than a fifth of an axis; the smallest always."""
    kept = tuple(t for t in sizes if cdiv(size, t) * t * 5 < size * 6)
    return kept or sizes[:1]


def _channel_blocks(channels: int) -> tuple[int, ...]:
    """Powers of two that waste less than a fifth of the channels, or what wastes least."""
    padded = {block: cdiv(channels, block) * block for block in (8, 16, 32, 64)}
    kept = tuple(b for b, size in padded.items() if b >= 16 and size * 5 < channels * 6)
    return kept[-2:] or (min(padded, key=lambda block: (padded[block], -block)),)


def _splits_worth_trying(
    problem: ConvProblem, config: DepthwiseConfig, device: DeviceFacts
) -> tuple[int, ...]:
    """Splits that fill the device with 8 and 16 warps of each multiprocessor."""
    stencil = stencil_of(problem, config)
    rows = stencil.filter[1]
    programs = cdiv(problem.out_channels, config.block_c) * cdiv(rows, stencil.height.taps)
    blocks = cdiv(_tiles(problem, stencil), config.block_p)
    wanted = (
        max(1, min(blocks, warps * device.sm_count // (programs * config.num_warps), 2048))
        for warps in (8, 16)
    )
    few, many = wanted
    return (many,) if blocks < _FEW_TURNS * few else tuple(dict.fromkeys((few, many)))


def _shape(problem: ConvProblem, config: DepthwiseConfig) -> Shape:
    dgrad = problem.direction is Direction.DGRAD
    return Shape(
        batch=problem.batch,
        channels=problem.in_channels if dgrad else problem.out_channels,
        block_p=config.block_p,
        block_c=config.block_c,
        vector=config.vector,
        warps=config.num_warps,
        itemsize=problem.dtype.itemsize,
        packed=bool(config.pack),
        split=config.split,
        flat=bool(config.flat),
    )


@functools.lru_cache(maxsize=1024)
def _axes(problem: ConvProblem, tile_h: int, tile_w: int, rows: int) -> tuple[Axis, Axis, Axis]:
    tile: tuple[int, ...] = (1, tile_h, tile_w)
    if problem.direction is Direction.DGRAD:
        depth, *hops = lifted(problem.stride, 1)
        tile = (depth, *(cdiv(t, hop) * hop for t, hop in zip(tile[1:], hops, strict=True)))
    depth_axis, height, width = axes(problem, tile)
    if problem.direction is Direction.WGRAD and 0 < rows < height.taps:
        shift = (cdiv(height.taps, rows) - 1) * rows * height.dilation
        height = dataclasses.replace(height, taps=rows, shift=shift)
    return depth_axis, height, width


def stencil_of(problem: ConvProblem, config: DepthwiseConfig) -> Stencil:
    """What a config's kernel is generated for."""
    gradient = problem.direction is Direction.DGRAD
    found = _axes(problem, config.tile_h, config.tile_w, config.rows)
    channels = problem.in_channels if gradient else problem.out_channels
    tiles = problem.batch * found[-1].tiles
    if not config.walk:
        tiles *= found[0].tiles * found[1].tiles
    groups = channels // config.vector if config.flat else 0
    return Stencil(
        *found,
        multiplier=problem.filters_per_group,
        even=channels % config.block_c == 0,
        full=tiles * max(1, groups) % config.block_p == 0,
        wide=problem.wide,
        known=_known_strides(problem, config),
        unroll=_unroll(problem, found, config.vector),
        filter=lifted(problem.kernel, 1)[:2] if problem.direction is Direction.WGRAD else (0, 0),
        groups=groups,
        walk=config.walk,
        ahead=bool(config.ahead),
    )


_MOST_PRODUCTS = 1024
"""Of a thread, written out in a row: more than that the instruction cache does not hold."""


def _unroll(problem: ConvProblem, found: tuple[Axis, Axis, Axis], vector: int) -> tuple[bool, bool]:
    """Whether planes and rows of the filter are written out; a weight gradient names every tap."""
    if problem.direction is Direction.WGRAD:
        return True, True
    depth, height, width = (sum(map(len, axis.reads().values())) for axis in found)
    most = min(_MOST_PRODUCTS // vector, 400)  # the compiler's time is the other
    return depth * height * width <= most, found[0].tile * height * width <= most


def _known_strides(problem: ConvProblem, config: DepthwiseConfig) -> tuple[tuple[str, int], ...]:
    """Strides between neighbouring columns and taps, where channels are the fastest axis."""
    if (config.block_c == 1 and not config.flat) or problem.wide:
        return ()
    x, y = problem.x_strides[-1], problem.y_strides[-1]
    if problem.direction is Direction.DGRAD:
        x, y = y, x
    known = [("x_sw", x), ("y_sw", y)]
    if config.pack:
        names = ("w_sn", "w_sc", "w_sd", "w_sh", "w_sw")
        known += zip(names, packed_strides(problem), strict=True)
    return tuple(known)


def _tiles(problem: ConvProblem, stencil: Stencil) -> int:
    """Tiles, of a whole column where threads walk."""
    if stencil.walk:
        return problem.batch * stencil.width.tiles
    return problem.batch * math.prod(axis.tiles for _, axis, _ in stencil.axes)


def _maps(problem: ConvProblem) -> tuple[tuple[Arg, Arg], tuple[Arg, Arg]]:
    """(sizes, strides) of the input's map and of the output's."""
    found = tuple(
        (lifted(size, 1), (*strides[:2], *lifted(strides[2:], 0)))
        for size, strides in (
            (problem.in_size, problem.x_strides),
            (problem.out_size, problem.y_strides),
        )
    )
    return found[0], found[1]


def _product(problem: ConvProblem, config: DepthwiseConfig) -> LaunchPlan:
    forward = problem.direction is Direction.FORWARD
    epilogue = epilogue_arguments(problem)
    stencil = stencil_of(problem, config)
    if epilogue.function is not None:
        # (acc, image, channel, …, mask, pointers, strides)
        coordinates = len(epilogue.function.arg_names) - 6
        stencil = dataclasses.replace(stencil, coordinates=coordinates, save_acc=epilogue.save_acc)
    x, y = _maps(problem) if forward else _maps(problem)[::-1]
    channels = problem.out_channels if forward else problem.in_channels
    tiles = _tiles(problem, stencil)
    if config.flat:
        blocks = cdiv(tiles * stencil.groups, config.block_p)
    else:
        blocks = cdiv(tiles, config.block_p) * cdiv(channels, config.block_c)
    segments = cdiv(stencil.height.out, config.walk) if config.walk else 1
    names = ("input", "output") if forward else ("grad_output", "grad_input")
    call = KernelCall(
        generated_kernel(stencil),
        (blocks, segments, 1),
        (
            Slot(names[0]),
            Slot("packed" if config.pack else "weight"),
            Slot(names[1]),
            Slot("acc" if epilogue.save_acc else names[1]),
            epilogue.pointers,
            epilogue.strides,
            problem.batch,
            x[0],
            y[0],
            x[1],
            packed_strides(problem) if config.pack else weight_strides(problem),
            y[1],
            channels,
        ),
        {"EPILOGUE": epilogue.function, "BLOCK_P": config.block_p, "BLOCK_C": config.block_c},
        config.num_warps,
        num_stages=1,
    )
    dtypes = slot_dtypes(problem)
    if not config.pack:
        return LaunchPlan((call,), dtypes)
    packing, space = packing_call(problem)
    return LaunchPlan((packing, call), {**dtypes, "packed": torch.float32}, (space,))


def _wgrad(problem: ConvProblem, config: DepthwiseConfig) -> LaunchPlan:
    stencil = stencil_of(problem, config)
    tiles = _tiles(problem, stencil)
    per_split, splits = _splits(tiles, config)
    planes, rows = stencil.filter
    chunks = cdiv(planes, stencil.depth.taps) * cdiv(rows, stencil.height.taps)
    segments = cdiv(stencil.height.size, config.walk) if config.walk else 1
    x, y = _maps(problem)
    call = KernelCall(
        generated_kernel(stencil),
        (cdiv(problem.out_channels, config.block_c), chunks * segments, splits),
        (
            Slot("grad_output"),
            Slot("input"),
            Slot("partial"),
            problem.batch,
            x[0],
            y[0],
            x[1],
            y[1],
            problem.out_channels,
            per_split,
        ),
        {"BLOCK_P": config.block_p, "BLOCK_C": config.block_c},
        config.num_warps,
        num_stages=1,
    )
    summing, space = summing_call(problem, splits * segments)
    dtypes: dict[str, Any] = {**slot_dtypes(problem), "partial": torch.float32}
    return LaunchPlan((call, summing), dtypes, (space,))


def _splits(tiles: int, config: DepthwiseConfig) -> tuple[int, int]:
    """Tiles of a split, and splits."""
    blocks = cdiv(tiles, config.block_p)
    per_split = cdiv(blocks, max(1, min(config.split, blocks))) * config.block_p
    return per_split, max(1, cdiv(tiles, per_split))
