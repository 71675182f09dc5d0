"""Quantise two trained convolutions to float8 and run them as one chain, without a detour.

The first kernel scales its sums, applies the activation and stores float8; the second reads that.
Scales come from a calibration batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import tritonconv as tc

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def main() -> None:
    """Calibrate, quantise, compare."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    first = torch.nn.Conv2d(64, 128, 3, padding=1).to(device)
    second = torch.nn.Conv2d(128, 64, 3, padding=1).to(device)
    calibration, x = (torch.randn(4, 64, 14, 14, device=device) for _ in range(2))

    with torch.no_grad():
        middle = F.silu(first(calibration))
        chain = torch.nn.Sequential(
            tc.nn.ScaledConv2d.from_float(
                first,
                calibration.abs().max() / LARGEST,
                scale_output=middle.abs().max() / LARGEST,
                epilogue=F.silu,
            ),
            tc.nn.ScaledConv2d.from_float(second, middle.abs().max() / LARGEST),
        )
        # channels_last: a float8 matrix instruction wants both operands along the sum.
        x = x.contiguous(memory_format=torch.channels_last)
        wanted = second(F.silu(first(x)))
        found = chain(x)

    error = ((found.float() - wanted).norm() / wanted.norm()).item()
    print(f"result in {found.dtype}, relative difference from float32 {error:.3f}")
    print(chain)
    assert error < 0.06


if __name__ == "__main__":
    main()
