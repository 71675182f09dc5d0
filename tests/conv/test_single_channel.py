"""Direct kernels for one to four input channels against PyTorch in float64, for every rank."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from tritonconv.conv.algorithms import ALGORITHMS
from tritonconv.conv.algorithms.common import slot_dtypes
from tritonconv.conv.algorithms.single_channel import SingleChannel
from tritonconv.conv.algorithms.single_geometry import (
    ALIGNED,
    FLAT,
    FMA,
    MMA,
    RUNS,
    SingleConfig,
    runs_of,
)
from tritonconv.conv.dispatch import ConvOperator
from tritonconv.conv.problem import ConvProblem, Direction
from tritonconv.runtime.accuracy import check
from tritonconv.runtime.device import device_facts, nominal_device
from tritonconv.runtime.launch import Executable

from .cases import Fields, fields

pytestmark = pytest.mark.interpreter

ALGORITHM = SingleChannel()

PROBLEMS: dict[str, tuple[int, Fields]] = {
    "1x1": (2, fields(N=2, C=1, M=5, H=5, W=7, K=1)),
    "3x3": (2, fields(N=2, C=1, M=17, H=9, W=19, K=3, P=1)),
    "3x3, many filters": (2, fields(N=1, C=1, M=130, H=7, W=7, K=3, P=1)),
    "5x5, no padding": (2, fields(N=1, C=1, M=8, H=12, W=37, K=5)),
    "one filter, 11x11": (2, fields(N=1, C=1, M=1, H=13, W=40, K=11, P=5)),
    "three channels": (2, fields(N=2, C=3, M=16, H=8, W=18, K=3, P=1)),
    "stem": (2, fields(N=1, C=3, M=4, H=13, W=21, K=7, S=2, P=3, dtype="float16")),
    "stride 3x2, kernel 2x3": (2, fields(N=1, C=2, M=5, H=9, W=18, K="2x3", S="3x2")),
    "kernel below stride": (2, fields(N=1, C=1, M=4, H=8, W=17, K=1, S=2)),
    "dilation 2x3": (2, fields(N=1, C=1, M=4, H=9, W=20, K=3, P=2, dilation="2x3")),
    "padding beyond the kernel": (2, fields(N=1, C=1, M=4, H=4, W=3, K=3, P="4x3")),
    "one of everything": (2, fields(N=1, C=1, M=1, H=1, W=1, K=1)),
    "row": (1, fields(N=3, C=1, M=18, W=70, K=7, P=3)),
    "row, stride 4": (1, fields(N=2, C=2, M=6, W=83, K=9, S=4, P=2)),
    "volume": (3, fields(N=2, C=1, M=16, D=5, H=6, W=21, K=3, P=1)),
    "volume, stride 2": (3, fields(N=1, C=1, M=3, D=6, H=7, W=10, K="3x2x3", S=2, P=1)),
    "volume, two channels": (3, fields(N=1, C=2, M=5, D=4, H=6, W=9, K=2, dilation="1x1x2")),
}
CASES = [
    (case, direction)
    for case, (rank, values) in PROBLEMS.items()
    for direction in Direction
    if ALGORITHM.supports(ConvOperator(direction, rank).parse(values)) is None
]
SOME = ("3x3", "stem", "row, stride 4", "volume")


def problem_of(case: str, direction: Direction, **more: Any) -> tuple[ConvOperator, ConvProblem]:
    rank, values = PROBLEMS[case]
    operator = ConvOperator(direction, rank)
    return operator, operator.parse({**values, **more})


def run_and_check(
    operator: ConvOperator,
    problem: ConvProblem,
    device: torch.device,
    config: SingleConfig | None = None,
) -> dict[str, torch.Tensor]:
    """Run on fresh tensors whose outputs hold NaN, and judge every output."""
    assert ALGORITHM.supports(problem) is None
    if config is None:
        config = ALGORITHM.space(problem, device_facts()).default
    tensors = operator.make_tensors(problem, device, torch.Generator(device).manual_seed(0))
    exact = operator.reference(problem, tensors, torch.float64)
    plain = operator.reference(problem, tensors, problem.dtype)
    Executable(ALGORITHM.plan(problem, config), tuple(slot_dtypes(problem)))(*tensors.values())
    outputs = operator.outputs(problem)
    for output in outputs:
        verdict = check(tensors[output], exact[output], plain[output], dtype=problem.dtype)
        assert verdict.ok, f"{problem} {config} {output}: {verdict}"
    return {output: tensors[output] for output in outputs}


LAYOUTS = ("contiguous", "channels_last")


def layout_of(*names: str) -> str:
    """Both layouts of everything cost twice the time; the parity of the names picks one."""
    return LAYOUTS[sum(map(len, names)) % 2]


@pytest.mark.parametrize(("case", "direction"), CASES, ids=str)
def test_default_config(case: str, direction: Direction, device: torch.device) -> None:
    operator, problem = problem_of(case, direction, layout=layout_of(case, direction))
    run_and_check(operator, problem, device)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, "bfloat16") for case in SOME), ("3x3", "float16"), ("volume", "tf32")],
)
@pytest.mark.parametrize("direction", Direction, ids=str)
def test_matrix_types(case: str, direction: Direction, dtype: str, device: torch.device) -> None:
    precision = {"dtype": "float32", "precision": dtype} if dtype == "tf32" else {"dtype": dtype}
    operator, problem = problem_of(case, direction, **precision)
    run_and_check(operator, problem, device)


def spread(problem: ConvProblem, count: int) -> list[SingleConfig]:
    """Configs spread over the space, and reductions split unevenly."""
    space = ALGORITHM.space(problem, device_facts())
    chosen = [space[k * (len(space) - 1) // count] for k in range(1, count + 1)]
    if problem.direction is Direction.WGRAD:
        chosen += [dataclasses.replace(space.default, split=split) for split in (1, 999)]
    return chosen


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("case", "span"),
    [("3x3", 2), ("three channels", 4), ("stem", 1), ("volume", 8), ("volume, two channels", 4)],
)
def test_weight_gradient_of_runs(case: str, span: int, layout: str, device: torch.device) -> None:
    operator, problem = problem_of(case, Direction.WGRAD, dtype="float16", layout=layout)
    for split in (1, 3):
        config = SingleConfig(RUNS, 2, 64, 16, 4, 3, split=split, span=span)
        run_and_check(operator, problem, device, config)


ALIGNED_CASES = {
    "stem": (2, "channels_last"),
    "three channels": (8, "channels_last"),
    "row, stride 4": (1, "channels_last"),
    "volume": (8, "contiguous"),
    "3x3": (4, "contiguous"),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", ALIGNED_CASES)
def test_runs_that_begin_at_whole_vectors(case: str, dtype: str, device: torch.device) -> None:
    """Each starts before its first window by what makes all of them start at a vector."""
    span, layout = ALIGNED_CASES[case]
    for direction in (Direction.FORWARD, Direction.WGRAD):
        operator, problem = problem_of(case, direction, dtype=dtype, layout=layout)
        aligned, plain = runs_of(problem, span, ALIGNED), runs_of(problem, span)
        assert aligned is not None
        assert plain is not None
        assert aligned.lead > plain.lead
        config = SingleConfig(ALIGNED, 2, 64, 16, 4, 3, span=span)
        if direction is Direction.WGRAD:
            config = dataclasses.replace(config, split=3)
        run_and_check(operator, problem, device, config)


def test_spaces_have_aligned_runs_where_they_differ() -> None:
    """A stem's do; where a run begins at a vector anyway, a second engine would be the first."""
    stem = problem_of("stem", Direction.FORWARD, layout="channels_last", M=64, H=64, W=64)[1]
    found = {(c.engine, c.span) for c in ALGORITHM.space(stem, nominal_device("sm_90"))}
    assert (ALIGNED, 2) in found
    for engine, span in found:
        if engine == ALIGNED:
            assert runs_of(stem, span, ALIGNED) != runs_of(stem, span)
    # Runs of 14 elements begin at even ones in both.
    odd = problem_of("stem", Direction.FORWARD, layout="channels_last", M=64, H=64, W=64, S=1)[1]
    spans = {c.span for c in ALGORITHM.space(odd, nominal_device("sm_90")) if c.engine == ALIGNED}
    assert 2 not in spans


