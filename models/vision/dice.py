"""Soft Dice loss and the Dice score.

The loss is the one that Oktay et al. 2018 (https://arxiv.org/abs/1804.03999) train with; its exact
form, with the place of the smoothing constant, follows the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tritonconv.runtime.errors import bad_type, bad_value


def soft_dice_loss(logits: Tensor, target: Tensor, *, smoothing: float = 0.01) -> Tensor:
    """One minus the soft Dice overlap, averaged over samples and all classes.

    With ``p = softmax(logits)``, ``t`` the one-hot target, and sums over the pixels of one sample
    and class::

        loss = 1 - mean( 2 (sum p t + s) / (sum p + sum t + s) ),    s = smoothing

    The background is a class like the others. The smoothing stands inside the doubled numerator,
    so a perfect overlap of A pixels scores ``(2 A + 2 s) / (2 A + s)``, a little over 1, and the
    loss can fall a little below 0. A class that is absent from the target scores ``2 s / (sum p +
    s)``: it approaches 2 as the prediction of that class vanishes.

    Args:
        logits: ``(N, C, *size)``, floating; half-precision logits are raised to float32.
        target: ``(N, *size)``, integer class indices in ``[0, C)``; a pixel with any other value
            belongs to no class (this is not checked, which would stall the GPU).
        smoothing: the constant ``s``, positive.

    Returns:
        A scalar tensor, float32 (float64 for float64 logits).

    Raises:
        ValueError: the shapes do not fit or ``smoothing`` is not positive.
        TypeError: ``logits`` is not floating or ``target`` not integer.

    Example:
        >>> import torch
        >>> target = torch.tensor([[[0, 1], [1, 1]]])
        >>> perfect = torch.nn.functional.one_hot(target).movedim(-1, 1) * 100.0
        >>> round(soft_dice_loss(perfect, target).item(), 4)
        -0.0033
    """
    _check("logits", logits, target)
    if not logits.is_floating_point():
        raise bad_type("logits", "a floating dtype", logits.dtype)
    if not smoothing > 0:
        raise bad_value("smoothing", "a positive number", smoothing)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    p = logits.softmax(1).flatten(2)
    classes = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1)
    t = (target.flatten(1).unsqueeze(1) == classes).to(p.dtype)
    overlap = (p * t).sum(-1)
    return 1 - (2 * (overlap + smoothing) / (p.sum(-1) + t.sum(-1) + smoothing)).mean()


class SoftDiceLoss(nn.Module):
    """:func:`soft_dice_loss` as a module.

    Example:
        >>> import torch
        >>> SoftDiceLoss()(torch.zeros(1, 2, 4), torch.tensor([[0, 0, 1, 1]])).shape
        torch.Size([])
    """

    def __init__(self, smoothing: float = 0.01) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the loss; see :func:`soft_dice_loss`."""
        return soft_dice_loss(logits, target, smoothing=self.smoothing)


def dice_score(
    prediction: Tensor, target: Tensor, num_classes: int, *, absent: float = 1.0
) -> Tensor:
    """Dice overlap ``2 |A ∩ B| / (|A| + |B|)`` of hard labels, per class.

    All pixels given are counted together: pass one image, or a whole volume.

    Args:
        prediction: integer class indices, any shape.
        target: integer class indices, same shape.
        num_classes: number of classes.
        absent: score of a class that occurs in neither. 1 by default: nothing was to be found and
            nothing was found. The authors' code scores 0.

    Returns:
        ``(num_classes,)``, float64, on the device of ``prediction``.

    Raises:
        ValueError: the shapes differ, or a label is outside ``[0, num_classes)``.
        TypeError: a tensor is not of an integer dtype.

    Example:
        >>> import torch
        >>> dice_score(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), 3).tolist()
        [0.6666666666666666, 0.8, 1.0]
    """
    both, ours, theirs = overlap_counts(prediction, target, num_classes)
    total = ours + theirs
    return torch.where(total > 0, 2.0 * both / total.clamp(min=1), torch.full_like(both, absent))


def overlap_counts(
    prediction: Tensor, target: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Count per class the pixels in both, in ``prediction`` and in ``target`` (float64)."""
    if prediction.shape != target.shape:
        raise bad_value(
            "prediction", f"the shape of target {tuple(target.shape)}", tuple(prediction.shape)
        )
    counts = []
    for name, labels in (("prediction", prediction), ("target", target)):
        if labels.is_floating_point() or labels.is_complex():
            raise bad_type(name, "an integer dtype", labels.dtype)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            got = f"labels from {int(labels.min())} to {int(labels.max())}"
            raise bad_value(name, f"labels in [0, {num_classes})", got)
    a, b = prediction.flatten().long(), target.flatten().long()
    for labels in (a[a == b], a, b):
        counts.append(torch.bincount(labels, minlength=num_classes).double())
    return counts[0], counts[1], counts[2]


def _check(name: str, scores: Tensor, target: Tensor) -> None:
    if scores.dim() < 3 or target.shape != (scores.shape[0], *scores.shape[2:]):
        raise bad_value(
            "target",
            f"shape (N, *size) for {name} of shape (N, C, *size) = {tuple(scores.shape)}",
            tuple(target.shape),
        )
    if target.is_floating_point() or target.is_complex():
        raise bad_type("target", "an integer dtype", target.dtype)
