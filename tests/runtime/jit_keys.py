"""Compare the cache keys of plans with those of Triton's dispatcher; prints JSON.

Run in a fresh process that does not interpret. The dispatcher runs on CPU tensors under a driver
that claims to be an H100; instead of compiling it notes the key under which it would look.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler.compiler import make_backend
from triton.runtime.cache import get_cache_key

from tritonconv.conv.dispatch import OPERATORS
from tritonconv.conv.epilogue import build_epilogue
from tritonconv.conv.problem import ConvProblem, Direction, EpilogueSpec
from tritonconv.runtime.aot import jit_source, parse_target
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.launch import Executable
from tritonconv.runtime.plan import LaunchPlan

TARGET = parse_target("sm_90")


class Driver:
    """As much of a driver as a launch that only compiles asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return TARGET


_noted: list[str] = []


def _note(source: Any, target: Any, options: dict[str, Any]) -> Any:
    _noted.append(_key(source, options))
    return object()


def _key(source: Any, options: dict[str, Any]) -> str:
    backend = make_backend(TARGET)
    parsed = backend.parse_options(dict(options))
    return get_cache_key(source, backend, parsed, get_cache_invalidating_env_vars())


def dispatched(plan: LaunchPlan) -> list[str]:
    """Keys under which the dispatcher looks for the kernels of a plan."""
    slots = tuple(dict.fromkeys(slot for call in plan.calls for slot in call.slots()))
    names = tuple(name for name in slots if name not in {s.name for s in plan.workspaces})
    executable = Executable(plan, names)
    held = names + tuple(space.name for space in plan.workspaces)
    tensors = [torch.empty(1024, dtype=plan.dtypes[name]) for name in held]
    _noted.clear()
    for call in executable.calls:
        call.kernel.device_caches.clear()  # or an equal launch before this one would be found
        call.kernel.run(
            *call.arguments(tensors),
            grid=call.grid,
            warmup=True,
            **call.constexprs,
            **call.options,
        )
    return list(_noted)


def compiled(plan: LaunchPlan) -> list[str]:
    """Keys under which a plan is compiled ahead of time."""
    found = []
    for call in plan.calls:
        source, options = jit_source(call, plan.dtypes, TARGET)
        found.append(_key(source, options.__dict__))
    return found


def problems() -> dict[str, ConvProblem]:
    """Problems whose launches differ in kind: tuples, functions, int64, ones, strings."""
    base = {"N": 4, "C": 64, "M": 48, "H": 30, "K": 3, "P": 1, "dtype": "bfloat16"}
    found: dict[str, ConvProblem] = {}
    for direction in Direction:
        operator = OPERATORS[direction, 2]
        for layer, more in {
            "plain": {},
            "float32": {"dtype": "float32", "precision": "tf32x3"},
            "single image": {"N": 1, "C": 1, "M": 16, "H": 17},
            "stem": {"C": 3, "K": 7, "S": 2, "P": 3},
            "1x1": {"K": 1, "P": 0},
            "patches": {"K": 2, "S": 2, "P": 0, "H": 32},
            "depthwise": {"M": 64, "G": 64},
            "grouped": {"M": 64, "G": 4},
        }.items():
            found[f"{direction} {layer}"] = operator.parse({**base, **more})
        deep = {**base, "D": 5, "H": 7}
        found[f"{direction} 3-D"] = OPERATORS[direction, 3].parse(deep)
    forward = OPERATORS[Direction.FORWARD, 2]
    for fused in ("fused", "fused+acc"):
        found[f"forward {fused}"] = forward.parse({**base, "epilogue": fused})
    plain = forward.parse(base)
    slopes = torch.randn(plain.out_channels)

    def leaky(y: torch.Tensor, other: torch.Tensor, *, c: torch.Tensor) -> torch.Tensor:
        return torch.where(y > 0, y, slopes[c] * y) + other

    epilogue = build_epilogue(leaky, False, (torch.bfloat16,), plain.dtype, 2)
    spec = EpilogueSpec(
        epilogue.key,
        (torch.bfloat16,),
        (plain.y_strides,),
        (torch.float32,),
        ((plain.out_channels,),),
        ((1,),),
    )
    found["forward leaky"] = replace(plain, epilogue=spec)
    batch = 2**31 // (plain.in_channels * 30 * 30)
    for direction in Direction:
        wide = OPERATORS[direction, 2].parse({**base, "N": batch})
        assert wide.wide
        found[f"{direction} wide"] = wide
    strides = (2**33, *plain.x_strides[1:])
    far = replace(plain, x_strides=strides)
    assert far.wide
    found["forward int64 stride"] = far
    found["forward leaky int64 stride"] = replace(far, epilogue=spec)
    return found


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    triton.compiler.compile = _note
    device = nominal_device("sm_90")
    rows, differing = 0, []
    for name, problem in problems().items():
        operator = OPERATORS[problem.direction, len(problem.in_size)]
        for algorithm in operator.candidates(problem):
            for config in list(algorithm.configs(problem, device))[:2]:
                plan = algorithm.plan(problem, config)
                if plan is None:
                    continue
                rows += 1
                expected = dispatched(plan)
                assert expected
                if compiled(plan) != expected:
                    differing.append(f"{name}: {algorithm.name} {config}")
    print(json.dumps({"plans": rows, "differing": differing}))


if __name__ == "__main__":
    main()


__all__ = ["compiled", "dispatched", "problems"]
