"""float8 convolutions: against float64 of the dequantised values, range, errors, PyTorch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tritonconv as tc
from tritonconv.conv import scaled_ops
from tritonconv.conv.algorithms.common import TileConfig
from tritonconv.conv.dispatch import OPERATORS
from tritonconv.conv.problem import ConvProblem, Direction
from tritonconv.conv.scaled_ops import NoGradientError
from tritonconv.runtime.accuracy import check
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.entries import problem_key
from tritonconv.runtime.tables import recording

from .cases import PROBLEMS, Fields, rank_of
from .oracle import assert_accurate
from .test_algorithms import run_and_check, run_problem

FLOAT8 = torch.float8_e4m3fn
SCALED = {1: tc.scaled_conv1d, 2: tc.scaled_conv2d, 3: tc.scaled_conv3d}
PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
RESULTS = ("bfloat16", "float16", "float32", "float8_e4m3fn")


@pytest.fixture(params=["kernels", "torch"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with tc.backend("auto" if request.param == "kernels" else "torch"):
        yield


def served() -> list[tuple[str, str, str]]:
    """(problem, algorithm, dtype of the result) of all that some kernel serves."""
    found = []
    for index, (name, case) in enumerate(PROBLEMS.items()):
        operator = OPERATORS[Direction.FORWARD, rank_of(case)]
        result = RESULTS[index % len(RESULTS)]
        problem = operator.parse({**case, "dtype": "float8_e4m3fn"})
        found += [(name, a.name, result) for a in operator.candidates(problem)]
    return found


@pytest.mark.interpreter
@pytest.mark.parametrize(("case", "algorithm", "result"), served(), ids=str)
def test_every_kernel(case: str, algorithm: str, result: str, device: torch.device) -> None:
    layout = ("contiguous", "channels_last")[len(case) % 2]
    fields = {"dtype": "float8_e4m3fn", "output_dtype": result, "layout": layout}
    run_and_check({**PROBLEMS[case], **fields}, Direction.FORWARD, algorithm, device)


def quantising() -> list[tuple[str, str]]:
    found = []
    for name in ("3x3", "few channels", "1x1", "patches", "groups", "narrow groups", "depthwise"):
        operator = OPERATORS[Direction.FORWARD, 2]
        problem = operator.parse(_quantising(name))
        found += [(name, a.name) for a in operator.candidates(problem)]
    one = {**PROBLEMS["3x3"], "C": 1}
    names = [a.name for a in OPERATORS[Direction.FORWARD, 2].candidates(_parsed(one))]
    return found + [("one channel", name) for name in names]


def _quantising(name: str) -> Fields:
    case = {**PROBLEMS["3x3"], "C": 1} if name == "one channel" else PROBLEMS[name]
    return {**case, "dtype": "bfloat16", "output_dtype": "float8_e4m3fn"}


def _parsed(case: Fields) -> ConvProblem:
    return OPERATORS[Direction.FORWARD, 2].parse({**case, "dtype": "bfloat16"})


@pytest.mark.interpreter
@pytest.mark.parametrize(("case", "algorithm"), quantising(), ids=str)
def test_every_kernel_quantises_its_result(case: str, algorithm: str, device: torch.device) -> None:
    run_and_check(_quantising(case), Direction.FORWARD, algorithm, device)


@pytest.mark.interpreter
@pytest.mark.parametrize("precision", ["ieee", "fast_accum"])
@pytest.mark.parametrize("case", ["3x3", "1x1", "groups"])
def test_other_configs(
    case: str, precision: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = OPERATORS[Direction.FORWARD, 2]
    fields = {**PROBLEMS[case], "C": 80, "dtype": "float8_e4m3fn", "precision": precision}
    problem = operator.parse(fields)
    assert problem.precision == precision
    name = operator.candidates(problem)[0].name
    for config in (
        TileConfig(16, 16, 32, 4, 2),
        TileConfig(32, 64, 64, 4, 2, split_k=3),
        TileConfig(64, 16, 128, 8, 3, group_m=1, split_k=999),
    ):
        run_problem(problem, name, device, config)
    monkeypatch.setattr(ConvProblem, "wide", property(lambda self: True))
    run_problem(problem, name, device)


def tensors(
    rank: int = 2, groups: int = 1, seed: int = 0, channels: int = 20, filters: int = 14
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A quantised input and weight with their scales, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    size = (7, 6, 5)[:rank]
    x = torch.randn(2, channels, *size, generator=generator) * 3
    w = torch.randn(filters, channels // groups, *(3,) * rank, generator=generator)
    w *= torch.rand(filters, *(1,) * (rank + 1), generator=generator)
    bias = torch.randn(filters, generator=generator)
    return *tc.quantize_per_tensor(x), *tc.quantize_per_channel(w), bias


def dequantised(
    x: Tensor, sx: Tensor, w: Tensor, sw: Tensor, b: Tensor | None, **options: Any
) -> Tensor:
    scales = sw.double().reshape(-1, *[1] * (w.dim() - 1))
    plain = PLAIN[x.dim() - 2]
    return plain(x.double() * sx, w.double() * scales, b if b is None else b.double(), **options)


@pytest.mark.interpreter
@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize(
    ("rank", "options"),
    [
        (1, dict(padding=2, dilation=2)),
        (2, dict(padding=1)),
        (2, dict(stride=2, groups=2)),
        (3, dict(padding=1, stride=(1, 2, 1))),
    ],
    ids=str,
)
def test_scales_bias_function_and_quantisation(
    rank: int, options: dict[str, Any], result: str, backend: None, device: torch.device
) -> None:
    x, sx, w, sw, b = (t.to(device) for t in tensors(rank, options.get("groups", 1)))
    out_dtype = getattr(torch, result)
    exact = dequantised(x, sx, w, sw, b, **options)
    skip = torch.randn(exact.shape, dtype=torch.bfloat16).to(device)
    exact = torch.relu(exact + skip.double())
    plain = exact.float()
    scale_output = None
    if out_dtype is FLOAT8:
        scale_output = (exact.max() / 600).float()  # so that some are too large
        exact = torch.clamp(exact / scale_output.double(), -448, 448)
        plain = torch.clamp(plain / scale_output, -448, 448)
        assert (exact == 448).any()
    found = SCALED[rank](
        x,
        w,
        b,
        **options,
        scale_input=sx,
        scale_weight=sw,
        scale_output=scale_output,
        out_dtype=out_dtype,
        epilogue=lambda y, r: torch.relu(y + r),
        epilogue_args=(skip,),
    )
    assert_accurate(found, exact, plain.to(out_dtype))


@pytest.mark.interpreter
def test_options_are_read(backend: None, device: torch.device) -> None:
    x, sx, w, sw, b = (t.to(device) for t in tensors())
    scales = dict(scale_input=sx, scale_weight=sw)
    plain = tc.scaled_conv2d(x, w, **scales, out_dtype=torch.float32)
    assert tc.scaled_conv2d(x, w, **scales).dtype is torch.bfloat16
    assert tc.scaled_conv2d(x, w, **scales, scale_output=sx).dtype is FLOAT8
    half = tc.scaled_conv2d(x, w, b.half(), **scales, out_dtype=torch.float32)
    torch.testing.assert_close(half, plain + b.half().float()[:, None, None])
    scales = dict(scale_input=sx.reshape(1, 1), scale_weight=sw[:1])
    one = tc.scaled_conv2d(x, w, **scales, out_dtype=torch.float32)
    torch.testing.assert_close(one, plain * (sw[0] / sw)[:, None, None])
    fast = tc.scaled_conv2d(x, w, **scales, out_dtype=torch.float32, use_fast_accum=True)
    torch.testing.assert_close(fast, one)
    single = tc.scaled_conv2d(x[0], w, **scales, out_dtype=torch.float32)
    torch.testing.assert_close(single, one[0])
    table = torch.arange(14.0).to(device)
    scales = dict(scale_input=sx, scale_weight=sw, out_dtype=torch.float32)
    captured = tc.scaled_conv2d(x, w, **scales, epilogue=lambda y, *, c, h: y * h + table[c])
    rows = torch.arange(5.0, device=device)[:, None]
    torch.testing.assert_close(captured, plain * rows + table[:, None, None])


@pytest.mark.interpreter
def test_a_result_too_large_is_the_largest_number(backend: None, device: torch.device) -> None:
    values = [0.0, 1.0, 447.0, 456.0, 465.0, 1e9, torch.inf, torch.nan]
    values += [-v for v in values]
    x = torch.tensor(values, device=device).reshape(1, 1, 1, -1)
    w = torch.ones(1, 1, 1, 1, device=device)
    y = tc.scaled_conv2d(x, w, out_dtype=FLOAT8).float().flatten()
    expected = torch.tensor([0.0, 1.0, 448.0, 448.0, 448.0, 448.0, 448.0, torch.nan])
    expected = torch.cat([expected, -expected]).to(device)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    scale = torch.tensor(2.0, device=device)
    y = tc.scaled_conv2d(x, w, scale_output=scale).float().flatten().tolist()
    assert y[2:6] == [224.0, 224.0, 240.0, 448.0]


@pytest.mark.interpreter
def test_an_unquantised_input_makes_a_float8_result(backend: None, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 9, 8, generator=generator).to(device)
    w, b = torch.randn(5, 3, 3, 3, generator=generator).to(device), torch.randn(5).to(device)
    scale = torch.tensor(0.02, device=device)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        args = [t.to(dtype) for t in (x, w, b)]
        y = tc.scaled_conv2d(*args, stride=2, scale_output=scale, epilogue=F.gelu)
        exact = F.gelu(F.conv2d(*[t.double() for t in args], stride=2)) / scale.double()
        assert_accurate(y, exact.clamp(-448, 448), exact.float().clamp(-448, 448).to(FLOAT8))


def test_empty_results(backend: None, device: torch.device) -> None:
    x, sx, w, sw, b = (t.to(device) for t in tensors())
    y = tc.scaled_conv2d(x[:0], w, b, scale_input=sx, scale_weight=sw)
    assert y.shape == (0, 14, 5, 4)
    none = tc.scaled_conv2d(x[:, :0], w[:, :0], b, scale_input=sx, scale_weight=sw)
    torch.testing.assert_close(none, b.bfloat16()[:, None, None].expand_as(none))


def test_quantised_tensors() -> None:
    x = torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    q, scale = tc.quantize_per_tensor(x)
    assert q.dtype is FLOAT8 and q.stride() == x.stride() and q.float().abs().max() == 448
    assert ((q.float() * scale - x).abs() <= x.abs() / 16 + scale * 2**-10).all()
    q, same = tc.quantize_per_tensor(x, scale / 4)
    assert same == scale / 4 and q.float().abs().max() == 448
    for shape in ((6, 4, 3), (6, 4, 3, 3), (6, 4, 2, 3, 1)):
        w = torch.randn(shape)
        w[2] = 0
        q, scales = tc.quantize_per_channel(w)
        assert scales.shape == (6,) and q.stride(1) == 1
        back = q.float() * scales.reshape(-1, *[1] * (w.dim() - 1))
        assert (back[2] == 0).all()
        assert ((back - w).abs().amax(dim=tuple(range(1, w.dim()))) <= 16 * scales).all()
    zeros, scale = tc.quantize_per_tensor(torch.zeros(3))
    assert (zeros.float() == 0).all() and scale > 0
    assert tc.quantize_per_tensor(torch.zeros(0))[0].numel() == 0


X, SX, W, SW, B = tensors()
GOOD: dict[str, Any] = dict(input=X, weight=W, scale_input=SX, scale_weight=SW)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no scale": (dict(scale_input=None), "scale_input: expected a float32 tensor .* got None"),
    "number": (dict(scale_weight=0.1), "scale_weight: expected a float32 tensor, got float"),
    "scale's dtype": (dict(scale_input=SX.half()), "scale_input: .* got torch.float16"),
    "scales": (dict(scale_weight=SW[:3]), r"scale_weight: .* shape \(14,\), got \(3,\)"),
    "scale's device": (dict(scale_input=SX.to("meta")), "scale_input: .* device cpu, got meta"),
    "bias dtype": (dict(bias=B.double()), "bias: expected float16, bfloat16 or float32"),
    "bias shape": (dict(bias=B[:3]), r"bias: expected shape \(14,\)"),
    "dtypes": (dict(weight=W.float()), "weight: expected the input's dtype"),
    "float64": (
        dict(input=X.double(), weight=W.double(), scale_input=None, scale_weight=None),
        "out_dtype: expected torch.float8_e4m3fn of a torch.float64 input",
    ),
    "scale of a float": (
        dict(input=X.half(), weight=W.half(), scale_weight=None),
        "scale_input: expected none for an input of dtype torch.float16",
    ),
    "result of a float": (
        dict(input=X.half(), weight=W.half(), scale_input=None, scale_weight=None),
        "out_dtype: expected torch.float8_e4m3fn of a torch.float16 input",
    ),
    "out_dtype": (dict(out_dtype=torch.int8), "out_dtype: expected bfloat16, .* got torch.int8"),
    "scale of a wide result": (
        dict(out_dtype=torch.float16, scale_output=SX),
        "scale_output: expected none for a result of dtype torch.float16",
    ),
    "kernel": (dict(dilation=9), "input: expected a padded map"),
    "epilogue": (dict(epilogue=3), "epilogue: expected a function"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        tc.scaled_conv2d(**{**GOOD, **changes})


def test_a_gradient_is_refused(backend: None) -> None:
    bias = B.clone().requires_grad_()
    with pytest.raises(NoGradientError, match=re.escape("torch.no_grad()")):
        tc.scaled_conv2d(**GOOD, bias=bias)
    with torch.no_grad():
        tc.scaled_conv2d(**GOOD, bias=bias)
    x, w = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(2, 2, 3, 3)
    with pytest.raises(NoGradientError):
        tc.scaled_conv2d(x, w, out_dtype=FLOAT8)
    with pytest.raises(NoGradientError):
        torch.func.grad(lambda b: tc.scaled_conv2d(**GOOD, bias=b).float().sum())(B)
    with pytest.raises(tc.TritonConvError):
        tc.conv2d(X, W)


@pytest.mark.filterwarnings("ignore")
def test_compiled(backend: None) -> None:
    torch._dynamo.reset()
    own = torch.linspace(1, 2, 14)

    def layer(x: Tensor, sx: Tensor, b: Tensor, r: Tensor, local: bool) -> Tensor:
        if local:
            factor = own * 1
            f = lambda y, r: torch.relu(y) * 2 + r  # noqa: E731
            return tc.scaled_conv2d(
                x, W, b, scale_input=sx, scale_weight=SW, scale_output=sx * factor[0],
                epilogue=lambda y, r: f(y, r), epilogue_args=(r,),
            )  # fmt: skip
        return tc.scaled_conv2d(
            x, W, b, scale_input=sx, scale_weight=SW, scale_output=sx,
            epilogue=lambda y, r, *, c: torch.relu(y) * own[c] + r, epilogue_args=(r,),
        )  # fmt: skip

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    skip = torch.randn(2, 14, 5, 4)
    for local in (False, True):
        expected = layer(X, SX, B, skip, local)
        found = compiled(X, SX, B, skip, local)
        assert found.dtype is FLOAT8 and found.stride() == expected.stride()
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.13, atol=0.01)


def test_devices_without_float8_take_pytorch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaled_ops, "float8_kernels", lambda device: False)
    y = tc.scaled_conv2d(**{k: v.to(device) for k, v in GOOD.items()}, out_dtype=torch.float32)
    exact = dequantised(X, SX, W, SW, None)
    assert check(y.cpu(), exact, exact.float(), dtype=torch.float32).ok


def test_tuned_entries_of_other_problems_keep_their_key() -> None:
    operator = OPERATORS[Direction.FORWARD, 2]
    fields = operator.parse({"C": 8, "M": 8, "H": 4, "dtype": "bfloat16"}).fields()
    assert "output_dtype" not in fields and list(fields)[-1] == "out_width"
    keys = set()
    for dtype, result, precision in (
        ("bfloat16", "bfloat16", "ieee"),
        ("bfloat16", "float8_e4m3fn", "ieee"),
        ("float8_e4m3fn", "bfloat16", "ieee"),
        ("float8_e4m3fn", "bfloat16", "fast_accum"),
        ("float8_e4m3fn", "float8_e4m3fn", "ieee"),
        ("float8_e4m3fn", "float32", "ieee"),
    ):
        given = {"C": 8, "M": 8, "H": 4, "dtype": dtype, "output_dtype": result}
        problem = operator.parse({**given, "precision": precision})
        again = operator.parse(problem.fields())
        assert again == problem
        keys.add(problem_key(operator.name, problem.fields()))
    assert len(keys) == 6
    assert problem.bytes_moved() == 16 * 8 + 64 + 16 * 8 * 4
    for direction in (Direction.DGRAD, Direction.WGRAD):
        for bad in ({"dtype": "float8_e4m3fn"}, {"output_dtype": "float8_e4m3fn"}):
            with pytest.raises(ValueError, match="float8"):
                OPERATORS[direction, 2].parse({"C": 8, "M": 8, "H": 4, **bad})


def test_a_call_asks_for_the_problem_that_a_suite_names() -> None:
    operator = OPERATORS[Direction.FORWARD, 2]
    with recording() as seen:
        tc.scaled_conv2d(**GOOD, bias=B, epilogue=torch.relu)
    (problem,) = [problem for _, problem in seen]
    row = {"N": 2, "C": 20, "M": 14, "H": 7, "W": 6, "K": 3, "dtype": "float8_e4m3fn"}
    row |= {"layout": "contiguous", "weight_layout": "channels_last"}
    assert dict(problem.fields()) == dict(operator.parse(row).fields())


def test_the_rival_of_a_float8_product_is_pytorch_in_bfloat16() -> None:
    operator = OPERATORS[Direction.FORWARD, 2]
    problem = operator.parse({"C": 32, "M": 8, "H": 4, "dtype": "float8_e4m3fn"})
    assert "aten" not in [a.name for a in operator.candidates(problem)]
    rivals = operator.elsewhere(problem)
    assert {rival.x_layout for rival in rivals} == {"channels_last", "contiguous"}
    assert {(r.dtype, r.out_dtype, r.epilogue) for r in rivals} == {(torch.bfloat16, None, None)}
    alone = operator.parse({"C": 4, "M": 4, "G": 4, "H": 4, "dtype": "float8_e4m3fn"})
    assert [a.name for a in operator.candidates(alone)] == ["aten"]


@pytest.mark.parametrize("case", PROBLEMS)
def test_steps_of_float8_products_fill_a_matrix_instruction(case: str) -> None:
    """Found on an H100: defaults of small products took steps of 16, where 32 are the least."""
    fields = {**PROBLEMS[case], "dtype": "float8_e4m3fn", "layout": "channels_last"}
    operator = OPERATORS[Direction.FORWARD, rank_of(fields)]
    problem = operator.parse(fields)
    device = nominal_device("sm_90")
    for algorithm in operator.candidates(problem):
        steps = {getattr(config, "block_k", 32) for config in algorithm.configs(problem, device)}
        assert min(steps) >= 32, algorithm.name
