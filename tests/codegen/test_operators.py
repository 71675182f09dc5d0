"""Every operator against PyTorch on edge values, through the emitted Triton and the interpreter."""

from __future__ import annotations

import pytest
import torch

from tritonconv.codegen import trace
from tritonconv.runtime.compat import interpreting

from .cases import Case, cases_of, operators
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
# Sums of a tensor and a product or quotient, which a GPU may fuse (FMA) and so round differently:
# where the sum cancels, what is left is as large as the rounding of the summands.
SUMS = {"addcmul.default", "addcdiv.default"}
TINY = torch.finfo(torch.float32).tiny


def flushed(x: torch.Tensor) -> torch.Tensor:
    """Which elements a GPU that flushes subnormals would read or write as zero."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return torch.zeros(x.shape, dtype=torch.bool)
    return (x != 0) & (x.abs() < TINY)


def lost_budget(operands: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """An intermediate below the normal numbers, multiplied by operands: exp(-88) * x * grad."""
    budget = torch.full(operands[0].shape, TINY, dtype=torch.float64)
    for x in operands:
        budget *= x.double().abs().nan_to_num(1.0, posinf=1.0).clamp(min=1.0)
    return budget


def comparable(
    case: Case, operands: tuple[torch.Tensor, ...], expected: torch.Tensor
) -> torch.Tensor:
    """Which rows a GPU computes as PyTorch does on the CPU.

    Triton compiles libdevice's float32 functions with flush-to-zero, and PyTorch does not. So rows
    with a subnormal operand or result may differ by anything, as rsqrt(1e-40) does, which is
    infinite there; so may an infinite gradient times a subnormal intermediate.
    """
    keep = torch.ones(expected.shape, dtype=torch.bool)
    for x in (*operands, expected):
        keep &= ~flushed(x)
    if any(x.is_floating_point() and x.isinf().any() for x in operands):
        finite = tuple(
            x.nan_to_num(float("nan"), posinf=1.0, neginf=-1.0) if x.is_floating_point() else x
            for x in operands
        )
        factor = precise_result(case, finite).double().abs()
        keep &= (factor == 0) | ~(factor <= lost_budget(finite)) | expected.isfinite()
    return keep


def assert_same(got: torch.Tensor, case: Case, operands: tuple[torch.Tensor, ...]) -> None:
    """Equal to PyTorch, or at most twice as far from the float64 result as PyTorch is."""
    expected = case(*operands)
    precise = precise_result(case, operands)
    on_gpu = not interpreting() and any(x.dtype is torch.float32 for x in (*operands, expected))
    assert got.dtype == expected.dtype, f"{case}: {got.dtype} for {expected.dtype}"
    checked = comparable(case, operands, expected) if on_gpu else torch.full_like(got, True).bool()
    if not expected.dtype.is_floating_point:
        assert torch.equal(got[checked], expected[checked]), f"{case}: {got} for {expected}"
        return
    loose = LOOSE.get(case.name, 0)
    rtol = max(loose, TOLERANCE[expected.dtype])
    atol = max(loose, TINY if got.dtype.itemsize < 8 else 1e-300)
    got, expected, precise = got.double(), expected.double(), precise.double()
    budget = 2 * (expected - precise).abs() + rtol * precise.abs() + atol
    if case.name in SUMS:
        summands = case(*(x.double().abs() for x in operands)).nan_to_num(0.0, posinf=0.0)
        budget += 4 * torch.finfo(operands[0].dtype).eps * summands
    if on_gpu:
        budget += lost_budget(operands)
    good = torch.isclose(got, expected, rtol=rtol, atol=atol, equal_nan=True)
    good |= torch.isclose(got, precise, rtol=rtol, atol=atol, equal_nan=True)
    good |= (got - precise).abs() <= budget
    if not (good | ~checked).all():
        k = int((~good & checked).nonzero()[0])
        raise AssertionError(f"{case}: row {k}: {got[k]} for {expected[k]} (float64 {precise[k]})")


def precise_result(case: Case, operands: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The operator in float64; in its own dtype where that changes what it computes."""
    return case(*(x.double() if x.dtype is torch.float32 else x for x in operands))


@pytest.mark.parametrize("op", operators(), ids=lambda op: str(op).removeprefix("aten."))
def test_operator_equals_pytorch(op):
    cases = cases_of(op)
    assert cases, f"no dtypes are accepted for {op}"
    for case in cases:
        operands = case.operands()
        (got,) = run(trace(case, case.arguments()), *operands)
        assert_same(got, case, operands)
