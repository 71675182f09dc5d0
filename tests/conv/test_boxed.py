"""Products over boxes of pixels that the copy engine fetches."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonconv.conv.algorithms.boxed import Boxed
from tritonconv.conv.algorithms.boxed_space import BoxedConfig
from tritonconv.conv.algorithms.boxed_views import axes_of, box_shapes, covered, run_shapes
from tritonconv.conv.dispatch import OPERATORS
from tritonconv.conv.epilogue import build_epilogue
from tritonconv.conv.problem import FUSED, ConvProblem, Direction, EpilogueSpec, dense_strides
from tritonconv.runtime import compat
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.launch import _aligned
from tritonconv.runtime.plan import Boxes

from ..aot import start
from .cases import Fields, fields, rank_of
from .test_algorithms import EPILOGUES, run_problem

PROBLEMS: dict[str, Fields] = {
    "3x3": fields(N=2, C=16, M=24, H=7, W=9, K=3, P=1),
    "more images than rows": fields(N=17, C=8, M=8, H=3, W=2, K=3, P=1),
    "no padding": fields(N=2, C=24, M=8, H=6, W=5, K="2x3"),
    "large padding": fields(N=1, C=8, M=16, H=4, W=3, K=3, P="4x3"),
    "dilation": fields(N=1, C=40, M=8, H=9, W=8, K=3, P=2, dilation="2x3"),
    "1x1": fields(N=3, C=24, M=72, H=4, W=5, K=1),
    "1x1, padded": fields(N=2, C=8, M=8, H=4, W=5, K=1, P=1),
    "one pixel": fields(N=1, C=8, M=8, H=1, W=1, K=1),
    "row": fields(N=3, C=16, M=16, H=1, W=37, K="1x5", P="0x2"),
    "column": fields(N=2, C=16, M=16, H=21, W=1, K="3x1", P="1x0"),
    "3-D": fields(N=2, C=16, M=8, D=3, H=5, W=6, K="2x3x3", P="0x1x2", dilation="1x2x1"),
    "3-D, planes alone": fields(N=2, C=8, M=8, D=5, H=3, W=4, K="3x1x1", P="1x0x0"),
}
HALF = {"layout": "channels_last", "dtype": "bfloat16"}
H100 = nominal_device("sm_90")


def parse(case: Fields, direction: Direction, **more: Any) -> ConvProblem:
    return OPERATORS[direction, rank_of(case)].parse({**HALF, **case, **more})


def configs(problem: ConvProblem) -> list[BoxedConfig]:
    """The default, and tiles that fill up, that leave a rest, of another box, of several taps."""
    found = [
        Boxed().space(problem, H100).default,
        BoxedConfig(16, 16, 16, 4, 2, split_k=3),
        BoxedConfig(32, 32, 32, 4, 3, group_m=1, split_k=2, box=1),
    ]
    if problem.direction is Direction.WGRAD and problem.taps <= 9:
        found.append(BoxedConfig(16, 16, 32, 4, 3, split_k=999, box=2, taps=problem.taps))
    return found


@pytest.mark.interpreter
@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("case", PROBLEMS)
def test_products(case: str, direction: Direction, device: torch.device) -> None:
    problem = parse(PROBLEMS[case], direction)
    assert Boxed().supports(problem) is None
    for config in configs(problem):
        run_problem(problem, "boxed", device, config)


TF32 = {"dtype": "float32", "precision": "tf32"}


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "case", ["3x3", "no padding", "dilation", "1x1, padded", "one pixel", "3-D"]
)
def test_forward_products_in_tf32(case: str, device: torch.device) -> None:
    problem = parse(PROBLEMS[case], Direction.FORWARD, **TF32)
    assert Boxed().supports(problem) is None
    for config in configs(problem):
        run_problem(problem, "boxed", device, config)


def test_boxes_in_tf32_are_for_tuned_forward_products() -> None:
    """Gradients read an operand the other way round; untuned calls keep what they had."""
    layer = {"N": 1, "C": 128, "M": 128, "H": 56, "K": 5, "P": 2, **TF32}
    forward = parse(layer, Direction.FORWARD)
    assert OPERATORS[Direction.FORWARD, 2].default_algorithm(forward, H100).name == "dense"
    found = list(Boxed().space(forward, H100))
    assert {config.block_k for config in found} <= {16, 32}
    assert BoxedConfig(64, 128, 32, 4, 4, split_k=3) in found  # 18.2 µs; 21.0 by other kernels
    for direction in (Direction.DGRAD, Direction.WGRAD):
        assert "dtype" in str(Boxed().supports(parse(layer, direction)))


@pytest.mark.interpreter
@pytest.mark.parametrize("direction", FUSED, ids=str)
@pytest.mark.parametrize("case", ["3x3", "1x1", "3-D"])
def test_epilogues_see_the_elements_of_the_result(
    case: str, direction: Direction, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_problem(parse(PROBLEMS[case], direction, epilogue=FUSED[direction]), "boxed", device)
    rank = rank_of(PROBLEMS[case])
    problem = parse(PROBLEMS[case], direction, dtype="float16")
    epilogue = build_epilogue(EPILOGUES[rank], False, (torch.float32,), problem.dtype, rank)
    strides = dense_strides(problem.result_shape, False)
    spec = EpilogueSpec(epilogue.key, (torch.float32,), (strides,), save_acc=True)
    problem = dataclasses.replace(problem, epilogue=spec)
    run_problem(problem, "boxed", device, BoxedConfig(16, 16, 16, 4, 2))
    monkeypatch.setattr(ConvProblem, "wide", property(lambda self: True))
    run_problem(problem, "boxed", device, BoxedConfig(16, 16, 16, 4, 2))


@pytest.mark.interpreter
@pytest.mark.parametrize("direction", Direction, ids=str)
def test_maps_with_gaps_and_weights_of_either_layout(
    direction: Direction, device: torch.device
) -> None:
    """A slice of more channels, every second row; a contiguous weight where it is only written."""
    problem = parse(PROBLEMS["3x3"], direction)
    n, _, h, w = problem.x_strides
    problem = dataclasses.replace(problem, x_strides=(4 * n, 1, 4 * h, 2 * w))
    if direction is Direction.WGRAD:
        problem = dataclasses.replace(problem, w_strides=dense_strides(problem.w_shape, False))
    assert Boxed().supports(problem) is None
    run_problem(problem, "boxed", device, BoxedConfig(16, 16, 16, 4, 2))


@pytest.mark.interpreter
@pytest.mark.parametrize("direction", Direction, ids=str)
def test_the_same_bits_twice(direction: Direction, device: torch.device) -> None:
    problem = parse(PROBLEMS["3x3"], direction)
    config = BoxedConfig(16, 16, 16, 4, 2, split_k=3)
    first, second = (run_problem(problem, "boxed", device, config) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"G": 2}, "groups"),
        ({"dtype": "float32"}, "dtype"),
        ({"S": 2}, "stride"),
        ({"C": 12}, "multiple of 8"),
        ({"M": 12}, "multiple of 8"),
        ({"layout": "contiguous"}, "input channels"),
        ({"output_layout": "contiguous"}, "output channels"),
        ({"weight_layout": "contiguous"}, "weight"),
    ],
)
def test_what_boxes_cannot_serve(change: Fields, words: str) -> None:
    reason = Boxed().supports(parse({**PROBLEMS["3x3"], **change}, Direction.FORWARD))
    assert reason is not None and words in reason


def test_strides_that_the_copy_engine_does_not_take() -> None:
    problem = parse(PROBLEMS["3x3"], Direction.FORWARD)
    n, c, h, w = problem.x_strides
    for strides in ((n, c, h + 4, w), (0, c, h, w)):
        assert Boxed().supports(dataclasses.replace(problem, x_strides=strides)) is not None


def test_pixels_of_a_1x1_product_are_one_row() -> None:
    axes = axes_of(parse(PROBLEMS["1x1"], Direction.FORWARD))
    assert axes.out_size == axes.in_size == (1, 1, 1, 3 * 4 * 5) and axes.merged
    for case in ("3x3", "1x1, padded", "one pixel"):
        problem = parse(PROBLEMS[case], Direction.FORWARD)
        axes = axes_of(problem)
        assert axes.out_size == (problem.batch, 1, *problem.out_size)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.integers(1, 70)] * 4),
    st.tuples(st.just(1), *[st.integers(1, 3)] * 3),
    st.sampled_from((16, 64, 128, 256)),
)
def test_shapes_of_boxes(
    size: tuple[int, int, int, int], kernel: tuple[int, int, int, int], pixels: int
) -> None:
    shapes = box_shapes(size, kernel, pixels)
    assert all(math.prod(shape) == pixels and max(shape) <= 256 for shape in shapes)
    assert 1 <= len(set(shapes)) == len(shapes) <= 3
    assert covered(size, shapes[0]) == min(covered(size, shape) for shape in shapes)
    runs = run_shapes(size, pixels)
    assert all(sorted(shape)[:3] == [1, 1, 1] and max(shape) <= pixels for shape in runs)
    assert 1 <= len(set(runs)) == len(runs) <= 2
    # Longer runs may waste a little more than the shortest ones along the best axis.
    assert covered(size, runs[0]) <= 1.125 * min(
        covered(size, tuple(16 if a == axis else 1 for a in range(4)))  # type: ignore[arg-type]
        for axis in range(4)
    )


def test_boxes_leave_no_rest_on_common_maps() -> None:
    for size in ((64, 1, 56, 56), (64, 1, 28, 28), (64, 1, 14, 14), (16, 1, 1, 4096)):
        assert covered(size, box_shapes(size, (1, 1, 3, 3), 128)[0]) == math.prod(size)
        assert covered(size, run_shapes(size, 64)[0]) == math.prod(size)
    assert max(run_shapes((64, 1, 7, 7), 64)[0]) == 64


@pytest.mark.parametrize("direction", Direction, ids=str)
def test_without_a_copy_engine_there_is_only_the_default(direction: Direction) -> None:
    layer = fields(N=32, C=128, M=128, H=28, K=3, P=1)
    problem = parse(layer, direction)
    assert len(Boxed().configs(problem, nominal_device("sm_86"))) == 1
    space = Boxed().space(problem, H100)
    assert 20 < len(space) < 900
    assert space.explain(space.default) == ()


@pytest.mark.skipif(compat.TRITON_VERSION < (3, 6), reason="how a launcher is wrapped")
def test_a_tensor_at_an_odd_address_is_copied() -> None:
    memory = torch.arange(100.0)
    assert _aligned(memory) is memory
    odd = memory[1:65].reshape(8, 8)[:, :4]
    copy = _aligned(odd)
    assert copy.data_ptr() % 16 == 0 and copy.stride() == odd.stride() and torch.equal(copy, odd)


@pytest.mark.aot
def test_operands_go_from_the_copy_engine_to_the_products() -> None:
    """Asynchronously and in shared memory: left operands in registers race in Triton 3.6."""
    rows = start("tests.conv.aot_boxed").result()
    assert len(rows) == 16
    for row in rows:
        assert row["ttng.async_tma_copy_global_to_local"] >= 4, row
        assert row["ttng.warp_group_dot"] >= 1 and row["ttg.local_load"] == 0, row


def test_descriptors_say_what_the_kernel_reads() -> None:
    problem = parse(PROBLEMS["3x3"], Direction.FORWARD)
    (call,) = Boxed().plan(problem, BoxedConfig(32, 16, 16, 4, 3)).calls
    boxes = [arg for arg in call.args if isinstance(arg, Boxes)]
    assert call.slots()[:3] == ("input", "weight", "output")
    assert [b.name for b in boxes] == ["input", "weight"]
    assert boxes[0].shape == (2, 1, 7, 9, 16) and math.prod(boxes[0].block) == 32 * 16
    assert boxes[1].shape == (9, 24, 16) and boxes[1].strides == (16, 144, 1)


@pytest.mark.skipif(compat.TRITON_VERSION != (3, 6), reason="the release of the direct launch")
def test_the_launch_behind_a_wrapper_is_found() -> None:
    from types import SimpleNamespace

    from triton.backends.nvidia.driver import wrap_handle_tensordesc

    seen: list[Any] = []
    wrapped = wrap_handle_tensordesc(
        lambda *args: seen.append(args), {"x": "tensordesc<bf16[1,8]>"}, [{"swizzle": 1}]
    )
    compiled = SimpleNamespace(
        run=SimpleNamespace(
            global_scratch_size=0,
            profile_scratch_size=0,
            launch=wrapped,
            launch_cooperative_grid=False,
            launch_pdl=False,
        ),
        function=7,
        packed_metadata=(4, 1, 0),
    )
    launch = compat.direct_launcher(compiled, maps=True)
    assert launch is not None
    launch(1, 2, 3, 99, ["map", 8, 8, 8, 1])
    assert seen[0][:5] == (1, 2, 3, 99, 7) and seen[0][-5:] == ("map", 8, 8, 8, 1)


def test_a_map_whose_pixels_pass_32_bits_is_refused() -> None:
    fields = {"N": 2**15, "C": 8, "M": 8, "H": 256, "K": 1, "dtype": "bfloat16"}
    problem = OPERATORS[Direction.FORWARD, 2].parse({**fields, "layout": "channels_last"})
    reason = OPERATORS[Direction.FORWARD, 2].algorithm("boxed").supports(problem)
    assert reason == "input with 2^31 pixels or more"
