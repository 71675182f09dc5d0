"""What is installed: the three folders as one package, with its data files."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def folder_of(package: str) -> Path:
    """Where a package lies in the repository."""
    longest = max((p for p in SETUP["package-dir"] if f"{package}.".startswith(f"{p}.")), key=len)
    rest = package.removeprefix(longest).strip(".").split(".")
    return ROOT.joinpath(SETUP["package-dir"][longest], *filter(None, rest))


def test_every_package_is_listed() -> None:
    listed = {folder_of(package) for package in SETUP["packages"]}
    tops = [ROOT / folder for folder in SETUP["package-dir"].values()]
    assert listed == {path.parent for top in tops for path in top.rglob("__init__.py")}


def test_every_data_file_is_listed() -> None:
    found = {
        path
        for package, patterns in SETUP["package-data"].items()
        for pattern in patterns
        for path in folder_of(package).glob(pattern)
    }
    tops = [ROOT / folder for folder in SETUP["package-dir"].values()]
    files = {path for top in tops for path in top.rglob("*") if path.is_file()}
    assert found == {f for f in files if f.suffix != ".py" and "__pycache__" not in f.parts}
