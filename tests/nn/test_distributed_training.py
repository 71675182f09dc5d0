"""Converted models under data parallelism, replicated and sharded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        not distributed.is_gloo_available(), reason="PyTorch was built without gloo"
    ),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What ``distributed_job.py`` finds on each of two ranks."""
    folder, world = tmp_path_factory.mktemp("ranks"), 2
    job = Path(__file__).with_name("distributed_job.py")
    running = []
    for rank in range(world):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MEETING_POINT": str(folder / "ranks"),
            "OMP_NUM_THREADS": "1",
            "TRITON_INTERPRET": "1",
            "TRITONCONV_CACHE_DIR": str(folder / f"rank{rank}"),
        }
        running.append(
            subprocess.Popen(
                [sys.executable, str(job)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    results = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * world, results
    return [json.loads(out.splitlines()[-1]) for out, _ in results]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_train_as_one_process_with_averaged_gradients(
    kind: str, ranks: list[dict[str, Any]]
) -> None:
    """Two steps, so that the second one meets calls prepared by the first."""
    for found in ranks:
        assert found[kind]["worst"] < 1e-5
        assert found[kind]["moved"] > 1e-2
