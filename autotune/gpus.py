"""Tune on all GPUs of one host: a thread and a laboratory each, problems from one queue."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from tritonconv.runtime.errors import bad_value
from tritonconv.runtime.operators import Operator, Problem

from .compiling import CompilePool
from .laboratory import Setup, close_lab
from .measure import Lab
from .report import Options, Progress, Report, Result, TuningInterrupted, TuningStoppedError
from .search import Outcome
from .session import Compiler, Session
from .space import Candidate
from .store import Store
from .tune import LookAhead, run_session, unique_pairs

Pair = tuple[Operator, Problem]


def gpus_of_this_host() -> tuple[int, ...]:
    """Indices of the GPUs of the same name as the first."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return tuple(index for index, name in enumerate(names) if name == names[0])


def parse_gpus(text: str) -> tuple[int, ...]:
    """GPU indices from ``all`` or ``0,2``; all means those of the first one's name.

    Raises:
        ArgumentValueError: another form, or no such GPU.
    """
    count = torch.cuda.device_count()
    if text == "all":
        return gpus_of_this_host()
    parts: Sequence[str] = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) < count for part in parts):
        raise bad_value("gpus", f"all, or indices below {count} such as 0,1", repr(text))
    return tuple(dict.fromkeys(int(part) for part in parts))


def tune_on_gpus(
    pairs: Iterable[Pair],
    devices: Sequence[int],
    make_lab: Callable[[int], Lab] | None = None,
    *,
    budget_s: float | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
    store: Store | None = None,
    setup: Setup | None = None,
) -> list[Report]:
    """Tune on several GPUs of this host at once: one thread each, problems from one queue.

    Args:
        pairs: operators and problems; repeats are tuned once.
        devices: indices of GPUs of the same name.
        make_lab: makes the laboratory of a GPU; what ``setup`` makes when None.
        budget_s: seconds for all of it.
        options: as for :func:`~tritonconv.autotune.tune.tune`.
        progress: told of every step, by one thread at a time.
        store: where entries go.
        setup: the measuring processes, and the compiling processes that all GPUs share.

    Returns:
        One report per problem, in their order. What a GPU that failed left behind was done by
        the others.

    Raises:
        ArgumentValueError: there are no devices, or their names differ.
        TuningInterrupted: Ctrl-C; carries the reports of the problems that are done.
        TuningStoppedError: every GPU failed; likewise.
    """
    if not devices:
        raise bad_value("devices", "at least one GPU", list(devices))
    setup = setup or Setup()
    crew = Crew(
        unique_pairs(pairs),
        budget_s,
        options or Options(),
        progress or Progress(),
        store or Store(),
    )
    pool: CompilePool | None = None
    labs: dict[int, Lab] = {}
    names: dict[int, str] = {}
    try:
        for device in devices:
            try:
                labs[device] = (make_lab or setup.lab)(device)
                names[device] = labs[device].facts.name
            except Exception as error:  # this GPU is out; the others tune
                crew.failures[device] = error
        if len(set(names.values())) > 1:
            raise bad_value("devices", "GPUs of one name", names)
        if make_lab is None and labs:
            pool = crew.compiler = setup.pool(next(iter(labs.values())).facts)
        return crew.work({device: labs[device] for device in names})
    finally:
        if pool is not None:
            pool.close()
        for lab in labs.values():
            close_lab(lab)


class _Stopped(KeyboardInterrupt):
    """Ends a thread's tuning between two candidates."""


