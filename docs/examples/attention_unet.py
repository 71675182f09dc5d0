"""Train a small Attention U-Net on discs and squares drawn on the spot.

`autotune quickstart` trains the same network on slices of a brain.
"""

from __future__ import annotations

import torch

from tritonconv.models.vision.attention_unet import AttentionUNet
from tritonconv.models.vision.dice import SoftDiceLoss, dice_score

SIDE = 48
CLASSES = ("background", "disc", "square")


def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images with one disc and one square each, and their labels."""
    grid = torch.arange(SIDE)
    rows, columns = grid[:, None], grid[None, :]
    labels = torch.zeros(count, SIDE, SIDE, dtype=torch.int64)
    for label in labels:
        centres = torch.randint(10, SIDE - 10, (4,), generator=generator).tolist()
        disc = (rows - centres[0]) ** 2 + (columns - centres[1]) ** 2 < 64
        square = ((rows - centres[2]).abs() < 7) & ((columns - centres[3]).abs() < 7)
        label[disc] = 1
        label[square] = 2
    noise = torch.randn(count, SIDE, SIDE, generator=generator)
    images = torch.tensor([0.0, 1.0, 2.0])[labels] + 0.3 * noise
    return images[:, None], labels


def main() -> None:
    """Train for some steps and report the overlap with the truth."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = AttentionUNet(1, len(CLASSES), widths=(8, 16, 32)).to(device)
    network = network.to(memory_format=torch.channels_last)
    loss_of = SoftDiceLoss()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(30):
        images, labels = (tensor.to(device) for tensor in draw(8, generator))
        loss = loss_of(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2}  loss {loss.item():.3f}")

    network.eval()
    images, labels = (tensor.to(device) for tensor in draw(16, generator))
    with torch.no_grad():
        logits, attention = network(images, return_attention=True)
    scores = dice_score(logits.argmax(1), labels, num_classes=len(CLASSES))
    for name, score in zip(CLASSES, scores.tolist(), strict=True):
        print(f"Dice, {name:10}  {score:.3f}")
    for level, maps in attention.items():
        print(f"attention at level {level}: {tuple(maps.shape)}")
    assert scores.mean() > 0.5


if __name__ == "__main__":
    main()
