"""Programs and problems with epilogues travel to processes that never saw the function."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import torch

from tritonconv.codegen import Argument, Role, ScalarFunction, trace
from tritonconv.codegen.registry import program_of
from tritonconv.conv.dispatch import OPERATORS
from tritonconv.conv.epilogue import build_epilogue
from tritonconv.conv.problem import Direction, EpilogueSpec

from .cases import cases_of, operators

X = Argument("x", torch.float32, Role.VALUE)


def test_every_operator_survives() -> None:
    for op in operators():
        case = next(iter(cases_of(op)))
        program = trace(type(case).__call__.__get__(case), case.arguments()).program
        copy = pickle.loads(pickle.dumps(program))
        assert copy is not program
        assert copy.source == program.source
        assert copy.key == program.key


def test_derivatives_captures_and_wide_addresses_survive() -> None:
    slope = torch.tensor([0.1, 0.2])

    def leaky(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, torch.tanh(x) * slope[c]) + x.detach()

    function = trace(leaky, (X, Argument("c", torch.int32, Role.COORD)))
    copy = ScalarFunction(pickle.loads(pickle.dumps(function.program)), function.captures)
    values = torch.tensor([1.0, -1.0]), torch.tensor([0, 1])
    assert torch.equal(copy(*values), function(*values))  # type: ignore[arg-type]
    for wrt in (("x",), ("x", "load:0")):
        assert copy.vjp(wrt).source == function.vjp(wrt).source
        second = pickle.loads(pickle.dumps(function.vjp(wrt).program))
        assert second.source == function.vjp(wrt).source
    wide = pickle.loads(pickle.dumps(function.with_wide().program))
    assert wide.source == function.with_wide().source


ARRIVAL = """
import json, pickle, sys
problem = pickle.load(sys.stdin.buffer)
from tritonconv.codegen.registry import program_of
print(json.dumps(program_of(problem.epilogue.function).source))
"""


def test_a_problem_brings_its_epilogue_to_another_process() -> None:
    def gate(y: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(y) * other + 0.125

    operator = OPERATORS[Direction.FORWARD, 2]
    plain = operator.parse({"in_channels": 8, "out_channels": 8, "height": 9})
    epilogue = build_epilogue(gate, True, (torch.float32,), torch.float32, 2)
    operands = ((0, 1, 0, 0), plain.y_strides)
    spec = EpilogueSpec(epilogue.key, (torch.float32,) * 2, operands)
    problem = type(plain)(**{**vars(plain), "epilogue": spec})
    data = pickle.dumps(problem)
    assert pickle.loads(data) == problem
    found = subprocess.run(
        [sys.executable, "-c", ARRIVAL],
        input=data,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=True,
    )
    assert json.loads(found.stdout) == program_of(epilogue.key).source


def test_a_spec_of_an_unknown_program_is_still_data() -> None:
    spec = EpilogueSpec("nowhere.v")
    assert pickle.loads(pickle.dumps(spec)) == spec
