"""Prologues, pairs of inputs and statistics: values, first and second gradients, refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tritonconv as tc
from tritonconv.conv.algorithms.common import TileConfig
from tritonconv.conv.algorithms.fused_aten import variance_of
from tritonconv.conv.fused_dispatch import FUSED_OPERATORS, make_fused_runner
from tritonconv.conv.ops import FORWARD
from tritonconv.conv.problem import ConvProblem
from tritonconv.runtime.accuracy import check
from tritonconv.runtime.device import device_facts
from tritonconv.runtime.errors import ArgumentTypeError, ArgumentValueError
from tritonconv.runtime.operators import Config
from tritonconv.runtime.tables import Choice, Tier

from .oracle import assert_accurate, assert_gradients

pytestmark = pytest.mark.interpreter

N, C, M = 2, 3, 4


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """What float32 is compared with here is not of TF32, and neither is ours then."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Every one is far from zero at zero: a padded pixel that it is applied to shows.
PROLOGUES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "shifted": (lambda x: torch.tanh(x) + 2.0, []),
    "scale, bias, silu": (lambda x, s, b: F.silu(x * s + b + 1.0), [(C,), (C,)]),
    "one vector twice": (lambda x, s: x * s + s * s + 1.0, [(C, 1, 1)]),
    "per image and channel": (lambda x, g: (x + 1.5) * torch.sigmoid(g), [(N, C, 1, 1)]),
    "residual": (lambda x, r: torch.cos(x + r), [(N, C, 5, 4)]),
    "one number": (lambda x, s: F.softplus(x) * s + 1.0, [()]),
    "row and column": (lambda x, r, c: x * r + torch.exp(c), [(5, 1), (1, 1, 1, 4)]),
    "unread operand": (lambda x, s: torch.exp(x), [(C,)]),
    "coordinates": (lambda x, *, n, c, h, w: x * (1.0 + c) + 0.5 * n + h * w + 1.0, []),
}


def with_torch(
    function: Callable[..., Tensor],
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    prologue: Callable[..., Tensor] | None = None,
    prologue_args: Any = (),
    epilogue: Callable[..., Tensor] | None = None,
    epilogue_args: Any = (),
    **options: Any,
) -> Tensor:
    """The same written with PyTorch."""
    if isinstance(x, tuple):
        x = torch.cat(x, 1)
    if prologue is not None:
        rank = x.dim() - 2
        names = dict(zip(("n", "c", "d", "h", "w")[: rank + 2], range(rank + 2), strict=True))
        names = {"n": 0, "c": 1, "h": rank, "w": rank + 1}
        code = prologue.__code__
        asked = code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount]
        at = {
            name: torch.arange(x.shape[names[name]], device=x.device).reshape(
                [-1 if k == names[name] else 1 for k in range(x.dim())]
            )
            for name in asked
        }
        args = [t.reshape(-1, *[1] * rank) if t.dim() == 1 else t for t in prologue_args]
        x = prologue(x, *args, **at).to(x.dtype)
    y = function(x, w, bias, **options)
    return y if epilogue is None else epilogue(y, *epilogue_args).to(y.dtype)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", PROLOGUES)
def test_prologue_and_its_gradients(
    name: str, form: torch.memory_format, device: torch.device
) -> None:
    prologue, shapes = PROLOGUES[name]
    x = torch.randn(N, C, 5, 4, device=device).contiguous(memory_format=form)
    w = torch.randn(M, C, 3, 3, device=device) / 5
    operands = [torch.randn(shape, device=device) for shape in shapes]

    def call(conv: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, w: Tensor, *operands: Tensor) -> Tensor:
            y = conv(x, w, padding=(1, 2), prologue=prologue, prologue_args=operands)
            # Every leaf takes part, so that unread operands have a gradient: zero.
            return y + sum(0 * t.sum() for t in (x, w, *operands))

        return run

    def plain(*args: Any, **options: Any) -> Tensor:
        return with_torch(F.conv2d, *args, **options)

    assert_gradients(call(tc.conv2d), call(plain), [x, w, *operands])


