"""Triton's interpreter with its faults mended, and what an interpreting process cannot do."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tritonconv.runtime.aot import compile_call
from tritonconv.runtime.compat import interpreting
from tritonconv.runtime.errors import TritonConvError
from tritonconv.runtime.plan import KernelCall, Slot


@triton.jit
def _count_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """y[i] = the sum of k below x[0] where x[0] and x[1] are positive, in a block."""
    bound = tl.load(x_ptr)
    total = 0
    for k in range(0, bound // 2 * 2):
        total += k
    both = (bound > 0) & (tl.load(x_ptr + 1) > 0)
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.where(both & (at >= 0), total, -1))


@pytest.mark.interpreter
def test_loops_bounded_by_loaded_scalars(device: torch.device) -> None:
    for bound, other, expected in ((5, 1, 6), (0, 1, -1), (4, 0, -1)):
        x = torch.tensor([bound, other], dtype=torch.int32, device=device)
        y = torch.zeros(4, dtype=torch.int32, device=device)
        _count_kernel[(1,)](x, y, BLOCK=4)
        assert y.tolist() == [expected] * 4


@pytest.mark.interpreter
def test_triton_is_as_before_after_a_launch() -> None:
    if not interpreting():
        pytest.skip("nothing is mended without the interpreter")
    before = tl.tensor.__dict__.get("__index__")
    _count_kernel[(1,)](
        torch.ones(2, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), BLOCK=4
    )
    assert tl.tensor.__dict__.get("__index__") is before


@pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET=0")
def test_an_interpreting_process_says_that_it_cannot_compile() -> None:
    call = KernelCall(_count_kernel, (1, 1, 1), (Slot("x"), Slot("y")), {"BLOCK": 4}, num_warps=1)
    dtypes = {"x": torch.int32, "y": torch.int32}
    with pytest.raises(TritonConvError, match="a process without TRITON_INTERPRET=1"):
        compile_call(call, dtypes, "sm_90")
