"""Host time of eager calls: what Python, the dispatcher and the launch cost while the GPU idles."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from tritonconv.runtime.operators import Problem, host_calls_of

from .measure import NoDeviceError

CALLS = 400
REPEATS = 7


@dataclass(frozen=True)
class HostTime:
    """Microseconds that one call keeps the host busy."""

    call: str
    microseconds: float


@triton.jit
def _nothing() -> None:
    pass


def host_times(
    operator: str,
    problem: Problem,
    device: torch.device | int | None = None,
    *,
    calls: int = CALLS,
    repeats: int = REPEATS,
    progress: Callable[[HostTime], None] | None = None,
) -> list[HostTime]:
    """Time eager calls of a problem on the host, beside PyTorch's and the least launches.

    A call's time is the least of ``repeats`` means over ``calls`` calls, so that what else the
    host had to do counts as little as possible. The GPU works behind; take a problem that it
    solves faster than the host can ask.

    Args:
        operator: name of an operator whose family offers such calls.
        problem: a small problem.
        device: the GPU; the current one when None.
        calls: calls per mean, fewer than the GPU's queue holds.
        repeats: means.
        progress: told of every call.

    Raises:
        ArgumentValueError: the operator's family offers no such calls.
        NoDeviceError: there is no GPU.
    """
    make = host_calls_of(operator)
    if not torch.cuda.is_available():
        raise NoDeviceError("host time of launches needs a CUDA GPU, and PyTorch sees none")
    if not isinstance(device, torch.device):
        device = torch.device("cuda", torch.cuda.current_device() if device is None else device)
    found = []
    with torch.cuda.device(device):
        small = torch.zeros(16, device=device)
        ladder: dict[str, Callable[[], Any]] = {
            "torch.add": lambda: torch.add(small, small),
            "a Triton launch of an empty kernel": lambda: _nothing[(1,)](),
            **make(problem, device),
        }
        for name, call in ladder.items():
            time_taken = HostTime(name, host_time(call, calls, repeats))
            found.append(time_taken)
            if progress is not None:
                progress(time_taken)
    return found


def host_time(call: Callable[[], Any], calls: int, repeats: int) -> float:
    """Microseconds that a call keeps the host busy: the least of several means."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    means = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        means.append((time.perf_counter() - begin) / calls)
        torch.cuda.synchronize()
    return min(means) * 1e6
