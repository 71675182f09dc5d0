"""Every algorithm in every direction against PyTorch in float64, called by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from tritonconv.conv.algorithms.common import TileConfig
from tritonconv.conv.dispatch import OPERATORS, make_runner
from tritonconv.conv.epilogue import build_epilogue
from tritonconv.conv.problem import FUSED, ConvProblem, Direction, EpilogueSpec, dense_strides
from tritonconv.runtime.accuracy import check
from tritonconv.runtime.device import device_facts
from tritonconv.runtime.operators import Config
from tritonconv.runtime.tables import Choice, Tier

from .cases import KINDS, PROBLEMS, Fields, rank_of

pytestmark = pytest.mark.interpreter

# Where a fused gradient of the input has something to get wrong: phases, elements of no window.
FUSED_CASES = ("stride 3x2, kernel 2x3", "kernel below stride", "patches with a rest", "1x1x1")
LAYOUTS = ("contiguous", "channels_last")
DTYPES = {
    "float16": dict(dtype="float16"),
    "bfloat16": dict(dtype="bfloat16"),
    "tf32": dict(dtype="float32", precision="tf32"),
    "tf32x3": dict(dtype="float32", precision="tf32x3"),
    "float64": dict(dtype="float64"),
}


def served(
    names: tuple[str, ...] = tuple(PROBLEMS),
    *,
    kernels_only: bool = False,
    more: Callable[[Direction], Fields] = lambda direction: {},
) -> list[tuple[str, Direction, str]]:
    """(problem, direction, algorithm) for everything that some algorithm serves."""
    return [
        (name, direction, algorithm.name)
        for (direction, rank), operator in OPERATORS.items()
        for name in names
        if rank == rank_of(PROBLEMS[name])
        for algorithm in operator.candidates(operator.parse({**PROBLEMS[name], **more(direction)}))
        if not (kernels_only and algorithm.name == "aten")
    ]


def serves(algorithm: str, fields: Fields, direction: Direction) -> bool:
    """Whether an algorithm serves a problem: some do only in one layout."""
    operator = OPERATORS[direction, rank_of(fields)]
    return operator.algorithm(algorithm).supports(operator.parse(fields)) is None


def fused(direction: Direction) -> Fields:
    """The epilogue that a product in this direction can have."""
    return {"epilogue": FUSED[direction]} if direction in FUSED else {}


def ids(value: object) -> str:
    return str(value)


def run_and_check(
    fields: Fields,
    direction: Direction,
    name: str,
    device: torch.device,
    config: Config | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Run one algorithm on fresh tensors whose outputs hold NaN, and judge every output."""
    problem = OPERATORS[direction, rank_of(fields)].parse(fields)
    assert isinstance(problem, ConvProblem)
    return run_problem(problem, name, device, config, seed)


