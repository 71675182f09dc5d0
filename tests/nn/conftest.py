"""Where the tests of captured steps run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tritonconv.nn import graphed

from .graph_cases import Again


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the models of a test are; exact float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(3)
    if request.param == "stand-in":
        monkeypatch.setattr(graphed.Captures, "graphs", Again)
        yield "cpu"
    else:
        yield "cuda"
