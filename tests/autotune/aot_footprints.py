"""Print the estimated and the real shared memory of convolution configs, as JSON, without a GPU."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

from tritonconv.autotune.hardware import limits
from tritonconv.conv.dispatch import OPERATORS
from tritonconv.runtime.aot import compile_plan
from tritonconv.runtime.device import nominal_device

LAYERS: dict[str, dict[str, Any]] = {
    "3x3": {"N": 32, "C": 128, "M": 128, "H": 28, "K": 3, "P": 1},
    "3x3 stride 2": {"N": 32, "C": 128, "M": 256, "H": 28, "K": 3, "S": 2, "P": 1},
    "stem": {"N": 32, "C": 3, "M": 64, "H": 224, "K": 7, "S": 2, "P": 3},
    "1x1": {"N": 32, "C": 256, "M": 256, "H": 28, "K": 1},
    "1x1, few channels": {"N": 32, "C": 64, "M": 64, "H": 28, "K": 1},
    "patches": {"N": 32, "C": 96, "M": 192, "H": 56, "K": 2, "S": 2},
    "groups": {"N": 32, "C": 512, "M": 512, "H": 28, "K": 3, "P": 1, "G": 4},
    "odd": {"N": 32, "C": 100, "M": 72, "H": 28, "K": 3, "P": 1},
    "depthwise": {"N": 32, "C": 96, "M": 96, "H": 56, "K": 7, "P": 3, "G": 96},
}
ARITHMETIC = (
    {"dtype": "bfloat16"},
    {"dtype": "float32", "precision": "tf32"},
    {"dtype": "float32", "precision": "ieee"},
)


def main(target: str, dropped: int, kept: int, seed: int = 0) -> None:
    """Sample configs that the hardware model drops and keeps, over all layers, and compile them."""
    rng = random.Random(seed)
    device = nominal_device(target)
    cases: dict[bool, list[Any]] = {True: [], False: []}
    for operator in OPERATORS.values():
        for layer, fields in LAYERS.items():
            # IEEE products over windows take ten seconds to compile.
            for arithmetic in ARITHMETIC[: 2 if layer in ("stem", "patches") else 3]:
                for layout in ("channels_last", "contiguous"):
                    problem = operator.parse({**fields, **arithmetic, "layout": layout})
                    first = operator.candidates(problem)[0]
                    configs = list(first.space(problem, device))
                    if first.footprint(problem, configs[0], device) is None:
                        continue
                    rng.shuffle(configs)
                    found: dict[bool, int] = {True: 0, False: 0}
                    for config in configs:
                        footprint = first.footprint(problem, config, device)
                        broken = limits(footprint, device)
                        if found[bool(broken)] < 2:
                            found[bool(broken)] += 1
                            case = (first, problem, config, layer, arithmetic, footprint, broken)
                            cases[bool(broken)].append(case)
    rows = []
    for is_dropped, count in ((True, dropped), (False, kept)):
        chosen = rng.sample(cases[is_dropped], min(count, len(cases[is_dropped])))
        for algorithm, problem, config, layer, arithmetic, footprint, broken in chosen:
            compiled = compile_plan(algorithm.plan(problem, config), target, resources=is_dropped)
            rows.append(
                {
                    "case": f"{problem} {algorithm.name} {config}",
                    "layer": layer,
                    **arithmetic,
                    "dropped": [violation.constraint for violation in broken],
                    "estimated": footprint.shared_bytes,
                    "real": max(kernel.shared_bytes for kernel in compiled),
                    "spills": max(kernel.spill_bytes or 0 for kernel in compiled),
                    "threads": footprint.threads in {32 * kernel.num_warps for kernel in compiled},
                }
            )
    print(json.dumps({"limit": device.shared_bytes, "rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1], *(int(argument) for argument in sys.argv[2:]))