def run_problem(
    problem: ConvProblem,
    name: str,
    device: torch.device,
    config: Config | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Run one algorithm on a problem and judge every output."""
    operator = OPERATORS[problem.direction, len(problem.in_size)]
    algorithm = operator.algorithm(name)
    if config is None:
        config = algorithm.configs(problem, device_facts())[0]
    tensors = operator.make_tensors(problem, device, torch.Generator(device).manual_seed(seed))
    inputs = {k: t.clone() for k, t in tensors.items() if k not in operator.outputs(problem)}
    exact = operator.reference(problem, tensors, torch.float64)
    plain = operator.reference(problem, tensors, problem.result_dtype)
    run = make_runner(problem, Choice(name, config, Tier.DEFAULT))
    run(*tensors.values())
    for output in operator.outputs(problem):
        verdict = check(tensors[output], exact[output], plain[output], dtype=problem.result_dtype)
        assert verdict.ok, f"{problem} {name} {config} {output}: {verdict}"
    for key, before in inputs.items():
        same = torch.equal(tensors[key].float(), before.float())  # float8 is not compared
        assert same, f"{name} wrote to its operand {key}"
    return {output: tensors[output] for output in operator.outputs(problem)}


@pytest.mark.parametrize(("case", "direction", "algorithm"), served(), ids=ids)
def test_default_config(
    case: str, direction: Direction, algorithm: str, device: torch.device
) -> None:
    # Both layouts of every problem cost twice the time; the parity of its name picks one.
    fields = {**PROBLEMS[case], "layout": LAYOUTS[len(case) % 2]}
    if not serves(algorithm, fields, direction):
        fields["layout"] = "channels_last"
    run_and_check(fields, direction, algorithm, device)


@pytest.mark.parametrize(
    "layouts", [("channels_last", "contiguous"), ("contiguous", "channels_last")], ids="-".join
)
@pytest.mark.parametrize(
    ("case", "direction", "algorithm"), served(KINDS, kernels_only=True), ids=ids
)
def test_layouts(
    case: str, direction: Direction, algorithm: str, layouts: tuple[str, str], device: torch.device
) -> None:
    fields = {**PROBLEMS[case], "layout": layouts[0], "weight_layout": layouts[1]}
    if not serves(algorithm, fields, direction):
        fields["layout"] = "channels_last"
    if not serves(algorithm, fields, direction):
        fields["weight_layout"] = "channels_last"
    run_and_check(fields, direction, algorithm, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "direction"), [(c, d) for c in KINDS for d in Direction], ids=ids)
def test_dtypes(case: str, direction: Direction, dtype: str, device: torch.device) -> None:
    fields = {**PROBLEMS[case], **DTYPES[dtype]}
    operator = OPERATORS[direction, rank_of(fields)]
    names = [a.name for a in operator.candidates(operator.parse(fields))]
    assert names == ["aten"] if dtype == "float64" else len(names) >= 1
    for name in names:
        run_and_check(fields, direction, name, device)


def other_configs(algorithm: object, problem: ConvProblem) -> list[Config]:
    """A few configs unlike the default: of the space, and with split reductions."""
    space = algorithm.configs(problem, device_facts())  # type: ignore[attr-defined]
    first, last = space[0], space[-1]
    chosen = [last, space[len(space) // 2]]
    fields = {field.name for field in dataclasses.fields(first)}
    if {"block_m", "block_n", "block_k"} <= fields:
        chosen.append(dataclasses.replace(first, block_m=16, block_n=16, block_k=16))
        chosen.append(dataclasses.replace(first, block_m=64, block_n=32, block_k=64, group_m=1))
    for split in {"split_k", "split"} & fields:
        if problem.direction is Direction.WGRAD:
            chosen += [dataclasses.replace(first, **{split: count}) for count in (2, 3, 999)]
    return [c for k, c in enumerate(chosen) if c != first and c not in chosen[:k]]


@pytest.mark.parametrize(
    ("case", "direction", "algorithm"), served(KINDS, kernels_only=True), ids=ids
)
def test_other_configs(
    case: str, direction: Direction, algorithm: str, device: torch.device
) -> None:
    operator = OPERATORS[direction, rank_of(PROBLEMS[case])]
    problem = operator.parse(PROBLEMS[case])
    configs = other_configs(operator.algorithm(algorithm), problem)
    assert configs
    for config in configs:
        run_and_check(PROBLEMS[case], direction, algorithm, device, config)


@pytest.mark.parametrize(
    ("case", "direction", "algorithm"), served(KINDS, kernels_only=True, more=fused), ids=ids
)
def test_64_bit_offsets(
    case: str,
    direction: Direction,
    algorithm: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ConvProblem, "wide", property(lambda self: True))
    run_and_check({**PROBLEMS[case], **fused(direction)}, direction, algorithm, device)


@pytest.mark.parametrize("save_acc", [False, True], ids=["", "acc"])
@pytest.mark.parametrize(
    ("case", "direction", "algorithm"),
    [row for row in served((*KINDS, *FUSED_CASES), more=fused) if row[1] in FUSED],
    ids=ids,
)
def test_fused_bias_and_relu(
    case: str, direction: Direction, algorithm: str, save_acc: bool, device: torch.device
) -> None:
    epilogue = FUSED[direction] + ("+acc" if save_acc else "")
    fields = {**PROBLEMS[case], "epilogue": epilogue, "dtype": "bfloat16"}
    outputs = run_and_check(fields, direction, algorithm, device)
    assert ("acc" in outputs) == save_acc


def weighted(acc: torch.Tensor, other: torch.Tensor, **at: torch.Tensor) -> torch.Tensor:
    """An epilogue that tells all coordinates of an element apart."""
    weights = {"n": 64.0, "c": 1.0, "d": 0.25, "h": 16.0, "w": 4.0}
    return acc + other * sum(weights[name] * index for name, index in at.items())


EPILOGUES = {
    2: lambda acc, other, *, n, c, h, w: weighted(acc, other, n=n, c=c, h=h, w=w),
    3: lambda acc, other, *, n, c, d, h, w: weighted(acc, other, n=n, c=c, d=d, h=h, w=w),
}


@pytest.mark.parametrize(
    ("case", "direction", "algorithm"),
    [
        row
        for row in served(("an axis each", "patches", "3-D patches", "1x1x1"), more=fused)
        if row[1] in FUSED
    ],
    ids=ids,
)
def test_coordinates_and_operands_of_the_result(
    case: str, direction: Direction, algorithm: str, device: torch.device
) -> None:
    """On either product the epilogue sees the elements of what is written."""
    rank = rank_of(PROBLEMS[case])
    problem = OPERATORS[direction, rank].parse(PROBLEMS[case])
    epilogue = build_epilogue(EPILOGUES[rank], False, (torch.float32,), problem.dtype, rank)
    strides = dense_strides(problem.result_shape, False)
    spec = EpilogueSpec(epilogue.key, (torch.float32,), (strides,))
    run_problem(dataclasses.replace(problem, epilogue=spec), algorithm, device)


@pytest.mark.parametrize("one_launch", [1, 0], ids=["one launch", "two"])
@pytest.mark.parametrize("split", [2, 5, 999])
@pytest.mark.parametrize("case", ["3x3", "groups, stride 2", "kernel below stride", "an axis each"])
@pytest.mark.parametrize("direction", FUSED, ids=ids)
def test_split_sums_of_products_over_pixels(
    direction: Direction,
    case: str,
    split: int,
    one_launch: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parts are added in a fixed order, by the last program of a tile or by a second kernel."""
    if split == 5:  # with offsets of 64 bits as well
        monkeypatch.setattr(ConvProblem, "wide", property(lambda self: True))
    fields = {**PROBLEMS[case], "epilogue": f"{FUSED[direction]}+acc"}
    problem = OPERATORS[direction, rank_of(fields)].parse(fields)
    name = "dense" if problem.groups == 1 else "grouped"
    config = TileConfig(16, 16, 16, 4, 2, split_k=split, one_launch=one_launch)
    first, second = (run_problem(problem, name, device, config) for _ in range(2))
    assert all(torch.equal(first[output], second[output]) for output in first)


@pytest.mark.parametrize(
    ("case", "direction", "algorithm"), served(KINDS, kernels_only=True), ids=ids
)
def test_the_same_bits_twice(
    case: str, direction: Direction, algorithm: str, device: torch.device
) -> None:
    operator = OPERATORS[direction, rank_of(PROBLEMS[case])]
    config = operator.algorithm(algorithm).configs(operator.parse(PROBLEMS[case]), device_facts())[
        0
    ]
    if direction is Direction.WGRAD:
        (split,) = {"split_k", "split"} & set(config.as_dict())
        config = dataclasses.replace(config, **{split: 2})
    first, second = (
        run_and_check(PROBLEMS[case], direction, algorithm, device, config) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_algorithm_is_exercised_in_every_direction_it_has() -> None:
    met = {(direction, algorithm) for _, direction, algorithm in served(KINDS)}
    names = {a.name for operator in OPERATORS.values() for a in operator.algorithms}
    missing = {(d, a) for d in Direction for a in names} - met
    # Products over boxes need aligned channels: test_boxed and test_boxed_operand have theirs.
    others = {(d, name) for d in FUSED for name in ("bundled_weights", "walked")}
    others |= {(Direction.WGRAD, "bundled"), *((d, "boxed") for d in Direction)}
    others |= {(d, "packed_phases") for d in Direction if d is not Direction.DGRAD}
    others |= {(d, "boxed_operand") for d in Direction}
    assert missing <= {(Direction.DGRAD, "few_channel"), *others}


@pytest.mark.parametrize(
    "case",
    [
        "3x3",
        "stride 3x2, kernel 2x3",
        "groups, stride 2",
        "patches with a rest",
        "an axis each",
    ],
)
def test_the_operators_reference_is_pytorchs_convolution(case: str) -> None:
    results = {}
    for direction in Direction:
        operator = OPERATORS[direction, rank_of(PROBLEMS[case])]
        problem = operator.parse({**PROBLEMS[case], "dtype": "float64"})
        tensors = operator.make_tensors(
            problem, torch.device("cpu"), torch.Generator().manual_seed(3)
        )
        results[direction] = tensors, operator.reference(problem, tensors, torch.float64)
    x = results[Direction.WGRAD][0]["input"].requires_grad_()
    w = results[Direction.DGRAD][0]["weight"].requires_grad_()
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    conv = {2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}[rank_of(PROBLEMS[case])]
    y = conv(x, w, None, *geometry)
    (grad_x,) = torch.autograd.grad(
        y, x, results[Direction.DGRAD][0]["grad_output"], retain_graph=True
    )
    (grad_w,) = torch.autograd.grad(y, w, results[Direction.WGRAD][0]["grad_output"])
    torch.testing.assert_close(results[Direction.DGRAD][1]["grad_input"], grad_x)
    torch.testing.assert_close(results[Direction.WGRAD][1]["grad_weight"], grad_w)
    tensors, found = results[Direction.FORWARD]
    expected = conv(tensors["input"], tensors["weight"], None, *geometry)
    torch.testing.assert_close(found["output"], expected)
