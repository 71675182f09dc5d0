"""The smallest kernel family: out = x · y + shift, with its gradients, tunable like the others.

In the package these sections are files of one folder: problem.py, reference.py, algorithms/flat.py,
dispatch.py, ops.py, api.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl

from tritonconv.autotune.space import space
from tritonconv.runtime import library
from tritonconv.runtime.aot import compile_plan
from tritonconv.runtime.backend import uses_triton
from tritonconv.runtime.device import DeviceFacts, device_facts, nominal_device
from tritonconv.runtime.errors import bad_value
from tritonconv.runtime.launch import Executable
from tritonconv.runtime.operators import Algorithm, Config, Field, Operator, register
from tritonconv.runtime.plan import KernelCall, LaunchPlan, Slot
from tritonconv.runtime.tables import choose, epoch

# problem.py -- the frozen description of one call: what is planned, tuned and looked up.


@dataclass(frozen=True)
class MuladdProblem:
    """out = x · y + shift over a flat array."""

    elements: int
    dtype: torch.dtype
    operator: ClassVar[str] = "muladd.forward"

    def fields(self) -> Mapping[str, Field]:
        """Strings are compared, integers have a distance."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "elements": self.elements}

    def flops(self) -> int:
        """One multiplication and one addition per element."""
        return 2 * self.elements

    def bytes_moved(self) -> int:
        """Three arrays read, one written."""
        return 4 * self.elements * self.dtype.itemsize


# reference.py -- the specification, and what CPU tensors run.


