"""Operators compile for every target without a GPU; on failure the operator is named."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tritonconv.runtime.aot import TARGETS

ROOT = Path(__file__).parents[2]
# Every program for one target of each vendor took a minute; a sample keeps the suite short.
SAMPLE = 12


def _compile(target: str) -> dict:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    process = subprocess.run(
        [sys.executable, "-m", "tests.codegen.aot_ops", target, str(SAMPLE)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


@functools.cache
def _started() -> dict[str, Future]:
    pool = ThreadPoolExecutor(2)
    return {target: pool.submit(_compile, target) for target in TARGETS}


@pytest.mark.aot
@pytest.mark.parametrize("target", TARGETS)
def test_operators_compile(target):
    result = _started()[target].result()
    assert result["count"] > 80
    assert result["failures"] == {}
