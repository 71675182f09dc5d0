"""How close to float64 a kernel has to be: the one rule used by the tests and by the tuner.

A result may err, against plain PyTorch in float64, by twice what plain PyTorch itself errs in the
result's dtype on the same inputs, plus a floor of a few eps. Two measures must both hold: the
root-mean-square error, which notices a bias spread over all elements, and the largest error,
which notices a single wrong element. Both are relative to the size of the reference as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import bad_value

FACTOR = 2.0
# Floors: rounding of the result, in eps of its dtype, and another order of accumulation, which
# kernels do in float32 whatever the result's dtype is, in eps of float32.
RMS_ROUNDING, RMS_ACCUMULATION = 0.5, 4.0
PEAK_ROUNDING, PEAK_ACCUMULATION = 1.0, 8.0


@dataclass(frozen=True)
class Errors:
    """Errors relative to the reference: root mean square, and largest over largest."""

    rms: float
    peak: float


@dataclass(frozen=True)
class Accuracy:
    """Verdict on a result: its error and the budget, of the measure that is nearer its limit."""

    error: float
    budget: float
    ok: bool

    def __str__(self) -> str:
        relation = "within" if self.ok else "exceeds"
        return f"error {self.error:.3g} {relation} budget {self.budget:.3g}"


def error(
    result: torch.Tensor, reference64: torch.Tensor, *, where: torch.Tensor | None = None
) -> Errors:
    """Relative errors of a result; infinite when it is NaN or infinite where the reference is not.

    Args:
        result: tensor of any dtype, of the shape of the reference.
        reference64: the same computed in float64.
        where: elements to compare; all when None.

    Raises:
        ArgumentValueError: the shapes differ.

    Example:
        >>> error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0], dtype=torch.float64))
        Errors(rms=0.0, peak=0.0)
    """
    if result.shape != reference64.shape:
        raise bad_value("result", f"shape {tuple(reference64.shape)}", tuple(result.shape))
    reference64 = reference64.detach().to(torch.float64)
    difference = result.detach().to(torch.float64) - reference64
    # Equal infinities are no error; any other non-finite element is.
    difference = torch.where(result.detach().to(torch.float64) == reference64, 0.0, difference)
    scale = torch.where(torch.isfinite(reference64), reference64, 0.0)
    if where is not None:
        difference, scale = difference[where], scale[where]
    if difference.numel() == 0:
        return Errors(0.0, 0.0)
    if not bool(torch.isfinite(difference).all()):
        return Errors(float("inf"), float("inf"))
    peak, rms = float(scale.abs().max()), float(scale.square().mean().sqrt())
    worst, spread = float(difference.abs().max()), float(difference.square().mean().sqrt())
    return Errors(_ratio(spread, rms), _ratio(worst, peak))


def _ratio(value: float, scale: float) -> float:
    # Against a reference of zeros the error is taken absolutely.
    return value / scale if scale > 0.0 else value


def budget(
    reference64: torch.Tensor,
    plain: torch.Tensor,
    dtype: torch.dtype,
    *,
    where: torch.Tensor | None = None,
) -> Errors:
    """Errors a kernel may make: twice those of ``plain`` plus a floor of a few eps of ``dtype``."""
    own = error(plain, reference64, where=where)
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    inner = min(eps, torch.finfo(torch.float32).eps)
    return Errors(
        FACTOR * own.rms + RMS_ROUNDING * eps + RMS_ACCUMULATION * inner,
        FACTOR * own.peak + PEAK_ROUNDING * eps + PEAK_ACCUMULATION * inner,
    )


def within_budget(found: Errors, allowed: Errors) -> bool:
    """Whether both measures hold."""
    return found.rms <= allowed.rms and found.peak <= allowed.peak


def check(
    result: torch.Tensor, reference64: torch.Tensor, plain: torch.Tensor, *, dtype: torch.dtype
) -> Accuracy:
    """Judge a kernel's result.

    Args:
        result: what the kernel wrote, into memory that held NaN before.
        reference64: plain PyTorch in float64 on the same inputs.
        plain: plain PyTorch in the problem's own dtype on the same inputs.
        dtype: the dtype whose eps makes the floor.

    Returns:
        The verdict. Elements where ``plain`` itself overflows are not compared.

    Example:
        >>> x = torch.linspace(0, 1, 5)
        >>> check(x + 1e-3, x.double(), x, dtype=torch.float32).ok
        False
    """
    where = None
    overflow = ~torch.isfinite(plain.to(torch.float64))  # of float8 it cannot be asked
    if bool(overflow.any()):
        where = ~overflow
    found = error(result, reference64, where=where)
    allowed = budget(reference64, plain, dtype, where=where)
    pairs = ((found.rms, allowed.rms), (found.peak, allowed.peak))
    worst = max(pairs, key=lambda pair: pair[0] / pair[1] if pair[1] > 0 else pair[0])
    return Accuracy(worst[0], worst[1], within_budget(found, allowed))
