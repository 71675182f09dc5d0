"""All phases of a stride as columns of one product: odd maps, strides, units and layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings

from tritonconv.conv.algorithms.packed_geometry import (
    MOST_COLUMNS,
    PackedConfig,
    axes_of,
    product_of,
)
from tritonconv.conv.algorithms.packed_phases import PackedPhases, packs_clearly_better
from tritonconv.conv.algorithms.packed_spaces import best_runs
from tritonconv.conv.dispatch import OPERATORS, make_runner
from tritonconv.conv.epilogue import build_epilogue
from tritonconv.conv.problem import ConvProblem, Direction, EpilogueSpec, dense_strides
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.tables import Choice, Tier

from .cases import fields, rank_of
from .test_algorithms import EPILOGUES, run_and_check, run_problem

ALGORITHM = PackedPhases()
H100 = nominal_device("sm_90")
CASES: dict[str, dict[str, Any]] = {
    "stem": fields(N=2, C=3, M=16, H=13, W=21, K=7, S=2, P=3),
    "one channel": fields(N=1, C=1, M=5, H=9, W=7, K=3, S=2, P=1),
    "stride 1x2": fields(N=1, C=4, M=6, H=5, W=9, K="3x4", S="1x2", P="1x2"),
    "stride 3": fields(N=1, C=5, M=7, H=8, W=11, K=5, S=3, P=2),
    "taps below the stride": fields(N=1, C=8, M=4, H=8, W=7, K="2x1", S="2x3"),
    "dilated": fields(N=1, C=6, M=4, H=11, W=14, K=3, S=2, P="2x1", dilation="2x3"),
    "dilation 6, stride 4": fields(N=1, C=2, M=4, H=15, W=18, K=3, S=4, P=1, dilation=6),
    "much padding": fields(N=1, C=3, M=4, H=4, W=5, K=3, S=2, P="5x4"),
    "a rest that no window reads": fields(N=1, C=2, M=3, H=10, W=13, K=2, S=4),
    "many filters": fields(N=1, C=3, M=150, H=5, W=6, K=4, S=2, P=1),
    "a row": fields(N=3, C=2, M=8, H=1, W=45, K="1x7", S="1x2", P="0x3"),
    "a column": fields(N=1, C=2, M=8, H=19, W=1, K="5x1", S="4x1", P="2x0"),
    "volume": fields(N=1, C=3, M=8, D=5, H=6, W=7, K=3, S=2, P=1),
    "an axis each": fields(
        N=2, C=4, M=5, D=5, H=6, W=7, K="2x3x1", S="2x1x2", P="1x0x2", dilation="1x2x1"
    ),
}
SOME = ("stem", "dilated", "an axis each")
LAYOUTS = ("channels_last", "contiguous")


def problem_of(case: dict[str, Any], **more: Any) -> ConvProblem:
    return OPERATORS[Direction.DGRAD, rank_of(case)].parse({"dtype": "float16", **case, **more})


def small(run: tuple[int, int, int], cached: int = 0) -> PackedConfig:
    # The interpreter takes its time for every program and step: wide ones.
    return PackedConfig(*run, block_m=64, block_k=32, num_warps=4, num_stages=2, cached=cached)


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_default(case: str, layout: str, device: torch.device) -> None:
    run_and_check({**CASES[case], "layout": layout}, Direction.DGRAD, "packed_phases", device)


@pytest.mark.interpreter
@pytest.mark.parametrize("run", [(1, 1, 1), (1, 2, 2), (1, 1, 3), (2, 3, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SOME)
def test_units(case: str, layout: str, run: tuple[int, int, int], device: torch.device) -> None:
    """Units that divide the map and those that do not, whether they make sense or not."""
    problem = problem_of(CASES[case], layout=layout)
    run_problem(problem, "packed_phases", device, small(run, cached=run[2] % 2))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "arithmetic",
    [{"dtype": "bfloat16"}, {"dtype": "float32"}]
    + [{"dtype": "float32", "precision": p} for p in ("tf32", "tf32x3")],
    ids=lambda a: "-".join(a.values()),
)
def test_arithmetics(arithmetic: dict[str, str], device: torch.device) -> None:
    problem = problem_of(CASES["stem"], **arithmetic)
    run_problem(problem, "packed_phases", device)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("layout", "weight", "output"),
    [
        ("channels_last", "contiguous", "strided"),
        ("contiguous", "channels_last", "channels_last"),
        ("strided", "strided", "contiguous"),
    ],
)
@pytest.mark.parametrize("case", SOME)
def test_layouts_of_each_tensor(
    case: str, layout: str, weight: str, output: str, device: torch.device
) -> None:
    problem = problem_of(CASES[case], layout=layout, weight_layout=weight, output_layout=output)
    assert (problem.x_layout, problem.y_layout) == (layout, output)
    run_problem(problem, "packed_phases", device, small((1, 2, 2)))


AXIS = st.tuples(
    *(st.integers(1, 9), st.integers(1, 7), st.sampled_from((1, 2, 2, 3))),
    *(st.integers(0, 4), st.integers(1, 3), st.integers(1, 3)),
).filter(lambda axis: axis[0] + 2 * axis[3] > axis[4] * (axis[1] - 1))


@pytest.mark.interpreter
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    st.lists(AXIS, min_size=1, max_size=3),
    st.integers(1, 8),
    st.integers(1, 9),
    st.sampled_from(LAYOUTS),
    st.integers(0, 1000),
)
def test_the_adjoint_exactly(
    axes: list[tuple[int, ...]], channels: int, filters: int, layout: str, seed: int
) -> None:
    """<conv(x, w), g> = <x, dgrad(g, w)> for all x: every element, exactly in integers."""
    axes = [(1, 1, 1, 0, 1, 1)] * (2 - len(axes)) + axes
    size, kernel, stride, padding, dilation, run = zip(*axes, strict=True)
    rank = len(axes)
    joined = {"K": kernel, "S": stride, "P": padding, "dilation": dilation}
    operator = OPERATORS[Direction.DGRAD, rank]
    problem = operator.parse(
        {
            **{"N": 2, "C": channels, "M": filters, "dtype": "float32", "layout": layout},
            **dict(zip("DHW"[-rank:], size, strict=True)),
            **{name: "x".join(map(str, values)) for name, values in joined.items()},
        }
    )
    config = small((*(1,) * (3 - rank), *run), cached=seed % 2)
    assume(ALGORITHM.supports(problem) is None)
    assume(product_of(problem, config.run, config.block_k).steps <= 50)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    tensors = operator.make_tensors(problem, device, torch.Generator(device).manual_seed(seed))
    for name in ("grad_output", "weight"):
        values = torch.randint(-8, 9, tensors[name].shape, generator=generator)
        tensors[name].copy_(values)
    make_runner(problem, Choice("packed_phases", config, Tier.DEFAULT))(*tensors.values())
    exact = operator.reference(problem, tensors, torch.float64)["grad_input"]
    assert torch.equal(tensors["grad_input"].double(), exact)


@pytest.mark.interpreter
def test_the_same_bits_twice(device: torch.device) -> None:
    problem = problem_of(CASES["stem"])
    first, second = (run_problem(problem, "packed_phases", device) for _ in range(2))
    assert torch.equal(first["grad_input"], second["grad_input"])


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SOME)
def test_an_epilogue_sees_the_coordinates_of_each_element(
    case: str, layout: str, device: torch.device
) -> None:
    """A transposed convolution's forward is this product, with what is fused behind it."""
    problem = problem_of(CASES[case], layout=layout)
    rank = len(problem.in_size)
    epilogue = build_epilogue(EPILOGUES[rank], False, (torch.float32,), problem.dtype, rank)
    strides = dense_strides(problem.result_shape, False)
    spec = EpilogueSpec(epilogue.key, (torch.float32,), (strides,), save_acc=True)
    problem = replace(problem, epilogue=spec)
    outputs = run_problem(problem, "packed_phases", device, small((1, 2, 2)))
    assert set(outputs) == {"grad_input", "acc"}


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_of_64_bits(
    layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ConvProblem, "wide", property(lambda self: True))
    problem = problem_of(CASES["volume"], layout=layout)
    run_problem(problem, "packed_phases", device, small((1, 2, 1)))


