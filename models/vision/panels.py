"""Draw what a segmentation network does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tritonconv.runtime.errors import bad_value

from ..data.segmentation import MissingExtraError


def render(
    path: str | Path,
    image: Tensor,
    truth: Tensor,
    prediction: Tensor,
    attention: Tensor,
    *,
    classes: Sequence[str] = (),
    title: str = "",
) -> Path:
    """Write a PNG with four panels: image, truth, prediction, attention.

    Args:
        path: file to write.
        image: ``(C, H, W)``; one channel is shown grey, three as colours.
        truth: ``(H, W)`` integer labels.
        prediction: ``(H, W)`` integer labels.
        attention: ``(H, W)`` in [0, 1].
        classes: names of the classes, for the legend.
        title: text above the panels.

    Returns:
        ``path``.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: the sizes differ.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise MissingExtraError(
            "render needs the matplotlib package: pip install 'tritonconv[demo]'"
        ) from error
    size = tuple(image.shape[1:])
    for name, panel in (("truth", truth), ("prediction", prediction), ("attention", attention)):
        if tuple(panel.shape) != size:
            raise bad_value(name, f"the size of the image {size}", tuple(panel.shape))
    picture = image.detach().float().cpu()
    low, high = torch.quantile(
        picture.flatten()[:: max(picture.numel() // 100_000, 1)], torch.tensor([0.005, 0.995])
    ).tolist()
    picture = ((picture - low) / max(high - low, 1e-6)).clamp(0, 1)
    pixels = picture.movedim(0, -1).numpy() if len(picture) == 3 else picture[0].numpy()
    truth, prediction = truth.cpu(), prediction.cpu()
    count = max(int(truth.max()), int(prediction.max())) + 1
    count = max(count, len(classes))

    figure = Figure(
        figsize=(13.0, 13.0 / 4 * size[0] / size[1] + 0.9), dpi=150, layout="constrained"
    )
    FigureCanvasAgg(figure)
    agreement = (truth == prediction).float().mean().item()
    axes = figure.subplots(1, 4)
    titles = ("image", "truth", f"prediction ({agreement:.1%} of pixels agree)", "attention")
    for axis, name in zip(axes, titles, strict=True):
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(name, fontsize=11)
        axis.set_axis_off()
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(count)]
    overlay = ListedColormap([(0, 0, 0, 0), *[(*c, 0.55) for c in colours[1:]]])
    for axis, labels in ((axes[1], truth), (axes[2], prediction)):
        axis.imshow(
            labels.numpy(), cmap=overlay, vmin=-0.5, vmax=count - 0.5, interpolation="nearest"
        )
    heat = axes[3].imshow(
        attention.detach().float().cpu().numpy(), cmap="inferno", vmin=0, vmax=1, alpha=0.75
    )
    figure.colorbar(heat, ax=axes[3], fraction=0.045, pad=0.02)
    if len(classes) > 1:
        patches = [Patch(color=colours[i], label=classes[i]) for i in range(1, len(classes))]
        figure.legend(
            handles=patches, loc="outside lower center", ncols=len(patches), frameon=False
        )
    if title:
        figure.suptitle(title, fontsize=12)
    path = Path(path)
    figure.savefig(path, format="png")
    return path


# Okabe and Ito's colours, which colour-blind people can tell apart; class 0 is transparent.
_COLOURS = (
    (0.0, 0.0, 0.0),
    (0.90, 0.62, 0.0),
    (0.34, 0.71, 0.91),
    (0.0, 0.62, 0.45),
    (0.94, 0.89, 0.26),
    (0.84, 0.37, 0.0),
    (0.80, 0.47, 0.65),
    (0.0, 0.45, 0.70),
)