KINDS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "dense, stride 2": ((2, 9, 5, 4), (4, 9, 3, 3), dict(padding=1, stride=2)),
    "1x1": ((2, 9, 5, 4), (4, 9, 1, 1), {}),
    "dilated": ((1, 3, 7, 6), (4, 3, 3, 2), dict(padding=2, dilation=2)),
    "groups": ((2, 4, 5, 4), (4, 2, 3, 3), dict(padding=1, groups=2)),
    "wide groups": ((1, 32, 3, 4), (6, 16, 3, 3), dict(padding=1, groups=2)),
    "1-D": ((2, 5, 9), (4, 5, 3), dict(padding=1, stride=2)),
    "3-D": ((1, 3, 2, 3, 3), (4, 3, 1, 3, 2), dict(padding=(0, 1, 1))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_prologue_epilogue_and_bias_of_every_kind(kind: str, device: torch.device) -> None:
    x_shape, w_shape, options = KINDS[kind]
    rank = len(x_shape) - 2
    x, w = torch.randn(x_shape, device=device), torch.randn(w_shape, device=device) / 5
    s, t = torch.randn(x_shape[1], device=device), torch.randn(x_shape[1], device=device)
    b = torch.randn(w_shape[0], device=device)
    g = torch.randn(w_shape[0], *[1] * rank, device=device)
    ours, plain = getattr(tc, f"conv{rank}d"), getattr(F, f"conv{rank}d")

    def call(conv: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, b, s, t, g: conv(
            x,
            w,
            b,
            prologue=lambda x, s, t: torch.tanh(x * s + t),
            prologue_args=(s, t),
            epilogue=lambda y, g: torch.sin(y) * g,
            epilogue_args=(g,),
            **options,
        )

    def composed(*args: Any, **more: Any) -> Tensor:
        return with_torch(plain, *args, **more)

    names = ["x", "w", "bias", "scale", "shift", "g"]
    assert_gradients(call(ours), call(composed), [x, w, b, s, t, g], names=names)


def test_captured_tensors_beside_operands(device: torch.device) -> None:
    x, w = torch.randn(N, C, 5, 4, device=device), torch.randn(M, C, 3, 3, device=device)
    s, table = torch.randn(C, device=device), torch.randn(C, device=device)

    def ours(x: Tensor, w: Tensor, s: Tensor, table: Tensor) -> Tensor:
        def prologue(x: Tensor, s: Tensor, *, c: Tensor) -> Tensor:
            return torch.tanh(x + table[c]) * s + 1.0

        return tc.conv2d(x, w, padding=1, prologue=prologue, prologue_args=(s,))

    def plain(x: Tensor, w: Tensor, s: Tensor, table: Tensor) -> Tensor:
        a = torch.tanh(x + table.reshape(-1, 1, 1)) * s.reshape(-1, 1, 1) + 1.0
        return F.conv2d(a, w, padding=1)

    assert_gradients(ours, plain, [x, w, s, table])


def test_a_constant_channel_has_no_variance() -> None:
    """On a GPU PyTorch says 0 for 1 / deviation of it, as behind a ReLU that lets nothing pass."""
    inverse, mean = torch.tensor([0.5, 0.0]), torch.tensor([1.0, 2.0])
    assert variance_of(inverse, mean)[0].tolist() == [4.0, 0.0]


@pytest.mark.parametrize("channels", [(3, 5), (16, 32), (17, 16)], ids=str)
@pytest.mark.parametrize("forms", ["ll", "cc", "lc"])
def test_two_inputs(channels: tuple[int, int], forms: str, device: torch.device) -> None:
    form = {"l": torch.channels_last, "c": torch.contiguous_format}
    a, b = (
        torch.randn(N, c, 4, 3, device=device).contiguous(memory_format=form[f])
        for c, f in zip(channels, forms, strict=True)
    )
    # Not saturated: 1 - tanh(y)² of a large y cancels, which is no fault of the product.
    w = torch.randn(M, sum(channels), 3, 3, device=device) / (9 * sum(channels)) ** 0.5
    bias = torch.randn(M, device=device)

    def ours(a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return tc.conv2d((a, b), w, bias, padding=1, epilogue=torch.tanh)

    def plain(a: Tensor, b: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return torch.tanh(F.conv2d(torch.cat((a, b), 1), w, bias, padding=1))

    assert_gradients(ours, plain, [a, b, w, bias], names=["first", "second", "w", "bias"])


@pytest.mark.parametrize("rank", [1, 3])
def test_two_inputs_of_other_ranks(rank: int, device: torch.device) -> None:
    a, b = (torch.randn(1, c, *[4] * rank, device=device) for c in (3, 2))
    w = torch.randn(M, 5, *[3] * rank, device=device) / 5
    ours, plain = getattr(tc, f"conv{rank}d"), getattr(F, f"conv{rank}d")
    assert_gradients(
        lambda a, b, w: ours((a, b), w, stride=2, padding=1),
        lambda a, b, w: plain(torch.cat((a, b), 1), w, stride=2, padding=1),
        [a, b, w],
    )


def statistics(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    var, mean = torch.var_mean(y, [0, *range(2, y.dim())], correction=0)
    return y, mean, var


@pytest.mark.parametrize(
    ("fused", "rank"),
    [
        ("", 2),
        ("prologue", 2),
        ("pair", 2),
        ("epilogue", 2),
        ("epilogue", 1),
        ("prologue", 1),
        ("prologue", 3),
    ],
)
def test_statistics_and_their_gradients(rank: int, fused: str, device: torch.device) -> None:
    size = {1: 12, 2: 4, 3: 2}[rank]
    x, w = torch.randn(N, 4, *[size] * rank, device=device), torch.randn(M, 4, *[3] * rank)
    w, b, s = w.to(device) / 5, torch.randn(M, device=device), torch.randn(4, device=device)
    options: dict[str, Any] = dict(padding=1)
    if fused == "epilogue":
        options["epilogue"] = torch.tanh

    def join(results: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        y, mean, var = results
        # All three are used, each with a weight of its own and none of them linearly.
        return torch.cat([y.flatten().sin(), 3.0 * mean.exp(), 5.0 * (var + 0.1).rsqrt()])

    def ours(x: Tensor, w: Tensor, b: Tensor, s: Tensor) -> Tensor:
        given: Any = (x[:, :1], x[:, 1:]) if fused == "pair" else x
        more = dict(options)
        if fused == "prologue":
            more |= dict(prologue=lambda x, s: torch.tanh(x + s), prologue_args=(s,))
        results = getattr(tc, f"conv{rank}d_with_stats")(given, w, b, **more)
        return join(results) + 0 * s.sum()

    def plain(x: Tensor, w: Tensor, b: Tensor, s: Tensor) -> Tensor:
        more = dict(options)
        if fused == "prologue":
            more |= dict(prologue=lambda x, s: torch.tanh(x + s), prologue_args=(s,))
        y = with_torch(getattr(F, f"conv{rank}d"), x, w, b, **more)
        return join(statistics(y)) + 0 * s.sum()

    assert_gradients(ours, plain, [x, w, b, s], names=["x", "w", "bias", "scale"])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradient_of_one_result_alone(which: int, device: torch.device) -> None:
    x, w = torch.randn(N, 4, 4, 4, device=device), torch.randn(M, 4, 3, 3, device=device) / 5
    assert_gradients(
        lambda x, w: tc.conv2d_with_stats(x, w)[which].square(),
        lambda x, w: statistics(F.conv2d(x, w))[which].square(),
        [x, w],
    )


def test_variance_of_an_output_far_from_zero(device: torch.device) -> None:
    """E[y²] − E[y]² has no correct digit here."""
    x, w = torch.randn(4, 8, 9, 9, device=device), torch.randn(M, 8, 3, 3, device=device) / 10
    bias = torch.full((M,), 3.0e3, device=device)
    y, mean, var = tc.conv2d_with_stats(x, w, bias, padding=1)
    _, exact_mean, exact_var = statistics(y.double())
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(2, 20, 6, 5, device=device).to(dtype)
    w = (torch.randn(M, 20, 3, 3, device=device) / 10).to(dtype)
    s = torch.randn(20, device=device)

    def prologue(x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(x * s) + 0.5

    options: dict[str, Any] = dict(padding=1, prologue=prologue, prologue_args=(s,))
    y, mean, var = tc.conv2d_with_stats(x, w, **options)
    exact = with_torch(
        F.conv2d, x.double(), w.double(), **{**options, "prologue_args": [s.double()]}
    )
    assert_accurate(y, exact, with_torch(F.conv2d, x, w, **options))
    _, exact_mean, exact_var = statistics(y.double())
    assert mean.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)


# name: fields of a problem of the operator, as a tuner meets them
PROBLEMS: dict[str, dict[str, Any]] = {
    "prologue": dict(N=2, C=10, M=7, H=5, W=7, K=3, P=1, prologue="fused"),
    "prologue, all": dict(
        N=2, C=40, M=37, H=5, W=7, K=3, S=2, P=1, prologue="fused", stats=True, epilogue="fused+acc"
    ),
    "one block of channels": dict(N=1, C=16, M=5, H=5, W=7, K=3, P=1, prologue="fused"),
    "groups": dict(N=1, C=8, M=6, H=5, W=7, K=3, P=1, G=2, prologue="fused", stats=True),
    "pair of blocks": dict(N=2, C=48, M=9, H=5, W=4, K=3, P=1, second_channels=16, stats=True),
    "odd pair": dict(N=2, C=45, M=9, H=5, W=4, K=3, P=1, second_channels=12, epilogue="fused"),
    "pair in two layouts": dict(
        N=2, C=48, M=9, H=5, W=4, K=3, P=1, second_channels=16, second_layout="contiguous"
    ),
    "3-D": dict(N=1, C=9, M=5, D=3, H=4, W=5, K=3, P=1, prologue="fused", stats=True),
    "3-D pair": dict(N=1, C=32, M=5, D=2, H=4, W=5, K=3, P=1, second_channels=16),
    "many tiles": dict(N=3, C=4, M=33, H=17, W=16, K=1, stats=True),
}


def run_problem(
    fields: dict[str, Any],
    device: torch.device,
    config: Config | None = None,
    name: str = "fused_input",
) -> dict[str, Tensor]:
    operator = FUSED_OPERATORS[3 if "D" in fields else 2]
    problem = operator.parse(fields)
    algorithm = operator.algorithm(name)
    if config is None:
        config = algorithm.configs(problem, device_facts())[0]
    tensors = operator.make_tensors(problem, device, torch.Generator(device).manual_seed(0))
    exact = operator.reference(problem, tensors, torch.float64)
    plain = operator.reference(problem, tensors, problem.dtype)
    make_fused_runner(problem, Choice(algorithm.name, config, Tier.DEFAULT))(*tensors.values())
    for name in operator.outputs(problem):
        verdict = check(tensors[name], exact[name], plain[name], dtype=problem.dtype)
        assert verdict.ok, f"{algorithm.name} {problem} {config} {name}: {verdict}"
    return {name: tensors[name] for name in operator.outputs(problem)}


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernels_with_other_configs(name: str, layout: str, device: torch.device) -> None:
    fields = {"layout": layout, **PROBLEMS[name]}
    run_problem(fields, device)
    small = TileConfig(16, 16, 16, 4, 2)
    first = run_problem(fields, device, small)
    second = run_problem(fields, device, small)
    assert all(torch.equal(first[key], second[key]) for key in first)
    run_problem(fields, device, TileConfig(64, 32, 64, 4, 2, group_m=1))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_algorithm_agrees(name: str, layout: str, device: torch.device) -> None:
    fields = {"layout": layout, **PROBLEMS[name]}
    operator = FUSED_OPERATORS[3 if "D" in fields else 2]
    served = {a.name for a in operator.candidates(operator.parse(fields))}
    prologue = {"prepared_input"} if "prologue" in fields else set()
    assert served == {"fused_input", "aten"} | prologue
    for algorithm in served:
        run_problem(fields, device, name=algorithm)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_prepared_input_with_other_configs(dtype: str, device: torch.device) -> None:
    fields = {**PROBLEMS["prologue, all"], "dtype": dtype}
    first, second = (
        run_problem(fields, device, TileConfig(16, 16, 16, 4, 2), "prepared_input") for _ in "12"
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_prologue_that_every_tap_would_repeat_runs_once(device: torch.device) -> None:
    operator = FUSED_OPERATORS[2]
    large = {"N": 64, "C": 64, "M": 64, "H": 56, "prologue": "fused", "dtype": "bfloat16"}

    def default(**fields: Any) -> str:
        problem = operator.parse({**large, **fields})
        return operator.default_algorithm(problem, device_facts()).name

    assert default(K=3, P=1) == "prepared_input"
    assert default(K=1) == "fused_input"  # once as it is
    assert default(K=3, P=1, S=2) == "fused_input"  # 2.25 times
    assert default(K=3, P=1, prologue="none", stats=True) == "fused_input"


def test_a_call_runs_what_the_table_says_even_if_that_is_pytorch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 16, 6, 5, device=device)
    w = torch.randn(16, 16, 3, 3, device=device) / 12
    scale = torch.rand(16, device=device)
    options = {"prologue": lambda x, s: torch.relu(x * s), "prologue_args": (scale,)}
    results = []
    for name in ("fused_input", "prepared_input", "aten"):
        algorithm = FUSED_OPERATORS[2].algorithm(name)
        monkeypatch.setattr(
            type(FUSED_OPERATORS[2]), "default_algorithm", lambda self, p, d, a=algorithm: a
        )
        FORWARD.clear()
        results.append(tc.conv2d_with_stats(x, w, padding=1, **options))
    FORWARD.clear()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["prologue, all", "pair of blocks"])
def test_kernels_in_half_precision(name: str, dtype: str, device: torch.device) -> None:
    run_problem({**PROBLEMS[name], "dtype": dtype}, device, TileConfig(32, 16, 16, 4, 2))


@pytest.mark.parametrize("name", ["prologue, all", "pair of blocks", "odd pair", "3-D"])
def test_kernels_with_64_bit_offsets(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tritonconv.conv.fused_problem.FusedProblem.wide", property(lambda s: True))
    run_problem(PROBLEMS[name], device, TileConfig(16, 16, 16, 4, 2))


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_made_again_from_its_fields(name: str) -> None:
    operator = FUSED_OPERATORS[3 if "D" in PROBLEMS[name] else 2]
    problem = operator.parse({"layout": "contiguous", **PROBLEMS[name]})
    assert operator.parse(problem.fields()).fields() == problem.fields()
    assert problem.operator == operator.name
    assert isinstance(problem, ConvProblem) and dataclasses.is_dataclass(problem)


def leaves(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s, device=device, dtype=torch.float64).requires_grad_() for s in shapes]


def test_gradgradcheck_on_the_reference_path() -> None:
    cpu = torch.device("cpu")
    x, w, s, b = leaves(cpu, (1, 2, 3, 3), (2, 2, 2, 2), (2,), (2,))

    def fused(x: Tensor, w: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return tc.conv2d_with_stats(
            x, w, padding=1, prologue=lambda x, s, b: torch.sigmoid(x * s + b), prologue_args=(s, b)
        )

    with tc.settings.override(backend="torch"):
        assert torch.autograd.gradcheck(fused, (x, w, s, b))
        assert torch.autograd.gradgradcheck(fused, (x, w, s, b))
        y, v, u = leaves(cpu, (1, 1, 3, 3), (1, 2, 3, 3), (2, 3, 2, 2))
        assert torch.autograd.gradgradcheck(lambda y, v, u: tc.conv2d((y, v), u), (y, v, u))


@pytest.mark.parametrize("which", ["prologue", "pair", "statistics"])
def test_opcheck(which: str, device: torch.device) -> None:
    from tritonconv.conv.fused_input_ops import CONV_FUSED, CONV_WGRAD_TWO
    from tritonconv.conv.prologue import bind_prologue

    x, w = torch.randn(1, 2, 4, 3, device=device), torch.randn(3, 2, 3, 3, device=device)
    geometry = ([1, 1], [1, 1, 1, 1], [1, 1], 1, "ieee")
    x, w = x.requires_grad_(), w.requires_grad_()
    s = torch.randn(2, device=device).requires_grad_()
    inputs, reads, key = [x], [], ""
    if which == "prologue":
        key, reads = bind_prologue(lambda x, s: torch.tanh(x * s), (s,), x, 2)
    if which == "pair":
        inputs = [x[:, :1].detach().requires_grad_(), x[:, 1:].detach().requires_grad_()]
        grad = torch.randn(1, 3, 4, 3, device=device)
        torch.library.opcheck(CONV_WGRAD_TWO.overload, (grad, *inputs, [3, 3], *geometry))
    arguments = (inputs, w, reads, key, [], [], "", False, which == "statistics", *geometry)
    torch.library.opcheck(CONV_FUSED.overload, arguments)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool) -> None:
    torch._dynamo.reset()

    def ours(a: Tensor, b: Tensor, w: Tensor, s: Tensor) -> Tensor:
        y, mean, var = tc.conv2d_with_stats((a, b), w, padding=1)
        z = (y - mean.reshape(-1, 1, 1)) * (var + 1e-5).rsqrt().reshape(-1, 1, 1)
        return z + tc.conv2d(
            a, w[:, :2], padding=1, prologue=lambda x, s: torch.tanh(x * s + 1), prologue_args=(s,)
        )

    def plain(a: Tensor, b: Tensor, w: Tensor, s: Tensor) -> Tensor:
        y = F.conv2d(torch.cat((a, b), 1), w, padding=1)
        z = F.batch_norm(y, None, None, training=True)
        return z + F.conv2d(torch.tanh(a * s.reshape(-1, 1, 1) + 1), w[:, :2], padding=1)

    with tc.settings.override(backend="torch"):
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for size in (4, 5):
            shapes = ((2, 2, size, 4), (2, 3, size, 4), (4, 5, 3, 3), (2,))
            given = [torch.randn(s).requires_grad_() for s in shapes]
            result, expected = compiled(*given), plain(*given)
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
            found = torch.autograd.grad(result.square().sum(), given)
            wanted = torch.autograd.grad(expected.square().sum(), given)
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


def test_unbatched_and_empty(device: torch.device) -> None:
    x, w = torch.randn(C, 5, 4, device=device), torch.randn(M, C, 3, 3, device=device)
    shifted = PROLOGUES["shifted"][0]
    y = tc.conv2d(x, w, padding=1, prologue=shifted)
    torch.testing.assert_close(y, F.conv2d(shifted(x), w, padding=1), rtol=1e-4, atol=1e-4)
    y = tc.conv2d((x[:1], x[1:]), w)
    torch.testing.assert_close(y, F.conv2d(x, w), rtol=1e-4, atol=1e-4)
    assert tc.conv2d(x[None, ...][:0], w, prologue=shifted).shape == (0, M, 3, 2)


def test_autocast(device: torch.device) -> None:
    x, w = torch.randn(1, C, 5, 4, device=device), torch.randn(M, C, 3, 3, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y, mean, _ = tc.conv2d_with_stats(x, w, prologue=torch.tanh)
        z = tc.conv2d((x, x), torch.cat((w, w), 1))
    assert y.dtype == z.dtype == torch.bfloat16
    assert mean.dtype == torch.float32


def test_refusals() -> None:
    x, w = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)
    relu, twice = torch.relu, torch.cat((w, w), 1)
    for error, words, call in (
        (ArgumentValueError, "prologue_args", lambda: tc.conv2d(x, w, prologue_args=(w,))),
        (ArgumentTypeError, "prologue", lambda: tc.conv2d(x, w, prologue=3)),
        (
            ArgumentTypeError,
            r"prologue_args\[0\]",
            lambda: tc.conv2d(x, w, prologue=torch.mul, prologue_args=(2.0,)),
        ),
        (
            ArgumentValueError,
            r"prologue_args\[0\]",
            lambda: tc.conv2d(x, w, prologue=torch.mul, prologue_args=(torch.ones(5),)),
        ),
        (ArgumentValueError, "two inputs", lambda: tc.conv2d((x, x), twice, prologue=relu)),
        (ArgumentValueError, "3 channels in both", lambda: tc.conv2d((x, x), w)),
        (ArgumentValueError, "two tensors that differ", lambda: tc.conv2d((x, x[:, :, 1:]), w)),
        (ArgumentValueError, "groups", lambda: tc.conv2d((x, x), twice, groups=2)),
        (ArgumentValueError, "a tensor or two", lambda: tc.conv2d((x, x, x), w)),
        (ArgumentTypeError, "one dtype", lambda: tc.conv2d((x[:, :1], x[:, 1:].double()), w)),
    ):
        with pytest.raises(error, match=words):
            call()
    with pytest.raises(TypeError, match="prologue"):
        tc.conv_transpose2d(x, w, prologue=relu)  # type: ignore[call-arg]


def test_operands_that_are_no_sequence_are_refused() -> None:
    x, w = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 1, 1)
    for more in ({}, {"prologue": lambda x, s: x * s}):
        with pytest.raises(ArgumentTypeError, match="prologue_args: expected a sequence"):
            tc.conv2d(x, w, prologue_args=torch.ones(2), **more)


def test_a_function_of_other_arguments_is_refused() -> None:
    x, w = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)
    with pytest.raises(tc.TritonConvError, match="prologue_args"):
        tc.conv2d(x, w, prologue=lambda x, s: x * s)
