"""A Triton kernel of your own under the tuner: `autotune` in place of `triton.autotune`.

On a GPU the first call measures the configs in a process of its own and stores what it finds; run
it again, and nothing is measured. Without a GPU the kernel runs in Triton's interpreter, with its
first config.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import time

import triton
import triton.language as tl

from tritonconv.autotune import autotune


@triton.jit
def _gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@autotune(
    configs=[
        triton.Config({"BLOCK": 1024}, num_warps=4),
        triton.Config({"BLOCK": 256}, num_warps=2),
        triton.Config({"BLOCK": 2048}, num_warps=8),
        triton.Config({"BLOCK": 4096}, num_warps=16),
    ],
    key=["size"],
)
@triton.jit
def bias_gelu(x_ptr, bias_ptr, y_ptr, size, channels, BLOCK: tl.constexpr):
    """y = gelu(x + bias), the bias along the last dimension."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + offsets, mask=mask)
    bias = tl.load(bias_ptr + offsets % channels, mask=mask)
    tl.store(y_ptr + offsets, _gelu(x + bias), mask=mask)


def fused(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Launch the kernel as any kernel of Triton is launched."""
    y = torch.empty_like(x)
    bias_gelu[lambda meta: (triton.cdiv(meta["size"], meta["BLOCK"]),)](
        x, bias, y, x.numel(), bias.numel()
    )
    return y


def main() -> None:
    """Call it twice and compare with PyTorch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = 8192 if device == "cuda" else 16
    x, bias = torch.randn(rows, 768, device=device), torch.randn(768, device=device)
    for call in ("first", "second"):
        begin = time.perf_counter()
        y = fused(x, bias)
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"{call} call: {(time.perf_counter() - begin) * 1e3:.2f} ms")
    torch.testing.assert_close(y, torch.nn.functional.gelu(x + bias), rtol=1e-4, atol=1e-4)
    print(f"config: {bias_gelu.best_config}")
    for config, (median, *_) in bias_gelu.configs_timings.items():
        print(f"  {config.kwargs}: {median * 1e3:.1f} us")


if __name__ == "__main__":
    main()
