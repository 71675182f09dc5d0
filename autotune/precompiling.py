"""Compile what a program is going to run, in parallel and before it runs.

A program whose first step compiles one kernel after the other waits for minutes. Here the kernels
that its calls will look up are compiled by the tuner's processes; they land in Triton's disk cache,
where the first step, in this process or another, finds them. Nothing is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import nn

from tritonconv.runtime.device import DeviceFacts, device_facts, nominal_device
from tritonconv.runtime.errors import TritonConvError, bad_type, bad_value
from tritonconv.runtime.operators import Operator, Problem
from tritonconv.runtime.tables import Choice, Tier, default_choice, tuned_table

from .compiling import COMPILE_SECONDS, CompilePool, CompileResult, without_plan
from .harvest import harvest
from .measure import NoDeviceError
from .search import Failure
from .space import Candidate


class State(StrEnum):
    """What became of the kernels of one problem."""

    COMPILED = "compiled"
    PRESENT = "already there"
    PYTORCH = "PyTorch's"
    FAILED = "failed"


@dataclass(frozen=True)
class Precompiled:
    """One problem of a program.

    Attributes:
        operator: its name.
        problem: the call.
        choice: what the call runs, and which table says so.
        state: whether its kernels were compiled now or before, or are PyTorch's.
        seconds: of a processor.
        reason: why it failed.
    """

    operator: str
    problem: Problem
    choice: Choice
    state: State
    seconds: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        took = f" in {self.seconds:.1f} s" if self.state is State.COMPILED else ""
        because = f": {self.reason}" if self.reason else ""
        return f"{self.problem}: {self.choice.algorithm}, {self.state}{took}{because}"


@dataclass(frozen=True)
class Precompilation:
    """What was done ahead of a program.

    Attributes:
        device: whose kernels these are.
        asked: distinct problems.
        rows: those that were reached, in their order.
        seconds: from the beginning to the end.
    """

    device: DeviceFacts
    asked: int
    rows: tuple[Precompiled, ...]
    seconds: float

    @property
    def compiled(self) -> tuple[Precompiled, ...]:
        """Kernels that were not there before."""
        return self._of(State.COMPILED)

    @property
    def present(self) -> tuple[Precompiled, ...]:
        """Kernels that were in Triton's disk cache already."""
        return self._of(State.PRESENT)

    @property
    def pytorch(self) -> tuple[Precompiled, ...]:
        """Problems for which PyTorch's kernels were chosen: there is nothing to compile."""
        return self._of(State.PYTORCH)

    @property
    def failed(self) -> tuple[Precompiled, ...]:
        """Problems whose kernels do not compile, each with its reason."""
        return self._of(State.FAILED)

    def _of(self, state: State) -> tuple[Precompiled, ...]:
        return tuple(row for row in self.rows if row.state is state)

    def __str__(self) -> str:
        missing = self.asked - len(self.rows)
        parts = [
            f"{len(self.compiled)} compiled",
            f"{len(self.present)} already there",
            f"{len(self.pytorch)} on PyTorch's kernels",
        ]
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += [f"{missing} not reached"] if missing else []
        return f"{self.asked} problems: {', '.join(parts)}; {self.seconds:.1f} s"


class PrecompileInterrupted(KeyboardInterrupt):
    """Ctrl-C; what is compiled stays, and ``report`` tells of it."""

    def __init__(self, report: Precompilation) -> None:
        super().__init__("compiling was interrupted")
        self.report = report


def precompile(
    model: nn.Module,
    inputs: torch.Tensor,
    *,
    amp: torch.dtype | None = None,
    backward: bool = True,
    jobs: int | None = None,
    target: str | None = None,
    progress: Callable[[Precompiled], None] | None = None,
) -> Precompilation:
    """Compile, in parallel, the kernels that a training step of a model will run.

    The model runs once on PyTorch's kernels, which shows its problems; what each runs is looked up
    in the tuned tables, as the step will do; nothing is tuned. Parameters, buffers and gradients
    are as before. Kernels of norms and those that are generated for gradients of epilogues are
    not covered: the first step compiles them.

    Args:
        model: any module of one tensor, in the mode (training or evaluation) it will run in, with
            convolutions of this library (:func:`tritonconv.nn.convert` puts them in).
        inputs: a batch as the program's, on the model's device.
        amp: dtype of an autocast region around the forward pass; None for none.
        backward: also what the backward pass runs.
        jobs: compiling processes; one per CPU but one when None.
        target: ``sm_90`` and the like, for a GPU that is not the one of ``inputs``: that of the
            board which :func:`~tritonconv.runtime.device.nominal_device` names.
        progress: told of every problem when its kernels are there.

    Raises:
        NoDeviceError: ``inputs`` is on no GPU, and ``target`` is not given.
        PrecompileInterrupted: Ctrl-C.

    Example:
        Before the first step of a training run::

            tritonconv.nn.convert(model)
            print(precompile(model, images, amp=torch.bfloat16))
    """
    if not isinstance(model, nn.Module):
        raise bad_type("model", "an nn.Module", type(model).__name__)
    if not isinstance(inputs, torch.Tensor):
        raise bad_type("inputs", "a tensor", type(inputs).__name__)
    _check_jobs(jobs)
    facts = facts_of(inputs.device, target)
    pairs = harvest(model, inputs, amp=amp, backward=backward, by_kernel=True)
    return precompile_pairs(pairs, facts, jobs=jobs, progress=progress)


