"""A stand-in for CUDA graphs, a network, and comparisons with eager steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tritonconv.nn import convert, cuda_graph_report, graphed
from tritonconv.nn.graph_capture import CudaGraphs


class Again(CudaGraphs):
    """Does what was recorded again; where it wrote then, it writes now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @staticmethod
    def serves(device: torch.device) -> bool:
        return device.type == "cpu"

    @staticmethod
    def capturing() -> bool:
        return False

    def beside(self) -> Any:
        return nullcontext()

    def settle(self) -> None:
        pass

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        places = [None if t is None else t.clone() for t in work()]

        def replay() -> None:
            # A graph knows of no modes that are on when it is replayed, nor of modules.
            graphed._local.capturing += 1
            with torch.enable_grad(), torch.autocast("cpu", enabled=False):
                results = work()
            graphed._local.capturing -= 1
            with torch.no_grad():
                for place, result in zip(places, results, strict=True):
                    if place is not None:
                        place.copy_(result)

        return replay, places

    def random_state(self) -> Tensor:
        return torch.get_rng_state()

    def restore_random(self, state: Tensor) -> None:
        torch.set_rng_state(state)

    def order(self) -> None:
        pass


class Net(nn.Module):
    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm, self.act = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.second, self.drop = nn.Conv2d(8, 8, 3, stride=2), nn.Dropout(rate)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.first(x)))
        return self.head(self.drop(self.second(y).mean((2, 3))))


def images(place: str, batch: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 9, 9, generator=torch.Generator().manual_seed(seed)).to(place)


def pair(place: str, model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The same model eagerly and with graphs, both on the library's kernels."""
    eager = model.to(place).train()
    ours = copy.deepcopy(eager)
    convert(eager, batch_norm=True)
    assert convert(ours, batch_norm=True, cuda_graph=True).cuda_graph
    return eager, ours


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def same_state(ours: nn.Module, eager: nn.Module) -> None:
    same(dict(ours.state_dict()), dict(eager.state_dict()))
    for mine, theirs in zip(ours.parameters(), eager.parameters(), strict=True):
        same(mine.grad, theirs.grad)


def counts(model: nn.Module) -> tuple[int, int]:
    report = cuda_graph_report(model)
    return report.captured, report.replayed


def eager_reasons(model: nn.Module) -> list[str]:
    return list(cuda_graph_report(model).eager)
