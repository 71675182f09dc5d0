"""Which kernel serves the calls of a function, why, and how near it comes to the least time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .device import DeviceFacts, device_facts
from .operators import Operator, Problem
from .recording import recording
from .settings import settings
from .tables import Choice, Tier, default_choice, from_tuner, served_by, tuned_table


@dataclass(frozen=True)
class ExplainedCall:
    """One problem that a function met.

    Attributes:
        operator: its name.
        problem: the call.
        count: how often it was met.
        choice: algorithm, config, and the tier and table that name them; the default, where a
            tuned config was found not to fit this device or compiler.
        is_default: the choice is what an untuned call would run.
        measured_us: the kernel's time, where this very problem is tuned.
        default_us: the default's time, likewise.
        floor_us: the least time possible; None on a device whose ceilings are not known.
        predicted_us: what the hardware model expects of the config; None where it knows nothing.
    """

    operator: str
    problem: Problem
    count: int
    choice: Choice
    is_default: bool
    measured_us: float | None
    default_us: float | None
    floor_us: float | None
    predicted_us: float | None = None

    @property
    def of_floor(self) -> float | None:
        """Share of the floor that the kernel reaches, 1 being as fast as possible."""
        if self.measured_us is None or self.floor_us is None:
            return None
        return self.floor_us / self.measured_us

    def __str__(self) -> str:
        config = ", ".join(f"{k}={v}" for k, v in self.choice.config.as_dict().items())
        source = f" in {self.choice.source} table" if self.choice.source else ""
        parts = [f"{self.choice.tier}{source}", "the default" if self.is_default else "tuned"]
        if self.measured_us is not None:
            parts.append(f"{self.measured_us:.1f} µs")
        elif self.predicted_us is not None:
            parts.append(f"about {self.predicted_us:.0f} µs expected")
        if self.of_floor is not None:
            parts.append(f"{100 * self.of_floor:.0f} % of the floor")
        times = f"{self.count}x " if self.count > 1 else ""
        return f"{times}{self.problem}\n    {self.choice.algorithm}({config}): {', '.join(parts)}"


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; printing it shows one paragraph per problem.

    Attributes:
        device: whose tables were asked.
        is_real: the device is there; otherwise it stands in for one.
        calls: one per problem, in the order met.
    """

    device: DeviceFacts
    is_real: bool
    calls: tuple[ExplainedCall, ...]

    def __str__(self) -> str:
        head = self.device.name if self.is_real else f"no GPU; as it would be on {self.device.name}"
        if not self.calls:
            return f"{head}: no call of a tunable operator"
        return "\n".join((head, *map(str, self.calls)))


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Run a function once and say which kernels its calls are served by, and why.

    Args:
        fn: any function or module; a training step for its backward products too.
        args, kwargs: what to call it with. CPU tensors will do: the answer is for the GPU.

    Example:
        >>> import torch, tritonconv as tc
        >>> x, w = torch.randn(1, 8, 9, 9), torch.randn(4, 8, 3, 3)
        >>> (call,) = tc.explain(tc.conv2d, x, w).calls
        >>> call.operator, str(call.choice.tier), call.is_default
        ('conv2d.forward', 'default', True)
    """
    with settings.override(require_tuned=False), recording() as met:
        fn(*args, **kwargs)
    device = device_facts()
    table = tuned_table(device)
    floor_us = from_tuner("roofline").floor_us
    calls = []
    for (operator, problem), count in Counter(met).items():
        found = table.find(operator, problem)
        default = default_choice(operator, problem, device)
        choice = served_by(problem, found.choice)
        chosen = (choice.algorithm, choice.config)
        measured = before = None
        if found.located is not None and choice.tier is Tier.EXACT:
            entry = found.located.entry
            measured = entry.best.timing.p50 if entry.best.timing else None
            before = entry.default.timing.p50 if entry.default.timing else None
        calls.append(
            ExplainedCall(
                operator.name,
                problem,
                count,
                choice,
                chosen == (default.algorithm, default.config),
                measured,
                before,
                floor_us(problem, device),
                _predicted_us(operator, problem, choice, device),
            )
        )
    return Explanation(device, torch.cuda.is_available(), tuple(calls))


def _predicted_us(
    operator: Operator, problem: Problem, choice: Choice, device: DeviceFacts
) -> float | None:
    footprint = operator.algorithm(choice.algorithm).footprint(problem, choice.config, device)
    if footprint is None:
        return None
    model = from_tuner("hardware").Model.of(device, problem.fields(), problem.bytes_moved())
    return float(model.predicted_us(footprint))


@contextmanager
def tuning() -> Iterator[None]:
    """Tune the problems that are first met inside a ``with`` block, as they are met.

    Nothing is measured without a GPU, while a CUDA graph is captured, or in deterministic mode.

    Example:
        >>> import tritonconv as tc
        >>> with tc.tuning():
        ...     tc.settings.autotune
        'tune'
    """
    with settings.override(autotune="tune"):
        yield


__all__ = ["ExplainedCall", "Explanation", "explain", "tuning"]
