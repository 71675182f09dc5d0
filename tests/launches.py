"""Launch every kernel a few times, for `compute-sanitizer`: no oracle, and nothing but launches.

The sanitizer slows whatever it watches, and racecheck so much that the suite is out of its reach.
Here each algorithm of each operator runs the smallest problems that it wins in the packaged tables
at the configs that won, and the test suite's problems at its defaults; and the norms.

    python -m tests.launches                       # compiles; the next line then only launches
    compute-sanitizer --tool racecheck python -m tests.launches --share 0/4 --seconds 300

Prints a line per launch, and at the end how many there were and how many are left.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch

import tritonconv as tc
from tritonconv.autotune.bundle import load_bundle_file
from tritonconv.conv.dispatch import OPERATORS
from tritonconv.conv.problem import ConvProblem
from tritonconv.norm.api import batch_norm
from tritonconv.runtime.device import device_facts
from tritonconv.runtime.operators import Config, get_operator
from tritonconv.runtime.tables import packaged_directory

from .conv.cases import PROBLEMS, rank_of

WINNERS = 4
"""Problems of the tables for each algorithm of an operator: those of the least work."""


@dataclass(frozen=True)
class Convolution:
    """One product by one algorithm at one config."""

    problem: ConvProblem
    algorithm: str
    config: Config

    def __str__(self) -> str:
        return f"{self.problem} {self.algorithm} {self.config}"

    def __call__(self, device: torch.device) -> None:
        operator = get_operator(self.problem.operator)
        tensors = operator.make_tensors(self.problem, device, torch.Generator(device))
        operator.algorithm(self.algorithm).launch(self.problem, self.config, tensors)


@dataclass(frozen=True)
class Norm:
    """A normalisation with its gradients, and theirs."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name} {self.shape} {self.dtype}"

    def __call__(self, device: torch.device) -> None:
        x = torch.randn(self.shape, device=device, dtype=self.dtype, requires_grad=True)
        channels = self.shape[1 if self.name == "batch_norm" else -1]
        weight, bias = (torch.randn(channels, device=device, requires_grad=True) for _ in range(2))
        if self.name == "batch_norm":
            y = batch_norm(x, None, None, weight, bias, training=True)
        else:
            y = tc.layer_norm(x, (channels,), weight, bias)
        gradients = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y), create_graph=True)
        torch.autograd.grad(gradients[0].sum() + gradients[1].sum(), (x, weight))


Launch = Callable[[torch.device], None]


def winners() -> dict[tuple[str, str], list[Convolution]]:
    """Of every operator and algorithm, what wins in the packaged tables, the least work first."""
    found: dict[tuple[str, str], dict[str, Convolution]] = defaultdict(dict)
    tables = packaged_directory()
    assert tables is not None
    for bundle in map(load_bundle_file, sorted(tables.glob("*.json"))):
        for entry in bundle.entries:
            best = entry.best
            if best.algorithm == "aten" or not entry.operator.startswith("conv"):
                continue
            operator = get_operator(entry.operator)
            problem = operator.parse(entry.problem)
            config = operator.algorithm(best.algorithm).config_type.from_dict(best.config)
            made = Convolution(problem, best.algorithm, config)
            found[entry.operator, best.algorithm].setdefault(str(made), made)
    return {
        key: sorted(made.values(), key=lambda c: c.problem.flops())[:WINNERS]
        for key, made in sorted(found.items())
    }


def defaults() -> dict[tuple[str, str], list[Convolution]]:
    """Of every operator and algorithm, the default config for the problems of the test suite."""
    found: dict[tuple[str, str], list[Convolution]] = defaultdict(list)
    for (_, rank), operator in sorted(OPERATORS.items(), key=lambda item: str(item[0])):
        for fields in PROBLEMS.values():
            if rank != rank_of(fields):
                continue
            for dtype in ("bfloat16", "float32"):
                problem = operator.parse({**fields, "dtype": dtype, "layout": "channels_last"})
                for algorithm in operator.candidates(problem):
                    if algorithm.name != "aten":
                        config = operator.space(algorithm, problem, device_facts())[0]
                        made = Convolution(problem, algorithm.name, config)
                        found[problem.operator, algorithm.name].append(made)
    return dict(found)


def norms() -> list[Norm]:
    """Rows narrow and wide, few and many."""
    shapes = {
        "batch_norm": [(4, 96, 15, 13), (64, 2048, 7, 7), (8, 16, 64, 64)],
        "layer_norm": [(333, 96), (64, 768), (5, 4099), (20_000, 96)],
    }
    dtypes = (torch.bfloat16, torch.float32)
    return [Norm(n, s, d) for n, some in shapes.items() for s in some for d in dtypes]


def launches() -> list[Launch]:
    """Everything, the least work first: time that runs out takes only the largest."""
    rows = (*winners().values(), *defaults().values())
    products = sorted((c for row in rows for c in row), key=lambda c: c.problem.flops())
    return [*norms(), *products]


def main() -> None:
    """Run a share of all launches until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", default="0/1", help="K/N: every Nth launch, from the Kth")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    options = parser.parse_args()
    first, step = map(int, options.share.split("/"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = launches()[first::step]
    begun = time.monotonic()
    done = 0
    for launch in chosen:
        if time.monotonic() - begun > options.seconds:
            break
        launch(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        done += 1
        print(f"{time.monotonic() - begun:.1f} s {launch}", flush=True)
    print(f"{done} launches, {len(chosen) - done} left")


if __name__ == "__main__":
    main()
