"""Compile every operator for one target, without a GPU; prints JSON. Run in a fresh process."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from tests.codegen.cases import Case, cases_of, operators
from tritonconv.codegen import ScalarFunction, trace
from tritonconv.codegen.modules import load, write
from tritonconv.runtime.aot import parse_target

KINDS = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "i1",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
CHUNK = 24
BLOCK = 64


def chunk_source(functions: list[ScalarFunction]) -> str:
    """One kernel that calls all functions; every input and output of a function is a pointer."""
    names = []
    body = ["    at = tl.arange(0, BLOCK)", "    mask = at < count"]
    for k, function in enumerate(functions):
        operands = []
        for i, _ in enumerate(function.arguments):
            name = f"a{k}_{i}"
            names.append(f"{name}_ptr")
            body.append(f"    {name} = tl.load({name}_ptr + at, mask=mask, other=0)")
            operands.append(name)
        outs = [f"o{k}_{i}" for i, _ in enumerate(function.outputs)]
        names += [f"{o}_ptr" for o in outs]
        body.append(f"    {', '.join(outs)} = F{k}({', '.join(operands)}, mask, (), ())")
        body += [f"    tl.store({o}_ptr + at, {o}, mask=mask)" for o in outs]
    constants = ", ".join(f"F{k}: tl.constexpr" for k in range(len(functions)))
    head = f"def kernel({', '.join(names)}, count, {constants}, BLOCK: tl.constexpr):"
    lines = ["import triton", "import triton.language as tl", "", "", "@triton.jit", head, *body]
    return "\n".join(lines) + "\n"


def compile_chunk(functions: list[ScalarFunction], target: Any) -> None:
    source = chunk_source(functions)
    kernel = load(write(source)).kernel
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for k, function in enumerate(functions):
        for i, argument in enumerate(function.arguments):
            signature[f"a{k}_{i}_ptr"] = f"*{KINDS[argument.dtype]}"
        for i, output in enumerate(function.outputs):
            signature[f"o{k}_{i}_ptr"] = f"*{KINDS[output.dtype]}"
    signature["count"] = "i32"
    for k, function in enumerate(functions):
        signature[f"F{k}"] = "constexpr"
        constants[f"F{k}"] = function.jit
    signature["BLOCK"], constants["BLOCK"] = "constexpr", BLOCK
    triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=target,
        options={"num_warps": 1},
    )


def failures(items: list[tuple[str, ScalarFunction]], target: Any) -> dict[str, str]:
    """Names of the functions that do not compile; a failing chunk is split to find them."""
    try:
        compile_chunk([f for _, f in items], target)
    except Exception as error:
        if len(items) == 1:
            return {items[0][0]: f"{type(error).__name__}: {str(error)[-600:]}"}
        middle = len(items) // 2
        return failures(items[:middle], target) | failures(items[middle:], target)
    return {}


def collect(every: int) -> list[tuple[str, ScalarFunction]]:
    """Each operator's first case and every ``every``-th of the others, equal programs once."""
    items: list[tuple[str, ScalarFunction]] = []
    seen: set[str] = set()
    chosen: list[Case] = []
    for op in operators():
        cases = list(cases_of(op))
        chosen += cases[:1] + cases[every::every]
    for case in chosen:
        function = trace(Case.__call__.__get__(case), case.arguments())
        shape = hashlib.sha256(function.source.split("@triton.jit")[1].encode()).hexdigest()
        shape += str([a.dtype for a in function.arguments])
        if shape not in seen:
            seen.add(shape)
            items.append((str(case), function))
    return items


def main(target_name: str, every: int = 1) -> None:
    target = parse_target(target_name)
    items = collect(every)
    found: dict[str, str] = {}
    for start in range(0, len(items), CHUNK):
        found |= failures(items[start : start + CHUNK], target)
    report = {
        "target": target_name,
        "operators": len(list(operators())),
        "count": len(items),
        "failures": found,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)
