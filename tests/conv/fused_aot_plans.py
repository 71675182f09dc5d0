"""Compile fused forward convolutions for one target, without a GPU; prints JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from tritonconv.conv.fused_dispatch import FUSED_OPERATORS
from tritonconv.runtime.aot import compile_plan
from tritonconv.runtime.device import nominal_device

LAYERS: dict[str, dict[str, Any]] = {
    "prologue, statistics": dict(
        N=64, C=64, M=64, H=56, K=3, P=1, prologue="fused", stats=True, epilogue="fused+acc"
    ),
    "pair": dict(N=8, C=128, M=64, H=128, K=3, P=1, second_channels=64, epilogue="fused"),
    "uneven pair": dict(N=8, C=72, M=64, H=64, K=3, P=1, second_channels=24, stats=True),
    "volume": dict(N=2, C=32, M=32, D=16, H=32, K=3, P=1, prologue="fused", stats=True),
}


def main(target: str) -> None:
    """Compile the default of every layer; kernels of an earlier run are taken from the cache."""
    device = nominal_device(target)
    rows = []
    for layer, fields in LAYERS.items():
        for more in ({"dtype": "bfloat16"}, {"dtype": "float32", "precision": "tf32"}):
            if more["dtype"] == "float32" and layer != "prologue, statistics":
                continue
            operator = FUSED_OPERATORS[3 if "D" in fields else 2]
            problem = operator.parse({**fields, **more, "layout": "channels_last"})
            for algorithm in operator.candidates(problem):
                row = {"layer": layer, "algorithm": algorithm.name, **more}
                row |= {"error": "", "kernels": []}
                try:
                    plan = algorithm.plan(problem, algorithm.configs(problem, device)[0])
                    if plan is None:
                        continue
                    compiled = compile_plan(plan, target, resources=more["dtype"] == "bfloat16")
                    row["kernels"] = [dataclasses.asdict(kernel) for kernel in compiled]
                except Exception as error:  # reported by the test, with its case
                    row["error"] = f"{type(error).__name__}: {str(error)[-500:]}"
                rows.append(row)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1])
