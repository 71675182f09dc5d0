"""What is known of an operator from its registration on."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tritonconv.runtime import operators

_MODULE = """
from typing import Any
from tritonconv.runtime.operators import Algorithm, Operator

class Mine(Algorithm):
    name = "mine"
    def supports(self, problem: Any) -> None: ...
    def plan(self, problem: Any, config: Any) -> None: ...

class Single(Operator):
    name = "test.single"
    algorithms = (Mine(),)
    parse = make_tensors = outputs = reference = default_algorithm = None

Single.__abstractmethods__ = frozenset()
"""


@pytest.fixture
def imported(tmp_path: Path) -> Iterator[Any]:
    path = tmp_path / "single_operator.py"
    path.write_text(_MODULE)
    spec = importlib.util.spec_from_file_location("single_operator", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["single_operator"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["single_operator"]
    operators._OPERATORS.pop("test.single", None)


def test_a_source_is_that_of_the_registration_whatever_becomes_of_the_file(imported: Any) -> None:
    before = operators._class_hash.__wrapped__(imported.Mine)
    operator = operators.register(imported.Single())
    Path(imported.__file__).write_text(_MODULE + "# edited\n")
    assert operators._class_hash.__wrapped__(imported.Mine) != before
    assert operator.source_hashes() == {"mine": before}


def test_an_operator_without_files_is_registered_all_the_same(imported: Any) -> None:
    Path(imported.__file__).unlink()
    operator = operators.register(imported.Single())
    assert operators.get_operator("test.single") is operator
    with pytest.raises(OSError, match="single_operator"):
        operator.source_hashes()
