"""PyTorch's operators one after the other: a tuned fused call never loses to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ...codegen.elementwise import apply_into
from ...codegen.ir import Role
from ...codegen.program import ScalarFunction
from ...codegen.registry import program_of
from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm, Config
from ...runtime.plan import LaunchPlan
from ..fused_problem import FusedProblem
from ..problem import ConvProblem
from .aten import Aten

_ATEN = Aten()


class FusedAten(Algorithm):
    """Concatenation, convolution and statistics by PyTorch.

    Prologue and epilogue are one generated elementwise kernel each, as PyTorch's compiler would
    make them.
    """

    name: ClassVar[str] = "aten"
    config_type = Config
    sources = ("../pytorch",)

    def supports(self, problem: FusedProblem) -> str | None:
        """What PyTorch's convolution serves."""
        return _ATEN.supports(problem)

    def configs(self, problem: FusedProblem, device: DeviceFacts) -> Sequence[Config]:
        """Nothing to choose."""
        return (Config(),)

    def plan(self, problem: FusedProblem, config: Config) -> LaunchPlan | None:
        """PyTorch launches its own kernels."""
        return None

    def launch(
        self, problem: FusedProblem, config: Config, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Compute, and make the output tensor the one that PyTorch allocated."""
        given = dict(tensors)
        x = given["input"]
        spec = problem.prologue
        if spec is not None:
            function = ScalarFunction(program_of(spec.function), ()).with_roles(x=Role.ELEMENT)
            reads = [given[f"prologue{index}"] for index in range(len(spec.capture_dtypes))]
            made = torch.empty_like(x)
            apply_into(function.program, made, [x], reads)
            x = made
        if problem.second_channels:
            x = torch.cat([x, given["second"]], 1)
        values = {f.name: getattr(problem, f.name) for f in dataclasses.fields(ConvProblem)}
        plain = ConvProblem(**{**values, "x_strides": tuple(x.stride())})
        _ATEN.launch(plain, config, {**given, "input": x})
        if problem.stats:
            var, mean = _statistics(given["output"])
            given["mean"].copy_(mean)
            given["var"].copy_(var)


def _statistics(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Biased variance and mean of every channel, the way batch normalisation takes them."""
    if y.is_cuda:
        return variance_of(*torch.batch_norm_stats(y, 0.0)[::-1])
    return torch.var_mean(y.float(), [0, *range(2, y.dim())], correction=0)


def variance_of(inverse: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance and mean of channels of which PyTorch gives 1 / deviation: 0 for constant ones."""
    return inverse.pow(-2).masked_fill_(inverse == 0, 0.0), mean
