"""Set up what tuning works with: processes that compile, and a process that measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from tritonconv.runtime.device import DeviceFacts

from .compiling import COMPILE_SECONDS, CompilePool, default_jobs
from .isolated import RUN_SECONDS, WorkerLab
from .measure import CudaLab, Lab, NoDeviceError
from .session import Compiler


@dataclass(frozen=True)
class Setup:
    """How candidates are compiled and run.

    Attributes:
        jobs: compiling processes; one per CPU but one when None, none when 0: then candidates are
            compiled one by one where they run.
        isolated: candidates run in a process of their own, which may hang or crash.
        compile_timeout: seconds for compiling one candidate.
        run_timeout: seconds for preparing, timing or checking one candidate.
    """

    jobs: int | None = None
    isolated: bool = True
    compile_timeout: float = COMPILE_SECONDS
    run_timeout: float = RUN_SECONDS

    def lab(self, device: torch.device | int | None = None) -> Lab:
        """A laboratory on one GPU; close it when it has a ``close``.

        Raises:
            NoDeviceError: there is no GPU.
        """
        if not self.isolated:
            return CudaLab(device)
        return WorkerLab(device, run_timeout=self.run_timeout, compile_timeout=self.compile_timeout)

    def pool(self, facts: DeviceFacts, shared_by: int = 1) -> CompilePool | None:
        """The compiling processes for a device, one of ``shared_by`` such pools on this host."""
        if self.jobs == 0:
            return None
        jobs = self.jobs
        if jobs is None and shared_by > 1:
            jobs = max(1, default_jobs() // shared_by)
        return CompilePool(facts.arch, jobs=jobs, timeout=self.compile_timeout)


@contextmanager
def laboratory(
    device: torch.device | int | None = None, setup: Setup | None = None, *, shared_by: int = 1
) -> Iterator[tuple[Lab, Compiler | None]]:
    """A laboratory and its compiling processes, ended at the end of the ``with`` block.

    Args:
        device: the GPU; the current one when None.
        setup: how candidates are compiled and run.
        shared_by: so many such laboratories share the host's processors.

    Example:
        Tune in processes of their own::

            with laboratory() as (lab, compiler):
                reports = tune_pairs(pairs, lab=lab, compiler=compiler)

    Raises:
        NoDeviceError: there is no GPU.
    """
    setup = setup or Setup()
    with ExitStack() as stack:
        lab = setup.lab(device)
        stack.callback(close_lab, lab)
        pool = setup.pool(lab.facts, shared_by)
        if pool is not None:
            stack.enter_context(pool)
        yield lab, pool


def require_gpu() -> None:
    """Refuse to measure where there is nothing to measure on.

    Raises:
        NoDeviceError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise NoDeviceError("measuring needs a CUDA GPU, and PyTorch sees none")


def close_lab(lab: Lab) -> None:
    """End the process of a laboratory that has one."""
    close: Callable[[], None] | None = getattr(lab, "close", None)
    if close is not None:
        close()