def reference(x: torch.Tensor, y: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Plain PyTorch."""
    return x * y + shift


# algorithms/flat.py -- one way to compute it: kernel, config space, plan.


@triton.jit
def _muladd_kernel(x_ptr, y_ptr, shift_ptr, out_ptr, elements, BLOCK: tl.constexpr):
    """out[i] = x[i] · y[i] + shift[i]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < elements
    x = tl.load(x_ptr + i, mask=mask).to(tl.float32)
    y = tl.load(y_ptr + i, mask=mask).to(tl.float32)
    shift = tl.load(shift_ptr + i, mask=mask).to(tl.float32)
    tl.store(out_ptr + i, (x * y + shift).to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class FlatConfig(Config):
    """Elements per program, and warps."""

    block: int
    num_warps: int


SLOTS = ("x", "y", "shift", "out")


class Flat(Algorithm):
    """One program per block of elements."""

    name: ClassVar[str] = "flat"
    config_type = FlatConfig

    def supports(self, problem: MuladdProblem) -> str | None:
        """None, or the reason why not."""
        return None if problem.dtype is not torch.float64 else "dtype float64"

    def configs(self, problem: MuladdProblem, device: DeviceFacts) -> Sequence[FlatConfig]:
        """The first is what an untuned call runs."""
        return [FlatConfig(block, warps) for block in (1024, 512, 2048) for warps in (4, 8)]

    def plan(self, problem: MuladdProblem, config: FlatConfig) -> LaunchPlan:
        """A pure function of problem and config; tensors are named, not held."""
        call = KernelCall(
            _muladd_kernel,
            (triton.cdiv(problem.elements, config.block), 1, 1),
            (*map(Slot, SLOTS), problem.elements),
            {"BLOCK": config.block},
            num_warps=config.num_warps,
        )
        return LaunchPlan((call,), dict.fromkeys(SLOTS, problem.dtype))


class Eager(Algorithm):
    """PyTorch's own way, always a candidate."""

    name: ClassVar[str] = "aten"

    def supports(self, problem: MuladdProblem) -> str | None:
        """Every problem."""
        return None

    def configs(self, problem: MuladdProblem, device: DeviceFacts) -> Sequence[Config]:
        """Nothing to choose."""
        return [Config()]

    def plan(self, problem: MuladdProblem, config: Config) -> None:
        """None: `launch` is overridden."""
        return None

    def launch(self, problem: Any, config: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write into the preallocated output."""
        torch.addcmul(tensors["shift"], tensors["x"], tensors["y"], out=tensors["out"])


# dispatch.py -- what the tuner and the command line see, and the choice for a call.


class MuladdOperator(Operator):
    """Registered once, at import."""

    name: ClassVar[str] = "muladd.forward"

    @property
    def algorithms(self) -> tuple[Algorithm, ...]:
        """Most special first; ties are broken in this order."""
        return (Flat(), Eager())

    def parse(self, fields: Mapping[str, Any]) -> MuladdProblem:
        """From a suite, the command line or a tuned entry."""
        if "elements" not in fields:
            raise bad_value("problem", "elements", dict(fields))
        return MuladdProblem(fields["elements"], getattr(torch, fields.get("dtype", "float32")))

    def make_tensors(
        self, problem: Any, device: torch.device, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Random inputs, and an output full of NaN."""
        made = {
            name: torch.randn(problem.elements, generator=generator, device=device)
            for name in SLOTS
        }
        made["out"].fill_(float("nan"))
        return {name: tensor.to(problem.dtype) for name, tensor in made.items()}

    def outputs(self, problem: Any) -> tuple[str, ...]:
        """What a launch writes."""
        return ("out",)

    def reference(
        self, problem: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """The oracle, in any dtype."""
        return {"out": reference(*(tensors[name].to(dtype) for name in SLOTS[:3]))}

    def default_algorithm(self, problem: Any, device: DeviceFacts) -> Algorithm:
        """What an untuned call runs."""
        return self.candidates(problem)[0]


OPERATOR = register(MuladdOperator())


@functools.lru_cache(maxsize=4096)
def _prepared(problem: MuladdProblem, device: torch.device, _epoch: int) -> Any:
    """Choose and prepare a problem, once per state of the tables."""
    facts = device_facts(device if device.type == "cuda" else None)
    choice = choose(OPERATOR, problem, facts)
    algorithm = OPERATOR.algorithm(choice.algorithm)
    plan = algorithm.plan(problem, choice.config)
    if plan is not None:
        return Executable(plan, SLOTS)
    return lambda *t: algorithm.launch(problem, choice.config, dict(zip(SLOTS, t, strict=True)))


# ops.py -- schema, implementation, fake, autograd.


def _muladd(x: torch.Tensor, y: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    if not uses_triton(x.device) or not x.numel():
        return reference(x, y, shift)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    run = _prepared(MuladdProblem(x.numel(), x.dtype), x.device, epoch())
    run(x.contiguous(), y.contiguous(), shift.contiguous(), out)
    return out


def _muladd_fake(x: torch.Tensor, y: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Muladd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        return MULADD.below_autograd(x, y, shift)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Differentiable operators again, so that the second order composes.
        x, y = ctx.saved_tensors
        zero = torch.zeros_like(grad)
        return muladd(grad, y, zero), muladd(grad, x, zero), grad


MULADD = library.define(
    "example_muladd",
    "(Tensor x, Tensor y, Tensor shift) -> Tensor",
    _muladd,
    _muladd_fake,
    _Muladd.apply,
)


# api.py -- validation, and the public function.


def muladd(x: torch.Tensor, y: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """x · y + shift, element by element."""
    for name, tensor in (("y", y), ("shift", shift)):
        if tensor.shape != x.shape:
            raise bad_value(name, f"the shape of x, {tuple(x.shape)}", tuple(tensor.shape))
    return MULADD(x, y, shift)


def main() -> None:
    """The checks that every family passes, in short."""
    torch.manual_seed(0)
    inputs = [torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(muladd, inputs)
    assert torch.autograd.gradgradcheck(muladd, inputs)
    torch.library.opcheck(torch.ops.tritonconv.example_muladd.default, inputs)
    print("gradients of first and second order, and PyTorch's checks of the operator: passed")

    problem = OPERATOR.parse({"elements": 1 << 20, "dtype": "bfloat16"})
    facts = nominal_device("sm_90")
    found = space(OPERATOR, problem, facts)
    print(f"{len(found.candidates)} candidates, the default is {found.default}")
    for candidate in found.candidates:
        plan = OPERATOR.algorithm(candidate.algorithm).plan(problem, candidate.config)
        for kernel in compile_plan(plan, facts.arch) if plan else ():
            assert not kernel.spill_bytes
            print(f"{candidate}: {kernel.registers} registers on {kernel.target}")


if __name__ == "__main__":
    main()