@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("case", SOME)
def test_other_configs(case: str, direction: Direction, device: torch.device) -> None:
    operator, problem = problem_of(case, direction)
    for config in spread(problem, 2):
        run_and_check(operator, problem, device, config)


ENGINES = {
    "scalars": SingleConfig(FMA, 2, 16, 4, 4, 1),
    "windows": SingleConfig(MMA, 2, 16, 16, 4, 1),
    "runs of 2": SingleConfig(RUNS, 2, 32, 16, 4, 2, span=2),
    "runs of 8": SingleConfig(RUNS, 1, 128, 8, 4, 3, span=8),
    "aligned runs": SingleConfig(ALIGNED, 2, 64, 16, 4, 3, span=4),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", SOME)
def test_every_engine_fuses_the_epilogue(case: str, engine: str, device: torch.device) -> None:
    layout = layout_of(case, engine)
    operator, problem = problem_of(
        case, Direction.FORWARD, dtype="bfloat16", layout=layout, epilogue="fused+acc"
    )
    outputs = run_and_check(operator, problem, device, ENGINES[engine])
    assert set(outputs) == {"output", "acc"}


@pytest.mark.parametrize("engine", [*ENGINES, *(d for d in Direction if d != "forward")], ids=str)
@pytest.mark.parametrize("case", ["three channels", "volume"])
def test_64_bit_offsets(
    case: str, engine: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ConvProblem, "wide", property(lambda self: True))
    if engine in ENGINES:
        operator, problem = problem_of(
            case, Direction.FORWARD, dtype="float16", epilogue="fused", layout="contiguous"
        )
        run_and_check(operator, problem, device, ENGINES[engine])
    else:
        operator, problem = problem_of(case, Direction(engine))
        run_and_check(operator, problem, device)


@pytest.mark.parametrize("case", ["3x3", "volume"])
def test_operands_of_any_strides(case: str, device: torch.device) -> None:
    for direction in Direction:
        operator, problem = problem_of(case, direction, layout="strided")
        run_and_check(operator, problem, device)


def test_a_split_gradient_has_the_same_bits_twice(device: torch.device) -> None:
    operator, problem = problem_of("volume", Direction.WGRAD)
    config = dataclasses.replace(ALGORITHM.space(problem, device_facts()).default, split=5)
    first, second = (
        run_and_check(operator, problem, device, config)["grad_weight"] for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("reason", "direction", "values"),
    [
        ("groups", Direction.FORWARD, fields(C=2, M=2, H=8, K=3, G=2)),
        ("input channels", Direction.WGRAD, fields(C=5, M=2, H=8, K=3)),
        ("window", Direction.FORWARD, fields(C=4, M=2, H=32, K=13)),
        ("dilation", Direction.DGRAD, fields(C=1, M=2, H=16, K=3, S=2, dilation=2)),
        ("shared memory", Direction.DGRAD, fields(C=1, M=2, H=64, K=21, dtype="float16")),
        ("scalar units", Direction.WGRAD, fields(C=3, M=8, H=16, K=7)),
        ("float64", Direction.FORWARD, fields(C=1, M=2, H=8, K=3, dtype="float64")),
    ],
)
def test_what_is_left_to_others(reason: str, direction: Direction, values: Fields) -> None:
    problem = ConvOperator(direction, 2).parse(values)
    assert reason in (ALGORITHM.supports(problem) or "")


@pytest.mark.parametrize(("case", "direction"), CASES, ids=str)
def test_footprints_know_the_grid_and_spaces_their_default(case: str, direction: Direction) -> None:
    _, problem = problem_of(case, direction, dtype="bfloat16")
    space = ALGORITHM.space(problem, device_facts())
    assert space.explain(space.default) == ()
    for config in space.configs[:: max(1, len(space) // 20)]:
        asked = ALGORITHM.footprint(problem, config, device_facts())
        plan = ALGORITHM.plan(problem, config)
        launched = {(math.prod(call.grid), 32 * call.num_warps) for call in plan.calls}
        assert (asked.programs, asked.threads) in launched
        assert asked.launches == len(plan.calls)


def test_it_comes_before_the_other_kernels_for_few_channels() -> None:
    names = [algorithm.name for algorithm in ALGORITHMS]
    assert names.index("single_channel") < names.index("few_channel")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case", ["1x1", "3x3", "3x3, many filters", "three channels", "stem", "dilation 2x3"]
)
def test_consecutive_pixels(case: str, layout: str, device: torch.device) -> None:
    operator, problem = problem_of(case, Direction.FORWARD, layout=layout)
    for block_m, block_w in ((4, 16), (16, 64)):
        run_and_check(operator, problem, device, SingleConfig(FLAT, 1, block_w, block_m, 4, 1))


def test_spaces_of_small_maps_have_both_scalar_engines() -> None:
    fields = {"N": 1, "C": 1, "M": 512, "K": 3, "P": 1}
    operator = ConvOperator(Direction.FORWARD, 2)
    measured = {28: SingleConfig(FMA, 4, 32, 8, 4, 1), 56: SingleConfig(FMA, 2, 64, 8, 4, 1)}
    for size in (14, 28, 56, 112):
        space = ALGORITHM.space(operator.parse({**fields, "H": size}), device_facts())
        assert space.default == measured.get(size, space.default)
        assert {config.engine for config in space} >= {FMA, FLAT}


@pytest.mark.parametrize("epilogue", ["fused", "fused+acc"])
def test_consecutive_pixels_with_an_epilogue(epilogue: str, device: torch.device) -> None:
    operator, problem = problem_of("3x3", Direction.FORWARD, epilogue=epilogue)
    outputs = run_and_check(operator, problem, device, SingleConfig(FLAT, 1, 32, 8, 4, 1))
    assert set(outputs) == ({"output", "acc"} if "acc" in epilogue else {"output"})
