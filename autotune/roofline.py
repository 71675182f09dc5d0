"""The least time a problem can take on a device: the one table of measured ceilings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.operators import Field, Problem


@dataclass(frozen=True)
class Ceilings:
    """Rates that a device reaches in practice, bytes and floating-point operations per second.

    Attributes:
        bandwidth: device copy, read plus write.
        rates: by arithmetic: ``bfloat16``, ``float16``, ``tf32``, ``float32``, ``float64``,
            ``float8_e4m3fn``.
        measured: by us on such a device; otherwise datasheet figures.
    """

    bandwidth: float
    rates: dict[str, float]
    measured: bool


# By a part of the device name; first match wins.
_CEILINGS: tuple[tuple[str, Ceilings], ...] = (
    (
        "H100 80GB HBM3",
        Ceilings(
            3.03e12,
            {
                "bfloat16": 705e12,
                "float16": 705e12,
                "tf32": 356e12,
                "float32": 51e12,
                "float64": 34e12,
                # Not measured: twice bfloat16's, as in the datasheet.
                "float8_e4m3fn": 1410e12,
            },
            measured=True,
        ),
    ),
    (
        "H200",
        Ceilings(
            4.8e12,
            {
                "bfloat16": 989e12,
                "float16": 989e12,
                "tf32": 494e12,
                "float32": 67e12,
                "float64": 34e12,
                "float8_e4m3fn": 1979e12,
            },
            measured=False,
        ),
    ),
    (
        "A100",
        Ceilings(
            1.555e12,
            {
                "bfloat16": 312e12,
                "float16": 312e12,
                "tf32": 156e12,
                "float32": 19.5e12,
                "float64": 9.7e12,
            },
            measured=False,
        ),
    ),
)


def ceilings(device: DeviceFacts) -> Ceilings | None:
    """Ceilings of a device; None when its arithmetic rates are not in the table."""
    return next((row for part, row in _CEILINGS if part in device.name), None)


def arithmetic_of(fields: Mapping[str, Field]) -> str:
    """Which of the rates a problem's arithmetic has, by its ``dtype`` and ``precision`` fields."""
    arithmetic = str(fields.get("dtype", "float32"))
    if arithmetic == "float32" and fields.get("precision") == "tf32":
        return "tf32"
    return arithmetic


def floor_us(problem: Problem, device: DeviceFacts) -> float | None:
    """The larger of compulsory traffic over bandwidth and arithmetic over rate, microseconds."""
    table = ceilings(device)
    if table is None:
        return None
    rate = table.rates.get(arithmetic_of(problem.fields()))
    if rate is None:
        return None
    return max(problem.bytes_moved() / table.bandwidth, problem.flops() / rate) * 1e6
