"""PyTorch's own kernel as a candidate: a tuned call never loses to it.

An epilogue runs as one generated elementwise kernel behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ...codegen.elementwise import apply_into
from ...codegen.ir import Role
from ...codegen.program import ScalarFunction
from ...codegen.registry import program_of
from ...runtime.compat import cudnn_settings
from ...runtime.device import DeviceFacts
from ...runtime.operators import Algorithm, Config
from ...runtime.plan import LaunchPlan
from ...runtime.settings import settings
from .. import pytorch
from ..problem import FLOAT8, ConvProblem, Direction
from .common import slot_names


class Aten(Algorithm):
    """cuDNN (or whatever PyTorch picks) behind the common interface."""

    name: ClassVar[str] = "aten"
    config_type = Config
    sources = ("../pytorch",)

    def supports(self, problem: ConvProblem) -> str | None:
        """Everything except what PyTorch does not have: emulated float32, and float8.

        float8 operands that no kernel serves are widened, so that an answer there is.
        """
        if problem.dtype is FLOAT8:
            return "PyTorch has no float8 convolution"
        if problem.precision == "tf32x3":
            return "PyTorch has no tf32x3"
        return None

    def configs(self, problem: ConvProblem, device: DeviceFacts) -> Sequence[Config]:
        """Nothing to choose."""
        return (Config(),)

    def plan(self, problem: ConvProblem, config: Config) -> LaunchPlan | None:
        """PyTorch launches its own kernels."""
        return None

    def compute(self, problem: ConvProblem, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The product in a tensor of PyTorch's own, without the epilogue."""
        pads = [(low, _high_pad(problem, axis, low)) for axis, low in enumerate(problem.padding)]
        first, second, _ = slot_names(problem.direction)
        geometry = (problem.stride, pads, problem.dilation, problem.groups)
        a, b = tensors[first], tensors[second]
        if problem.dtype is FLOAT8:
            # In half precision the sum would be rounded before it is scaled. TF32 loses nothing.
            a, b = a.float(), b.float()
            allow_tf32: bool | None = True
        else:
            allow_tf32 = problem.precision == "tf32" if problem.dtype is torch.float32 else None
        with cudnn_settings(allow_tf32=allow_tf32, deterministic=not settings.atomics):
            if problem.direction is Direction.FORWARD:
                result = pytorch.forward(a, b, None, *geometry)
                return _laid_out(result, problem.y_strides)
            if problem.direction is Direction.DGRAD:
                result = pytorch.dgrad(a, b, problem.in_size, *geometry)
                return _laid_out(result, problem.x_strides)
            result = pytorch.wgrad(a, b, problem.kernel, *geometry)
            return _laid_out(result, problem.w_strides)

    def launch(
        self, problem: ConvProblem, config: Config, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Compute, and make the output tensor the one that PyTorch allocated: no copy."""
        result = self.compute(problem, tensors)
        spec = problem.epilogue
        output = tensors[slot_names(problem.direction)[2]]
        if spec is None:
            output.set_(result.detach())  # type: ignore[call-overload]  # stubs know no tensor
            return
        if spec.save_acc:
            tensors["acc"].set_(result.detach())  # type: ignore[call-overload]
        elements = [tensors[f"element{i}"] for i in range(len(spec.element_dtypes))]
        captures = [tensors[f"capture{i}"] for i in range(len(spec.capture_dtypes))]
        function = ScalarFunction(program_of(spec.function), ()).with_roles(acc=Role.ELEMENT)
        apply_into(function.program, output, [result, *elements], captures)


def _laid_out(result: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The result with the strides that the problem promises; PyTorch may choose others."""
    pairs = zip(result.shape, result.stride(), strides, strict=True)
    if all(size == 1 or have == want for size, have, want in pairs):
        return result
    return result.new_empty_strided(result.shape, strides).copy_(result)


def _high_pad(problem: ConvProblem, axis: int, low: int) -> int:
    """A high pad that gives the output its size: the low one (symmetric) where that does."""
    hop = problem.stride[axis]
    extent = problem.dilation[axis] * (problem.kernel[axis] - 1) + 1
    least = (problem.out_size[axis] - 1) * hop + extent - problem.in_size[axis] - low
    return min(max(low, least), least + hop - 1)
