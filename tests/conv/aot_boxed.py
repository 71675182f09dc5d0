"""Compile boxed products for sm_90 and count what becomes of their operands; prints JSON."""

from __future__ import annotations

import json
import re
from typing import Any

import triton

from tritonconv.conv.algorithms.boxed import Boxed
from tritonconv.conv.dispatch import OPERATORS
from tritonconv.conv.problem import Direction
from tritonconv.runtime.aot import jit_source, parse_target
from tritonconv.runtime.device import nominal_device

from .cases import rank_of

LAYERS: dict[str, dict[str, Any]] = {
    "3x3": {"N": 64, "C": 64, "M": 64, "H": 56, "K": 3, "P": 1},
    "1x1": {"N": 64, "C": 512, "M": 2048, "H": 7, "K": 1},
    "1-D": {"N": 16, "C": 256, "M": 256, "H": 1, "W": 4096, "K": "1x3", "P": "0x1"},
    "3-D": {"N": 2, "C": 128, "M": 128, "D": 20, "H": 20, "W": 12, "K": 3, "P": 1},
}
OPERATIONS = ("ttng.async_tma_copy_global_to_local", "ttng.warp_group_dot ", "ttg.local_load")


def main() -> None:
    device, target = nominal_device("sm_90"), parse_target("sm_90")
    rows = []
    for layer, fields in LAYERS.items():
        for direction, precision in (
            *((d, "ieee") for d in Direction),
            (Direction.FORWARD, "tf32"),
        ):
            dtype = "bfloat16" if precision == "ieee" else "float32"
            more = {"dtype": dtype, "precision": precision, "layout": "channels_last"}
            problem = OPERATORS[direction, rank_of(fields)].parse({**fields, **more})
            plan = Boxed().plan(problem, Boxed().space(problem, device).default)
            source, options = jit_source(plan.calls[0], plan.dtypes, target)
            code = triton.compile(source, target=target, options=options.__dict__).asm["ttgir"]
            counts = {name.strip(): len(re.findall(re.escape(name), code)) for name in OPERATIONS}
            rows.append({"layer": layer, "direction": str(direction), **counts})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
