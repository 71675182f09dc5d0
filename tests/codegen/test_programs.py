"""Random scalar programs: value, first and second derivative equal PyTorch's autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tritonconv.codegen import Argument, Role, ScalarFunction, trace

from .run_scalar import kernel, run

pytestmark = pytest.mark.interpreter

UNARY = {
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "atan": torch.atan,
    "erf": torch.erf,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "softplus": F.softplus,
    "mish": F.mish,
    "logsigmoid": F.logsigmoid,
    "exp": lambda x: torch.exp(torch.tanh(x)),
    "expm1": lambda x: torch.expm1(torch.tanh(x)),
    "log": lambda x: torch.log(x * x + 1.0),
    "log1p": lambda x: torch.log1p(x * x),
    "log2": lambda x: torch.log2(x * x + 1.5),
    "sqrt": lambda x: torch.sqrt(x * x + 1.0),
    "rsqrt": lambda x: torch.rsqrt(x * x + 1.0),
    "reciprocal": lambda x: 1 / (1 + x * x),
    "cube": lambda x: torch.tanh(x) ** 3,
    "power": lambda x: (x * x + 0.5) ** 1.7,
    "sinh": lambda x: torch.sinh(torch.sin(x)),
    "acos": lambda x: torch.acos(torch.sin(x) * 0.9),
    "erfc": torch.erfc,
    "neg": lambda x: torch.neg(torch.neg(-x)),
    "scale": lambda x: x * 1 * 0.3 + 0,
    "detach": lambda x: x.detach() * x,
}
# These have kinks, so that rounding in float32 could choose another branch than in float64.
KINKED = {
    "abs": torch.abs,
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": F.elu,
    "celu": lambda x: F.celu(x, 1.3),
    "selu": F.selu,
    "hardswish": F.hardswish,
    # PyTorch has no second derivative of its hardsigmoid.
    "hardsigmoid": lambda x: F.relu6(x + 3) / 6,
    "hardtanh": F.hardtanh,
    "softshrink": F.softshrink,
    "clamp": lambda x: torch.clamp(x, -0.7, 0.9),
    "clamp_min": lambda x: x.clamp(min=0.1),
    "floor": lambda x: torch.floor(x) * x,
    "frac": torch.frac,
    "round": lambda x: x - torch.round(x),
    "remainder": lambda x: torch.remainder(x, 1.3),
    "fmod": lambda x: torch.fmod(x, 0.8),
    "sign": lambda x: torch.sign(x) * x * x,
}
BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: torch.tanh(a) * torch.tanh(b),
    "div": lambda a, b: a / (1 + b * b),
    "atan2": lambda a, b: torch.atan2(a, b * b + 1),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
}
KINKED_BINARY = {
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "where": lambda a, b: torch.where(a > b, a * b, a - b),
    "both": lambda a, b: torch.where((a > 0) & ~(b < 0.5), a, b * 2),
}
INTEGER = {
    "float": lambda i: i.float() * 0.25,
    "remainder": lambda i: (i - 5) % 3,
    "divide": lambda i: (i - 7) // 2,
    "mode": lambda i: torch.div(i - 7, 3, rounding_mode="trunc"),
    "bits": lambda i: (i & 3) ^ (i << 1),
    "bool": lambda i: (i % 2 == 0) | (i > 11),
}


def leaves() -> st.SearchStrategy[Any]:
    return st.one_of(
        st.just(("x",)),
        st.just(("y",)),
        st.tuples(st.just("const"), st.sampled_from([0.5, -1.25, 2, 0.1])),
        st.tuples(st.just("int"), st.sampled_from(sorted(INTEGER))),
        st.tuples(st.just("slope")),
        st.tuples(st.just("table"), st.integers(0, 3)),
    )


def trees(unary: list[str], binary: list[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves(),
        lambda inner: st.one_of(
            st.tuples(st.just("unary"), st.sampled_from(unary), inner),
            st.tuples(st.just("binary"), st.sampled_from(binary), inner, inner),
        ),
        max_leaves=6,
    )


class Program:
    """An expression tree as a Python function of scalars, and of vectors just as well."""

    def __init__(self, tree: Any, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tree = tree
        self.slope = torch.randn(4, generator=generator, dtype=dtype).requires_grad_()
        self.table = torch.randn(4, 5, generator=generator, dtype=dtype).requires_grad_()

    def __call__(self, x: Any, y: Any, i: Any) -> Any:
        return self.run(self.tree, x, y, i) + x * y

    def run(self, tree: Any, x: Any, y: Any, i: Any) -> Any:
        kind = tree[0]
        if kind == "x":
            return x
        if kind == "y":
            return y
        if kind == "const":
            return x.new_full(x.shape, tree[1])
        if kind == "int":
            return INTEGER[tree[1]](i).to(x.dtype)
        if kind == "slope":
            return self.slope[i % 4]
        if kind == "table":
            return self.table[tree[1], (i * 2 + 1) % 5]
        operands = [self.run(t, x, y, i) for t in tree[2:]]
        return {**UNARY, **KINKED, **BINARY, **KINKED_BINARY}[tree[1]](*operands)


def operands(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, generator=generator, dtype=torch.float64)
    y = torch.randn(16, generator=generator, dtype=torch.float64)
    x[0], y[1] = 0.0, 0.0
    x[2] = y[2] = 0.25  # a tie, where min, max and their derivatives must choose as PyTorch does
    return [x.to(dtype), y.to(dtype)]


def traced(program: Program, dtype: torch.dtype) -> ScalarFunction:
    arguments = [Argument(n, dtype, Role.VALUE) for n in "xy"]
    return trace(program, (*arguments, Argument("i", torch.int32, Role.COORD)))


def gradients(outputs: list[Any], inputs: list[Any], seeds: list[Any]) -> list[torch.Tensor]:
    pairs = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(i) for i in inputs]
    found = torch.autograd.grad(
        [o for o, _ in pairs], inputs, [s for _, s in pairs], create_graph=True, allow_unused=True
    )
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]


def autograd(program: Program, dtype: torch.dtype) -> list[torch.Tensor]:
    """Value, first and second derivatives of the function run on vectors."""
    program.slope = program.slope.detach().to(dtype).requires_grad_()
    program.table = program.table.detach().to(dtype).requires_grad_()
    x, y = (v.requires_grad_() for v in operands(dtype))
    i = torch.arange(16, dtype=torch.int32)
    g, gx, gy = (torch.linspace(a, 1, 16, dtype=dtype) for a in (0.2, -1, -0.5))
    g.requires_grad_()
    value = program(x, y, i)
    first = gradients([value], [x, y], [g])
    second = gradients(first, [x, y, g], [gx, gy])
    tables = gradients([value], [program.slope, program.table], [g])
    return [t.detach() for t in (value, *first, *second, *tables)]


def through_triton(program: Program, dtype: torch.dtype) -> list[torch.Tensor]:
    """The same through the emitted functions; gradients of loads are scattered here."""
    function = traced(program, dtype)
    x, y = operands(dtype)
    i = torch.arange(16, dtype=torch.int32)
    g, gx, gy = (torch.linspace(a, 1, 16, dtype=dtype) for a in (0.2, -1, -0.5))
    (value,) = run(function, x, y, i)
    vjp = function.vjp(("x", "y"))
    first = run(vjp, x, y, i, g)
    second = run(vjp.vjp(("x", "y", "grad_out")), x, y, i, g, gx, gy)
    scattered = {id(program.slope): torch.zeros(4, dtype=dtype)}
    scattered[id(program.table)] = torch.zeros(4, 5, dtype=dtype)
    if function.loads:
        wrt = tuple(f"load:{k}" for k in range(len(function.loads)))
        parts = run(function.vjp(wrt), x, y, i, g)
        for k, load in enumerate(function.loads):
            target = scattered[id(function.captures[load.capture])].view(-1)
            target.index_add_(0, parts[2 * k + 1], parts[2 * k])
    return [value, *first, *second, *scattered.values()]


EVERY = trees(sorted(UNARY | KINKED), sorted(BINARY | KINKED_BINARY))
SMOOTH = trees(sorted(UNARY), sorted(BINARY))
PROFILE = settings(
    deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


@settings(PROFILE, max_examples=60)
@given(EVERY)
def test_random_program_equals_autograd_in_float64(tree):
    program = Program(tree, torch.float64)
    expected = autograd(program, torch.float64)
    got = through_triton(program, torch.float64)
    for a, b in zip(got, expected, strict=True):
        # hardsigmoid and hardswish hold 1/6 in float32 in PyTorch's kernels.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@settings(PROFILE, max_examples=30)
@given(SMOOTH)
def test_random_program_equals_autograd_in_float32(tree):
    program = Program(tree, torch.float64)
    precise = autograd(program, torch.float64)
    expected = autograd(program, torch.float32)
    got = through_triton(program, torch.float32)
    for a, b, exact in zip(got, expected, precise, strict=True):
        budget = 2 * (b.double() - exact).abs() + 2e-5 * (1 + exact.abs())
        assert ((a.double() - exact).abs() <= budget).all(), (a, b, exact)


@pytest.mark.parametrize("name", sorted(UNARY | KINKED))
def test_each_function_equals_autograd(name):
    program = Program(("unary", name, ("x",)), torch.float64)
    expected = autograd(program, torch.float64)
    got = through_triton(program, torch.float64)
    loose = name in ("hardswish", "hardsigmoid")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if loose else 1e-11, atol=1e-11)


def test_third_derivative():
    f = trace(torch.tanh, (Argument("x", torch.float64, Role.VALUE),))
    third = f.vjp(("x",)).vjp(("x",)).vjp(("x",))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    one = torch.ones_like(x)
    t = torch.tanh(x)
    expected = (1 - t**2) * (6 * t**2 - 2)
    roles = {a.name: Role.VALUE for a in third.arguments}
    (got,) = run(third.with_roles(**roles), x, *(one for _ in third.arguments[1:]))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("fn", [torch.nn.functional.silu, torch.nn.functional.mish])
def test_a_derivative_made_where_gradients_are_off_has_one_itself(fn):
    """A plain backward makes the first derivative; a later call may ask for the second."""
    with torch.no_grad():
        program = trace(fn, (Argument("x", torch.float64, Role.VALUE),)).program
        first = program.vjp(("x",))
    assert first.vjp(("x",)).lowered.nodes


def test_hardsigmoid_has_a_second_derivative():
    f = trace(F.hardsigmoid, (Argument("x", torch.float64, Role.VALUE),))
    second = f.vjp(("x",)).vjp(("x", "grad_out"))
    x = torch.tensor([-4.0, -1.0, 2.0, 5.0], dtype=torch.float64)
    roles = {a.name: Role.VALUE for a in second.arguments}
    by_x, by_grad = run(second.with_roles(**roles), x, torch.ones_like(x), torch.ones_like(x))
    assert not by_x.any()
    torch.testing.assert_close(by_grad, torch.tensor([0, 1 / 6, 1 / 6, 0], dtype=torch.float64))


def test_call_is_differentiable_by_pytorch():
    program = Program(("binary", "mul", ("slope",), ("unary", "gelu", ("x",))), torch.float64)
    expected = autograd(program, torch.float64)
    function = traced(program, torch.float64)
    x, y = (v.requires_grad_() for v in operands(torch.float64))
    g = torch.linspace(0.2, 1, 16, dtype=torch.float64)
    value = function(x, y, torch.arange(16))
    got = torch.autograd.grad(value, [x, y, program.slope], g)
    for a, b in zip((value, *got), (*expected[:3], expected[6]), strict=True):
        torch.testing.assert_close(a, b)


def test_a_frame_adds_coordinates_to_the_call(device: torch.device) -> None:
    names = [Argument(name, torch.int32, Role.COORD) for name in ("n", "w")]
    function = trace(
        lambda x, n, w: x * n + 10 * w, (Argument("x", torch.float32, Role.VALUE), *names)
    )
    assert function.with_frame(("n", "w")) is function
    framed = function.with_frame(("n", "d", "w"))
    x = torch.randn(8, device=device)
    n, d, w = (torch.arange(8, device=device, dtype=torch.int32) * k for k in (1, 100, 3))
    out = torch.empty_like(x)
    kernel(1, 3, 1)[(1,)](x, n, d, w, out, (), (), 8, FN=framed.jit, BLOCK=8)
    torch.testing.assert_close(out, x * n + 10 * w)
    assert framed.vjp(("x",)).program.frame == ("n", "d", "w")
