"""What ``triton.autotune`` would do, to compare with: its tuning loop and its hit path."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
import triton.language as tl
import triton.testing

from tritonconv.runtime.launch import Executable
from tritonconv.runtime.operators import Operator, Problem
from tritonconv.runtime.settings import settings

from .measure import classify
from .search import Failure
from .space import Candidate


def tune_like_triton(
    operator: Operator, problem: Problem, candidates: Iterable[Candidate]
) -> dict[Candidate, float | None]:
    """Time candidates one after the other as ``triton.autotune`` does; microseconds.

    Each is compiled by the JIT at its first call, in this process, then timed by
    ``triton.testing.do_bench`` with its defaults (25 ms of warm-up, 100 ms of repetitions, the L2
    cleared before each), through Triton's own dispatcher. Candidates without kernels of ours are
    left out, which Triton could not know; None is one that fails.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device)
    generator.manual_seed(0)
    tensors = operator.make_tensors(problem, device, generator)
    slots, values = tuple(tensors), tuple(tensors.values())
    found: dict[Candidate, float | None] = {}
    for candidate in candidates:
        plan = operator.algorithm(candidate.algorithm).plan(problem, candidate.config)
        if plan is None:
            continue
        with settings.override(fast_launch=False), torch.no_grad():
            executable = Executable(plan, slots)

            def call(executable: Executable = executable) -> None:
                executable(*values)

            found[candidate] = _bench(call)
    return found


def _bench(call: Callable[[], None]) -> float | None:
    try:
        p50, _, _ = triton.testing.do_bench(call, quantiles=(0.5, 0.2, 0.8))
    except Exception as error:
        # The errors that Triton's own loop passes over; others are ours to see.
        if isinstance(classify(error), Failure) and not isinstance(error, (TypeError, NameError)):
            return None
        raise
    return float(p50) * 1e3


@triton.jit
def _touch_kernel(
    a_ptr, b_ptr, c_ptr, d_ptr, e_ptr, n0, n1, n2, n3, n4, n5, n6, n7, n8, BLOCK: tl.constexpr
):
    """e = a on a few elements; the arguments are what a convolution's kernel takes."""
    offsets = tl.arange(0, BLOCK)
    tl.store(e_ptr + offsets, tl.load(a_ptr + offsets))


def launches(device: torch.device) -> dict[str, Callable[[], Any]]:
    """A kernel of five tensors and nine integers, launched bare and through ``triton.autotune``.

    The difference of their host times is the hit path: what ``triton.autotune`` costs every call.
    """
    tensors = [torch.zeros(128, device=device) for _ in range(5)]
    sizes = [64, 56, 56, 64, 3, 3, 2, 48, 7]
    tuned = triton.autotune(
        [triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})],
        key=["n0", "n1", "n2", "n3", "n4", "n5"],
    )(_touch_kernel)
    return {
        "bare launch": lambda: _touch_kernel[(1,)](*tensors, *sizes, BLOCK=64),
        "launch through triton.autotune": lambda: tuned[(1,)](*tensors, *sizes),
    }
