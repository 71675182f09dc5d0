"""Every operator against PyTorch on edge values, through the emitted Triton and the interpreter."""

from __future__ import annotations

import pytest
import torch

from tritonconv.codegen import trace

from .cases import _ELSEWHERE, cases_of, operators
from .run_scalar import run

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NumPy at edge values
]

# Relative error of the interpreter's NumPy against PyTorch's CPU kernels.
TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-13, torch.bfloat16: 0.0, torch.float16: 0.0}
# PyTorch computes these with the float32 value of 1/6; a sum that cancels.
LOOSE = {
    "hardsigmoid_backward.default": 1e-7,
    "hardswish_backward.default": 1e-7,
    "logaddexp2.default": 1e-7,
}


def assert_same(
    got: torch.Tensor, expected: torch.Tensor, precise: torch.Tensor, case: object, loose: float = 0
) -> None:
    """Equal to PyTorch, or at most twice as far from the float64 result as PyTorch is."""
    assert got.dtype == expected.dtype, f"{case}: {got.dtype} for {expected.dtype}"
    if not expected.dtype.is_floating_point:
        assert torch.equal(got, expected), f"{case}: {got} for {expected}"
        return
    rtol = max(loose, TOLERANCE[expected.dtype])
    atol = max(loose, torch.finfo(torch.float32).tiny if got.dtype.itemsize < 8 else 1e-300)
    got, expected, precise = got.double(), expected.double(), precise.double()
    budget = 2 * (expected - precise).abs() + rtol * precise.abs() + atol
    good = torch.isclose(got, expected, rtol=rtol, atol=atol, equal_nan=True)
    good |= torch.isclose(got, precise, rtol=rtol, atol=atol, equal_nan=True)
    good |= (got - precise).abs() <= budget
    if not good.all():
        k = int((~good).nonzero()[0])
        raise AssertionError(f"{case}: row {k}: {got[k]} for {expected[k]} (float64 {precise[k]})")


def precise_result(case: object, operands: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The operator in float64; in its own dtype where that changes what it computes."""
    wide = tuple(x.double() if x.dtype is torch.float32 else x for x in operands)
    return case(*wide)  # type: ignore[operator]


@pytest.mark.parametrize("op", operators(), ids=lambda op: str(op).removeprefix("aten."))
def test_operator_equals_pytorch(op):
    cases = cases_of(op)
    if str(op).removeprefix("aten.").partition(".")[0] in _ELSEWHERE:
        pytest.skip("has its own test")
    assert cases, f"no dtypes are accepted for {op}"
    for case in cases:
        function = trace(case, case.arguments())
        operands = case.operands()
        expected = case(*operands)
        (got,) = run(function, *operands)
        precise = precise_result(case, operands)
        assert_same(got, expected, precise, case, LOOSE.get(case.name, 0))
