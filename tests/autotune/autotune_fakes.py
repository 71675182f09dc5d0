"""An operator that belongs to no family, and a laboratory that plays back recorded times."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl

from tritonconv.autotune.measure import CandidateError, NumericCheck, Policy
from tritonconv.autotune.search import Failure, Status
from tritonconv.autotune.space import Candidate
from tritonconv.runtime.accuracy import Accuracy
from tritonconv.runtime.device import DeviceFacts, nominal_device
from tritonconv.runtime.errors import bad_value
from tritonconv.runtime.operators import Algorithm, Config, Field, Operator, Problem
from tritonconv.runtime.plan import KernelCall, LaunchPlan, Slot

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ScaleProblem:
    """y = 3 x for a vector of ``size`` elements."""

    size: int
    dtype: str = "float32"

    @property
    def operator(self) -> str:
        return "fake.scale"

    def fields(self) -> Mapping[str, Field]:
        return {"size": self.size, "dtype": self.dtype}

    def flops(self) -> int:
        return self.size

    def bytes_moved(self) -> int:
        return 2 * self.size * DTYPES[self.dtype].itemsize


@triton.jit
def _scale_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """y = 3 x."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + offsets, mask=mask)
    tl.store(y_ptr + offsets, 3 * x, mask=mask)


@dataclass(frozen=True)
class BlockConfig(Config):
    block: int
    num_warps: int = 4


class Vector(Algorithm):
    """The Triton kernel."""

    name: ClassVar[str] = "vector"
    config_type = BlockConfig

    def supports(self, problem: ScaleProblem) -> str | None:
        return None

    def configs(self, problem: ScaleProblem, device: DeviceFacts) -> Sequence[Config]:
        return [BlockConfig(block) for block in (256, 512, 1024)]

    def plan(self, problem: ScaleProblem, config: BlockConfig) -> LaunchPlan | None:
        call = KernelCall(
            _scale_kernel,
            (triton.cdiv(problem.size, config.block), 1, 1),
            (Slot("x"), Slot("y"), problem.size),
            {"BLOCK": config.block},
            num_warps=config.num_warps,
        )
        dtype = DTYPES[problem.dtype]
        return LaunchPlan((call,), {"x": dtype, "y": dtype})


@dataclass(frozen=True)
class VariantConfig(Config):
    variant: int


class OnTorch(Algorithm):
    """Base of algorithms that call PyTorch, with numbered variants."""

    config_type = VariantConfig
    variants: int = 1

    def supports(self, problem: ScaleProblem) -> str | None:
        return None

    def configs(self, problem: ScaleProblem, device: DeviceFacts) -> Sequence[Config]:
        return [VariantConfig(variant) for variant in range(self.variants)]

    def plan(self, problem: ScaleProblem, config: VariantConfig) -> LaunchPlan | None:
        return None

    def launch(
        self, problem: ScaleProblem, config: VariantConfig, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        tensors["y"].copy_(self.compute(tensors["x"], config.variant))

    def compute(self, x: torch.Tensor, variant: int) -> torch.Tensor:
        return 3 * x


class Fine(OnTorch):
    """Right in every variant."""

    name: ClassVar[str] = "fine"
    variants = 4


class Aten(OnTorch):
    """PyTorch's own."""

    name: ClassVar[str] = "aten"


class Wrong(OnTorch):
    """Wrong in three ways: everywhere, in one element, by an element never written."""

    name: ClassVar[str] = "wrong"
    variants = 3

    def launch(
        self, problem: ScaleProblem, config: VariantConfig, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        y = tensors["y"]
        if config.variant == 2:
            y[1:] = 3 * tensors["x"][1:]
            return
        y.copy_(3 * tensors["x"])
        if config.variant == 0:
            y *= 1.01
        else:
            y[-1] += 1


class Picky(OnTorch):
    """Serves nothing."""

    name: ClassVar[str] = "picky"

    def supports(self, problem: ScaleProblem) -> str | None:
        return "size is not a multiple of 1000003"


class Scale(Operator):
    """The operator over a choice of algorithms."""

    name: ClassVar[str] = "fake.scale"

    def __init__(
        self,
        *algorithms: Algorithm,
        source: str = "source-1",
        changed: Mapping[str, str] | None = None,
    ) -> None:
        self._algorithms = algorithms or (Vector(), Fine(), Aten(), Picky())
        self.source = source
        self.changed = dict(changed or {})

    @property
    def algorithms(self) -> tuple[Algorithm, ...]:
        return tuple(self._algorithms)

    def source_hashes(self) -> Mapping[str, str]:
        return {a.name: self.changed.get(a.name, self.source) for a in self.algorithms}

    def parse(self, fields: Mapping[str, Any]) -> Problem:
        known = {"size", "dtype", "layout", "name"}
        if not set(fields) <= known or "size" not in fields:
            raise bad_value("problem field", "size, dtype", dict(fields))
        return ScaleProblem(int(fields["size"]), str(fields.get("dtype", "float32")))

    def make_tensors(
        self, problem: ScaleProblem, device: torch.device, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        dtype = DTYPES[problem.dtype]
        x = torch.randn(problem.size, generator=generator, device=device).to(dtype)
        return {"x": x, "y": torch.full_like(x, float("nan"))}

    def outputs(self, problem: ScaleProblem) -> tuple[str, ...]:
        return ("y",)

    def reference(
        self, problem: ScaleProblem, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        return {"y": 3 * tensors["x"].to(dtype)}

    def default_algorithm(self, problem: ScaleProblem, device: DeviceFacts) -> Algorithm:
        return next(a for a in self.algorithms if a.supports(problem) is None)


Times = Callable[[Candidate], float | Failure]


@dataclass
class PlaybackTimer:
    """Draws samples around a recorded time."""

    times: Times
    noise: float
    rng: random.Random
    prepared: list[Candidate]
    closed: bool = False

    def prepare(self, candidate: Candidate) -> Candidate:
        found = self.times(candidate)
        self.prepared.append(candidate)
        if isinstance(found, Failure):
            raise CandidateError(found)
        return candidate

    def sample(self, handle: Candidate, seconds: float) -> list[float]:
        time = self.times(handle)
        assert isinstance(time, float)
        return [time * (1 + self.noise * self.rng.gauss(0, 1)) for _ in range(10)]

    def note(self, handle: Candidate) -> str:
        return ""

    def close(self) -> None:
        self.closed = True


@dataclass
class PlaybackLab:
    """Plays back recorded times; results are really computed and checked, on the CPU."""

    times: Times = lambda candidate: 10.0
    noise: float = 0.0
    seed: int = 0
    facts: DeviceFacts = field(default_factory=lambda: nominal_device("sm_90"))
    prepared: list[Candidate] = field(default_factory=list)

    def timer(self, operator: Operator, problem: Any, policy: Policy, seed: int) -> PlaybackTimer:
        rng = random.Random(f"{self.seed} {problem}")
        return PlaybackTimer(self.times, self.noise, rng, self.prepared)

    def checker(
        self, operator: Operator, problem: Any, seed: int
    ) -> Callable[[Candidate], Accuracy]:
        return NumericCheck(operator, problem, torch.device("cpu"), seed)


def table_of(times: Mapping[tuple[str, int], float | Failure], default: float = 50.0) -> Times:
    """Times by (algorithm, first config value)."""

    def lookup(candidate: Candidate) -> float | Failure:
        first = next(iter(candidate.config.as_dict().values()), 0)
        return times.get((candidate.algorithm, first), default)

    return lookup


BROKEN = Failure(Status.COMPILE, "CompilationError: no")
