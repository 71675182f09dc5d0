"""The arrows between the packages, read from the source: who imports whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = {
    "tritonconv": "tritonconv",
    "autotune": "tritonconv.autotune",
    "models": "tritonconv.models",
}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module by its installed name."""
    for folder, package in TOPS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *(p for p in parts if p != "__init__"))), path


MODULES = dict(modules())


def package_of(module: str) -> str:
    """The unit of the rules that a module belongs to; a family without a rule is its own."""
    parts = module.split(".")
    if len(parts) == 1 or (len(parts) == 2 and ROOT.joinpath(*parts).with_suffix(".py").exists()):
        return "tritonconv"
    return ".".join(parts[:2])


def typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(module: str, at_import: bool) -> set[str]:
    """Modules of ours that a module imports.

    Args:
        module: its name.
        at_import: only what runs when it is imported; otherwise imports in functions too.
    """
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    stack: list[ast.AST] = [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        if typing_only(node) or (
            at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        ):
            continue
        stack.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join(filter(None, (*parts, base)))
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.add(name if name in MODULES else base)
    return {name for name in found if name in MODULES} - {module}


def allowed(package: str) -> set[str]:
    """The packages of ours that a package may import beside itself."""
    below = {"tritonconv.runtime", "tritonconv.codegen"}
    kernels = {package_of(module) for module in MODULES} - {*TOPS.values()}
    if package in below:
        return {"tritonconv.runtime"}
    if package in TOPS.values():
        return kernels | {"tritonconv"} - {package}
    return kernels if package == "tritonconv.nn" else below  # the rest are families


@pytest.mark.parametrize("module", MODULES)
def test_arrows(module: str) -> None:
    mine = package_of(module)
    others = {package_of(name) for name in imports(module, at_import=False)} - {mine}
    assert others <= allowed(mine), f"{module} imports {sorted(others - allowed(mine))}"


@pytest.mark.parametrize("at_import", [True, False], ids=["at import", "in functions too"])
def test_no_circles(at_import: bool) -> None:
    graph = {module: imports(module, at_import=at_import) for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for name in sorted(graph[module]):
                # A package's __init__ collects its modules; they may name the package's others.
                if not module.startswith(f"{name}."):
                    visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_across_the_roots_imports_are_absolute_and_inside_them_relative() -> None:
    for module, path in MODULES.items():
        root = module.split(".")[1] if module.split(".")[1:2] in (["autotune"], ["models"]) else ""
        depth = len(module.split(".")) - (0 if path.name == "__init__.py" else 1)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                limit = depth - (1 if root else 0)
                assert node.level <= limit, f"{path}:{node.lineno} leaves its root relatively"
                if not node.level and node.module and root:
                    assert not node.module.startswith(f"tritonconv.{root}"), f"{path}:{node.lineno}"


def test_importing_the_library_imports_neither_tuner_nor_models_nor_extras() -> None:
    code = (
        "import sys, tritonconv\n"
        "heavy = ('tritonconv.autotune', 'tritonconv.models', 'matplotlib', 'rich', 'typer',"
        " 'nilearn', 'hypothesis', 'tests')\n"
        "print([m for m in sys.modules if m.startswith(heavy)])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
