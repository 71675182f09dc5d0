"""Predict the next value of a noisy wave with causal convolutions, and coarsen and refine it.

Rows of (batch, length, channels) are convolved where they lie: transposed views, no copies.
"""

from __future__ import annotations

import torch
from torch import nn

import tritonconv as tc


def gelu_residual(y: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """An activation and a residual in the convolution's kernel."""
    return torch.nn.functional.gelu(y) + skip


class Causal(nn.Module):
    """Dilated causal layers: every output sees the past 31 values and nothing later."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.first = tc.nn.Conv1d(1, channels, 1)
        self.layers = nn.ModuleList(
            tc.nn.Conv1d(
                channels, channels, 3, padding="causal", dilation=hop, epilogue=gelu_residual
            )
            for hop in (1, 2, 4, 8)
        )
        self.last = tc.nn.Conv1d(channels, 1, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(batch, length, 1) to (batch, length, 1)."""
        y = self.first(rows.transpose(1, 2))
        for layer in self.layers:
            y = layer(y, y)
        return self.last(y).transpose(1, 2)


def main() -> None:
    """Train, check causality, and go down and up again in length."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Causal().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        phase = 6 * torch.rand(16, 1, 1, device=device)
        time = torch.arange(65, device=device).reshape(1, -1, 1)
        wave = torch.sin(0.3 * time + phase) + 0.05 * torch.randn(16, 65, 1, device=device)
        loss = (model(wave[:, :-1]) - wave[:, 1:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == 59:
            print(f"step {step:2}  loss {loss.item():.4f}")
    assert losses[-1] < 0.2 * losses[0]

    with torch.no_grad():
        changed = wave.clone()
        changed[:, 40:] = 0
        before, after = model(wave), model(changed)
        print("first changed output:", int((before != after).any(0).flatten().nonzero()[0]))

        rows = wave[:, :64].transpose(1, 2)
        average = torch.full((1, 1, 4), 0.25, device=device)
        coarse = tc.conv1d(rows, average, stride=4)
        fine = tc.conv_transpose1d(coarse, 4 * average, stride=4)
        print("coarse and fine:", tuple(coarse.shape), tuple(fine.shape))


if __name__ == "__main__":
    main()
