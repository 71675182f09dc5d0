"""A rank of a training job; started by ``test_distributed_training.py``, prints what it found."""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tritonconv as tc

STEPS = 2


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )


def train(model: nn.Module, inputs: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in inputs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def alone(model: nn.Module, inputs: list[list[Tensor]]) -> None:
    """What ranks do together, in one process: statistics of each part, averaged gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parts in zip(*inputs, strict=True):
        optimizer.zero_grad()
        for x in parts:
            (model(x).square().mean() / len(parts)).backward()
        optimizer.step()


def shards() -> list[list[Tensor]]:
    """Inputs of every rank and step."""
    torch.manual_seed(5)
    world = dist.get_world_size()
    return [[torch.randn(2, 3, 7, 5) for _ in range(STEPS)] for _ in range(world)]


def worst(model: nn.Module, expected: nn.Module) -> float:
    """Largest difference of a parameter."""
    found = 0.0
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        full: Any = ours.full_tensor() if hasattr(ours, "full_tensor") else ours  # of a DTensor
        assert full.shape == theirs.shape, name
        found = max(found, (full - theirs).abs().max().item())
    return found


def trained(kind: str) -> dict[str, float]:
    plain = network()
    expected = copy.deepcopy(plain)
    tc.nn.convert(plain, batch_norm=True)
    inputs = shards()
    alone(expected, inputs)
    model: nn.Module = plain
    if kind == "ddp":
        model = DistributedDataParallel(plain)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(plain[0], mesh=mesh)
        fully_shard(plain, mesh=mesh)
    train(model, inputs[dist.get_rank()])
    return {"worst": worst(plain, expected), "moved": worst(plain, network())}


def main() -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['MEETING_POINT']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    print(json.dumps({kind: trained(kind) for kind in ("ddp", "fsdp2")}), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # gloo's threads abort now and then when a process ends in the usual way
