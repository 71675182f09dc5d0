"""Launch plans: the arguments a kernel gets, temporaries, zeroed slots, empty grids."""

from __future__ import annotations

import ast
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

import tritonconv as tc
from tritonconv.conv import dispatch
from tritonconv.runtime import tables
from tritonconv.runtime.device import device_facts
from tritonconv.runtime.launch import Executable, _BoundCall
from tritonconv.runtime.lookup import Found
from tritonconv.runtime.plan import KernelCall, LaunchPlan, Slot, Workspace
from tritonconv.runtime.tables import Tier, TunedTable, default_choice


@triton.jit
def _scale_kernel(x_ptr, extra, y_ptr, count, factor, strides, BLOCK: tl.constexpr):
    """y[i] = x[i] · factor · extra[0][i] + extra[1][0], read and written at strides."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    x = tl.load(x_ptr + i * strides[0], mask=mask)
    y = x * factor * tl.load(extra[0] + i, mask=mask) + tl.load(extra[1])
    tl.store(y_ptr + i * strides[1], y, mask=mask)


def call(source: str, target: str, count: int, grid: int | None = None) -> KernelCall:
    return KernelCall(
        _scale_kernel,
        (triton.cdiv(count, 16) if grid is None else grid, 1, 1),
        (Slot(source), (Slot("a"), Slot("b")), Slot(target), count, 2.0, (1, 1)),
        {"BLOCK": 16},
        num_warps=1,
    )


DTYPES = dict.fromkeys(("x", "a", "b", "y", "t"), torch.float32)


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned")
def test_two_kernels_with_a_temporary_between(device: torch.device) -> None:
    plan = LaunchPlan(
        (call("x", "t", 37), call("t", "y", 37)), DTYPES, (Workspace("t", (37,), torch.float32),)
    )
    run = Executable(plan, ("x", "a", "b", "y"))
    for seed in range(3):  # later calls of an executable take the prepared path on a GPU
        torch.manual_seed(seed)
        x, a, b = (torch.randn(37).to(device) for _ in range(3))
        y = torch.empty(37, device=device)
        run(x, a, b, y)
        once = x * 2 * a + b[0]
        torch.testing.assert_close(y, once * 2 * a + b[0])


@pytest.mark.interpreter
def test_unaligned_tensors_of_a_prepared_call(device: torch.device) -> None:
    run = Executable(LaunchPlan((call("x", "y", 20),), DTYPES), ("x", "a", "b", "y"))
    for shift in (0, 1, 0, 3):
        x, a, b, y = (torch.randn(24, device=device)[shift : shift + 20] for _ in range(4))
        run(x, a, b, y)
        torch.testing.assert_close(y, x * 2 * a + b[0])


@pytest.mark.interpreter
def test_slots_that_kernels_do_not_fill_are_zeroed(device: torch.device) -> None:
    plan = LaunchPlan((call("x", "y", 5),), DTYPES, zeroed=("y",))
    x, a, b = (torch.randn(9, device=device) for _ in range(3))
    y = torch.full((9,), float("nan"), device=device)
    Executable(plan, ("x", "a", "b", "y"))(x, a, b, y)
    torch.testing.assert_close(y[:5], (x * 2 * a + b[0])[:5])
    assert not y[5:].any()


@pytest.mark.interpreter
def test_an_empty_grid_launches_nothing(device: torch.device) -> None:
    plan = LaunchPlan((call("x", "y", 5, grid=0),), DTYPES)
    y = torch.ones(5, device=device)
    Executable(plan, ("x", "a", "b", "y"))(y, y, y, y)
    assert torch.equal(y, torch.ones_like(y))


def test_slots_of_a_call_in_order() -> None:
    assert call("x", "y", 5).slots() == ("x", "a", "b", "y")


class _Failing:
    """A kernel that cannot be compiled or loaded."""

    arg_names = _scale_kernel.arg_names

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, grid: object) -> object:
        def launch(*args: object, **options: object) -> None:
            raise self.error

        return launch


TOO_LARGE = OutOfResources(262144, 232448, "shared memory")
UNFIT = {
    "too large": (TOO_LARGE, "needs more than this device has"),
    "front end": (CompilationError("", ast.parse("x").body[0], "no"), "does not compile here"),
    "ptxas": (PTXASError("bad register"), "does not compile here"),
    "passes": (RuntimeError("PassManager::run failed"), "does not compile here"),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("unfit", UNFIT)
def test_a_config_that_does_not_fit_gives_way_to_another_plan(
    device: torch.device, unfit: str
) -> None:
    error, message = UNFIT[unfit]
    too_large = LaunchPlan(
        (replace(call("x", "t", 20), kernel=_Failing(error)),),
        DTYPES,
        (Workspace("t", (20,), torch.float32),),
    )
    x, a, b = (torch.randn(20, device=device) for _ in range(3))
    with pytest.raises(type(error)):
        Executable(too_large, ("x", "a", "b", "y"))(x, a, b, torch.empty(20, device=device))
    fits = LaunchPlan((call("x", "y", 20),), DTYPES)
    run = Executable(too_large, ("x", "a", "b", "y"), lambda: fits)
    assert not run.fell_back
    with pytest.warns(UserWarning, match=message):
        y = torch.empty(20, device=device)
        run(x, a, b, y)
    torch.testing.assert_close(y, x * 2 * a + b[0])
    run(x, a, b, y.zero_())
    torch.testing.assert_close(y, x * 2 * a + b[0])
    assert run.fell_back


def test_other_errors_of_a_launch_are_not_taken_for_a_config_that_does_not_fit() -> None:
    plan = LaunchPlan((replace(call("x", "y", 20), kernel=_Failing(RuntimeError("lost"))),), DTYPES)
    run = Executable(plan, ("x", "a", "b", "y"), lambda: plan)
    with pytest.raises(RuntimeError, match="lost"):
        run(*torch.zeros(4, 20))


@pytest.fixture
def no_entries(tmp_path: Path) -> Iterator[None]:
    with tc.settings.override(cache_dir=tmp_path, cache_path=(), autotune="lookup"):
        tables.invalidate()
        yield
    tables.invalidate()


def _as_if_tuned(self: TunedTable, operator: Any, problem: Any) -> Found:
    """A lookup that answers with the default as if an entry named it."""
    default = default_choice(operator, problem, device_facts())
    return Found(replace(default, tier=Tier.EXACT, source="user"))


@pytest.mark.interpreter
@pytest.mark.usefixtures("no_entries")
def test_what_was_tuned_with_another_epilogue_may_not_fit_and_explain_says_so(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = torch.randn(1, 4, 6, 6, device=device), torch.randn(4, 4, 3, 3, device=device)
    monkeypatch.setattr(TunedTable, "find", _as_if_tuned)
    expected = tc.conv2d(x, w)
    first = True
    dispatched = _BoundCall.dispatch

    def fail_once(self: _BoundCall, tensors: Any) -> Any:
        nonlocal first
        if first:
            first = False
            raise TOO_LARGE
        return dispatched(self, tensors)

    monkeypatch.setattr(_BoundCall, "dispatch", fail_once)
    with pytest.warns(UserWarning, match="needs more than this device has"):
        found = tc.explain(tc.conv2d, x, w, epilogue=lambda y: torch.relu(y) * 3)
    (explained,) = found.calls
    assert explained.choice.tier is Tier.DEFAULT and explained.is_default
    (run,) = [r for (p, _), r in dispatch._RUNNERS.items() if p == explained.problem]
    assert run.asked.tier is Tier.EXACT and run.choice.tier is Tier.DEFAULT
    result = tc.conv2d(x, w, epilogue=lambda y: torch.relu(y) * 3)
    torch.testing.assert_close(result, torch.relu(expected) * 3)
    first = True
    with pytest.raises(OutOfResources):  # without an epilogue the very problem was measured
        tc.conv2d(x[:, :, :5], w)


@pytest.mark.interpreter
@pytest.mark.usefixtures("no_entries")
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("epilogue", [None, torch.relu], ids=["bare", "epilogue"])
def test_a_choice_made_while_tuning_must_wait_is_not_kept(
    epilogue: Any, recorded: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = torch.randn(1, 4, 6, 6, device=device), torch.randn(4, 4, 3, 3, device=device)
    if recorded:
        x.requires_grad_(), w.requires_grad_()
    asked: list[bool] = []
    capturing = True

    def may_measure() -> bool:
        asked.append(capturing)
        return not capturing

    tuned: list[Any] = []
    tuner = types.SimpleNamespace(tune_on_the_spot=lambda *call: tuned.append(call))
    monkeypatch.setattr(tables, "_may_measure", may_measure)
    monkeypatch.setattr(tables, "from_tuner", lambda module: tuner)
    products = 3 if recorded else 1

    def step() -> None:
        y = tc.conv2d(x, w, epilogue=epilogue)
        if recorded:
            y.sum().backward()

    with tc.settings.override(autotune="tune"):
        step()
        step()
        assert len(asked) >= 2 * products and all(asked) and not tuned
        capturing = False
        step()
        assert len(tuned) == products
        asked.clear()
        step()
        assert not asked and len(tuned) == products
