"""Objects for workers, and labs without a GPU whose candidates hang, crash and break things."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from autotune_fakes import BlockConfig, OnTorch, Scale, ScaleProblem, VariantConfig, Vector

from tritonconv.autotune.forkserver import note
from tritonconv.autotune.measure import (
    CandidateError,
    DeviceLostError,
    NumericCheck,
    Policy,
)
from tritonconv.autotune.search import Failure, Status
from tritonconv.autotune.space import Candidate
from tritonconv.runtime.accuracy import Accuracy
from tritonconv.runtime.device import DeviceFacts, nominal_device
from tritonconv.runtime.operators import Config, Operator
from tritonconv.runtime.plan import KernelCall, LaunchPlan, Slot


class Servant:
    """Does what it is told."""

    def __init__(self, greeting: str = "hello") -> None:
        if greeting == "refuse":
            raise ValueError("no greeting")
        self.greeting = greeting
        self.calls = 0

    def echo(self, value: Any) -> Any:
        self.calls += 1
        return value

    def count(self) -> int:
        return self.calls

    def surroundings(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "group": os.getpgid(0),
            "directory": os.getcwd(),
            "interpret": os.environ.get("TRITON_INTERPRET"),
            "main": getattr(sys.modules["__main__"], "__file__", None),
            "cuda": torch.cuda.is_initialized(),
        }

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def setting(self, name: str) -> Any:
        from tritonconv.runtime.settings import settings

        return getattr(settings, name)

    def fail(self, text: str) -> None:
        raise RuntimeError(text)

    def leave(self, code: int) -> None:
        os._exit(code)

    def abort(self) -> None:
        print("fatal: no way out", file=sys.stderr, flush=True)
        os.abort()

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "slept"

    def spawn(self) -> int:
        """Start a process that would live on."""
        return subprocess.Popen(["sleep", "600"]).pid

    def chatter(self, size: int) -> None:
        print("x" * size, flush=True)
        os.write(2, b"noise\n")

    def steps(self, pauses: Sequence[float]) -> str:
        for index, pause in enumerate(pauses):
            note(index)
            time.sleep(pause)
        return "done"

    def odd(self) -> Any:
        return lambda: None


BAD = {1: "hang in prepare", 2: "hang in sample", 3: "exit", 4: "broken", 5: "raise", 6: "compile"}


SLOWLY = 2.5
"""Seconds of a compilation that is slow, but not too slow."""


class Moody(OnTorch):
    """Variant 0 and those above 6 work; each of the others has its own way to fail."""

    name: ClassVar[str] = "moody"
    variants = 9


class MoodyTimer:
    """Fails where the lab is told to."""

    def __init__(self, lab: MoodyLab) -> None:
        self.lab = lab

    def prepare(self, candidate: Candidate) -> Candidate:
        how = self.lab.how(candidate)
        if how == "hang in prepare":
            time.sleep(600)
        if how == "exit":
            os._exit(7)
        if how == "broken":
            raise DeviceLostError("an illegal memory access was encountered")
        if how == "raise":
            raise CandidateError(Failure(Status.LAUNCH, "not on this device"))
        return candidate

    def sample(self, handle: Candidate, seconds: float) -> list[float]:
        if self.lab.how(handle) == "hang in sample":
            time.sleep(600)
        if self.lab.how(handle) == "late":
            self.lab.samples += 1
            if self.lab.samples > 1:
                os._exit(9)
        variant = getattr(handle.config, "variant", 0)
        return [10.0 + variant] * 5

    def note(self, handle: Candidate) -> str:
        return f"in {os.getpid()}"

    def close(self) -> None:
        pass


class MoodyLab:
    """Needs no GPU; times are the numbers of the variants."""

    def __init__(self, moods: Mapping[int, str] | None = None, identity: str | None = None) -> None:
        self.moods = BAD if moods is None else moods
        self.identity = identity
        self.samples = 0
        self.compiled: set[Candidate] = set()
        self.facts: DeviceFacts = nominal_device("sm_90")

    def how(self, candidate: Candidate) -> str:
        return self.moods.get(getattr(candidate.config, "variant", 0), "")

    def compile(self, operator: Operator, problem: Any, candidate: Candidate) -> None:
        if self.how(candidate) == "compile":
            time.sleep(600)
        self._compile_slowly(candidate)

    def _compile_slowly(self, candidate: Candidate) -> None:
        """Takes its time, once in a process, whoever needs the kernel first."""
        if self.how(candidate) == "slow to compile" and candidate not in self.compiled:
            time.sleep(SLOWLY)
            self.compiled.add(candidate)

    def timer(self, operator: Operator, problem: Any, policy: Policy, seed: int) -> MoodyTimer:
        return MoodyTimer(self)

    def checker(
        self, operator: Operator, problem: Any, seed: int
    ) -> Callable[[Candidate], Accuracy]:
        check = NumericCheck(operator, problem, torch.device("cpu"), seed)

        def judged(candidate: Candidate) -> Accuracy:
            if self.how(candidate) == "exit in check":
                os._exit(5)
            self._compile_slowly(candidate)
            return check(candidate)

        return judged


# Kernels that cannot be compiled in any useful time, hang on the GPU, and write out of bounds.


@triton.jit
def _endless_compile_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """y = 3 x, preceded by more code than a compiler gets through."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + offsets, mask=mask)
    for i in tl.static_range(STEPS):
        x = tl.where(x > i, x * 1.0000001, x - i)
    tl.store(y_ptr + offsets, 3 * x, mask=mask)


