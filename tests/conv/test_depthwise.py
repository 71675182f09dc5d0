"""Depthwise kernels of one to three spatial axes, called through the algorithm itself."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tritonconv.conv.algorithms import depthwise, depthwise_source
from tritonconv.conv.algorithms.common import slot_dtypes
from tritonconv.conv.algorithms.depthwise import Depthwise, DepthwiseConfig, stencil_of
from tritonconv.conv.algorithms.depthwise_model import compiling
from tritonconv.conv.algorithms.depthwise_taps import Axis, schedule
from tritonconv.conv.dispatch import ConvOperator
from tritonconv.conv.problem import ConvProblem, Direction
from tritonconv.runtime.accuracy import check
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.launch import Executable

H100 = nominal_device("sm_90")
DEPTHWISE = Depthwise()


def case(rank: int, **fields: Any) -> tuple[int, dict[str, Any]]:
    """Rank and named values of a problem."""
    return rank, fields


CASES = {
    "1-D": case(1, N=2, C=8, M=8, W=21, K=7, P=3, G=8),
    "1-D, causal, dilation": case(1, N=1, C=4, M=4, W=13, out_width=13, K=3, P=4, dilation=2, G=4),
    "1-D, stride 3": case(1, N=1, C=6, M=6, W=17, K=4, S=3, P=1, G=6),
    "2-D": case(2, N=2, C=16, M=16, H=9, W=7, K=5, P=2, G=16),
    "2-D, 3x3": case(2, N=3, C=20, M=20, H=5, W=8, K=3, P=1, G=20),
    "2-D, no padding, a rest of rows": case(2, N=2, C=4, M=4, H=7, W=6, K=3, G=4),
    "2-D, 4x3, dilated columns": case(
        2, N=1, C=8, M=8, H=6, W=9, K="4x3", P="3x2", dilation="1x2", G=8
    ),
    "2-D, stride 2": case(2, N=1, C=8, M=8, H=9, W=10, K=3, S=2, P=1, G=8),
    "2-D, stride 2x3, dilation 3x2": case(
        2, N=1, C=4, M=4, H=11, W=12, K="3x2", S="2x3", P="3x1", dilation="3x2", G=4
    ),
    "2-D, stride above kernel": case(2, N=1, C=4, M=4, H=8, W=7, K=1, S=3, G=4),
    "2-D, multiplier 3": case(2, N=1, C=4, M=12, H=6, W=5, K=3, P=1, G=4),
    "2-D, no padding, a rest": case(2, N=1, C=3, M=3, H=8, W=9, K=3, S=2, G=3),
    "2-D, wide padding": case(2, N=1, C=2, M=2, H=2, W=3, K=3, P=4, G=2),
    "3-D": case(3, N=1, C=8, M=8, D=4, H=5, W=6, K=3, P=1, G=8),
    "3-D, stride 2": case(3, N=1, C=4, M=8, D=5, H=4, W=7, K="2x3x3", S=2, P=1, G=4),
    "3-D, stride 1x2x2, dilation 2x1x1": case(
        3, N=1, C=3, M=3, D=6, H=5, W=5, K=3, S="1x2x2", P="2x1x1", dilation="2x1x1", G=3
    ),
}
LAYOUTS = ("channels_last", "contiguous")


def parse(name: str, direction: Direction, **more: Any) -> tuple[ConvOperator, ConvProblem]:
    rank, fields = CASES[name]
    operator = ConvOperator(direction, rank)
    return operator, operator.parse({**fields, **more})


def run(
    operator: ConvOperator,
    problem: ConvProblem,
    config: DepthwiseConfig,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Outputs of the kernels, judged against float64; outputs held NaN before."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = operator.make_tensors(problem, device, generator)
    exact = operator.reference(problem, tensors, torch.float64)
    plain = operator.reference(problem, tensors, problem.dtype)
    executable = Executable(DEPTHWISE.plan(problem, config), tuple(slot_dtypes(problem)))
    executable(*tensors.values())
    for output in operator.outputs(problem):
        verdict = check(tensors[output], exact[output], plain[output], dtype=problem.dtype)
        assert verdict.ok, f"{problem} {config} {output}: {verdict}"
    return {output: tensors[output] for output in operator.outputs(problem)}


def default(problem: ConvProblem) -> DepthwiseConfig:
    return DEPTHWISE.space(problem, H100).default


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("name", CASES)
def test_default_config(name: str, direction: Direction, layout: str, device: torch.device) -> None:
    operator, problem = parse(name, direction, layout=layout)
    run(operator, problem, default(problem), device)


# Tiles that do and do not divide the maps, lanes over channels or pixels, loops and none.
CONFIGS = {
    "one output": DepthwiseConfig(16, 1, 1, 1, 1),
    "rows": DepthwiseConfig(8, 2, 3, 1, 1, pack=1),
    "columns": DepthwiseConfig(8, 4, 1, 5, 2, pack=1),
    "patch": DepthwiseConfig(4, 4, 2, 4, 1),
    "one channel": DepthwiseConfig(1, 1, 4, 2, 1),
}
TILED = ("1-D", "2-D", "2-D, stride 2x3, dilation 3x2", "2-D, multiplier 3", "3-D, stride 2")


@pytest.mark.interpreter
@pytest.mark.parametrize("tile", CONFIGS)
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("name", TILED)
def test_tiles(name: str, direction: Direction, tile: str, device: torch.device) -> None:
    config = CONFIGS[tile]
    if direction is Direction.WGRAD:
        config = dataclasses.replace(config, pack=0, split=3, rows=2)
    operator, problem = parse(name, direction)
    run(operator, problem, config, device)


# Segments that do and do not divide the map, steps that do and do not divide a segment.
WALKS = {
    "whole map": DepthwiseConfig(2, 2, 1, 3, 1, pack=1, flat=1, walk=100),
    "steps of two": DepthwiseConfig(4, 4, 2, 4, 1, pack=1, flat=1, walk=4),
    "one channel, ahead": DepthwiseConfig(1, 1, 1, 7, 2, pack=1, flat=1, walk=3, ahead=1),
    "steps of three, ahead": DepthwiseConfig(2, 2, 3, 2, 1, pack=1, flat=1, walk=4, ahead=1),
    "a tile, lanes over all channels": DepthwiseConfig(4, 4, 2, 3, 1, pack=1, flat=1),
    "the same, weights in place": DepthwiseConfig(1, 1, 1, 4, 1, flat=1),
}
WALKED = ("2-D", "2-D, 3x3", "2-D, no padding, a rest of rows", "2-D, 4x3, dilated columns")
WEIGHT_WALKS = {
    "whole map": DepthwiseConfig(8, 2, 1, 3, 1, split=2, walk=100),
    "steps of two": DepthwiseConfig(16, 4, 2, 2, 1, split=3, walk=4),
    "steps of three": DepthwiseConfig(8, 4, 3, 5, 2, walk=5),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.DGRAD])
@pytest.mark.parametrize("name", WALKED)
def test_walks(name: str, direction: Direction, walk: str, device: torch.device) -> None:
    operator, problem = parse(name, direction, layout="channels_last")
    run(operator, problem, WALKS[walk], device)


@pytest.mark.interpreter
@pytest.mark.parametrize("walk", WEIGHT_WALKS)
@pytest.mark.parametrize("name", WALKED)
def test_weight_gradients_by_rows(name: str, walk: str, device: torch.device) -> None:
    operator, problem = parse(name, Direction.WGRAD, layout="channels_last")
    run(operator, problem, WEIGHT_WALKS[walk], device)


@pytest.mark.interpreter
@pytest.mark.parametrize("epilogue", ["fused", "fused+acc"])
@pytest.mark.parametrize("walk", ["steps of two", "steps of three, ahead"])
def test_walks_with_an_epilogue(epilogue: str, walk: str, device: torch.device) -> None:
    operator, problem = parse("2-D, 3x3", Direction.FORWARD, epilogue=epilogue)
    run(operator, problem, WALKS[walk], device)


def test_spaces_begin_with_every_kind_of_kernel() -> None:
    for direction in (Direction.FORWARD, Direction.DGRAD):
        configs = list(DEPTHWISE.space(layer("7x7", direction, "channels_last"), H100))[:4]
        assert {(c.flat, min(1, c.walk)) for c in configs} == {(0, 0), (1, 0), (1, 1)}
    for name in ("1-D", "3-D", "3x3, stride 2"):
        assert not any(
            c.walk for c in DEPTHWISE.space(layer(name, Direction.FORWARD, "channels_last"), H100)
        )


MEASURED = {  # the fastest on an H100, or within a few percent of it
    ("7x7", Direction.FORWARD): DepthwiseConfig(1, 1, 1, 7, 1, 1, flat=1, walk=56, ahead=1),
    ("7x7", Direction.WGRAD): DepthwiseConfig(16, 2, 4, 4, 4, split=44),
    ("7x7, small", Direction.FORWARD): DepthwiseConfig(1, 1, 1, 7, 1, 1, flat=1, walk=14, ahead=1),
    ("7x7, small", Direction.WGRAD): DepthwiseConfig(32, 4, 2, 7, 1, rows=4, split=88),
    ("3x3", Direction.FORWARD): DepthwiseConfig(4, 4, 4, 4, 4, 1, flat=1),
    ("3x3", Direction.WGRAD): DepthwiseConfig(16, 4, 2, 4, 1, split=112, walk=56),
    ("3x3, small", Direction.FORWARD): DepthwiseConfig(4, 4, 2, 7, 2, 1, flat=1),
    ("3x3, small", Direction.WGRAD): DepthwiseConfig(32, 8, 1, 2, 1, split=56, walk=14),
    ("3-D", Direction.DGRAD): DepthwiseConfig(4, 4, 4, 4, 2, 1, flat=1),
    ("3-D", Direction.WGRAD): DepthwiseConfig(32, 4, 4, 4, 8, split=66),
}


@pytest.mark.parametrize(("name", "direction"), MEASURED)
def test_default_of_measured_layers(name: str, direction: Direction) -> None:
    assert default(layer(name, direction, "channels_last")) == MEASURED[name, direction]


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("name", ["1-D", "2-D, 3x3"])
def test_half_precision(name: str, direction: Direction, dtype: str, device: torch.device) -> None:
    operator, problem = parse(name, direction, dtype=dtype)
    run(operator, problem, default(problem), device)


@pytest.mark.interpreter
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize(
    "layout", [("strided",) * 3, ("contiguous", "contiguous", "channels_last")]
)
def test_other_strides(
    direction: Direction, layout: tuple[str, str, str], device: torch.device
) -> None:
    names = ("layout", "weight_layout", "output_layout")
    operator, problem = parse("2-D, stride 2", direction, **dict(zip(names, layout, strict=True)))
    run(operator, problem, default(problem), device)


@pytest.mark.interpreter
@pytest.mark.parametrize("direction", Direction)
def test_64_bit_offsets(
    direction: Direction, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ConvProblem, "wide", property(lambda self: True))
    operator, problem = parse("2-D, multiplier 3", direction)
    assert stencil_of(problem, CONFIGS["rows"]).wide
    config = dataclasses.replace(CONFIGS["rows"], pack=int(direction is not Direction.WGRAD))
    run(operator, problem, config, device)


@pytest.mark.interpreter
@pytest.mark.parametrize("epilogue", ["fused", "fused+acc"])
@pytest.mark.parametrize("name", ["2-D, 3x3", "2-D, stride 2"])
def test_fused_epilogue(name: str, epilogue: str, device: torch.device) -> None:
    operator, problem = parse(name, Direction.FORWARD, epilogue=epilogue)
    outputs = run(operator, problem, CONFIGS["columns"], device)
    assert set(outputs) == ({"output", "acc"} if "acc" in epilogue else {"output"})


@pytest.mark.interpreter
@pytest.mark.parametrize("rows", [0, 2, 3])
@pytest.mark.parametrize("split", [1, 2, 999])
def test_splits_and_chunks_of_rows(rows: int, split: int, device: torch.device) -> None:
    operator, problem = parse("2-D", Direction.WGRAD)
    config = DepthwiseConfig(16, 2, 2, 3, 1, rows=rows, split=split)
    first, second = (run(operator, problem, config, device) for _ in range(2))
    assert torch.equal(first["grad_weight"], second["grad_weight"])


axis_values = st.fixed_dictionaries(
    {
        "taps": st.integers(1, 7),
        "stride": st.integers(1, 3),
        "padding": st.integers(0, 4),
        "dilation": st.integers(1, 3),
        "gradient": st.booleans(),
        "tile": st.integers(1, 5),
        "size": st.integers(1, 40),
        "out": st.integers(1, 40),
    }
)


@hypothesis_settings(max_examples=200, deadline=None)
@given(axis_values)
def test_an_axis_reads_what_the_convolution_reads(values: dict[str, Any]) -> None:
    """Every product once, at the position that the definition says; loops spell out the same."""
    if values["gradient"]:
        values = {**values, "tile": values["tile"] * values["stride"]}
    axis = Axis(**values)
    expected = set()
    for output in range(axis.tile):
        for tap in range(axis.taps):
            if not axis.gradient:
                offset = output * axis.stride + tap * axis.dilation - axis.padding
                expected.add((offset, output, tap))
            elif (output + axis.padding - tap * axis.dilation) % axis.stride == 0:
                offset = (output + axis.padding - tap * axis.dilation) // axis.stride
                expected.add((offset, output, tap))
    for unroll in (True, False):
        steps = schedule(axis, unroll)
        spelled = [
            (step.offset + turn * step.hop, output, tap + turn * step.tap_hop)
            for step in steps
            for turn in range(step.count)
            for output, tap in step.pairs
        ]
        assert len(spelled) == len(set(spelled))
        assert set(spelled) == expected
        assert unroll <= all(step.count == 1 for step in steps)


@hypothesis_settings(max_examples=200, deadline=None)
@given(axis_values)
def test_bounds_are_left_out_only_where_no_tile_crosses_them(values: dict[str, Any]) -> None:
    if values["gradient"]:
        values = {**values, "tile": values["tile"] * values["stride"]}
    axis = Axis(**values)
    for offset in axis.reads():
        positions = [tile * axis.step + offset for tile in range(axis.tiles)]
        assert axis.below(offset) == (min(positions) < 0)
        assert axis.above(offset) == (max(positions) >= axis.size)


LAYERS = {
    "7x7": (2, dict(N=64, C=96, M=96, H=56, K=7, P=3, G=96)),
    "7x7, small": (2, dict(N=64, C=384, M=384, H=14, K=7, P=3, G=384)),
    "3x3": (2, dict(N=64, C=144, M=144, H=56, K=3, P=1, G=144)),
    "3x3, small": (2, dict(N=64, C=576, M=576, H=14, K=3, P=1, G=576)),
    "3x3, stride 2": (2, dict(N=64, C=240, M=240, H=28, K=3, S=2, P=1, G=240)),
    "1-D": (1, dict(N=16, C=512, M=512, W=4096, K=7, P=3, G=512)),
    "3-D": (3, dict(N=4, C=64, M=64, D=32, H=56, W=56, K=3, P=1, G=64)),
}


def layer(name: str, direction: Direction, layout: str) -> ConvProblem:
    rank, fields = LAYERS[name]
    fields = {**fields, "dtype": "bfloat16", "layout": layout}
    return ConvOperator(direction, rank).parse(fields)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("name", LAYERS)
def test_spaces_of_real_layers(name: str, direction: Direction, layout: str) -> None:
    problem = layer(name, direction, layout)
    space = DEPTHWISE.space(problem, H100)
    configs = list(space)
    assert len(configs) >= 8
    # The first ones are unlike each other, for whoever tries only a few.
    assert len({(c.tile_h, c.tile_w, c.vector) for c in configs[:4]}) >= 3
    for config in configs[:8]:
        stencil = stencil_of(problem, config)
        assert compiling(stencil) <= depthwise._MOST_COMPILING
        footprint = DEPTHWISE.footprint(problem, config, H100)
        plan = DEPTHWISE.plan(problem, config)
        assert plan is not None
        x, y, z = plan.calls[config.pack].grid
        assert footprint.programs == x * y * z
        assert footprint.flops >= problem.flops()
        assert footprint.accumulators <= 128


def test_lanes_of_channels_last_maps_are_channels() -> None:
    for direction in Direction:
        wide = DEPTHWISE.space(layer("7x7", direction, "channels_last"), H100)
        assert all(c.flat or (c.block_c >= 16 and c.vector > 1) for c in wide)
        assert all(c.block_c == c.vector for c in wide if c.flat)
        narrow = DEPTHWISE.space(layer("7x7", direction, "contiguous"), H100)
        assert all(config.block_c == 1 for config in narrow)


def test_an_untuned_call_waits_little_for_its_config() -> None:
    seconds = []
    for batch in range(50, 55):
        problem = dataclasses.replace(layer("7x7", Direction.FORWARD, LAYOUTS[0]), batch=batch)
        begin = time.perf_counter()
        assert DEPTHWISE.configs(problem, H100)[0]
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.25  # about 15 ms


def test_positions_are_read_once_for_all_outputs_of_a_tile() -> None:
    """A tile of 2x8 outputs under 7x7 taps: 14 loads in each of 8 rows, not 16 x 49."""
    problem = layer("7x7", Direction.FORWARD, "channels_last")
    config = DepthwiseConfig(16, 4, 2, 8, 4, pack=1)
    source = depthwise_source.product_source(stencil_of(problem, config))
    loads = [line for line in source.splitlines() if "x = as_float(tl.load(x_row" in line]
    assert len(loads) == 3 * 14  # the first row, the last, and those between as a loop
    assert sum("in_column" in line or "at >=" in line for line in loads) < len(loads) / 2
