"""Run a problem's default kernel through the interpreter, in a process of its own.

The interpreter has to be chosen before Triton is imported, so a child process does the work:
``python -m tritonconv.autotune.interpret`` reads one request from stdin and answers on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tritonconv.runtime.accuracy import Accuracy
from tritonconv.runtime.device import device_facts
from tritonconv.runtime.errors import TritonConvError
from tritonconv.runtime.operators import Operator, Problem, get_operator

from .measure import NumericCheck
from .space import Candidate, Space, space


class InterpreterError(TritonConvError, RuntimeError):
    """The interpreting process failed; the message is its last words."""


@dataclass(frozen=True)
class Interpreted:
    """Which candidate was interpreted and how close it came to float64."""

    candidate: str
    accuracy: Accuracy


def own_kernel(operator: Operator, found: Space, problem: Problem) -> Candidate | None:
    """The first candidate that runs kernels of ours rather than PyTorch's."""
    for candidate in found.candidates:
        algorithm = operator.algorithm(candidate.algorithm)
        if algorithm.plan(problem, candidate.config) is not None:
            return candidate
    return None


def interpret(operator: str, fields: Mapping[str, Any], *, timeout: float = 120.0) -> Interpreted:
    """Check a problem's kernel against float64 without a GPU.

    Args:
        operator: name of a registered operator.
        fields: the problem, as ``Operator.parse`` takes it; small, since the interpreter is slow.
        timeout: seconds.

    Raises:
        InterpreterError: the process failed or took too long.
    """
    request = json.dumps({"operator": operator, "fields": dict(fields)})
    try:
        child = subprocess.run(
            [sys.executable, "-m", __name__],
            input=request,
            env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InterpreterError(f"interpreting {operator} took over {timeout:.0f} s") from None
    if child.returncode != 0:
        words = child.stderr.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
        raise InterpreterError(f"interpreting {operator} failed: {words[0]}")
    answer = json.loads(child.stdout.strip().splitlines()[-1])
    return Interpreted(
        answer["candidate"], Accuracy(answer["error"], answer["budget"], answer["ok"])
    )


def _serve() -> None:
    import tritonconv  # noqa: F401  # registers the operators

    request = json.load(sys.stdin)
    operator = get_operator(request["operator"])
    problem = operator.parse(request["fields"])
    candidate = own_kernel(operator, space(operator, problem, device_facts()), problem)
    if candidate is None:
        raise SystemExit("no kernel of ours serves the problem")
    verdict = NumericCheck(operator, problem, torch.device("cpu"), 0)(candidate)
    answer = {
        "candidate": str(candidate),
        "error": verdict.error,
        "budget": verdict.budget,
        "ok": verdict.ok,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    _serve()
