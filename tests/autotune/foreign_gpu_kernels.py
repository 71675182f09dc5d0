"""Kernels of Triton's tutorials, decorated with the tuner, for the tests on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonconv.autotune import autotune

ADD_CONFIGS = [
    triton.Config({"BLOCK": block}, num_warps=warps)
    for block in (256, 1024, 4096)
    for warps in (2, 4, 8)
]


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """out = x + y."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + offsets, mask=mask)
    y = tl.load(y_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, x + y, mask=mask)


add = autotune(ADD_CONFIGS, key=["size"])(add_kernel)

MATMUL_CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=w, num_stages=s)
    for m, n, k, w, s in [
        (64, 64, 32, 4, 3),
        (128, 64, 32, 4, 4),
        (128, 128, 32, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 512, 8, 2),  # more shared memory than there is, but quick to compile
    ]
]


@triton.jit
def matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_cm,
    stride_cn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """c = a b."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + inner
        a = tl.load(
            a_ptr + rows[:, None] * stride_am + k[None, :] * stride_ak,
            mask=(rows[:, None] < M) & (k[None, :] < K),
            other=0.0,
        )
        b = tl.load(
            b_ptr + k[:, None] * stride_bk + columns[None, :] * stride_bn,
            mask=(k[:, None] < K) & (columns[None, :] < N),
            other=0.0,
        )
        accumulator = tl.dot(a, b, accumulator)
    tl.store(
        c_ptr + rows[:, None] * stride_cm + columns[None, :] * stride_cn,
        accumulator,
        mask=(rows[:, None] < M) & (columns[None, :] < N),
    )


matmul = autotune(MATMUL_CONFIGS, key=["M", "N", "K"])(matmul_kernel)


@autotune([triton.Config({}, num_warps=w) for w in (2, 4, 8, 16)], key=["columns"])
@triton.heuristics({"BLOCK": lambda args: triton.next_power_of_2(args["columns"])})
@triton.jit
def softmax(x_ptr, y_ptr, stride, columns, BLOCK: tl.constexpr):
    """Softmax of a row."""
    offsets = tl.arange(0, BLOCK)
    mask = offsets < columns
    row = tl.program_id(0) * stride
    x = tl.load(x_ptr + row + offsets, mask=mask, other=-float("inf"))
    numerator = tl.exp(x - tl.max(x, axis=0))
    tl.store(y_ptr + row + offsets, numerator / tl.sum(numerator, axis=0), mask=mask)


@autotune(
    [
        triton.Config({"BLOCK": 256, "FAR": 0, "FOREVER": 0}),
        triton.Config({"BLOCK": 256, "FAR": 1 << 40, "FOREVER": 0}),
        triton.Config({"BLOCK": 256, "FAR": 0, "FOREVER": 1}),
        triton.Config({"BLOCK": 1024, "FAR": 0, "FOREVER": 0}),
    ],
    key=["size"],
)
@triton.jit
def wild(
    x_ptr, y_ptr, flag_ptr, size, BLOCK: tl.constexpr, FAR: tl.constexpr, FOREVER: tl.constexpr
):
    """y = 2 x; one config writes far out of bounds, another never ends."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + offsets, mask=mask)
    if FOREVER:
        while tl.load(flag_ptr, volatile=True) == 0:
            x += 1
    tl.store(y_ptr + FAR + offsets, 2 * x, mask=mask)
