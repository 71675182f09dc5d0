"""What runs under the sanitizer: every algorithm, and launches that do run."""

from __future__ import annotations

import pytest
import torch

from tritonconv.conv.dispatch import OPERATORS
from tritonconv.conv.fused_dispatch import FUSED_OPERATORS

from .launches import Convolution, launches


def test_every_algorithm_is_among_the_launches() -> None:
    found = [one for one in launches() if isinstance(one, Convolution)]
    met = {one.algorithm for one in found}
    every = {
        algorithm.name
        for operator in (*OPERATORS.values(), *FUSED_OPERATORS.values())
        for algorithm in operator.algorithms
    }
    assert every - met == {"aten"}
    work = [one.problem.flops() for one in found]
    assert work == sorted(work)


@pytest.mark.interpreter
def test_launches_run(device: torch.device) -> None:
    norms = [one for one in launches() if not isinstance(one, Convolution)]
    products = [one for one in launches() if isinstance(one, Convolution)]
    for one in (norms[-6], *products[:3]):
        one(device)
