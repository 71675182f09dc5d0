"""Steps of a training: how long they take, and that Ctrl-C cuts none in two."""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_WARM_UP = 5  # first steps, left out of the time per step: allocation, compilation, tuning


class StepTimer:
    """Times steps: by events on the GPU, which cost no waiting, else by the clock."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.steps: list[Any] = []

    def __enter__(self) -> None:
        self.start = self._now()

    def __exit__(self, *_: object) -> None:
        self.steps.append((self.start, self._now()))

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def median_ms(self) -> float:
        """Median of all steps but the first few; the device must have finished them."""
        steps = self.steps[_WARM_UP:]
        if not steps:
            return math.nan
        if self.cuda:
            return statistics.median(a.elapsed_time(b) for a, b in steps)
        return 1000 * statistics.median(b - a for a, b in steps)


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, so that a step is never cut in two."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(*_: object) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield flag.is_set
    finally:
        signal.signal(signal.SIGINT, before)
