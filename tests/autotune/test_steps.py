"""Timing of training steps: the same steps for every contender, and one that fails says why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from tritonconv.autotune import steps
from tritonconv.autotune.measure import NoDeviceError
from tritonconv.runtime.errors import ArgumentValueError

TURN = 1 + steps.HOST_STEPS + 3
"""Steps of a contender in a round of three timed ones."""


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


class LayerNormalised(Net):
    """A layer norm behind its first convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(self.first, nn.LayerNorm(8))  # type: ignore[assignment]


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
        # A CPU's step is over when it is issued.
        assert row.host_ms is not None and row.host_ms > 0.2 * row.timing.p20
    curves = [[loss for own, loss in Net.losses if own is kind] for kind in (False, True)]
    assert len(curves[0]) == steps.WARM_UP + steps.ROUNDS * TURN
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
    Interrupted.left = steps.WARM_UP + 2 * TURN
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


def test_layer_norms_are_converted_on_request() -> None:
    options: dict[str, Any] = dict(batch=2, size=(8, 8), dtype="float32", steps=1, device="cpu")
    counts = [
        steps.step_times("test_steps:LayerNormalised", layer_norm=asked, **options)[1].converted
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


class Observed(Net):
    """Remembers the thread of each backward pass."""

    threads: ClassVar[list[bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Observed.threads.append(torch.autograd.is_multithreading_enabled())  # type: ignore[attr-defined]
        return super().forward(x)


def test_backward_passes_on_one_thread_on_request() -> None:
    for asked in (False, True):
        Observed.threads.clear()
        steps.step_times(
            "test_steps:Observed", batch=1, size=(8, 8), steps=1, device="cpu", one_thread=asked
        )
        assert set(Observed.threads) == {not asked}
    assert torch.autograd.is_multithreading_enabled()  # type: ignore[attr-defined]


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ArgumentValueError, match="graph: expected False where the device is no"):
        steps.step_times("test_steps:Net", graph=True, device="cpu")
    with pytest.raises(ArgumentValueError, match="convert_graph: expected False where"):
        steps.step_times("test_steps:Net", convert_graph=True, device="cpu")


def test_graphs_inside_of_the_model_and_why_there_are_none() -> None:
    model, images = Normalised(), torch.randn(2, 1, 8, 8)
    rows = []
    for who in (steps.EAGER, steps.OURS):
        contender = steps._Contender(
            who, model, images, "float32", "contiguous", batch_norm=True, convert_graph=True
        )
        contender.warm_up()
        contender.run(2)
        rows.append(contender.result())
    assert [row.contender for row in rows] == ["PyTorch", "tritonconv, cuda_graph=True"]
    assert all(row.timing is not None for row in rows)
    assert [row.reason for row in rows] == ["", "no graphs: its tensors are on cpu"]


def test_a_contender_replays_what_it_captured_after_its_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replayed = []

    def stand_in(train: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        assert all(parameter.grad is None for parameter in contender.parameters)

        def replay() -> torch.Tensor:
            replayed.append(1)
            return torch.zeros(())

        return replay

    monkeypatch.setattr(steps, "capture", stand_in)
    model, images = Net(), torch.randn(1, 1, 8, 8)
    contender = steps._Contender("PyTorch", model, images, "float32", "contiguous", graph=True)
    Net.losses.clear()
    contender.warm_up()
    assert (contender.name, contender.reason) == ("PyTorch, graph", "")
    assert len(Net.losses) == steps.WARM_UP and not replayed
    contender.run(3)
    assert len(Net.losses) == steps.WARM_UP and len(replayed) == TURN


gpu = pytest.mark.gpu


class Waits(Net):
    """What no graph can hold, on PyTorch's kernels only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.relu(self.first(x)))
        if not type(self.first).__module__.startswith("tritonconv"):
            float(y.detach().sum())
        return y


class Quiet(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(torch.relu(self.first(x)))
        return y


class QuietNormalised(Quiet):
    """A batch norm, whose running statistics a graph moves too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(self.first, nn.BatchNorm2d(4))  # type: ignore[assignment]


@gpu
@pytest.mark.parametrize("who", [steps.EAGER, steps.OURS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_replayed_steps_train_as_eager_ones(who: str, dtype: str, batch_norm: bool) -> None:
    torch.manual_seed(0)
    model, images = QuietNormalised(), torch.randn(2, 1, 16, 16, device="cuda")
    states = []
    for graph in (False, True):
        contender = steps._Contender(
            who, model, images, dtype, "channels_last", graph=graph, batch_norm=batch_norm
        )
        for group in contender.optimizer.param_groups:
            group["lr"] = 0.1
        contender.warm_up()
        assert not contender.reason and (contender.replay is not None) == graph
        for _ in range(7):
            contender.step()
        torch.cuda.synchronize()
        states.append([tensor.float().cpu() for tensor in contender.tensors])
    tolerance = 1e-4 if dtype == "float32" else 1e-2
    for eager, replayed in zip(*states, strict=True):
        torch.testing.assert_close(replayed, eager, rtol=tolerance, atol=tolerance)
    begun = [parameter.detach() for parameter in model.parameters()]
    moved = [float((a - b).abs().max()) for a, b in zip(begun, states[1], strict=False)]
    assert max(moved) > 3 * tolerance, "they trained"


@gpu
def test_graphs_of_every_contender_and_why_one_has_none() -> None:
    options: dict[str, Any] = dict(batch=1, size=(16, 16), steps=4, graph=True)
    rows = steps.step_times("test_steps:Quiet", **options)
    assert [row.contender for row in rows] == ["PyTorch, graph", "tritonconv, graph"]
    for row in rows:
        assert row.timing is not None and not row.reason and row.host_ms is not None
        assert row.host_ms < 1.0, "a replay is one call"
    theirs, ours = steps.step_times("test_steps:Waits", **options)
    assert theirs.timing is None and "cannot be captured" in theirs.reason
    assert ours.timing is not None and not ours.reason
    (eager, _) = steps.step_times("test_steps:Quiet", batch=1, size=(16, 16), steps=4)
    assert eager.timing is not None, "nothing of a capture that failed is left behind"


@gpu
def test_graphs_inside_of_the_model_beside_eager_steps() -> None:
    options: dict[str, Any] = dict(batch=2, size=(16, 16), steps=4, batch_norm=True)
    theirs, ours = steps.step_times("test_steps:QuietNormalised", convert_graph=True, **options)
    assert (theirs.contender, ours.contender) == ("PyTorch", "tritonconv, cuda_graph=True")
    for row in (theirs, ours):
        assert row.timing is not None and not row.reason
    *_, compiled = steps.step_times(
        "test_steps:QuietNormalised", convert_graph=True, compiled=True, **options
    )
    assert compiled.contender == "tritonconv, compiled, cuda_graph=True"
    assert compiled.timing is not None and not compiled.reason
    with pytest.raises(ArgumentValueError, match="convert_graph: expected False with graph"):
        steps.step_times("test_steps:Quiet", convert_graph=True, graph=True)
