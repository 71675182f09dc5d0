"""A problem is made again from its fields: what a missed problem, an entry, a suite row are."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings

from tritonconv.conv import dispatch
from tritonconv.conv.problem import (
    FUSED,
    LAYOUTS,
    ConvProblem,
    Direction,
    EpilogueSpec,
    dense_strides,
    output_size,
)
from tritonconv.runtime.entries import problem_key

SMALL = st.integers(1, 5)


@st.composite
def strides(draw: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides as tensors have them: dense, permuted, sliced, expanded, far apart."""
    base = dense_strides(shape, draw(st.booleans()))
    kind = draw(st.sampled_from(["dense", "sliced", "expanded", "padded", "wide", "odd"]))
    if kind == "sliced":
        return tuple(2 * hop for hop in base)
    if kind == "expanded":
        kept = draw(st.tuples(*[st.booleans()] * len(shape)))
        return tuple(hop if keep else 0 for hop, keep in zip(base, kept, strict=True))
    if kind == "padded":
        return tuple(hop + 3 if hop > 1 else hop for hop in base)
    if kind == "wide":
        return (base[0] + 2**30, *base[1:])
    if kind == "odd":  # the stride of an axis of one element can be anything
        return tuple(7 if size == 1 else hop for hop, size in zip(base, shape, strict=True))
    return base


@st.composite
def problems(draw: Any) -> ConvProblem:
    """Any problem that a call can meet."""
    direction = draw(st.sampled_from(Direction))
    groups = draw(st.integers(1, 3))
    per_group, filters = draw(SMALL), draw(SMALL)
    rank = draw(st.sampled_from([2, 3]))
    kernel, hop, dilation = (draw(st.tuples(*[SMALL] * rank)) for _ in range(3))
    low, high = (draw(st.tuples(*[st.integers(0, 3)] * rank)) for _ in range(2))
    in_size = draw(st.tuples(*[st.integers(1, 40)] * rank))
    padding = tuple(zip(low, high, strict=True))
    out_size = output_size(in_size, kernel, hop, padding, dilation)
    assume(min(out_size) > 0)
    batch = draw(SMALL)
    x = (batch, groups * per_group, *in_size)
    w = (groups * filters, per_group, *kernel)
    y = (batch, groups * filters, *out_size)
    dense = {"x": dense_strides(x, draw(st.booleans())), "w": dense_strides(w, draw(st.booleans()))}
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    # What a product writes is dense; what it reads is the user's.
    x_strides = dense["x"] if direction is Direction.DGRAD else draw(strides(x))
    w_strides = dense["w"] if direction is Direction.WGRAD else draw(strides(w))
    forward = direction is Direction.FORWARD
    y_strides = dense_strides(y, draw(st.booleans())) if forward else draw(strides(y))
    epilogue = None
    if direction in FUSED and draw(st.booleans()):
        operand = draw(strides(y if forward else x))
        epilogue = EpilogueSpec("a function", (dtype,), (operand,), save_acc=draw(st.booleans()))
    return ConvProblem(
        direction,
        batch,
        groups * per_group,
        groups * filters,
        groups,
        in_size,
        out_size,
        kernel,
        hop,
        low,
        dilation,
        dtype,
        draw(st.sampled_from(["ieee", "tf32", "tf32x3"])) if dtype is torch.float32 else "ieee",
        x_strides,
        w_strides,
        y_strides,
        epilogue,
    )


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(problems())
def test_every_problem_is_made_again_from_its_fields(problem: ConvProblem) -> None:
    operator = dispatch.OPERATORS[problem.direction, len(problem.in_size)]
    fields = problem.fields()
    again = operator.parse(fields)
    assert dict(again.fields()) == dict(fields)
    key = problem_key(operator.name, fields, "source")
    assert problem_key(operator.name, again.fields(), "source") == key
    assert again.operator == problem.operator
    assert (again.flops(), again.wide) == (problem.flops(), problem.wide)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(["channels_last", "contiguous"]),
    st.tuples(SMALL, SMALL, st.sampled_from([1, 3]), st.sampled_from([1, 7])),
)
def test_elements_of_a_named_layout_never_share_memory(
    layout: str, sizes: tuple[int, int, int, int]
) -> None:
    # What is written through strides that overlap depends on which program writes last.
    c, m, taps, size = sizes
    fields = {"N": 2, "C": c, "M": m, "H": size, "K": taps, "P": taps // 2, "layout": layout}
    problem = dispatch.OPERATORS[Direction.WGRAD, 2].parse(fields)
    for shape, hops in (
        (problem.x_shape, problem.x_strides),
        (problem.w_shape, problem.w_strides),
        (problem.y_shape, problem.y_strides),
    ):
        offsets = {
            sum(i * hop for i, hop in zip(index, hops, strict=True))
            for index in itertools.product(*map(range, shape))
        }
        assert len(offsets) == math.prod(shape), (shape, hops)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("direction", Direction)
def test_the_tensors_have_the_strides_of_the_problem(
    direction: Direction, rank: int, layout: str
) -> None:
    operator = dispatch.OPERATORS[direction, rank]
    names = dict.fromkeys(("layout", "weight_layout", "output_layout"), layout)
    fields = {"N": 2, "C": 3, "M": 4, "H": 5, "K": 3, "P": 1, **names}
    fields["epilogue"] = FUSED.get(direction, "none")
    problem = operator.parse(fields)
    tensors = operator.make_tensors(problem, torch.device("cpu"), torch.Generator())
    strides = {
        "input": problem.x_strides, "grad_input": problem.x_strides,
        "weight": problem.w_strides, "grad_weight": problem.w_strides,
        "output": problem.y_strides, "grad_output": problem.y_strides,
    }  # fmt: skip
    for name, tensor in tensors.items():
        if name in strides:
            assert tensor.stride() == strides[name], name


def test_an_operand_has_the_strides_that_the_kernel_reads_it_by() -> None:
    operator = dispatch.OPERATORS[Direction.FORWARD, 2]
    bare = operator.parse({"N": 2, "C": 3, "M": 4, "H": 5, "K": 3, "P": 1})
    for strides in ((100, 1, 20, 4), (0, 2, 0, 0), (100, 25, 5, 1)):
        spec = EpilogueSpec("a function", (torch.float32,), (strides,))
        problem = replace(bare, epilogue=spec)
        tensors = operator.make_tensors(problem, torch.device("cpu"), torch.Generator())
        assert tensors["element0"].stride() == strides
        assert tensors["element0"].shape == problem.y_shape
