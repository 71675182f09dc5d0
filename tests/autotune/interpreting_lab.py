"""A laboratory for a measuring process without a GPU: kernels run in the interpreter there."""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # which measuring processes do without

from autotune_fakes import PlaybackLab, PlaybackTimer

from tritonconv.autotune.measure import runner
from tritonconv.autotune.space import Candidate
from tritonconv.runtime.compat import repair_interpreter

repair_interpreter()


class RunningTimer(PlaybackTimer):
    """Runs every candidate once, as a real one would."""

    def prepare(self, candidate: Candidate) -> Candidate:
        tensors = self.operator.make_tensors(self.problem, "cpu", None)  # type: ignore[attr-defined]
        config = candidate.config.as_dict()
        if config.get("SCALE") == 3:
            os._exit(11)  # what an illegal access may come to
        run = runner(self.operator, self.problem, candidate, tuple(tensors))  # type: ignore[attr-defined]
        run(tuple(tensors.values()))
        return super().prepare(candidate)


class InterpretingLab(PlaybackLab):
    """Later configs are faster."""

    def timer(self, operator: Any, problem: Any, policy: Any, seed: int) -> Any:
        order = [config.as_dict() for config in operator.algorithms[0].listed(problem)]
        self.times = lambda candidate: 100.0 / (1 + order.index(candidate.config.as_dict()))
        timer = super().timer(operator, problem, policy, seed)
        running = RunningTimer(**vars(timer))
        running.operator, running.problem = operator, problem  # type: ignore[attr-defined]
        return running
