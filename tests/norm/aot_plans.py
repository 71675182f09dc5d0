"""Compile the kernels of batch and layer norms for one target, without a GPU; prints JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch
import torch.nn.functional as F

from tritonconv.norm import layer_plans
from tritonconv.norm.activation import activation_key
from tritonconv.norm.layer_problem import LayerNormProblem
from tritonconv.norm.plans import NormProblem, apply_plan, backward_plan, statistics_plan
from tritonconv.norm.problem import NormView
from tritonconv.runtime.aot import compile_plan
from tritonconv.runtime.device import DeviceFacts, nominal_device
from tritonconv.runtime.plan import LaunchPlan

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


def layer_problems(target: str) -> dict[str, LayerNormProblem]:
    """The same of layer normalisation: ConvNeXt's widths, and on one target odd and wide ones."""
    half, full = torch.bfloat16, torch.float32
    affine = {"weight": full, "bias": full}
    sizes = {96: 401408, 192: 100352, 384: 25088, 768: 6272}
    if target not in ("sm_80", "sm_90", "gfx942"):
        sizes = {96: 401408}
    found = {f"{c}": LayerNormProblem(r, c, half, half, **affine) for c, r in sizes.items()}
    if target == "sm_90":
        found["autocast"] = LayerNormProblem(401408, 96, full, half, **affine)
        found["float32"] = LayerNormProblem(6272, 768, full, full, **affine)
        found["one"] = LayerNormProblem(1000, 1, torch.float16, torch.float16)
        found["odd"] = LayerNormProblem(1000, 197, half, half, weight=half)
        found["widest"] = LayerNormProblem(300, 8192, half, half, **affine)
        found["many"] = LayerNormProblem(1 << 25, 96, half, half, **affine)
    return found


def plans(name: str, problem: NormProblem, device: DeviceFacts) -> list[LaunchPlan]:
    """The three plans of a batch normalisation."""
    running = (torch.float32, torch.float32)
    affine = problem.weight is not None
    return [
        statistics_plan(problem, device, running, None if "one" in name else 0.1, True),
        apply_plan(problem),
        backward_plan(problem, device, (True, affine, affine, problem.residual)),
    ]


def layers(name: str, problem: LayerNormProblem, device: DeviceFacts) -> list[LaunchPlan]:
    """The plans of a layer normalisation, once without what a gradient needs."""
    needed = (True, problem.weight is not None, problem.bias is not None)
    found = [
        layer_plans.forward_plan(problem),
        layer_plans.backward_plan(problem, device, needed),
    ]
    return [*found, layer_plans.forward_plan(problem, stats=False)] if name == "96" else found


def compiled(make: Any, cases: dict[str, Any], target: str) -> list[dict[str, Any]]:
    """What the compiler says of every case."""
    rows = []
    for name, problem in cases.items():
        row: dict[str, Any] = {"problem": name, "error": "", "kernels": []}
        try:
            made = make(name, problem, nominal_device(target))
            kernels = [k for plan in made for k in compile_plan(plan, target)]
            row["kernels"] = [dataclasses.asdict(kernel) for kernel in kernels]
        except Exception as error:  # reported by the test, with its case
            row["error"] = f"{type(error).__name__}: {str(error)[-500:]}"
        rows.append(row)
    return rows


def main(target: str) -> None:
    """Compile all cases of both."""
    batch = compiled(plans, problems(target), target)
    print(json.dumps({"batch": batch, "layer": compiled(layers, layer_problems(target), target)}))


if __name__ == "__main__":
    main(sys.argv[1])
