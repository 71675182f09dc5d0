"""Compile launch plans for a GPU that need not be present, and read what the compiler says.

Example:
    >>> from tritonconv.runtime.aot import parse_target
    >>> parse_target("sm_90").arch
    90
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .compat import interpreting
from .errors import TritonConvError, bad_value
from .plan import Arg, KernelCall, LaunchPlan, Slot

TARGETS: tuple[str, ...] = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
"""Targets that every kernel must compile for."""

SHARED_MEMORY_LIMIT: dict[str, int] = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
"""Bytes of shared memory one block may use (CUDA C++ programming guide, AMD CDNA3 ISA)."""

_TYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Compiled:
    """Resources of one compiled kernel; None where no tool reports them."""

    name: str
    target: str
    shared_bytes: int
    num_warps: int
    registers: int | None
    spill_bytes: int | None


def parse_target(name: str) -> GPUTarget:
    """Turn ``sm_90`` or ``gfx942`` into Triton's description of a target.

    Raises:
        ArgumentValueError: the name is neither.
    """
    match = re.fullmatch(r"sm_?(\d{2,3})", name)
    if match:
        return GPUTarget("cuda", int(match.group(1)), 32)
    if re.fullmatch(r"gfx9\w+", name):
        return GPUTarget("hip", name, 64)
    if re.fullmatch(r"gfx1\w+", name):
        return GPUTarget("hip", name, 32)
    raise bad_value("target", "sm_XX or gfxXXX, such as sm_90", repr(name))


def _describe(arg: Arg, dtypes: Any, path: tuple[int, ...], out: _Signature) -> Any:
    if isinstance(arg, tuple):
        return tuple(_describe(item, dtypes, (*path, index), out) for index, item in enumerate(arg))
    if isinstance(arg, Slot):
        out.attrs[path] = [["tt.divisibility", 16]]
        return "*" + _TYPE_NAMES[dtypes[arg.name]]
    if isinstance(arg, float):
        return "fp32"
    if arg == 1:
        out.constants[path] = 1
        return "constexpr"
    if arg % 16 == 0:
        out.attrs[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= arg < 2**31 else "i64"


class _Signature:
    """What Triton's dispatcher would derive from the arguments of a call."""

    def __init__(self, call: KernelCall, dtypes: Any) -> None:
        self.attrs: dict[tuple[int, ...], list[list[Any]]] = {}
        self.constants: dict[tuple[int, ...], Any] = {}
        names = list(call.kernel.arg_names)
        self.types: dict[str, Any] = {}
        for index, (name, arg) in enumerate(zip(names, call.args, strict=False)):
            self.types[name] = _describe(arg, dtypes, (index,), self)
        for index, name in enumerate(names[len(call.args) :], start=len(call.args)):
            self.types[name] = "constexpr"
            self.constants[(index,)] = call.constexprs[name]


def compile_call(call: KernelCall, dtypes: Any, target: str, *, resources: bool = True) -> Compiled:
    """Compile one kernel call for ``target`` and return the resources it takes.

    Raises:
        TritonConvError: kernels of this process are interpreted.
    """
    if interpreting():
        raise TritonConvError(
            "ahead-of-time compilation needs a process without TRITON_INTERPRET=1: "
            "Triton chooses at import whether it interprets"
        )
    signature = _Signature(call, dtypes)
    source = ASTSource(call.kernel, signature.types, signature.constants, signature.attrs)
    gpu = parse_target(target)
    compiled = triton.compile(
        source,
        target=gpu,
        options={
            "num_warps": call.num_warps,
            "num_stages": call.num_stages,
            # The default, said aloud: Triton 3.9 warns where it is left unsaid.
            "enable_fp_fusion": triton.knobs.language.default_fp_fusion,
        },
    )
    registers, spills = None, None
    if resources and gpu.backend == "cuda":
        registers, spills = _cubin_resources(compiled.asm["cubin"])
    return Compiled(
        call.kernel.__name__,
        target,
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        registers,
        spills,
    )


def compile_plan(plan: LaunchPlan, target: str, *, resources: bool = True) -> tuple[Compiled, ...]:
    """Compile every kernel of a plan for ``target``, without any GPU.

    Args:
        plan: the plan of an algorithm for a problem.
        target: ``sm_80`` … ``sm_120`` or ``gfx942``.
        resources: also read registers and spills (NVIDIA targets; costs a few milliseconds).

    Raises:
        ArgumentValueError: unknown target.
        TritonConvError: kernels of this process are interpreted.
        triton.CompilationError: the kernel does not compile.
    """
    return tuple(
        compile_call(call, plan.dtypes, target, resources=resources) for call in plan.calls
    )


def _cubin_resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and local-memory bytes from cuobjdump, which ships with Triton's NVIDIA backend."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
    registers = re.search(r"REG:(\d+)", text)
    stack = re.search(r"STACK:(\d+)", text)
    local = re.search(r"LOCAL:(\d+)", text)
    if registers is None:
        return None, None
    spilled = max(int(m.group(1)) if m else 0 for m in (stack, local))
    return int(registers.group(1)), spilled
