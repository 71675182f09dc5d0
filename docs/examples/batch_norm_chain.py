"""conv – batch norm – ReLU – conv in training, without writing the map between the two.

The first convolution sums up its output's statistics in its kernel; normalisation and ReLU are the
prologue of the second one, which pads what they return. Gradients and running statistics are those
of PyTorch's four layers.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

import tritonconv as tc


def main() -> None:
    """Compare a training step of the chain with PyTorch's layers."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False
    plain = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
    ).to(device)
    nn.init.normal_(plain[1].bias)  # relu(bias) is not what padding should be
    layers = copy.deepcopy(plain)
    first = tc.nn.ConvBatchNorm2d.of(layers[0], layers[1], torch.relu)
    second = tc.nn.ConvBatchNorm2d.of(layers[3], layers[4])
    x = torch.randn(4, 8, 20, 20, device=device)

    theirs = plain(x)
    ours = second(first.pending(x))
    direction = torch.randn_like(ours)
    wanted = torch.autograd.grad(theirs, list(plain.parameters()), direction)
    found = torch.autograd.grad(ours, list(layers.parameters()), direction)
    for (name, _), a, b in zip(plain.named_parameters(), found, wanted, strict=True):
        error = ((a - b).norm() / b.norm()).item()
        assert error < 1e-4, f"gradient of {name}: relative error {error:.1e}"
        print(f"gradient of {name:10} relative difference from PyTorch {error:.1e}")
    for ours_norm, norm in ((first.norm, plain[1]), (second.norm, plain[4])):
        torch.testing.assert_close(ours_norm.running_mean, norm.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours_norm.running_var, norm.running_var, rtol=1e-4, atol=1e-5)

    # A decoder's convolution reads the upsampled map and the skip where they lie.
    up, skip = torch.randn(2, 8, 12, 12, device=device), torch.randn(2, 8, 12, 12, device=device)
    weight = torch.randn(16, 16, 3, 3, device=device)
    y = tc.conv2d((up, skip), weight, padding=1, precision="ieee")
    together = nn.functional.conv2d(torch.cat((up, skip), 1), weight, padding=1)
    print("two inputs: largest difference", (y - together).abs().max().item())


if __name__ == "__main__":
    main()