class Crew:
    """The threads of :func:`tune_on_gpus` and what they share."""

    def __init__(
        self,
        plan: Sequence[Pair],
        budget_s: float | None,
        options: Options,
        progress: Progress,
        store: Store,
    ) -> None:
        self.plan = plan
        self.options = options
        self.progress = progress
        self.store = store
        self.compiler: Compiler | None = None
        self.sessions: list[Session] = []
        self.deadline = None if budget_s is None else time.monotonic() + budget_s
        self.lock = threading.RLock()
        self.stop = threading.Event()
        self.todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.reports: dict[int, Report] = {}
        self.failures: dict[int, Exception] = {}
        self.blamed: dict[int, Exception] = {}
        self.working = 0
        for index in range(len(plan)):
            self.todo.put(index)

    def work(self, labs: Mapping[int, Lab]) -> list[Report]:
        """Run the threads until nothing is left to do, or nobody to do it."""
        self.progress.begin(len(self.plan))
        if labs:
            lab = next(iter(labs.values()))  # to begin with; a session runs on the lab it gets
            self.sessions = [self._session(index, lab) for index in range(len(self.plan))]
            self.ahead = LookAhead(self.sessions)
        while True:
            sound = {device: lab for device, lab in labs.items() if device not in self.failures}
            if not sound or self.todo.empty():
                break
            # Again when a GPU failed after the others had found nothing left and gone.
            self._round(sound)
        if len(self.reports) < len(self.plan):
            first = next(iter(self.failures.values()))
            raise TuningStoppedError(self._ordered(), first) from first
        return self._ordered()

    def _round(self, labs: Mapping[int, Lab]) -> None:
        self.working = len(labs)
        threads = [
            threading.Thread(target=self._thread, args=item, name=f"tune-gpu{item[0]}")
            for item in labs.items()
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.1)  # returns to Python, which may have a Ctrl-C to raise
        except KeyboardInterrupt:
            self.stop.set()
            for lab in labs.values():
                # A candidate that hangs would keep its thread, and this one waiting.
                interrupt: Callable[[], None] | None = getattr(lab, "interrupt", None)
                if interrupt is not None:
                    interrupt()
                else:
                    close_lab(lab)
            if isinstance(self.compiler, CompilePool):
                self.compiler.close()
            for thread in threads:
                thread.join()
            raise TuningInterrupted(self._ordered()) from None

    def _ordered(self) -> list[Report]:
        return [self.reports[index] for index in sorted(self.reports)]

    def _thread(self, device: int, lab: Lab) -> None:
        while not self.stop.is_set():
            try:
                index = self.todo.get_nowait()
            except queue.Empty:
                return
            try:
                with self.lock:
                    self.ahead.feed(index)
                    session = self.sessions[index]
                    session.lab = lab
                report = run_session(session, index, self._share())
                if self.stop.is_set() and report.result is Result.FAILED:
                    return  # of the processes that were ended, not of the problem
            except KeyboardInterrupt:
                return
            except Exception as error:
                self._give_up(device, index, error)
                return
            with self.lock:
                self.reports[index] = report

    def _share(self) -> float | None:
        """Seconds for the next problem: what is left for all, on all GPUs that still work."""
        if self.deadline is None:
            return None
        left = max(self.deadline - time.monotonic(), 0.0)
        return left * self.working / max(self.todo.qsize() + self.working, 1)

    def _give_up(self, device: int, index: int, error: Exception) -> None:
        """One GPU is out; its problem goes to another, unless it has cost a GPU before."""
        with self.lock:
            if self.stop.is_set():
                return
            self.working -= 1
            self.failures[device] = error
            if index in self.blamed:
                self.reports[index] = self.sessions[index].failed(error)
            else:
                self.blamed[index] = error
                self.sessions[index] = self._session(index, self.sessions[index].lab)
                self.todo.put(index)

    def _session(self, index: int, lab: Lab) -> Session:
        operator, problem = self.plan[index]
        progress = _OneOf(self, index)
        return Session(operator, problem, lab, self.store, self.options, progress, self.compiler)


class _OneOf(Progress):
    """Passes on the progress of one problem, under the lock and with its own index."""

    def __init__(self, crew: Crew, index: int) -> None:
        self.crew = crew
        self.index = index

    def problem(self, index: int, problem: Problem, planned: int) -> None:
        with self.crew.lock:
            self.crew.progress.problem(self.index, problem, planned)

    def candidate(self, candidate: Candidate, outcome: Outcome) -> None:
        if self.crew.stop.is_set():
            raise _Stopped
        with self.crew.lock:
            self.crew.progress.candidate(candidate, outcome)

    def finalists(self, count: int) -> None:
        with self.crew.lock:
            self.crew.progress.finalists(count)

    def end(self, report: Report) -> None:
        with self.crew.lock:
            self.crew.progress.end(report)
