"""The kernels of batch normalisation compile for every target without a GPU."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from tritonconv.runtime.aot import SHARED_MEMORY_LIMIT, TARGETS

from ..aot import start

pytestmark = pytest.mark.aot


@pytest.fixture(scope="module")
def compiled() -> dict[str, Future[Any]]:
    return {target: start("tests.norm.aot_plans", target) for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(target: str, compiled: dict[str, Future[Any]]) -> None:
    rows = compiled[target].result()
    assert [row for row in rows if row["error"]] == []
    for row in rows:
        kernels = row["kernels"]
        assert len(kernels) == (3 if row["problem"] == "evaluation" else 4)
        assert all(k["shared_bytes"] <= SHARED_MEMORY_LIMIT[target] for k in kernels), row
        if target == "sm_90":
            assert not any(k["spill_bytes"] for k in kernels), row
