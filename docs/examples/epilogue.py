"""Write one output element as a Python function; get it fused, with its derivatives.

The convolution's kernel calls the generated function on its accumulator, so bias, activation,
residual and per-channel scale cost no pass over memory of their own.
"""

from __future__ import annotations

import torch

import tritonconv as tc


def scaled_residual(y: torch.Tensor, skip: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """relu(scale · y + skip), of one element."""
    return torch.relu(scale * y + skip)


def main() -> None:
    """Run the fused convolution, and check its gradients against PyTorch's own operators."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(2, 16, 24, 24, device=device, requires_grad=True)
    weight = torch.randn(32, 16, 3, 3, device=device, requires_grad=True)
    bias = torch.randn(32, device=device, requires_grad=True)
    skip = torch.randn(2, 32, 24, 24, device=device)
    scale = torch.rand(32, 1, 1, device=device, requires_grad=True)  # broadcast over n, h, w
    inputs = (x, weight, bias, scale)

    ours = tc.conv2d(
        x,
        weight,
        bias,
        padding=1,
        epilogue=scaled_residual,
        epilogue_args=(skip, scale),
        precision="ieee",
    )
    unfused = torch.nn.functional.conv2d(x, weight, bias, padding=1)
    theirs = scaled_residual(unfused, skip, scale)

    mine = torch.autograd.grad(ours.square().sum(), inputs)
    other = torch.autograd.grad(theirs.square().sum(), inputs)
    for name, a, b in zip(("x", "weight", "bias", "scale"), mine, other, strict=True):
        error = ((a - b).norm() / b.norm()).item()
        assert error < 1e-5, f"gradient of {name}: relative error {error:.1e}"
        print(f"gradient of {name:6}  relative difference from PyTorch {error:.1e}")

    print("\nwhat the kernel calls, and its derivative:\n")
    tc.codegen.show(scaled_residual, order=1)


if __name__ == "__main__":
    main()
