"""Launch plans: the arguments a kernel gets, temporaries, zeroed slots, empty grids."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from tritonconv.runtime.launch import Executable
from tritonconv.runtime.plan import KernelCall, LaunchPlan, Slot, Workspace


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


class _TooLarge:
    """A kernel for which the device has too little shared memory."""

    arg_names = _scale_kernel.arg_names

    def __getitem__(self, grid: object) -> object:
        def launch(*args: object, **options: object) -> None:
            raise OutOfResources(262144, 232448, "shared memory")

        return launch


@pytest.mark.interpreter
def test_a_config_that_does_not_fit_gives_way_to_another_plan(device: torch.device) -> None:
    too_large = LaunchPlan(
        (replace(call("x", "t", 20), kernel=_TooLarge()),),
        DTYPES,
        (Workspace("t", (20,), torch.float32),),
    )
    x, a, b = (torch.randn(20, device=device) for _ in range(3))
    with pytest.raises(OutOfResources):
        Executable(too_large, ("x", "a", "b", "y"))(x, a, b, torch.empty(20, device=device))
    fits = LaunchPlan((call("x", "y", 20),), DTYPES)
    run = Executable(too_large, ("x", "a", "b", "y"), lambda: fits)
    with pytest.warns(UserWarning, match="needs more than this device has"):
        y = torch.empty(20, device=device)
        run(x, a, b, y)
    torch.testing.assert_close(y, x * 2 * a + b[0])
    run(x, a, b, y.zero_())
    torch.testing.assert_close(y, x * 2 * a + b[0])
