"""Which files a tuned entry of an algorithm depends on."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from tritonconv.conv import algorithms
from tritonconv.conv.algorithms import ALGORITHMS
from tritonconv.conv.fused_dispatch import FUSED_ALGORITHMS
from tritonconv.runtime import operators
from tritonconv.runtime.operators import Algorithm

FOLDER = Path(algorithms.__file__).parent
NO_KERNELS = "footprints"
"""Modules of this name, and what begins so, estimate: what is launched does not hang on them."""


SHARED = "../../runtime/"
"""Kernels of any family share helpers there; its other modules run nothing on a GPU."""


def siblings(module: str) -> set[str]:
    """Modules of the folder that a module imports, directly, and shared ones with kernels."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {name.partition(".")[0] for name in names}
        elif isinstance(node, ast.ImportFrom) and node.level == 3:
            package, _, name = (node.module or "").partition(".")
            shared = f"{SHARED}{name}"
            if package == "runtime" and has_kernels(FOLDER / f"{shared}.py"):
                found.add(shared)
        elif isinstance(node, ast.ImportFrom):
            inside = "conv.algorithms"
            if (node.module or "").partition(inside)[1]:
                rest = (node.module or "").partition(inside)[2].lstrip(".")
                found |= {rest} if rest else {alias.name for alias in node.names}
    return {name for name in found if not name.startswith(NO_KERNELS)}


def has_kernels(path: Path) -> bool:
    return "@triton.jit" in path.read_text()


def needed(module: str) -> set[str]:
    """The same, with what those import in turn."""
    found: set[str] = set()
    left = siblings(module)
    while left:
        name = left.pop()
        found.add(name)
        left |= siblings(name) - found
    return found - {module}


def own(algorithm: Algorithm) -> str:
    return Path(inspect.getfile(type(algorithm))).stem


EVERY = (*ALGORITHMS, *FUSED_ALGORITHMS)


@pytest.mark.parametrize("algorithm", EVERY, ids=lambda a: a.name)
def test_sources_are_the_modules_with_what_an_algorithm_runs(algorithm: Algorithm) -> None:
    """One that is not listed could change without a word; one too many makes entries stale."""
    # PyTorch's own runs no kernel of ours: what it takes from its neighbours are names.
    wanted = {"../pytorch"} if algorithm.name == "aten" else needed(own(algorithm))
    assert set(algorithm.sources) == wanted
    assert len(set(algorithm.sources)) == len(algorithm.sources)


def test_the_rule_sees_kernels_that_are_imported_from_a_neighbour() -> None:
    assert {"common", "tiles"} <= needed("implicit_gemm")
    assert "footprints" not in needed("dense") and "windows" not in needed("dense")
    with_kernels = {p.stem for p in FOLDER.glob("*.py") if has_kernels(p)}
    with_kernels |= {f"{SHARED}{p.stem}" for p in (FOLDER / SHARED).glob("*.py") if has_kernels(p)}
    listed = {name for a in EVERY for name in (*a.sources, own(a))}
    assert with_kernels <= listed


class _Copied(Algorithm):
    """Stands in for an algorithm of a folder of files."""

    name = "copied"

    def supports(self, problem: object) -> str | None:
        return None

    def plan(self, problem: object, config: object) -> None:
        return None


def test_a_hash_is_of_its_own_file_and_of_those_that_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("own", "common", "tiles", "other"):
        (tmp_path / f"{name}.py").write_text(name)
    monkeypatch.setattr(_Copied, "sources", ("common", "tiles"))
    monkeypatch.setattr(operators.inspect, "getfile", lambda cls: str(tmp_path / "own.py"))

    def hashed() -> str:
        operators._class_hash.cache_clear()
        return _Copied().source_hash()

    before = hashed()
    assert hashed() == before and len(before) == 16
    seen = {before}
    (tmp_path / "other.py").write_text("changed")
    assert hashed() == before
    for name in ("own", "common", "tiles"):
        (tmp_path / f"{name}.py").write_text("changed")
        seen.add(hashed())
    assert len(seen) == 4
    (tmp_path / "tiles.py").unlink()
    with pytest.raises(FileNotFoundError):
        hashed()
    monkeypatch.undo()
    operators._class_hash.cache_clear()


def test_algorithms_of_one_operator_have_hashes_of_their_own() -> None:
    hashes = operators.get_operator("conv2d.forward").source_hashes()
    assert list(hashes) == [a.name for a in ALGORITHMS]
    assert len(set(hashes.values())) == len(ALGORITHMS)