def precompile_pairs(
    pairs: Iterable[tuple[Operator, Problem]],
    device: DeviceFacts | None = None,
    *,
    jobs: int | None = None,
    timeout: float = COMPILE_SECONDS,
    progress: Callable[[Precompiled], None] | None = None,
) -> Precompilation:
    """Compile what calls will run, for problems from anywhere: a suite, shapes, a recording.

    Args:
        pairs: operators and problems; repeats are compiled once.
        device: whose tuned table is asked, and whose architecture is compiled for; the current GPU
            when None.
        jobs: compiling processes; one per CPU but one when None.
        timeout: seconds that one problem's kernels may take.
        progress: told of every problem when its kernels are there.

    Raises:
        NoDeviceError: there is no GPU, and ``device`` is not given.
        PrecompileInterrupted: Ctrl-C.
        RuntimeError: no compiling process can be started.
    """
    _check_jobs(jobs)
    facts = facts_of(torch.device("cuda"), None) if device is None else device
    wanted = list(dict.fromkeys(pairs))
    begin = time.monotonic()
    rows: list[Precompiled] = []
    interrupted = False
    try:
        with ExitStack() as stack:
            for row in _prepared(wanted, facts, jobs, timeout, stack):
                rows.append(row)
                if progress is not None:
                    progress(row)
    except KeyboardInterrupt:
        interrupted = True
    report = Precompilation(facts, len(wanted), tuple(rows), time.monotonic() - begin)
    if interrupted:
        raise PrecompileInterrupted(report)
    return report


def facts_of(device: torch.device, target: str | None) -> DeviceFacts:
    """Whose kernels are compiled: the target's, or those of the GPU that a device is.

    Raises:
        ArgumentValueError: an unknown target.
        NoDeviceError: the device is no GPU, or there is none.
    """
    if target is not None:
        return nominal_device(target)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise NoDeviceError(
            "kernels are compiled for a CUDA GPU, and there is none here; "
            "a target (--arch) such as sm_90 says for which other GPU to compile"
        )
    return device_facts(device)


def _check_jobs(jobs: int | None) -> None:
    if jobs is not None and (type(jobs) is not int or jobs < 1):
        raise bad_value("jobs", "a number of processes, at least 1, or None", repr(jobs))


@dataclass(frozen=True)
class _Call:
    """A problem and what it runs."""

    operator: Operator
    problem: Problem
    choice: Choice

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.choice.algorithm, self.choice.config)

    def row(self, state: State, seconds: float = 0.0, reason: str = "") -> Precompiled:
        return Precompiled(self.operator.name, self.problem, self.choice, state, seconds, reason)


def _prepared(
    pairs: Iterable[tuple[Operator, Problem]],
    facts: DeviceFacts,
    jobs: int | None,
    timeout: float,
    stack: ExitStack,
) -> Iterator[Precompiled]:
    """Ask for everything at once, and take it in order."""
    table = tuned_table(facts)
    calls = [_Call(op, problem, table.lookup(op, problem)) for op, problem in pairs]
    pool: CompilePool | None = None
    waiting: list[tuple[_Call, Precompiled | None]] = []
    for call in calls:
        known: Precompiled | None = None
        if without_plan(call.operator, call.problem, call.candidate):
            known = call.row(State.PYTORCH)
        else:
            if pool is None:  # its processes take seconds to start
                pool = stack.enter_context(CompilePool(facts.arch, jobs=jobs, timeout=timeout))
            try:
                pool.submit(call.operator, call.problem, [call.candidate])
            except TritonConvError as error:  # it cannot travel to another process
                known = call.row(State.FAILED, reason=str(error))
        waiting.append((call, known))
    for call, known in waiting:
        if known is not None:
            yield known
            continue
        assert pool is not None
        outcome = _outcome(pool, call)
        if isinstance(outcome, CompileResult):
            state = State.COMPILED if outcome.built else State.PRESENT
            yield call.row(state, outcome.seconds)
            continue
        reason = f"{outcome.status}: {outcome.reason}"
        if call.choice.tier is not Tier.DEFAULT:  # where a tuned config does not fit, this runs
            default = default_choice(call.operator, call.problem, facts)
            found = _outcome(pool, _Call(call.operator, call.problem, default))
            if isinstance(found, CompileResult):
                reason += "; the default is compiled too"
        yield call.row(State.FAILED, reason=reason)


def _outcome(pool: CompilePool, call: _Call) -> CompileResult | Failure:
    ((_, outcome),) = pool.results(call.operator, call.problem, [call.candidate])
    return outcome


__all__ = [
    "Precompilation",
    "PrecompileInterrupted",
    "Precompiled",
    "State",
    "facts_of",
    "precompile",
    "precompile_pairs",
]
