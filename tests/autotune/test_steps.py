"""Timing of training steps: the same steps for every contender, and one that fails says why."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from tritonconv.autotune import steps
from tritonconv.autotune.measure import NoDeviceError
from tritonconv.runtime.errors import ArgumentValueError


class Net(nn.Module):
    """Two convolutions; remembers the losses of its steps."""

    losses: ClassVar[list[tuple[bool, float]]] = []

    def __init__(self, in_channels: int = 1, rank: int = 2) -> None:
        super().__init__()
        conv = nn.Conv2d if rank == 2 else nn.Conv3d
        self.first = conv(in_channels, 4, 3, padding=1)
        self.second = conv(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.relu(self.first(x)))
        ours = type(self.first).__module__.startswith("tritonconv")
        Net.losses.append((ours, float(y.detach().float().square().sum())))
        return y


class Normalised(Net):
    """A batch norm and an activation behind its first convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(self.first, nn.BatchNorm2d(4), nn.ReLU())  # type: ignore[assignment]


class Refuses(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(self.first).__module__.startswith("tritonconv"):
            raise ValueError("not with me")
        return super().forward(x)


def test_both_train_the_same_network_on_the_same_images() -> None:
    Net.losses.clear()
    theirs, ours = steps.step_times(
        "test_steps:Net", batch=2, size=(8, 8), dtype="float32", steps=3, device="cpu"
    )
    assert (theirs.contender, ours.contender) == ("PyTorch", "tritonconv")
    assert (theirs.converted, ours.converted) == (0, 2)
    for row in (theirs, ours):
        assert row.timing is not None and row.timing.count == 3 * steps.ROUNDS
        assert 0 < row.timing.p20 <= row.timing.p50 <= row.timing.p80
        assert row.first_s > 0
    curves = [[loss for own, loss in Net.losses if own is kind] for kind in (False, True)]
    assert len(curves[0]) == steps.WARM_UP + steps.ROUNDS * (3 + 1)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4), "the same steps from the same weights"
    assert curves[0][-1] < curves[0][0], "and they train"


def test_a_contender_that_cannot_run_does_not_stop_the_others() -> None:
    theirs, ours = steps.step_times(
        "test_steps:Refuses", batch=1, size=(8, 8), dtype="float32", steps=2, device="cpu"
    )
    assert theirs.timing is not None and not math.isnan(theirs.timing.p50)
    assert ours.timing is None and ours.reason == "ValueError: not with me"


class Interrupted(Net):
    """Ctrl-C in the second round of the second contender."""

    left = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(self.first).__module__.startswith("tritonconv"):
            Interrupted.left -= 1
            if Interrupted.left == 0:
                raise KeyboardInterrupt
        return super().forward(x)


def test_says_what_it_does_and_keeps_what_it_has() -> None:
    Interrupted.left = steps.WARM_UP + 2 * (3 + 1)
    said: list[str] = []
    rows = steps.step_times(
        "test_steps:Interrupted",
        batch=1,
        size=(8, 8),
        dtype="float32",
        steps=3,
        device="cpu",
        progress=said.append,
    )
    assert [row.timing.count for row in rows if row.timing] == [6, 3]
    assert {row.reason for row in rows} == {steps.INTERRUPTED}
    assert said[0] == "PyTorch: first step" and said[-1].startswith("round 2 of 3")
    Interrupted.left = 2
    with pytest.raises(KeyboardInterrupt):
        steps.step_times("test_steps:Interrupted", batch=1, size=(8, 8), steps=3, device="cpu")


def test_batch_norms_are_converted_on_request() -> None:
    options: dict[str, Any] = dict(batch=2, size=(8, 8), dtype="float32", steps=1, device="cpu")
    counts = [
        steps.step_times("test_steps:Normalised", batch_norm=asked, **options)[1].converted
        for asked in (False, True)
    ]
    assert counts == [2, 3]


def test_volumes() -> None:
    (theirs, _) = steps.step_times(
        "test_steps:Net", {"rank": 3}, batch=1, size=(4, 6, 8), steps=2, device="cpu"
    )
    assert theirs.timing is not None


def test_bad_options() -> None:
    with pytest.raises(ArgumentValueError, match="layout"):
        steps.step_times("test_steps:Net", layout="diagonal", device="cpu")
    with pytest.raises(ArgumentValueError, match="dtype"):
        steps.step_times("test_steps:Net", dtype="int8", device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(NoDeviceError):
            steps.step_times("test_steps:Net")


def test_a_real_network_stays_finite() -> None:
    for row in steps.step_times(
        "attention_unet", {"widths": (4, 8)}, batch=2, size=(32, 32), steps=3, device="cpu"
    ):
        assert row.timing is not None and not row.reason


class Diverges(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * float("inf")


class LaterRefuses(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        ours = type(self.first).__module__.startswith("tritonconv")
        if ours and sum(own for own, _ in Net.losses) > steps.WARM_UP + 2:
            raise MemoryError("too much")
        return y


class Linear(nn.Module):
    def __init__(self, in_channels: int = 1) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return y


def test_what_was_no_training_has_no_time() -> None:
    Net.losses.clear()
    for name, reason in (("Diverges", "not finite"), ("LaterRefuses", "MemoryError: too much")):
        _, ours = steps.step_times(
            f"test_steps:{name}", batch=1, size=(8, 8), dtype="float32", steps=2, device="cpu"
        )
        assert ours.timing is None and reason in ours.reason
    theirs, ours = steps.step_times(
        "test_steps:Linear", batch=1, size=(8, 8), steps=2, device="cpu"
    )
    assert theirs.timing is not None and not theirs.reason
    assert "no layer was converted" in ours.reason
