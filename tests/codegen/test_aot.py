"""Operators compile for every target without a GPU; on failure the operator is named."""

from __future__ import annotations

import functools
from concurrent.futures import Future
from typing import Any

import pytest

from tests.aot import start
from tritonconv.runtime.aot import TARGETS

# Every program for one target of each vendor took a minute: beside the first case of every
# operator a sample of the others keeps the suite short.
SAMPLE = 12


@functools.cache
def _started() -> dict[str, Future[Any]]:
    return {target: start("tests.codegen.aot_ops", target, str(SAMPLE)) for target in TARGETS}


@pytest.mark.aot
@pytest.mark.parametrize("target", TARGETS)
def test_operators_compile(target):
    result = _started()[target].result()
    assert result["operators"] >= 80
    assert result["count"] >= result["operators"] / 2  # equal programs are compiled once
    assert result["failures"] == {}
