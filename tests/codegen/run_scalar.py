"""Run an emitted scalar function over vectors through a minimal kernel."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from tritonconv.codegen import Role, ScalarFunction
from tritonconv.codegen.modules import digest, load_function
from tritonconv.runtime.compat import interpreting


def kernel_source(values: int, coords: int, outputs: int) -> str:
    """A kernel that applies ``FN`` to vectors of values and coordinates."""
    names = [f"v{k}" for k in range(values)] + [f"c{k}" for k in range(coords)]
    outs = [f"o{k}" for k in range(outputs)]
    pointers = ", ".join(f"{n}_ptr" for n in names + outs)
    lines = [
        "import triton",
        "import triton.language as tl",
        "",
        "",
        "@triton.jit",
        f"def kernel({pointers}, ptrs, strides, count, FN: tl.constexpr, BLOCK: tl.constexpr):",
        "    at = tl.arange(0, BLOCK)",
        "    mask = at < count",
    ]
    lines += [f"    {n} = tl.load({n}_ptr + at, mask=mask, other=0)" for n in names]
    lines += [f"    {', '.join(outs)} = FN({', '.join([*names, 'mask', 'ptrs', 'strides'])})"]
    lines += [f"    tl.store({o}_ptr + at, {o}, mask=mask)" for o in outs]
    return "\n".join(lines) + "\n"


def kernel(values: int, coords: int, outputs: int) -> Any:
    """The kernel as a ``JITFunction``."""
    source = kernel_source(values, coords, outputs)
    return load_function(source, "kernel", digest(source))


def run(function: ScalarFunction, *arguments: Tensor) -> tuple[Tensor, ...]:
    """Apply the emitted function elementwise to vectors; one tensor for each output."""
    vectors = {a.name: x for a, x in zip(function.arguments, arguments, strict=True)}
    device = "cpu" if interpreting() else "cuda"
    count = max(x.numel() for x in arguments)
    by_role: dict[Role, list[Tensor]] = {role: [] for role in Role}
    for argument in function.arguments:
        x = vectors[argument.name].expand(count).contiguous().to(device)
        by_role[argument.role].append(x)
    coords = by_role[Role.COORD]
    strides: list[int] = []
    for _ in by_role[Role.ELEMENT]:
        # The first coordinate walks the operand: tests supply arange there.
        strides += [1] + [0] * (len(coords) - 1)
    captures = [c.detach().to(device) for c in function.captures]
    for capture in captures:
        strides += capture.stride()
    outputs = []
    for output in function.outputs:
        if output.dtype.is_floating_point:
            outputs.append(torch.full((count,), float("nan"), dtype=output.dtype, device=device))
        else:
            outputs.append(torch.zeros(count, dtype=output.dtype, device=device))
    block = max(2, 1 << (count - 1).bit_length())
    kernel(len(by_role[Role.VALUE]), len(coords), len(outputs))[(1,)](
        *by_role[Role.VALUE],
        *coords,
        *outputs,
        (*by_role[Role.ELEMENT], *captures),
        tuple(strides),
        count,
        FN=function.jit,
        BLOCK=block,
    )
    return tuple(x.cpu() for x in outputs)