@pytest.mark.parametrize(
    ("direction", "more", "reason"),
    [
        (Direction.FORWARD, {}, "only the gradient of the input"),
        (Direction.WGRAD, {}, "only the gradient of the input"),
        (Direction.DGRAD, {"S": 1}, "stride of one"),
        (Direction.DGRAD, {"G": 3, "M": 6}, "groups"),
        (Direction.DGRAD, {"C": 17}, "more than 64 input channels"),
        (Direction.DGRAD, {"dtype": "float64"}, "dtype"),
    ],
)
def test_what_is_not_served_is_refused_with_a_reason(
    direction: Direction, more: dict[str, Any], reason: str
) -> None:
    problem = OPERATORS[direction, 2].parse({**CASES["stem"], **more})
    why = ALGORITHM.supports(problem)
    assert why is not None and reason in why


def test_a_window_is_what_any_pixel_of_a_unit_reads() -> None:
    problem = problem_of(CASES["stem"])
    _, height, width = axes_of(problem, (1, 1, 2))
    assert (height.unit, height.first, height.window, height.skip) == (2, -1, 4, 1)
    assert (width.unit, width.first, width.window, width.skip) == (4, -1, 5, 1)
    # Every second output pixel is a tap of some phase, and no other one.
    _, height, width = axes_of(problem_of(CASES["stem"], K=3, dilation=4), (1, 1, 1))
    assert (height.window, height.skip) == (3, 2) == (width.window, width.skip)


STEM = fields(N=64, C=3, M=64, H=224, K=7, S=2, P=3, dtype="bfloat16")


def test_units_of_a_stem_fill_tiles_of_every_width() -> None:
    problem = problem_of(STEM)
    products = [product_of(problem, run, 64) for run in best_runs(problem)]
    assert {product.block_n for product in products} == {16, 32, 64, 128}
    assert all(product.columns <= MOST_COLUMNS for product in products)
    assert product_of(problem, (1, 1, 1), 64).offsets == 16
    assert len(ALGORITHM.configs(problem, H100)) < 500


@pytest.mark.parametrize(
    ("more", "better"),
    [
        ({}, True),
        ({"dtype": "float16", "C": 1}, True),
        ({"M": 16, "K": 3, "P": 1, "N": 128}, True),
        ({"C": 8, "K": 3, "P": 1}, True),
        ({"dtype": "float32"}, False),
        ({"layout": "contiguous"}, False),
        ({"N": 1}, False),
        ({"K": 2, "P": 0}, False),
        ({"C": 16}, True),
        ({"C": 32}, False),
    ],
)
def test_untuned_calls_of_large_maps_pack_their_phases(more: dict[str, Any], better: bool) -> None:
    problem = problem_of({**STEM, "layout": "channels_last", **more})
    chosen = OPERATORS[Direction.DGRAD, 2].default_algorithm(problem, H100).name
    assert (chosen == "packed_phases") == better
    if ALGORITHM.supports(problem) is None:
        assert packs_clearly_better(problem) == better
