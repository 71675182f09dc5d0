"""Calls whose host time is worth comparing: what a user writes, and PyTorch's words for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..runtime.operators import register_host_calls
from .api import conv2d
from .dispatch import OPERATORS, runner
from .problem import ConvProblem, Direction

Tensor = torch.Tensor


def _relu_of_sum(y: Tensor, skip: Tensor) -> Tensor:
    return torch.relu(y + skip)


def host_calls(problem: ConvProblem, device: torch.device) -> Mapping[str, Callable[[], Any]]:
    """Eager calls of one forward problem, by what one would write.

    Args:
        problem: a 2-D forward convolution; the epilogue, if it has one, is not used.
        device: where the tensors live.
    """
    operator = OPERATORS[Direction.FORWARD, 2]
    generator = torch.Generator(device)
    generator.manual_seed(0)
    tensors = operator.make_tensors(problem, device, generator)
    x, w, y = tensors["input"], tensors["weight"], tensors["output"]
    bias = torch.zeros(problem.out_channels, dtype=problem.dtype, device=device)
    skip = torch.zeros_like(y)
    recorded = w.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    grad = torch.ones_like(y)
    geometry: dict[str, Any] = {
        "stride": problem.stride,
        "padding": problem.padding,
        "dilation": problem.dilation,
        "groups": problem.groups,
    }
    prepared = runner(problem, device)
    slots = tuple(tensors[name] for name in prepared.slots)

    def both_ways(function: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(function(leaf, recorded, **geometry), (leaf, recorded), grad)

        return run

    return {
        "launch of the prepared plan alone": lambda: prepared(*slots),
        "tc.conv2d(x, w)": lambda: conv2d(x, w, **geometry),
        "F.conv2d(x, w)": lambda: F.conv2d(x, w, **geometry),
        "tc.conv2d(x, w, b)": lambda: conv2d(x, w, bias, **geometry),
        "F.conv2d(x, w, b)": lambda: F.conv2d(x, w, bias, **geometry),
        "tc.conv2d(x, w, b, epilogue=relu of the sum with s)": lambda: conv2d(
            x,
            w,
            bias,
            **geometry,
            epilogue=_relu_of_sum,
            epilogue_args=(skip,),
        ),
        "torch.relu(F.conv2d(x, w, b) + s)": lambda: torch.relu(
            F.conv2d(x, w, bias, **geometry) + skip
        ),
        "tc.conv2d(x, w), recording": lambda: conv2d(x, recorded, **geometry),
        "F.conv2d(x, w), recording": lambda: F.conv2d(x, recorded, **geometry),
        "tc.conv2d forward and both gradients": both_ways(conv2d),
        "F.conv2d forward and both gradients": both_ways(F.conv2d),
    }


register_host_calls("conv2d.forward", host_calls)
