"""Compile the kernels of batch normalisation for one target, without a GPU; prints JSON."""

from __future__ import annotations

import dataclasses
import json
import sys

import torch
import torch.nn.functional as F

from tritonconv.norm.activation import activation_key
from tritonconv.norm.plans import NormProblem, apply_plan, backward_plan, statistics_plan
from tritonconv.norm.problem import NormView
from tritonconv.runtime.aot import compile_plan
from tritonconv.runtime.device import nominal_device

VIEWS = {
    "large map": NormView(64, 64, 3136, True),
    "small map": NormView(64, 2048, 49, True),
    "odd channels": NormView(3, 63, 197, True),
    "eights": NormView(64, 72, 784, True),
    "channels first": NormView(64, 64, 3136, False),
    "small maps first": NormView(64, 512, 49, False),
    "one channel": NormView(1, 1, 81, False),
    "one row": NormView(1, 64, 2, True),
}


def problems(target: str) -> dict[str, NormProblem]:
    """What is compiled, by name."""
    relu, silu = (activation_key(fn, torch.float32) for fn in (F.relu, F.silu))
    assert relu and silu
    half = {"dtype": torch.bfloat16, "weight": torch.float32, "bias": torch.float32}
    found = {name: NormProblem(view, function=relu, **half) for name, view in VIEWS.items()}
    large = VIEWS["large map"]
    found["plain"] = NormProblem(large, **half)
    if target == "sm_90":
        found["silu, residual"] = NormProblem(large, function=silu, residual=True, **half)
        wide = NormView(1 << 10, 64, 1 << 16, True)
        found["wide"] = NormProblem(wide, function=relu, **half)
        found["float32"] = NormProblem(
            large, torch.float32, torch.float32, torch.float32, function=relu
        )
        found["evaluation"] = NormProblem(large, torch.float16, batch=False)
    return found


def main(target: str) -> None:
    """Compile every problem's three plans."""
    device = nominal_device(target)
    rows = []
    for name, problem in problems(target).items():
        row = {"problem": name, "error": "", "kernels": []}
        try:
            running = (torch.float32, torch.float32)
            affine = problem.weight is not None
            plans = (
                statistics_plan(problem, device, running, None if "one" in name else 0.1, True),
                apply_plan(problem),
                backward_plan(problem, device, (True, affine, affine, problem.residual)),
            )
            kernels = [k for plan in plans for k in compile_plan(plan, target)]
            row["kernels"] = [dataclasses.asdict(kernel) for kernel in kernels]
        except Exception as error:  # reported by the test, with its case
            row["error"] = f"{type(error).__name__}: {str(error)[-500:]}"
        rows.append(row)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1])
