"""Captured steps of what the compiler made of a module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tritonconv.nn import convert, cuda_graph_report, revert, without_cuda_graphs
from tritonconv.runtime.errors import ArgumentValueError

from .graph_cases import Net, counts, eager_reasons, images, pair, same, same_state


class Compiler:
    """A backend that counts the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_steps_of_a_compiled_module_are_the_eager_ones(place: str, backend: str) -> None:
    eager, ours = pair(place, Net())
    ours.compile(backend=backend)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (eager, ours)]
    for step in range(4):
        losses = []
        for model, optimizer in zip((eager, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(images(place, seed=step)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        same(losses[1], losses[0])
    assert counts(ours) == (1, 4) and not eager_reasons(ours)
    same_state(ours, eager)


def test_what_is_captured_and_what_runs_eagerly_is_compiled(place: str) -> None:
    eager, ours = pair(place, Net())
    compiler = Compiler()
    ours.compile(backend=compiler)
    assert compiler.graphs == 0
    same(ours(images(place)), eager(images(place)))
    first = compiler.graphs
    assert first > 0
    same(ours(images(place, seed=1)), eager(images(place, seed=1)))
    assert compiler.graphs == first
    ours.eval(), eager.eval()
    same(ours(images(place)), eager(images(place)))
    assert compiler.graphs > first


def test_compiling_again_drops_what_was_captured(place: str) -> None:
    _, ours = pair(place, Net())
    ours(images(place)).sum().backward()
    assert counts(ours) == (1, 1)
    compiler = Compiler()
    ours.compile(backend=compiler)
    assert counts(ours) == (0, 0)
    ours(images(place)).sum().backward()
    assert counts(ours) == (1, 1) and compiler.graphs > 0


def test_without_graphs_the_compiled_module_is_differentiable_twice(place: str) -> None:
    eager, ours = pair(place, nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()))
    ours.compile(backend="eager")
    slopes = []
    for model in (eager, ours):
        x = images(place).requires_grad_()
        with without_cuda_graphs():
            y = model(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        slope.square().sum().backward()
        slopes.append(slope)
    same(*slopes)
    same_state(ours, eager)


def test_modes_with_graphs_of_their_own_are_refused(place: str) -> None:
    _, ours = pair(place, Net())
    with pytest.raises(ArgumentValueError, match="mode: expected one without CUDA graphs"):
        ours.compile(mode="reduce-overhead")
    with pytest.raises(ArgumentValueError, match="options: expected without CUDA graphs"):
        ours.compile(options={"triton.cudagraphs": True})
    with pytest.raises(ArgumentValueError, match="backend: expected one without CUDA graphs"):
        ours.compile(backend="cudagraphs")
    with (
        torch._inductor.config.patch({"triton.cudagraphs": True}),
        pytest.raises(ArgumentValueError, match="options: expected without CUDA graphs"),
    ):
        ours.compile()


@pytest.mark.parametrize("options", [{"cuda_graph": True}, {"layer_norm": True}])
def test_converting_again_keeps_a_module_compiled(place: str, options: dict[str, bool]) -> None:
    eager, ours = pair(place, nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()))
    compiler = Compiler()
    ours.compile(backend=compiler)
    ours(images(place)).sum().backward()
    before = compiler.graphs
    convert(ours, **options)
    torch._dynamo.reset()  # what was compiled before is the same code
    same(ours(images(place, seed=1)), eager(images(place, seed=1)))
    assert compiler.graphs > before and counts(ours)[0] == 1


def test_a_module_that_was_compiled_before_says_so() -> None:
    model = Net()
    model.compile(backend="eager")
    report = convert(model, cuda_graph=True)
    assert "compiled before" in str(report)


def test_copies_and_reverted_modules_are_not_compiled(place: str) -> None:
    _, ours = pair(place, Net())
    compiler = Compiler()
    ours.compile(backend=compiler)
    copied = copy.deepcopy(ours)
    copied(images(place)).sum().backward()
    assert compiler.graphs == 0 and cuda_graph_report(copied).captured == 1
    revert(ours)
    ours(images(place))
    assert compiler.graphs == 0
