"""The three layers of the suite: interpreter on the CPU, compilation without a GPU, a real GPU.

Without a CUDA device the kernels run in Triton's interpreter, which has to be switched on before
Triton is imported; tests marked ``interpreter`` are the ones that launch kernels. With a CUDA
device the same tests launch the compiled kernels, and count as ``gpu`` tests (``-m gpu``).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Generated modules and tuned entries of the tests, their subprocesses included.
_CACHE = tempfile.TemporaryDirectory(prefix="tritonconv-tests-")
os.environ["TRITONCONV_CACHE_DIR"] = _CACHE.name
os.environ.pop("TRITONCONV_CACHE_PATH", None)

import triton

from tritonconv.runtime import tables
from tritonconv.runtime.compat import interpreting
from tritonconv.runtime.settings import settings

if interpreting():
    from triton.runtime import interpreter

    # The interpreter spends half of its time on conditions that no integer overflows, which it
    # throws away where `debug` is off. Both changes are for speed only: where a Triton has not what
    # they change, tests take longer.
    _builder = getattr(interpreter, "interpreter_builder", None)
    if hasattr(getattr(_builder, "options", None), "sanitize_overflow"):
        assert not _builder.options.debug
        _builder.options = dataclasses.replace(_builder.options, sanitize_overflow=False)

    @functools.cache
    def _builtins(package: object) -> list[str]:
        """Read before anything is patched, as what is patched no longer looks like a builtin."""
        members = inspect.getmembers(package)
        return [name for name, value in members if triton.language.core.is_builtin(value)]

    def _patch_builtin(package: object, *rest: Any) -> None:
        """What Triton's does, without listing all members of the language at every call."""
        for name in _builtins(package):
            member = getattr(package, name)
            if triton.language.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, *rest)

    if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
        interpreter._patch_builtin = _patch_builtin

LAYERS = {"interpreter": "interpreter", "aot": "ahead of time", "gpu": "gpu"}
_outcomes: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in LAYERS}


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--aot-everything`` compiles all configs and dtypes for all targets: ten minutes."""
    parser.addoption(
        "--aot-everything", action="store_true", help="compile all cases ahead of time"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register markers; share the cores among the workers of pytest-xdist."""
    config.addinivalue_line("markers", "slow: takes much memory or time")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # there is a worker for every core


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernel tests run on the GPU that is there; tests of a GPU that is not there are skipped."""
    for item in items:
        if not interpreting() and item.get_closest_marker("interpreter"):
            item.add_marker(pytest.mark.gpu if CUDA else pytest.mark.skip("TRITON_INTERPRET=0"))
        elif item.get_closest_marker("gpu") and (not CUDA or interpreting()):
            reason = "TRITON_INTERPRET=1" if CUDA else "no CUDA device"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count the outcomes by layer."""
    if report.when != "call" and not (report.when == "setup" and report.skipped):
        return
    layers = [name for name in LAYERS if name in report.keywords]
    if "gpu" in layers and not interpreting():
        layers = ["gpu"]
    for name in layers:
        _outcomes[name][report.outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which layers ran, and with what."""
    terminalreporter.section("kernel layers", sep="-")
    device = torch.cuda.get_device_name() if CUDA else "no CUDA device"
    terminalreporter.line(f"torch {torch.__version__}, triton {triton.__version__}, {device}")
    for name, title in LAYERS.items():
        counts = ", ".join(f"{count} {outcome}" for outcome, count in _outcomes[name].items())
        terminalreporter.line(f"{title:<14} {counts or 'not run'}")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU through the interpreter."""
    return torch.device("cuda" if CUDA and not interpreting() else "cpu")


@pytest.fixture(autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Only kernel tests interpret kernels; all others take the path that CPU tensors take."""
    if not interpreting() or request.node.get_closest_marker("interpreter"):
        yield
        return
    with settings.override(backend="torch"):
        yield


@pytest.fixture(autouse=True)
def _no_packaged_tables(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test runs must not change with the tables that are shipped."""
    if "packaged" not in request.node.path.name:
        monkeypatch.setattr(tables, "packaged_directory", lambda: None)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory (``torch.empty`` and its like) holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return Path(__file__).parents[1]
