"""Compile the plans of every algorithm for one target, without a GPU; prints JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from tritonconv.autotune.hardware import limits
from tritonconv.conv.dispatch import OPERATORS
from tritonconv.conv.problem import FUSED, ConvProblem, Direction
from tritonconv.runtime.aot import compile_plan
from tritonconv.runtime.device import DeviceFacts, nominal_device
from tritonconv.runtime.operators import Algorithm, Config

from .cases import rank_of

# Layers of real networks, one for each algorithm at least.
LAYERS: dict[str, dict[str, Any]] = {
    "3x3": {"N": 32, "C": 128, "M": 128, "H": 28, "K": 3, "P": 1},
    "3x3 stride 2": {"N": 32, "C": 128, "M": 256, "H": 28, "K": 3, "S": 2, "P": 1},
    "small map": {"N": 1, "C": 256, "M": 256, "H": 14, "K": 3, "P": 1},
    "stem": {"N": 32, "C": 3, "M": 64, "H": 224, "K": 7, "S": 2, "P": 3},
    "1x1": {"N": 32, "C": 256, "M": 64, "H": 56, "K": 1},
    "patches": {"N": 32, "C": 96, "M": 192, "H": 56, "K": 2, "S": 2},
    "groups": {"N": 32, "C": 128, "M": 128, "H": 28, "K": 3, "P": 1, "G": 32},
    "3x3x3": {"N": 4, "C": 64, "M": 64, "D": 16, "H": 32, "K": 3, "P": 1},
    "few channels": {"N": 2, "C": 16, "M": 16, "D": 32, "H": 64, "K": 3, "P": 1},
    "depthwise": {"N": 32, "C": 96, "M": 96, "H": 56, "K": 7, "P": 3, "G": 96},
}
DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "quantised")
NO_FLOAT8 = ("sm_80", "sm_86")  # they have no conversion of it: PyTorch computes there


def volume(config: Config) -> int:
    """How large a tile is: the product of its blocks and stages."""
    size = 1
    for name, value in config.as_dict().items():
        if name.startswith("block") or name == "num_stages":
            size *= value
    return size


def fitting(algorithm: Algorithm, problem: ConvProblem, device: DeviceFacts) -> list[Config]:
    """The configs that the tuner would try, the default first."""
    default, *others = algorithm.configs(problem, device)
    footprints = ((c, algorithm.footprint(problem, c, device)) for c in others)
    return [default, *(c for c, asked in footprints if asked is None or not limits(asked, device))]


def representative(space: list[Config]) -> dict[str, Config]:
    """The default, the smallest and the largest config of a space."""
    chosen = {"default": space[0]}
    for label, config in (
        ("smallest", min(space, key=volume)),
        ("largest", max(space, key=volume)),
    ):
        if config not in chosen.values():
            chosen[label] = config
    return chosen


# The general algorithms serve every layer: these are enough for them.
HOME = {
    "banded": ("few channels",),
    "boxed": ("3x3", "1x1", "3x3x3"),
    "dense": ("3x3", "3x3 stride 2", "small map", "3x3x3"),
    "walked": ("3x3", "3x3 stride 2", "1x1", "3x3x3", "few channels"),
    "few_channel": ("stem",),
}


# float16 is bfloat16 but for its conversions, and so is a result in float8: one layer of a kind.
ONE_OF_A_KIND = ("3x3", "stem", "depthwise", "3x3x3")


def wanted(target: str, dtype: str, label: str, everything: bool) -> bool:
    """Whether a case is compiled: all of them for one target, for the others the defaults."""
    if dtype == "quantised":
        return label == "default" and target == "sm_90"
    if dtype == "float8_e4m3fn":
        return label == "default" and target not in NO_FLOAT8
    if everything or target == "sm_90":
        return label == "default" or dtype == "bfloat16"
    # Single precision takes the most shared memory, which these have least of.
    small = target in ("sm_120", "gfx942")
    return label == "default" and (dtype == "bfloat16" or (dtype == "float32" and small))


def cases(
    target: str, everything: bool = False
) -> list[tuple[dict[str, Any], Algorithm, ConvProblem, Config]]:
    """Description, algorithm, problem and config of all that is compiled for a target."""
    device = nominal_device(target)
    found = []
    for (direction, rank), operator in OPERATORS.items():
        for layer, fields in LAYERS.items():
            if rank != rank_of(fields):
                continue
            for dtype in DTYPES:
                if dtype in ("float16", "quantised") and layer not in ONE_OF_A_KIND:
                    continue
                more = {"dtype": dtype, "layout": "channels_last"}
                if dtype in ("float8_e4m3fn", "quantised"):
                    if direction is not Direction.FORWARD:
                        continue
                    more["output_dtype"] = "float8_e4m3fn"
                if dtype == "quantised":
                    more["dtype"] = "bfloat16"
                if direction is Direction.FORWARD:
                    more["epilogue"] = "fused+acc" if dtype == "bfloat16" else "fused"
                if direction is Direction.DGRAD and dtype == "float16":
                    more["epilogue"] = "transposed+acc"
                if dtype == "float32":
                    more["precision"] = "tf32"
                problem = operator.parse({**fields, **more})
                for algorithm in operator.candidates(problem):
                    space = fitting(algorithm, problem, device)
                    if layer not in HOME.get(algorithm.name, LAYERS):
                        continue
                    if algorithm.plan(problem, space[0]) is None:
                        continue
                    for label, config in representative(space).items():
                        if wanted(target, dtype, label, everything):
                            row = {
                                "direction": str(direction),
                                "algorithm": algorithm.name,
                                "layer": layer,
                                "dtype": dtype,
                                "label": label,
                            }
                            found.append((row, algorithm, problem, config))
    return found + residuals(target)


def residuals(target: str) -> list[tuple[dict[str, Any], Algorithm, ConvProblem, Config]]:
    """Epilogues that read a tensor as large as the result have an algorithm of their own."""
    found = []
    for direction, epilogue in FUSED.items():
        for layer in ("3x3", "1x1"):
            more = {"dtype": "bfloat16", "layout": "channels_last"}
            operator = OPERATORS[direction, 2]
            problem = operator.parse(
                {**LAYERS[layer], **more, "epilogue": f"{epilogue}+operand+acc"}
            )
            algorithm = operator.algorithm("boxed_operand")
            space = fitting(algorithm, problem, nominal_device(target))
            for label, config in representative(space).items():
                if wanted(target, "bfloat16", label, False):
                    row = {
                        "direction": str(direction),
                        "algorithm": algorithm.name,
                        "layer": layer,
                        "dtype": "bfloat16",
                        "label": label,
                    }
                    found.append((row, algorithm, problem, config))
    return found


def main(target: str, everything: bool = False) -> None:
    """Compile all cases; kernels that an earlier run compiled are taken from Triton's cache."""
    rows = []
    for case, algorithm, problem, config in cases(target, everything):
        row = {**case, "config": config.as_dict(), "error": "", "kernels": []}
        try:
            plan = algorithm.plan(problem, config)
            assert plan is not None
            resources = case["dtype"] in ("bfloat16", "float8_e4m3fn")
            resources = resources and case["label"] == "default"
            compiled = compile_plan(plan, target, resources=resources)
            row["kernels"] = [dataclasses.asdict(kernel) for kernel in compiled]
        except Exception as error:  # reported by the test, with its case
            row["error"] = f"{type(error).__name__}: {str(error)[-500:]}"
        rows.append(row)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] == ["everything"])
