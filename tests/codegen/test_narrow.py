"""Cheaper functions where results are stored in half precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import tritonconv as tc
from tritonconv.codegen import Argument, Role, trace
from tritonconv.codegen.registry import program_of
from tritonconv.conv.epilogue import build_epilogue

from .run_scalar import run

X = (Argument("x", torch.float32, Role.VALUE),)
FUNCTIONS = {
    "gelu": F.gelu,
    "written out": lambda x: 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5))),
    "the sum alone": lambda x: torch.erf(x) + 1,
}


def sweep() -> torch.Tensor:
    """[-10, 10] densely, and what is special about float32."""
    special = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 3e38, -3e38]
    special += [float("inf"), float("-inf"), float("nan")]
    dense = torch.linspace(-10, 10, 40001)
    small = torch.logspace(-30, 0, 301)
    return torch.cat([dense, small, -small, torch.tensor(special)])


@pytest.mark.interpreter
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_plus_erf_is_as_good_as_the_rounding_that_follows(
    name: str,
) -> None:
    function = trace(FUNCTIONS[name], X)
    narrow = function.with_narrow()
    assert "one_plus_erf" in narrow.source and "tl.erf" not in narrow.source
    assert "tl.erf" in function.source and "one_plus_erf" not in function.source
    x = sweep()
    found = run(narrow, x)[0].cpu()
    # PyTorch's vectorised GELU makes NaN of infinity on a CPU.
    formula = FUNCTIONS["written out" if name == "gelu" else name]
    exact, plain = formula(x.double()), formula(x)
    special = ~torch.isfinite(plain)
    assert torch.equal(torch.isnan(found), torch.isnan(plain))
    assert torch.equal(found[special].nan_to_num(7.0), plain[special].nan_to_num(7.0))
    rest = ~special
    error = (found.double() - exact)[rest].abs()
    scale = x[rest].double().abs().clamp_min(1.0) if name != "the sum alone" else 1.0
    assert bool((error <= 4e-7 * scale).all()), error.max()
    # A small result keeps its leading digits: a third of what float16 rounds away.
    tail = rest & (x < -1e-30) & (x > -4.4)
    relative = ((found.double() - exact) / exact)[tail].abs()
    assert bool((relative <= 1.5e-4).all()), relative.max()
    for dtype in (torch.float16, torch.bfloat16):
        ours, theirs = (
            (value.to(dtype).double() - exact)[rest & (x.abs() < 100)].abs()
            for value in (found, plain)
        )
        assert float(ours.max()) <= 1.01 * float(theirs.max())


def test_only_sums_with_one_are_replaced_and_derivatives_are_exact() -> None:
    for alone in (torch.erf, lambda x: 2 + torch.erf(x), lambda x: 1 - torch.erf(x)):
        function = trace(alone, X).with_narrow()
        assert "one_plus_erf" not in function.source and "tl.erf" in function.source
    both = trace(lambda x: torch.erf(x) * (1 + torch.erf(x)), X).with_narrow()
    assert "one_plus_erf" in both.source and "tl.erf" in both.source
    derivative = trace(F.gelu, X).with_narrow().vjp(("x",))
    assert "one_plus_erf" not in derivative.source and "tl.erf" in derivative.source


@pytest.mark.parametrize(
    ("dtype", "cheap"),
    [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False), (torch.float64, False)],
    ids=str,
)
def test_epilogues_of_half_precision_are_narrow(dtype: torch.dtype, cheap: bool) -> None:
    epilogue = build_epilogue(F.gelu, False, (), dtype, 2)
    assert ("one_plus_erf" in program_of(epilogue.key).source) == cheap


@pytest.mark.interpreter
def test_gradients_of_first_and_second_order(device: torch.device) -> None:
    """Of gelu(conv + bias + residual) in bfloat16, against float64."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).bfloat16()

    x, w, b, r = values(2, 8, 5, 6), values(8, 8, 3, 3) / 8, values(8), values(2, 8, 5, 6)
    seed, direction = values(2, 8, 5, 6), values(2, 8, 5, 6)

    def results(dtype: torch.dtype, ours: bool) -> list[torch.Tensor]:
        inputs = [t.to(device=device, dtype=dtype).requires_grad_() for t in (x, w, b, r)]
        if ours:
            inputs[0] = inputs[0].detach().to(memory_format=torch.channels_last).requires_grad_()
            y = tc.conv2d(
                *inputs[:3],
                padding=1,
                epilogue=lambda y, r: F.gelu(y + r),
                epilogue_args=(inputs[3],),
            )
        else:
            y = F.gelu(F.conv2d(*inputs[:3], padding=1) + inputs[3])
        first = torch.autograd.grad(y, inputs, seed.to(y), create_graph=True)
        scalar = (first[0] * direction.to(y)).sum()
        second = torch.autograd.grad(scalar, inputs, allow_unused=True)
        return [y, *first, *second]

    exact, plain = results(torch.float64, False), results(torch.bfloat16, False)
    for found, wanted, base in zip(results(torch.bfloat16, True), exact, plain, strict=True):
        error, allowed = ((t.double() - wanted).abs().max() for t in (found, base))
        floor = 2**-8 * wanted.abs().max()
        assert float(error) <= 2 * float(allowed) + float(floor)
