"""Training steps inside of the user's loop as CUDA graphs: they are the eager ones.

Every test runs twice: with a stand-in for graphs on the CPU, which does recorded work again and
leaves its results where the recording did, and on a GPU.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tritonconv.nn import graphed, without_cuda_graphs
from tritonconv.nn.graph_capture import GraphedStepError

from .graph_cases import Net, counts, eager_reasons, images, pair, same, same_state


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_steps_of_training_are_the_eager_ones(
    place: str, amp: torch.dtype | None, layout: torch.memory_format
) -> None:
    models = pair(place, Net().to(memory_format=layout))
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in models]
    for step in range(6):
        x = images(place, seed=step).to(memory_format=layout)
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            with torch.autocast(place, amp) if amp else nullcontext():
                y = model(x)
            loss = y.float().square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if amp is None:
            same(losses[1], losses[0])
        else:
            torch.testing.assert_close(losses[1], losses[0], rtol=3e-2, atol=1e-3)
    eager, ours = models
    assert counts(ours) == (1, 6) and not eager_reasons(ours)
    if amp is None:
        same_state(ours, eager)
    assert ours.norm.num_batches_tracked == 6, "warming up counts for nothing"


def test_gradients_of_micro_batches_add_up(place: str) -> None:
    eager, ours = pair(place, Net())
    for model in (eager, ours):
        for step in range(3):
            model(images(place, seed=step)).square().sum().backward()
    same_state(ours, eager)
    held = [p.grad for p in ours.parameters()]
    values = [g.clone() for g in held]
    ours.zero_grad()
    ours(images(place, seed=7)).square().sum().backward()
    assert all(torch.equal(g, v) for g, v in zip(held, values, strict=True)), "nobody writes there"
    assert counts(ours) == (1, 4)


def test_results_stay_the_callers(place: str) -> None:
    _, ours = pair(place, Net())
    kept = []
    for step in range(3):
        y = ours(images(place, seed=step))
        kept.append((y, y.detach().clone()))
        y.sum().backward()
    assert all(torch.equal(y, value) for y, value in kept)
    assert not torch.equal(kept[0][0], kept[1][0])


def test_gradients_of_the_input(place: str) -> None:
    eager, ours = pair(place, Net())
    for seed in (1, 2):
        found = []
        for model in (eager, ours):
            x = images(place, seed=seed).requires_grad_()
            (model(x * 2).square().sum() + x.sum()).backward()
            found.append(x.grad)
        same(found[1], found[0])
    assert counts(ours) == (1, 2)


def test_kinds_of_calls_and_the_limit_of_them(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "LIMIT", 2)
    eager, ours = pair(place, Net())
    for batch in (4, 2, 4, 3, 2, 4):
        for model in (eager, ours):
            model(images(place, batch)).square().sum().backward()
    same_state(ours, eager)
    assert counts(ours) == (2, 6)
    strided = images(place).to(memory_format=torch.channels_last)
    for model in (eager, ours):
        model(strided).sum().backward()
    same_state(ours, eager)
    monkeypatch.setattr(graphed, "MAX_ATTEMPTS", 0)
    with pytest.warns(UserWarning, match="its calls keep changing"):
        ours(images(place, 5))
    ours(strided)
    assert counts(ours) == (2, 8), "what is captured still runs"


def test_frozen_and_moved_parameters_and_modes_of_submodules(place: str) -> None:
    eager, ours = pair(place, Net())

    def step(seed: int) -> None:
        for model in (eager, ours):
            model.zero_grad()
            model(images(place, seed=seed)).square().sum().backward()
        same_state(ours, eager)

    step(0)
    for model in (eager, ours):
        model.first.requires_grad_(False)
    step(1)
    assert ours.first.weight.grad is None
    for model in (eager, ours):
        model.norm.eval()
    step(2)
    assert ours.norm.num_batches_tracked == 2
    for model in (eager, ours):
        model.first.requires_grad_(True)
        model.norm.train()
        for p in model.parameters():
            p.data = p.data * 0.5
    step(3)
    assert counts(ours) == (1, 4), "what was captured for the old storage is gone"
    for model in (eager, ours):
        model.norm.momentum = 0.5
    step(4)
    for model in (eager, ours):
        model.head = nn.Linear(8, 5, device=place)
    ours.head.load_state_dict(eager.head.state_dict())
    step(5)
    assert not eager_reasons(ours)


def test_evaluation_between_steps(place: str) -> None:
    eager, ours = pair(place, Net())
    for step in range(3):
        x = images(place, seed=step)
        results = []
        for model in (eager, ours):
            model.train()(x).square().sum().backward()
            with torch.no_grad():
                results.append([model(x), model.eval()(x)])
        same(results[1], results[0])
    same_state(ours, eager)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.eval()(images(place))
    assert eager_reasons(ours) == ["gradients are not recorded", "the module is in eval mode"]
    assert counts(ours) == (1, 3)


def test_a_second_forward_before_the_first_backward(place: str) -> None:
    eager, ours = pair(place, Net())
    with pytest.warns(UserWarning, match="Net converted .* waits for its backward pass"):
        for model in (eager, ours):
            for _ in range(2):
                one, two = model(images(place, seed=1)), model(images(place, seed=2))
                (one * two).sum().backward()
    same_state(ours, eager)
    assert counts(ours) == (1, 2) and len(eager_reasons(ours)) == 1
    for model in (eager, ours):  # results that nobody holds wait for nothing
        model(images(place, seed=3))
        model(images(place, seed=4)).sum().backward()
    same_state(ours, eager)
    assert counts(ours) == (1, 4)


def test_gradients_of_gradients_are_refused(place: str) -> None:
    eager, ours = pair(place, Net())
    x = images(place).requires_grad_()
    with pytest.raises(GraphedStepError, match="create_graph"):
        torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    found = []
    for model in (eager, ours):
        with without_cuda_graphs():
            y = model(x)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), model.head.weight)[0])
    same(found[1], found[0])


def test_a_second_backward_is_refused(place: str) -> None:
    _, ours = pair(place, Net())
    loss = ours(images(place)).square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(GraphedStepError, match="second backward"):
        loss.backward()


def test_parameters_changed_before_the_backward_are_refused(place: str) -> None:
    _, ours = pair(place, Net())
    loss = ours(images(place)).sum()
    with torch.no_grad():
        ours.first.weight.mul_(2)
    with pytest.raises(GraphedStepError, match="changed in place"):
        loss.backward()


def test_dropout_differs_and_capturing_draws_nothing(place: str) -> None:
    _, ours = pair(place, nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 3, 1)))
    x = torch.ones(2, 3, 16, 16, device=place)

    def draw(count: int) -> list[Tensor]:
        found = []
        for _ in range(count):
            y = ours(x)
            found.append(y.detach())
            y.sum().backward()
        return found

    torch.manual_seed(1)
    one = [*draw(2), torch.rand(4, device=place)]
    assert not torch.equal(one[0], one[1])
    torch.manual_seed(1)
    again = [*draw(2), torch.rand(4, device=place)]  # captured before
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert counts(ours) == (1, 4)


def test_existing_gradients_survive_a_capture(place: str) -> None:
    _, ours = pair(place, Net())
    for p in ours.parameters():
        p.grad = torch.ones_like(p)
    y = ours(images(place))
    assert counts(ours) == (1, 1)
    assert all(bool((p.grad == 1).all()) for p in ours.parameters())
    y.sum().backward()


class Result(NamedTuple):
    score: Tensor
    extra: dict[str, Any]


class Nested(nn.Module):
    """Takes and returns structures; an auxiliary head whose result may be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.aux, self.unused = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Linear(2, 2)

    def forward(self, batch: dict[str, Tensor], scale: float = 1.0) -> Result:
        y = self.conv(batch["image"]) * scale + batch["shift"]
        return Result(y, {"aux": [self.aux(y)], "largest": y.argmax(1), "name": "n", "none": None})


@pytest.mark.parametrize("used", ["both", "score", "aux"])
def test_nested_arguments_and_results(place: str, used: str) -> None:
    eager, ours = pair(place, Nested())
    for seed in (1, 2):
        found = []
        for model in (eager, ours):
            model.zero_grad()
            shift = torch.ones(1, 4, 1, 1, device=place, requires_grad=True)
            y = model({"image": images(place, seed=seed), "shift": shift}, scale=2.0)
            assert y.extra["name"] == "n" and y.extra["none"] is None
            parts = {"score": y.score.square().sum(), "aux": y.extra["aux"][0].sum()}
            sum(v for k, v in parts.items() if used in (k, "both")).backward()
            assert not y.extra["largest"].requires_grad
            found.append([y.score, y.extra["aux"], y.extra["largest"], shift.grad])
        same(found[1], found[0])
        same_state(ours, eager)  # gradients that are None among them
    assert counts(ours) == (1, 2)