@triton.jit
def _hanging_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """Waits for a value that nobody writes."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seen = tl.load(x_ptr, volatile=True)
    while seen < 1e30:
        seen = tl.load(x_ptr, volatile=True)
    tl.store(y_ptr + offsets, offsets + seen, mask=offsets < size)


@triton.jit
def _stray_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """Writes a terabyte away from its output."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK) + (1 << 40)
    tl.store(y_ptr + offsets, tl.full((BLOCK,), 0.0, tl.float32))


@dataclass(frozen=True)
class StepsConfig(Config):
    """So many steps to compile."""

    steps: int
    block: int = 256


class Endless(Vector):
    """Compiles forever."""

    name: ClassVar[str] = "endless"
    config_type = StepsConfig

    def configs(self, problem: ScaleProblem, device: DeviceFacts) -> Sequence[Config]:
        return [StepsConfig(1_000_000)]

    def plan(self, problem: ScaleProblem, config: Any) -> LaunchPlan | None:
        return _plan(_endless_compile_kernel, problem, config.block, {"STEPS": config.steps})


class Hanging(Vector):
    """Never ends."""

    name: ClassVar[str] = "hanging"

    def configs(self, problem: ScaleProblem, device: DeviceFacts) -> Sequence[Config]:
        return [BlockConfig(256)]

    def plan(self, problem: ScaleProblem, config: BlockConfig) -> LaunchPlan | None:
        return _plan(_hanging_kernel, problem, config.block)


class Stray(Vector):
    """Writes out of bounds."""

    name: ClassVar[str] = "stray"

    def configs(self, problem: ScaleProblem, device: DeviceFacts) -> Sequence[Config]:
        return [BlockConfig(256)]

    def plan(self, problem: ScaleProblem, config: BlockConfig) -> LaunchPlan | None:
        return _plan(_stray_kernel, problem, config.block)


class Unbuildable(Vector):
    """Its plan ends the process."""

    name: ClassVar[str] = "unbuildable"

    def configs(self, problem: ScaleProblem, device: DeviceFacts) -> Sequence[Config]:
        return [BlockConfig(256)]

    def plan(self, problem: ScaleProblem, config: BlockConfig) -> LaunchPlan | None:
        os._exit(6)


class Refusing(Vector):
    """Its kernel does not compile."""

    name: ClassVar[str] = "refusing"

    def configs(self, problem: ScaleProblem, device: DeviceFacts) -> Sequence[Config]:
        return [BlockConfig(100)]  # not a power of two


def _plan(
    kernel: Any, problem: ScaleProblem, block: int, more: Mapping[str, int] | None = None
) -> LaunchPlan:
    dtype = torch.float32
    call = KernelCall(
        kernel,
        (triton.cdiv(problem.size, block), 1, 1),
        (Slot("x"), Slot("y"), problem.size),
        {"BLOCK": block, **(more or {})},
    )
    return LaunchPlan((call,), {"x": dtype, "y": dtype})


def candidates(operator: Operator, problem: Any) -> list[Candidate]:
    """All candidates in the order of the algorithms."""
    facts = nominal_device("sm_90")
    return [
        Candidate(algorithm.name, config)
        for algorithm in operator.algorithms
        for config in algorithm.configs(problem, facts)
    ]


__all__ = ["Moody", "MoodyLab", "Scale", "Servant", "VariantConfig", "candidates"]
