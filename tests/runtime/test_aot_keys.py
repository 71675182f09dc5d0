"""What is compiled ahead of time is what a launch looks up."""

from __future__ import annotations

import pytest

from ..aot import start

pytestmark = pytest.mark.aot


def test_launches_find_what_was_compiled_ahead_of_time() -> None:
    report = start("tests.runtime.jit_keys").result()
    assert report["plans"] > 60
    assert report["differing"] == []
