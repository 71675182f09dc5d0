"""From Python: which kernel serves a call, what else could, and tuning it for this GPU.

Without a GPU nothing is measured: the candidates are listed and the default one is compiled
ahead of time. The command line does the same: `autotune show`, `autotune tune`.
"""

from __future__ import annotations

import torch

import tritonconv  # registers the operators  # noqa: F401
from tritonconv.autotune.space import space
from tritonconv.autotune.tune import tune
from tritonconv.runtime.aot import compile_plan
from tritonconv.runtime.device import device_facts, nominal_device
from tritonconv.runtime.operators import get_operator
from tritonconv.runtime.tables import tuned_table

SHAPE = {"batch": 8, "in_channels": 64, "out_channels": 64, "height": 56, "kernel": 3, "padding": 1}


def main() -> None:
    """Describe one problem and its candidates; then tune it, or compile its default."""
    operator = get_operator("conv2d.forward")
    problem = operator.parse({**SHAPE, "dtype": "bfloat16"})
    cuda = torch.cuda.is_available()
    facts = device_facts() if cuda else nominal_device("sm_90")
    print(f"{problem}\non {facts.name}: {problem.flops() / 1e9:.1f} GFLOP")

    found = space(operator, problem, facts)
    print(f"{len(found.candidates)} candidates, the default is {found.default}")
    for name, reason in found.unsupported.items():
        print(f"  not {name}: {reason}")

    if cuda:
        (report,) = tune(operator, [problem], budget_s=20)
        print(f"{report.result}: {report.entry.best if report.entry else 'the default stays'}")
    choice = tuned_table(facts).lookup(operator, problem)
    print(f"a call runs {choice.algorithm} {choice.config.as_dict()} ({choice.tier})")

    plan = operator.algorithm(choice.algorithm).plan(problem, choice.config)
    if not cuda and plan is not None:
        for kernel in compile_plan(plan, facts.arch):
            print(
                f"compiled for {kernel.target}: {kernel.name.strip('_')}, "
                f"{kernel.registers} registers, {kernel.spill_bytes} bytes spilled, "
                f"{kernel.shared_bytes // 1024} KiB shared"
            )


if __name__ == "__main__":
    main()
