"""Train with a gradient penalty: the loss contains a gradient, so its gradient is of second order.

The penalty of a Wasserstein critic is (‖∂critic(x)/∂x‖ − 1)². Every operator of the library is
differentiable twice, so that the second pass runs on generated kernels as well.
"""

from __future__ import annotations

import torch
from torch import nn

import tritonconv as tc


def softplus(y: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(y)), written so that it does not overflow."""
    return torch.relu(y) + torch.log1p(torch.exp(-y.abs()))


class Critic(nn.Module):
    """Two strided convolutions with fused activations, and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first = tc.nn.Conv2d(1, 16, 4, stride=2, padding=1, epilogue=softplus)
        self.second = tc.nn.Conv2d(16, 32, 4, stride=2, padding=1, epilogue=softplus)
        self.head = nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One score per image."""
        return self.head(self.second(self.first(x)).mean((2, 3)))


def gradient_penalty(critic: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Mean of (‖∂critic(x)/∂x‖ − 1)², differentiable by the critic's parameters."""
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def main() -> None:
    """Take a few steps on two Gaussian clouds of images."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    critic = Critic().to(device)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    penalties = []
    for step in range(30):
        real = torch.randn(8, 1, 16, 16, device=device) + 1
        fake = torch.randn(8, 1, 16, 16, device=device)
        mix = torch.rand(8, 1, 1, 1, device=device)
        penalty = gradient_penalty(critic, mix * real + (1 - mix) * fake)
        loss = critic(fake).mean() - critic(real).mean() + 10 * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        penalties.append(penalty.item())
        if step % 10 == 0 or step == 29:
            print(f"step {step:2}  loss {loss.item():7.3f}  penalty {penalty.item():.4f}")
    assert sum(penalties[-5:]) < sum(penalties[:5])


if __name__ == "__main__":
    main()
