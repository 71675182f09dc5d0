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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import MockTensor, create_function_from_signature

from .compat import interpreting, tensor_descriptor
from .errors import TritonConvError, bad_value
from .plan import Arg, Boxes, KernelCall, LaunchPlan, Slot

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


def jit_source(call: KernelCall, dtypes: Any, target: GPUTarget) -> tuple[ASTSource, Any]:
    """Source and options of a call, exactly as Triton's dispatcher would derive them on a launch.

    The dispatcher's own binder looks at the arguments: what is compiled here lies in Triton's disk
    cache under the key that a launch of the call, in any process, looks up. Tensors stand for
    themselves: pointers aligned to 16 bytes, as PyTorch allocates them.
    """
    kernel = call.kernel
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    compilation = triton.knobs.compilation
    options = {
        "num_warps": call.num_warps,
        "num_stages": call.num_stages,
        # The default, said aloud: Triton 3.9 warns where it is left unsaid.
        "enable_fp_fusion": triton.knobs.language.default_fp_fusion,
        # What JITFunction.run adds to every launch.
        "debug": kernel.debug or triton.knobs.runtime.debug,
        "instrumentation_mode": compilation.instrumentation_mode,
    }
    if hasattr(compilation, "fpsan_homomorphic_casts"):
        options["fpsan_homomorphic_casts"] = compilation.fpsan_homomorphic_casts
    arguments = [_stand_in(arg, dtypes) for arg in call.args]
    keywords = {**call.constexprs, **options}
    bound, specialization, rest = binder(*arguments, **keywords)
    parsed, signature, constants, attrs = kernel._pack_args(
        backend, keywords, bound, specialization, rest
    )
    return ASTSource(kernel, signature, constants, attrs), parsed


def _stand_in(arg: Arg, dtypes: Any) -> Any:
    if isinstance(arg, tuple):
        return tuple(_stand_in(item, dtypes) for item in arg)
    if isinstance(arg, Boxes):
        return tensor_descriptor(MockTensor(dtypes[arg.name]), arg.shape, arg.strides, arg.block)
    return MockTensor(dtypes[arg.name]) if isinstance(arg, Slot) else arg


def compile_call(
    call: KernelCall, dtypes: Any, target: str, *, resources: bool = True, launcher: bool = False
) -> Compiled:
    """Compile one kernel call for ``target`` and return the resources it takes.

    Raises:
        TritonConvError: kernels of this process are interpreted.
    """
    if interpreting():
        raise TritonConvError(
            "ahead-of-time compilation needs a process without TRITON_INTERPRET=1: "
            "Triton chooses at import whether it interprets"
        )
    gpu = parse_target(target)
    source, options = jit_source(call, dtypes, gpu)
    compiled = triton.compile(source, target=gpu, options=options.__dict__)
    registers, spills = None, None
    if gpu.backend == "cuda":
        if resources:
            registers, spills = _cubin_resources(compiled.asm["cubin"])
        if launcher:
            _build_launcher(compiled)
    return Compiled(
        call.kernel.__name__,
        target,
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        registers,
        spills,
    )


def _build_launcher(compiled: Any) -> None:
    """Have the C function that launches the kernel built, which Triton does once per signature.

    It takes a tenth of a second of the C compiler. Triton 3.6 builds it without a GPU, but needs
    the driver's library; where it is missing, and in releases that build nothing, nothing is done.
    """
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return
    with suppress(Exception):
        driver.CudaLauncher(compiled.src, compiled.metadata)


def compile_plan(
    plan: LaunchPlan, target: str, *, resources: bool = True, launcher: bool = False
) -> tuple[Compiled, ...]:
    """Compile every kernel of a plan for ``target``, without any GPU.

    Args:
        plan: the plan of an algorithm for a problem.
        target: ``sm_80`` … ``sm_120`` or ``gfx942``.
        resources: also read registers and spills (NVIDIA targets; costs a few milliseconds).
        launcher: also build what launches the kernel, where the release of Triton builds that.

    Raises:
        ArgumentValueError: unknown target.
        TritonConvError: kernels of this process are interpreted.
        triton.CompilationError: the kernel does not compile.
    """
    return tuple(
        compile_call(call, plan.dtypes, target, resources=resources, launcher=launcher)
        for call in plan.calls
        if 0 not in call.grid
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
