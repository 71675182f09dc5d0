"""Operators of fused forward convolutions for dispatch and the tuner: ``conv2d.fused``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..runtime.device import DeviceFacts, device_facts
from ..runtime.errors import bad_value
from ..runtime.launch import Executable
from ..runtime.operators import Algorithm, register
from ..runtime.plan import LaunchPlan
from ..runtime.tables import Choice, Tier, choose, note_replaced
from . import dispatch
from .algorithms.fused_aten import FusedAten
from .algorithms.fused_input import FusedInput, fused_slots
from .algorithms.fused_prepared import PreparedInput, worth_preparing
from .dispatch import ConvOperator, Runner
from .fused_problem import FusedProblem
from .problem import ConvProblem, Direction, EpilogueSpec, strides_for
from .prologue import apply_prologue, prologue_key, prologue_order

Tensor = torch.Tensor

FUSED_ALGORITHMS: tuple[Algorithm, ...] = (FusedInput(), PreparedInput(), FusedAten())


def _scale_shift_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The prologue of problems that are made from fields: a normalisation and a ReLU."""
    return torch.relu(x * scale + shift)


class FusedOperator(ConvOperator):
    """Forward convolution with a prologue, a second input or statistics of its output."""

    def __init__(self, rank: int) -> None:
        super().__init__(Direction.FORWARD, rank)
        self.name = f"conv{rank}d.fused"  # type: ignore[misc]

    @property
    def algorithms(self) -> tuple[Algorithm, ...]:
        """The algorithms of fused products."""
        return FUSED_ALGORITHMS

    def parse(self, fields: Mapping[str, Any]) -> FusedProblem:
        """Build a problem; its prologue is a scale and shift per channel and a ReLU.

        Args:
            fields: of the convolution; and ``prologue`` (``"none"`` or ``"fused"``),
                ``second_channels``, ``second_layout``, ``stats``.
        """
        extra = {k: fields[k] for k in _FIELDS if k in fields}
        plain = super().parse({k: v for k, v in fields.items() if k not in _FIELDS})
        second = int(extra.get("second_channels", 0))
        if not 0 <= second < plain.in_channels:
            raise bad_value("second_channels", f"fewer than {plain.in_channels}", second)
        wide = bool(fields.get("wide", False))
        x_strides = plain.x_strides
        second_strides: tuple[int, ...] = ()
        if second:
            x_shape = (plain.batch, plain.in_channels - second, *plain.in_size)
            x_strides = strides_for(x_shape, str(fields.get("layout", plain.x_layout)), wide)
            layout = str(extra.get("second_layout", fields.get("layout", plain.x_layout)))
            second_strides = strides_for((plain.batch, second, *plain.in_size), layout, wide)
        prologue = None
        if str(extra.get("prologue", "none")) != "none":
            vector = (plain.in_channels,)
            kinds = (torch.float32,) * 2
            asked = (_scale_shift_relu, ((1,), (1,)), vector * 2, kinds, plain.dtype, self.rank)
            assert prologue_order(*asked) == (0, 1)
            prologue = EpilogueSpec(
                prologue_key(*asked),
                capture_dtypes=(torch.float32,) * 2,
                capture_shapes=(vector, vector),
                capture_strides=((1,), (1,)),
            )
        return fused_problem(
            replace(plain, x_strides=x_strides),
            prologue,
            second,
            second_strides,
            _flag(extra.get("stats", False)),
        )

    def elsewhere(self, problem: ConvProblem) -> tuple[ConvProblem, ...]:
        """All tensors in the memory format that the input is not in."""
        other = "contiguous" if problem.x_layout == "channels_last" else "channels_last"
        names = ("layout", "weight_layout", "output_layout", "second_layout")
        return (self.parse({**problem.fields(), **dict.fromkeys(names, other)}),)

    def outputs(self, problem: ConvProblem) -> tuple[str, ...]:
        """The product, the accumulator and the statistics, as far as the problem has them."""
        assert isinstance(problem, FusedProblem)
        statistics = ("mean", "var") if problem.stats else ()
        return (*super().outputs(problem), *statistics)

    def make_tensors(
        self, problem: ConvProblem, device: torch.device, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """As for plain products; what is fused likewise."""
        assert isinstance(problem, FusedProblem)
        made = super().make_tensors(problem, device, generator)
        if problem.second_channels:
            values = torch.randn(problem.second_shape, generator=generator, device=device)
            made["second"] = torch.empty_strided(
                problem.second_shape, problem.second_strides, dtype=problem.dtype, device=device
            ).copy_(values)
        if problem.stats:
            for name in ("mean", "var"):
                made[name] = torch.full((problem.out_channels,), float("nan"), device=device)
        spec = problem.prologue
        if spec is not None:
            for index, (dtype, shape, strides) in enumerate(
                zip(spec.capture_dtypes, spec.capture_shapes, spec.capture_strides, strict=True)
            ):
                read = torch.empty_strided(shape, strides, dtype=dtype, device=device)
                values = torch.randn(shape, generator=generator, device=device)
                made[f"prologue{index}"] = read.copy_(values)
        return {name: made[name] for name in fused_slots(problem)}

    def reference(
        self, problem: ConvProblem, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """PyTorch's operators one after the other, in ``dtype``."""
        assert isinstance(problem, FusedProblem)
        given = dict(tensors)
        x = given["input"].to(dtype)
        spec = problem.prologue
        if spec is not None:
            reads = [given[f"prologue{index}"] for index in range(len(spec.capture_dtypes))]
            x = _in_dtype(spec.function, x, reads, dtype)
        if problem.second_channels:
            x = torch.cat([x, given["second"].to(dtype)], 1)
        given["input"] = x
        outputs = super().reference(plain_problem(problem, x), given, dtype)
        if problem.stats:
            axes = [0, *range(2, outputs["output"].dim())]
            stored = outputs["output"].to(torch.float64)
            var, mean = torch.var_mean(stored, axes, correction=0)
            if dtype is not torch.float64:
                # Rounding of the stored values moves both by chance. What a kernel may err is what
                # that can come to, not what it came to here.
                # The statistics are float32 and asked for as such, the stored values are not.
                kept = problem.result_dtype
                step = torch.finfo(kept).eps / 2 if kept.itemsize == 2 else 0.0
                var, mean = (var * (1 + step)).float(), (mean + step * var.sqrt()).float()
            outputs["mean"], outputs["var"] = mean, var
        return outputs

    def candidates(self, problem: ConvProblem) -> tuple[Algorithm, ...]:
        """Algorithms that serve the problem; maybe none."""
        return tuple(a for a in self.algorithms if a.supports(problem) is None)

    def default_algorithm(self, problem: ConvProblem, device: DeviceFacts) -> Algorithm:
        """The fused kernel; where its prologue is computed often, the one that computes it once."""
        ours = [a for a in self.candidates(problem) if a.name != "aten"]
        if not ours:
            raise bad_value("problem", "one that a fused kernel serves", str(problem))
        assert isinstance(problem, FusedProblem)
        return ours[-1] if worth_preparing(problem) else ours[0]


_FIELDS = ("prologue", "second_channels", "second_layout", "stats")


def _flag(value: Any) -> bool:
    return value if isinstance(value, bool) else str(value).lower() in ("true", "1")


def _in_dtype(key: str, x: Tensor, reads: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """A prologue on a whole tensor; float64 only stays so where the program computes in it."""
    return apply_prologue(key, x, [t.to(dtype) if t.is_floating_point() else t for t in reads])


def fused_problem(
    plain: ConvProblem,
    prologue: EpilogueSpec | None,
    second_channels: int,
    second_strides: tuple[int, ...],
    stats: bool,
) -> FusedProblem:
    """A forward product with what is fused around it."""
    values = {f.name: getattr(plain, f.name) for f in dataclasses.fields(ConvProblem)}
    return FusedProblem(
        **values,
        prologue=prologue,
        second_channels=second_channels,
        second_strides=second_strides,
        stats=stats,
    )


def plain_problem(problem: FusedProblem, x: Tensor) -> ConvProblem:
    """The product and its epilogue alone, of one input."""
    values = {f.name: getattr(problem, f.name) for f in dataclasses.fields(ConvProblem)}
    return ConvProblem(**{**values, "x_strides": tuple(x.stride())})


FUSED_OPERATORS: dict[int, FusedOperator] = {}
for _rank in (2, 3):
    FUSED_OPERATORS[_rank] = FusedOperator(_rank)
    register(FUSED_OPERATORS[_rank])


def fused_runner(problem: FusedProblem, device: torch.device) -> Runner:
    """Choose (tuned table or default) and prepare a problem."""
    operator = FUSED_OPERATORS[len(problem.in_size)]
    choice = choose(operator, problem, device_facts(device if device.type == "cuda" else None))
    return make_fused_runner(problem, choice)


def make_fused_runner(problem: FusedProblem, choice: Choice) -> Runner:
    """Prepare a problem with a given choice."""
    algorithm = FUSED_OPERATORS[len(problem.in_size)].algorithm(choice.algorithm)
    plan = algorithm.plan(problem, choice.config)
    slots = tuple(fused_slots(problem))
    executable = None
    if plan is not None:
        fits = choice.tier is Tier.DEFAULT
        executable = Executable(plan, slots, None if fits else lambda: _instead(problem, choice))
    return Runner(problem, choice, algorithm, executable, slots)


def _instead(problem: FusedProblem, choice: Choice) -> LaunchPlan:
    """What runs where a config that was tuned elsewhere does not fit."""
    facts = device_facts()
    operator = FUSED_OPERATORS[len(problem.in_size)]
    algorithm = operator.default_algorithm(problem, facts)
    config = operator.space(algorithm, problem, facts)[0]
    plan = algorithm.plan(problem, config)
    assert plan is not None
    note_replaced(problem, choice, Choice(algorithm.name, config, Tier.DEFAULT))
    return plan


__all__ = [
    "FUSED_OPERATORS",
    "dispatch",
    "fused_problem",
    "fused_runner",
    "make_fused_runner",
]
