from __future__ import annotations

import doctest

import pytest
import torch

from tritonconv.models.vision import dice
from tritonconv.models.vision.dice import SoftDiceLoss, dice_score, soft_dice_loss


def test_loss_equals_a_value_computed_by_hand():
    # Two pixels of classes 0 and 1, both predicted (.75, .25).
    logits = torch.log(torch.tensor([[[0.75, 0.75], [0.25, 0.25]]], dtype=torch.double))
    target = torch.tensor([[0, 1]])
    class0 = 2 * (0.75 + 0.01) / (1.5 + 1 + 0.01)
    class1 = 2 * (0.25 + 0.01) / (0.5 + 1 + 0.01)
    assert soft_dice_loss(logits, target).item() == pytest.approx(1 - (class0 + class1) / 2)


def test_loss_averages_samples_and_classes_not_pixels():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 5, 6, 7, dtype=torch.double)
    target = torch.randint(4, (3, 5, 6, 7))
    terms = []
    for n in range(3):
        p = logits[n].softmax(0)
        for c in range(4):
            t = (target[n] == c).double()
            terms.append(2 * ((p[c] * t).sum() + 0.01) / (p[c].sum() + t.sum() + 0.01))
    expected = 1 - torch.stack(terms).mean()
    torch.testing.assert_close(soft_dice_loss(logits, target), expected)
    torch.testing.assert_close(SoftDiceLoss()(logits, target), expected)


def test_perfect_overlap_is_slightly_below_zero():
    target = torch.tensor([[[0, 0, 1], [1, 1, 1]]])
    logits = torch.nn.functional.one_hot(target).movedim(-1, 1) * 200.0
    expected = 1 - ((2 * 2.01) / 4.01 + (2 * 4.01) / 8.01) / 2
    assert expected < 0
    assert soft_dice_loss(logits, target).item() == pytest.approx(expected, abs=1e-6)


def test_absent_class_approaches_two_when_not_predicted():
    target = torch.zeros(1, 4, dtype=torch.long)
    logits = torch.tensor([[[200.0] * 4, [-200.0] * 4]])
    assert soft_dice_loss(logits, target).item() == pytest.approx(1 - (8.02 / 8.01 + 2) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_raised(dtype):
    logits = torch.randn(1, 2, 9).to(dtype)
    target = torch.randint(2, (1, 9))
    loss = soft_dice_loss(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, soft_dice_loss(logits.float(), target))


def test_gradcheck():
    logits = torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True)
    target = torch.randint(3, (2, 4))
    assert torch.autograd.gradcheck(lambda x: soft_dice_loss(x, target), logits)
    assert torch.autograd.gradgradcheck(lambda x: soft_dice_loss(x, target), logits)


def test_score_by_hand():
    prediction = torch.tensor([[0, 1, 1], [2, 2, 0]])
    target = torch.tensor([[0, 1, 2], [2, 2, 1]])
    expected = [2 * 1 / (2 + 1), 2 * 1 / (2 + 2), 2 * 2 / (2 + 3), 1.0]
    assert dice_score(prediction, target, 4).tolist() == pytest.approx(expected)
    assert dice_score(prediction, target, 4, absent=0.0)[3] == 0
    assert dice_score(target.to(torch.uint8), target, 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: soft_dice_loss(torch.zeros(1, 2, 3), torch.zeros(1, 4).long()),
            ValueError,
            "target: expected shape",
        ),
        (lambda: soft_dice_loss(torch.zeros(2, 3), torch.zeros(2).long()), ValueError, "target"),
        (lambda: soft_dice_loss(torch.zeros(1, 2, 3), torch.zeros(1, 3)), TypeError, "target"),
        (
            lambda: soft_dice_loss(torch.zeros(1, 2, 3).long(), torch.zeros(1, 3).long()),
            TypeError,
            "logits: expected a floating dtype",
        ),
        (
            lambda: soft_dice_loss(torch.zeros(1, 2, 3), torch.zeros(1, 3).long(), smoothing=0),
            ValueError,
            "smoothing",
        ),
        (lambda: dice_score(torch.zeros(2).long(), torch.zeros(3).long(), 2), ValueError, "shape"),
        (lambda: dice_score(torch.zeros(2), torch.zeros(2).long(), 2), TypeError, "prediction"),
        (
            lambda: dice_score(torch.tensor([2]), torch.tensor([0]), 2),
            ValueError,
            r"prediction: expected labels in \[0, 2\), got labels from 2 to 2",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_examples_run():
    assert doctest.testmod(dice).failed == 0
