"""The config spaces of the convolution algorithms, and what their configs ask of a device."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tritonconv.autotune.search import Effort, StrategyName, make_strategy
from tritonconv.autotune.space import Candidate, Space
from tritonconv.autotune.space import space as listed
from tritonconv.conv.algorithms.common import TileConfig
from tritonconv.conv.algorithms.single_geometry import ALIGNED
from tritonconv.conv.dispatch import OPERATORS
from tritonconv.conv.problem import Direction
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.lookup import default_choice
from tritonconv.runtime.operators import get_operator

H100 = nominal_device("sm_90")

problems = st.fixed_dictionaries(
    {
        "batch": st.sampled_from((1, 3, 8, 64)),
        "in_channels": st.sampled_from((1, 3, 6, 16, 72, 512)),
        "out_channels": st.sampled_from((1, 6, 64, 72, 2048)),
        "height": st.integers(7, 60),
        "kernel": st.integers(1, 3),
        "stride": st.integers(1, 3),
        "padding": st.integers(0, 1),
        "dtype": st.sampled_from(("bfloat16", "float32")),
        "precision": st.sampled_from(("ieee", "tf32")),
        "layout": st.sampled_from(("channels_last", "contiguous")),
    }
)


FEW_SHORT_RUNS = {
    "batch": 8,
    "in_channels": 512,
    "out_channels": 2048,
    "height": 8,
    "kernel": 2,
    "stride": 1,
    "padding": 1,
    "dtype": "bfloat16",
    "precision": "ieee",
    "layout": "channels_last",
}


@settings(max_examples=40, deadline=None)
@given(problems, st.sampled_from(Direction), st.sampled_from(("sm_90", "sm_86")), st.booleans())
@example(FEW_SHORT_RUNS, Direction.WGRAD, "sm_90", False)  # boxes had 1,188 configs
def test_spaces_of_arbitrary_problems(
    fields: dict[str, Any], direction: Direction, target: str, grouped: bool
) -> None:
    """All configs are valid, the default too; footprints agree with the plan's grid."""
    if grouped and fields["in_channels"] in (6, 72) and fields["out_channels"] % 6 == 0:
        fields = {**fields, "groups": 6}
    device = nominal_device(target)
    operator = OPERATORS[direction, 2]
    problem = operator.parse(fields)
    for algorithm in operator.candidates(problem):
        space = algorithm.space(problem, device)
        configs = list(space)
        assert configs[0] == space.default
        assert all(space.explain(config) == () for config in configs)
        assert 1 <= len(configs) <= 1000
        for config in configs[:: max(1, len(configs) // 7)]:
            assert all(other in space for other in space.neighbours(config))
            footprint = algorithm.footprint(problem, config, device)
            plan = algorithm.plan(problem, config)
            if plan is None or footprint is None:
                assert plan is None and footprint is None
                continue
            launched = {(math.prod(call.grid), 32 * call.num_warps) for call in plan.calls}
            assert (footprint.programs, footprint.threads) in launched
            assert footprint.launches == len(plan.calls)
            # Tiles pad their edges; strided gradients meet fewer taps than are counted.
            assert footprint.flops >= problem.flops() or direction is Direction.DGRAD
            assert footprint.bytes_loaded > 0 and footprint.steps >= 1


LAYER = {"N": 64, "C": 512, "M": 512, "H": 7, "K": 3, "P": 1}
STEM = {"N": 32, "C": 3, "M": 64, "H": 224, "K": 7, "S": 2, "P": 3}
POINTS = {"N": 1, "C": 64, "M": 256, "H": 56, "K": 1}
PATCHES = {"N": 32, "C": 96, "M": 192, "H": 56, "K": 2, "S": 2}
GROUPS = {"N": 32, "C": 128, "M": 128, "H": 28, "K": 3, "P": 1, "G": 32}
# What untuned calls ran before spaces were typed: choices that were measured (docs/benchmarks).
DEFAULTS: list[tuple[str, dict[str, int], str, TileConfig]] = [
    ("forward", LAYER, "dense", TileConfig(64, 128, 64, 4, 3)),
    ("dgrad", LAYER, "dense", TileConfig(64, 128, 64, 4, 3)),
    ("wgrad", LAYER, "dense", TileConfig(128, 128, 64, 4, 3, split_k=3)),
    ("forward", STEM, "few_channel", TileConfig(128, 64, 32, 4, 3)),
    ("wgrad", STEM, "few_channel", TileConfig(64, 64, 64, 4, 3, split_k=352)),
    ("forward", POINTS, "pointwise", TileConfig(32, 128, 64, 4, 3)),
    ("dgrad", POINTS, "pointwise", TileConfig(32, 64, 64, 4, 3)),
    ("wgrad", POINTS, "pointwise", TileConfig(128, 64, 64, 4, 3, split_k=12)),
    ("forward", PATCHES, "patchify", TileConfig(128, 128, 64, 4, 3)),
    ("dgrad", PATCHES, "patchify", TileConfig(128, 64, 32, 4, 3)),
    ("wgrad", PATCHES, "patchify", TileConfig(128, 32, 64, 4, 3, split_k=11)),
    ("forward", GROUPS, "grouped", TileConfig(128, 16, 16, 4, 3)),
    ("wgrad", GROUPS, "grouped", TileConfig(16, 64, 64, 4, 3, split_k=33)),
]


@pytest.mark.parametrize(("direction", "fields", "name", "config"), DEFAULTS)
def test_defaults_are_those_that_were_measured(
    direction: str, fields: dict[str, int], name: str, config: TileConfig
) -> None:
    operator = OPERATORS[Direction(direction), 2]
    problem = operator.parse({**fields, "dtype": "bfloat16"})
    assert operator.algorithm(name).configs(problem, H100)[0] == config


@pytest.mark.parametrize("direction", ["forward", "wgrad"])
def test_stems_begin_runs_at_whole_vectors_where_that_was_measured(direction: str) -> None:
    """7×7, 3 → 64: 87 for 103 µs and 15 for 20 at batches 64 and 8, slower at batch 1."""
    operator = OPERATORS[Direction(direction), 2]

    def engine(batch: int, target: str = "sm_90") -> int:
        fields = {**STEM, "N": batch, "dtype": "bfloat16", "layout": "channels_last"}
        space = operator.algorithm("single_channel").space(
            operator.parse(fields), nominal_device(target)
        )
        return dict(space.default.as_dict())["engine"]

    assert engine(64) == engine(8) == ALIGNED
    assert engine(1) != ALIGNED and engine(64, "sm_86") != ALIGNED


def test_a_split_is_tried_at_half_and_twice_its_estimate() -> None:
    operator = OPERATORS[Direction.WGRAD, 2]
    problem = operator.parse(
        {"N": 64, "C": 64, "M": 64, "H": 56, "K": 3, "P": 1, "dtype": "bfloat16"}
    )
    space = operator.algorithm("dense").space(problem, H100)
    default = space.default.split_k
    splits = {
        c.split_k for c in space.neighbours(space.default) if c.block_m == space.default.block_m
    }
    assert {default // 2, 2 * default} <= splits


def test_listing_a_space_is_quick() -> None:
    operator = OPERATORS[Direction.WGRAD, 2]
    problem = operator.parse({"N": 64, "C": 256, "M": 256, "H": 14, "K": 3, "P": 1})
    dense = operator.algorithm("dense")
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        count = len(dense.configs(problem, H100))
        seconds.append(time.perf_counter() - begin)
    assert count > 100
    assert min(seconds) < 0.1  # about 5 ms; a slow machine may take longer
    begin = time.perf_counter()
    assert isinstance(dense.configs(problem, H100)[0], TileConfig)
    assert time.perf_counter() - begin < 0.02


FUSED = {"dtype": "bfloat16", "layout": "channels_last"}
STAGE = {"N": 64, "C": 64, "M": 64, "H": 56, "K": 3, "P": 1}
# Measured on an H100: of eight configs of the first, of five to eight of the others.
PREFERRED: list[tuple[str, dict[str, Any], str, TileConfig]] = [
    (
        "conv2d.fused",
        {**STAGE, "K": 1, "P": 0, "prologue": "fused"},
        "fused_input",
        TileConfig(64, 64, 64, 4, 3),
    ),
    (
        "conv2d.fused",
        {**STAGE, "prologue": "fused"},
        "prepared_input",
        TileConfig(128, 64, 64, 4, 3),
    ),
    ("conv2d.fused", {**STAGE, "stats": True}, "fused_input", TileConfig(128, 64, 64, 4, 3)),
    (
        "conv2d.fused",
        {**STAGE, "N": 8, "C": 128, "H": 128, "second_channels": 64},
        "fused_input",
        TileConfig(128, 64, 64, 4, 3),
    ),
    (
        "conv2d.forward",
        {**STAGE, "C": 256, "M": 256, "H": 14, "dtype": "float8_e4m3fn"},
        "dense",
        TileConfig(64, 128, 128, 4, 4),
    ),
    (
        "conv2d.forward",
        {**STAGE, "C": 256, "M": 256, "H": 14, "dtype": "float8_e4m3fn", "precision": "fast_accum"},
        "dense",
        TileConfig(128, 128, 128, 4, 3),
    ),
    (
        "conv2d.forward",
        {**STAGE, "precision": "fast_accum", "dtype": "float8_e4m3fn"},
        "dense",
        TileConfig(128, 64, 64, 4, 4),
    ),
    (
        "conv2d.forward",
        {"N": 64, "C": 1024, "M": 256, "H": 14, "K": 1, "dtype": "float8_e4m3fn"},
        "pointwise",
        TileConfig(64, 128, 128, 4, 4),
    ),
]


@pytest.mark.parametrize(("name", "fields", "algorithm", "config"), PREFERRED)
def test_what_was_measured_best_is_the_default_and_its_rivals_come_next(
    name: str, fields: dict[str, Any], algorithm: str, config: TileConfig
) -> None:
    operator = get_operator(name)
    problem = operator.parse({**FUSED, **fields})
    chosen = default_choice(operator, problem, H100)
    assert (chosen.algorithm, chosen.config) == (algorithm, config)
    space = operator.space(operator.algorithm(algorithm), problem, H100)
    assert list(space)[: 1 + len(space.plausible)] == [config, *space.plausible]
    assert len(space.plausible) >= 4
    assert all(space.explain(other) == () for other in space.plausible)
    # The tuner asks for them in its first batch, whatever its model of the hardware says.
    candidates = listed(operator, problem, H100)
    batch = make_strategy(StrategyName.AUTO, candidates, Effort.QUICK).ask()
    assert {Candidate(algorithm, c) for c in space.plausible} <= {*batch, *dropped(candidates)}


def dropped(space: Space) -> list[Candidate]:
    return [row.candidate for row in space.dropped]


def test_a_pair_is_summed_up_in_steps_that_divide_both_inputs() -> None:
    operator = get_operator("conv2d.fused")
    fields = {"N": 8, "C": 48, "M": 16, "H": 256, "K": 3, "P": 1, "second_channels": 32}
    problem = operator.parse({**FUSED, **fields})
    algorithm = operator.default_algorithm(problem, H100)
    space = operator.space(algorithm, problem, H100)
    assert space.default.block_k == 16
    assert space.explain(space.default) == ()


def test_float8_elsewhere_keeps_the_space_of_the_algorithm() -> None:
    operator = OPERATORS[Direction.FORWARD, 2]
    problem = operator.parse({**FUSED, **STAGE, "dtype": "float8_e4m3fn"})
    older = nominal_device("sm_89")
    dense = operator.algorithm("dense")
    assert operator.space(dense, problem, older).default == dense.space(problem, older).default
