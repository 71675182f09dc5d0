"""From a problem to something that runs: operators for the tuner, and the cache for calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..runtime.device import DeviceFacts, device_facts
from ..runtime.errors import bad_value
from ..runtime.launch import Executable
from ..runtime.operators import Algorithm, Operator, register
from ..runtime.plan import LaunchPlan
from ..runtime.space import ConfigSpace
from ..runtime.tables import Choice, Tier, choose, note_replaced, served_by
from .algorithms import ALGORITHMS, common
from .algorithms.aten import Aten
from .algorithms.banded import Banded, is_clearly_better
from .algorithms.banded_groups import BandedGroups, bands_clearly_better
from .algorithms.boxed_operand import BoxedOperand, fills
from .algorithms.common import slot_names
from .algorithms.packed_phases import PackedPhases, packs_clearly_better
from .algorithms.walked_spaces import wasteful
from .epilogue import apply_with_torch, build_epilogue
from .float8_tiles import float8_tiles
from .problem import (
    FLOAT8,
    FUSED,
    ConvProblem,
    Direction,
    EpilogueSpec,
    parse_problem,
    wide_stride,
)
from .scaled_epilogue import Scaling, scaled_epilogue

Tensor = torch.Tensor


class ConvOperator(Operator):
    """One of the three convolution products for one number of spatial axes."""

    def __init__(self, direction: Direction, rank: int) -> None:
        self.direction = direction
        self.rank = rank
        self.name = f"conv{rank}d.{direction}"  # type: ignore[misc]

    @property
    def algorithms(self) -> tuple[Algorithm, ...]:
        """All convolution algorithms."""
        return ALGORITHMS

    def parse(self, fields: Mapping[str, Any]) -> ConvProblem:
        """Build a problem; its epilogue is a bias and a ReLU, or a bias, a residual and GELU."""
        problem = parse_problem(self.direction, self.rank, fields)
        if problem.out_dtype is not None:
            return replace(problem, epilogue=_scales(problem))
        kind, *more = str(fields.get("epilogue", "none")).split("+")
        if kind == FUSED.get(self.direction):
            shape = problem.result_shape
            operand = "operand" in more
            epilogue = build_epilogue(
                _gelu_of_sum if operand else torch.relu,
                True,
                (problem.dtype,) * operand,
                problem.dtype,
                self.rank,
            )
            strides = [0, 1] + [0] * self.rank
            if fields.get("wide", False) and not problem.wide:
                # Then the operand is: a bias, or another axis, of elements far apart.
                axis = next((a for a in (1, 0, *range(2, self.rank + 2)) if shape[a] > 1), 1)
                strides[1], strides[axis] = 0, wide_stride(shape[axis])
            spec = EpilogueSpec(
                epilogue.key,
                (problem.dtype,) * (1 + operand),
                (tuple(strides), problem.result_memory)[: 1 + operand],
                save_acc="acc" in more,
            )
            problem = replace(problem, epilogue=spec)
        return problem

    def elsewhere(self, problem: ConvProblem) -> tuple[ConvProblem, ...]:
        """All tensors in the memory format that the input is not in.

        PyTorch has no float8 convolution: its rival to one is the bare product in bfloat16.
        """
        fields = dict(problem.fields())
        names = ["contiguous" if problem.x_layout == "channels_last" else "channels_last"]
        if problem.dtype is FLOAT8:
            del fields["output_dtype"]
            fields.update(dtype="bfloat16", precision="ieee", epilogue="none")
            names = ["channels_last", "contiguous"]
        kinds = ("layout", "weight_layout", "output_layout")
        return tuple(self.parse({**fields, **dict.fromkeys(kinds, name)}) for name in names)

    def outputs(self, problem: ConvProblem) -> tuple[str, ...]:
        """The product, and the accumulator when the epilogue saves it."""
        name = slot_names(self.direction)[2]
        if problem.epilogue is not None and problem.epilogue.save_acc:
            return (name, "acc")
        return (name,)

    def make_tensors(
        self, problem: ConvProblem, device: torch.device, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Standard normal inputs, weights scaled to keep the variance, NaN outputs."""

        def fresh(shape: tuple[int, ...], strides: tuple[int, ...], scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device)
            if problem.dtype is not FLOAT8:  # it has few small numbers: scales are for them
                values *= scale
            out = torch.empty_strided(shape, strides, dtype=problem.dtype, device=device)
            return out.copy_(values)

        def poisoned(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
            out = torch.empty_strided(shape, strides, dtype=problem.result_dtype, device=device)
            return out.fill_(float("nan"))

        fan_in = max(1, problem.channels_per_group * problem.taps)
        x = (problem.x_shape, problem.x_strides)
        w = (problem.w_shape, problem.w_strides)
        y = (problem.y_shape, problem.y_strides)
        if self.direction is Direction.WGRAD:
            return {"grad_output": fresh(*y), "input": fresh(*x), "grad_weight": poisoned(*w)}
        operand, result = (y, x) if self.direction is Direction.DGRAD else (x, y)
        first, _, out = slot_names(self.direction)
        tensors = {
            first: fresh(*operand),
            "weight": fresh(*w, scale=fan_in**-0.5),
            out: poisoned(*result),
        }
        spec = problem.epilogue
        if spec is not None:
            if spec.save_acc:
                tensors["acc"] = poisoned(*result)
            for index, (dtype, strides) in enumerate(
                zip(spec.element_dtypes, spec.element_strides, strict=True)
            ):
                sizes = zip(problem.result_shape, strides, strict=True)
                shape = tuple(size if hop else 1 for size, hop in sizes)
                values = torch.randn(shape, generator=generator, device=device)
                element = torch.empty_strided(shape, strides, dtype=dtype, device=device)
                tensors[f"element{index}"] = element.copy_(values).expand(problem.result_shape)
            for index, (dtype, size, strides) in enumerate(
                zip(spec.capture_dtypes, spec.capture_shapes, spec.capture_strides, strict=True)
            ):
                capture = torch.empty_strided(size, strides, dtype=dtype, device=device)
                # Integer captures may be indices into another: zero is valid for all of them.
                values = torch.randn(size, generator=generator, device=device)
                if problem.out_dtype is not None:
                    values = 0.5 + values.abs()  # scales
                capture.copy_(values if dtype.is_floating_point else torch.zeros_like(values))
                tensors[f"capture{index}"] = capture
        return tensors

    def reference(
        self, problem: ConvProblem, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """PyTorch's result in ``dtype``; TF32 is float32 on what tensor cores read of it."""
        if dtype is FLOAT8:
            # Plain PyTorch computes what it quantises in float32.
            wide = self.reference(problem, tensors, torch.float32)
            return {name: tensor.to(FLOAT8) for name, tensor in wide.items()}
        first, second, out = slot_names(self.direction)
        a, b = tensors[first].to(dtype), tensors[second].to(dtype)
        if problem.precision == "tf32" and dtype is torch.float32:
            a, b = as_tf32(a), as_tf32(b)
        plain = replace(problem, dtype=dtype, precision="ieee", epilogue=None, out_dtype=None)
        result = ATEN.compute(plain, {first: a, second: b})
        spec = problem.epilogue
        if spec is None:
            return {out: result}
        captures = [tensors[f"capture{i}"] for i in range(len(spec.capture_dtypes))]
        elements = [tensors[f"element{i}"].to(dtype) for i in range(len(spec.element_dtypes))]
        outputs = {out: apply_with_torch(spec.function, result, elements, captures)}
        if spec.save_acc:
            outputs["acc"] = result
        return outputs

    def candidates(self, problem: ConvProblem) -> tuple[Algorithm, ...]:
        """Algorithms that serve the problem; where none does, PyTorch's in full precision."""
        return super().candidates(problem) or (ATEN,)

    def default_algorithm(self, problem: ConvProblem, device: DeviceFacts) -> Algorithm:
        """The most special algorithm that serves the problem, but where another is known better.

        On an H100 the generated kernels for groups of a few channels ran at 0.3 to 0.9 times
        PyTorch's speed, but for large maps in half precision; that of a depthwise weight gradient
        is faster where channels are fastest in memory, not measured elsewhere (docs/benchmarks).
        """
        if bands_clearly_better(problem) and BANDED_GROUPS.supports(problem) is None:
            return BANDED_GROUPS
        if problem.depthwise:
            wgrad = problem.direction is Direction.WGRAD
            slow = wgrad and problem.x_layout != "channels_last"
        else:
            slow = problem.groups > 1 and problem.channels_per_group < 32
        if slow and ATEN.supports(problem) is None:
            return ATEN
        if BOXED_OPERAND.supports(problem) is None and fills(problem, device):
            return BOXED_OPERAND
        if is_clearly_better(problem) and BANDED.supports(problem) is None:
            return BANDED
        if packs_clearly_better(problem) and PACKED.supports(problem) is None:
            return PACKED
        found = self.candidates(problem)
        if found[0].name == "walked" and wasteful(problem):
            return found[1]
        if found[0].name == "boxed" and problem.dtype is torch.float32:
            return found[1]  # in TF32 boxes win on some maps only: for tuned calls
        return found[0]

    def space(
        self, algorithm: Algorithm, problem: ConvProblem, device: DeviceFacts
    ) -> ConfigSpace[Any]:
        """The algorithm's; float8 products prefer other tiles of it than wider types."""
        space = algorithm.space(problem, device)
        return space.preferring(float8_tiles(space.default, problem, device))


def _gelu_of_sum(y: Tensor, residual: Tensor) -> Tensor:
    return torch.nn.functional.gelu(y + residual)


def _scales(problem: ConvProblem) -> EpilogueSpec:
    """The epilogue of a problem with float8 operands or a float8 result: its scales alone."""
    quantised = problem.out_dtype is FLOAT8
    scaled, filters = problem.dtype is FLOAT8, problem.out_channels
    scaling = Scaling(scaled, False, quantised, quantised, filters)
    found = scaled_epilogue(None, scaling, (), len(problem.in_size))
    shapes = [(filters,) if name == "scale_weight" else () for name in found.order]
    return EpilogueSpec(
        found.key,
        capture_dtypes=(torch.float32,) * len(shapes),
        capture_shapes=tuple(shapes),
        capture_strides=tuple((1,) * len(shape) for shape in shapes),
    )


def as_tf32(t: Tensor) -> Tensor:
    """float32 as tensor cores read it for TF32: without the low 13 mantissa bits (PTX ISA)."""
    return (t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


ATEN = next(a for a in ALGORITHMS if isinstance(a, Aten))
BANDED = next(a for a in ALGORITHMS if isinstance(a, Banded))
BANDED_GROUPS = next(a for a in ALGORITHMS if isinstance(a, BandedGroups))
PACKED = next(a for a in ALGORITHMS if isinstance(a, PackedPhases))
BOXED_OPERAND = next(a for a in ALGORITHMS if isinstance(a, BoxedOperand))

OPERATORS: dict[tuple[Direction, int], ConvOperator] = {}
for _rank in (2, 3):
    for _direction in Direction:
        _operator = ConvOperator(_direction, _rank)
        OPERATORS[_direction, _rank] = _operator
        register(_operator)


@dataclass(frozen=True)
class Runner:
    """A problem with its choice made: what a call executes.

    Attributes:
        problem: the call.
        asked: what was chosen.
        algorithm: the algorithm that was chosen.
        executable: its kernels; None where the algorithm runs without a plan.
        slots: names of the tensors in the order of a call.
    """

    problem: ConvProblem
    asked: Choice
    algorithm: Algorithm
    executable: Executable | None
    slots: tuple[str, ...]

    @property
    def choice(self) -> Choice:
        """What runs: what was chosen, or the default once that was found not to fit."""
        if self.executable is not None and self.executable.fell_back:
            return served_by(self.problem, self.asked)
        return self.asked

    def __call__(self, *tensors: Tensor) -> None:
        """Run on tensors in slot order; outputs are written in place."""
        if self.executable is not None:
            self.executable(*tensors)
        else:
            named = dict(zip(self.slots, tensors, strict=True))
            self.algorithm.launch(self.problem, self.asked.config, named)


_RUNNERS: dict[Any, Runner] = {}


def runner(problem: ConvProblem, device: torch.device) -> Runner:
    """Choose (tuned table or default) and prepare a problem, once where the choice is final."""
    key = (problem, device)
    found = _RUNNERS.get(key)
    if found is None:
        operator = OPERATORS[problem.direction, len(problem.in_size)]
        choice = choose(operator, problem, device_facts(device if device.type == "cuda" else None))
        found = make_runner(problem, choice)
        if choice.final:
            _RUNNERS[key] = found
    return found


def make_runner(problem: ConvProblem, choice: Choice) -> Runner:
    """Prepare a problem with a given choice."""
    operator = OPERATORS[problem.direction, len(problem.in_size)]
    algorithm = operator.algorithm(choice.algorithm)
    plan = algorithm.plan(problem, choice.config)
    slots = tuple(common.slot_dtypes(problem))
    executable = None
    if plan is not None:
        # What was tuned with an epilogue was so with a bias and a ReLU: another may need more.
        measured = choice.tier is Tier.EXACT and problem.epilogue is None
        fits = measured or choice.tier is Tier.DEFAULT
        executable = Executable(plan, slots, None if fits else lambda: _instead(problem, choice))
    return Runner(problem, choice, algorithm, executable, slots)


def _instead(problem: ConvProblem, choice: Choice) -> LaunchPlan:
    """What runs where a config that was tuned elsewhere does not fit: kernels of ours, always."""
    operator = OPERATORS[problem.direction, len(problem.in_size)]
    facts = device_facts()
    for algorithm in (operator.default_algorithm(problem, facts), *operator.candidates(problem)):
        config = operator.space(algorithm, problem, facts)[0]
        plan = algorithm.plan(problem, config)
        if plan is not None:
            note_replaced(problem, choice, Choice(algorithm.name, config, Tier.DEFAULT))
            return plan
    raise bad_value("problem", "one that a kernel serves", str(problem))


def forget() -> None:
    """Drop every prepared call, so that the tables are consulted again."""
    _RUNNERS.clear()


__all__ = ["ATEN", "OPERATORS", "Runner", "forget", "make_runner", "runner"]
