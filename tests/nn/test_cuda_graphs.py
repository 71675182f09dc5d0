"""Training steps inside of the user's loop as CUDA graphs: they are the eager ones.

Every test runs twice: with a stand-in for graphs on the CPU, which does recorded work again and
leaves its results where the recording did, and on a GPU.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tritonconv as tc
from tritonconv.models.vision.attention_unet import AttentionUNet
from tritonconv.nn import convert, cuda_graph_report, graphed, revert, without_cuda_graphs
from tritonconv.nn.graph_capture import CudaGraphs, GraphedStepError
from tritonconv.runtime.errors import ArgumentTypeError, ArgumentValueError


class Again(CudaGraphs):
    """Does what was recorded again; where it wrote then, it writes now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @staticmethod
    def serves(device: torch.device) -> bool:
        return device.type == "cpu"

    @staticmethod
    def capturing() -> bool:
        return False

    def beside(self) -> Any:
        return nullcontext()

    def settle(self) -> None:
        pass

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        places = [None if t is None else t.clone() for t in work()]

        def replay() -> None:
            # A graph knows of no modes that are on when it is replayed, nor of modules.
            graphed._local.capturing += 1
            with torch.enable_grad(), torch.autocast("cpu", enabled=False):
                results = work()
            graphed._local.capturing -= 1
            with torch.no_grad():
                for place, result in zip(places, results, strict=True):
                    if place is not None:
                        place.copy_(result)

        return replay, places

    def random_state(self) -> Tensor:
        return torch.get_rng_state()

    def restore_random(self, state: Tensor) -> None:
        torch.set_rng_state(state)

    def order(self) -> None:
        pass


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the models of a test are; exact float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(3)
    if request.param == "stand-in":
        monkeypatch.setattr(graphed.Captures, "graphs", Again)
        yield "cpu"
    else:
        yield "cuda"


class Net(nn.Module):
    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm, self.act = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.second, self.drop = nn.Conv2d(8, 8, 3, stride=2), nn.Dropout(rate)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.first(x)))
        return self.head(self.drop(self.second(y).mean((2, 3))))


def images(place: str, batch: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 9, 9, generator=torch.Generator().manual_seed(seed)).to(place)


def pair(place: str, model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The same model eagerly and with graphs, both on the library's kernels."""
    eager = model.to(place).train()
    ours = copy.deepcopy(eager)
    convert(eager, batch_norm=True)
    assert convert(ours, batch_norm=True, cuda_graph=True).cuda_graph
    return eager, ours


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def same_state(ours: nn.Module, eager: nn.Module) -> None:
    same(dict(ours.state_dict()), dict(eager.state_dict()))
    for mine, theirs in zip(ours.parameters(), eager.parameters(), strict=True):
        same(mine.grad, theirs.grad)


def counts(model: nn.Module) -> tuple[int, int]:
    report = cuda_graph_report(model)
    return report.captured, report.replayed


def eager_reasons(model: nn.Module) -> list[str]:
    return list(cuda_graph_report(model).eager)


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


class Changes(nn.Module):
    """What a graph would leave out, by name."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.conv, self.what, self.calls = nn.Conv2d(3, 3, 1), what, 0
        self.register_buffer("seen", torch.zeros(()))
        self.cache: Tensor | None = None
        object.__setattr__(self, "foreign", [torch.ones(1, requires_grad=True)])

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        match self.what:
            case "attribute":
                self.calls += 1
            case "buffer":
                self.seen = self.seen + 1
            case "random":
                y = y * random.random()
            case "result":
                return [y, object()]
            case "argument":
                x.mul_(1.0)
            case "foreign":
                y = y * self.foreign[0].to(x.device)
            case "frozen":
                return y.detach()
            case "cache":
                if self.cache is None:
                    self.cache = torch.full((), 2.0, device=x.device)
                y = y * self.cache
        return y


REASONS = {
    "attribute": "changes the attribute calls",
    "buffer": "replaces a buffer",
    "random": "draws random numbers on the host",
    "result": "returns a object",
    "argument": "changes an argument in place",
    "foreign": "is no parameter of it",
    "frozen": "nothing that it returns requires gradients",
}


@pytest.mark.parametrize("what", REASONS)
def test_what_a_graph_would_leave_out_runs_eagerly(place: str, what: str) -> None:
    eager, ours = pair(place, Changes(what))
    found = []
    for model in (eager, ours):
        random.seed(5)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for seed in (1, 2):
                y = model(images(place, seed=seed))
        found.append(y[0] if what == "result" else y)
        assert len(told) == (model is ours), "once"
        assert model.calls == 2 * (what == "attribute")
        assert model.seen == 2 * (what == "buffer")
    assert REASONS[what] in str(told[0].message)
    same(found[1], found[0])
    assert counts(ours) == (0, 0)


def test_what_a_first_call_fills_is_no_change(place: str) -> None:
    eager, ours = pair(place, Changes("cache"))
    for seed in (1, 2, 3):
        for model in (eager, ours):
            model(images(place, seed=seed)).sum().backward()
    same_state(ours, eager)
    assert counts(ours) == (1, 3)


def hook_in_it(model: nn.Module) -> None:
    model.first.register_forward_hook(lambda m, args, out: out + 1)


def hooked_parameter(model: nn.Module) -> None:
    model.first.weight.register_hook(lambda g: g * 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(hook_in_it, "a Conv2d in it has hooks"), (hooked_parameter, "a parameter of it has hooks")],
)
def test_hooks_that_a_graph_would_not_call(
    place: str, change: Callable[[nn.Module], None], reason: str
) -> None:
    eager, ours = pair(place, Net())
    for model in (eager, ours):
        model(images(place)).sum().backward()
        change(model)
    with pytest.warns(UserWarning, match=reason):
        for model in (eager, ours):
            model(images(place)).sum().backward()
    same_state(ours, eager)


def test_hooks_of_the_module_itself_run_around_its_graphs(place: str) -> None:
    eager, ours = pair(place, Net())
    for model in (eager, ours):
        model.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        model.register_forward_hook(lambda m, args, y: y + 1)
        model.register_full_backward_hook(lambda m, given, made: None)
        for _ in range(2):
            model(images(place)).square().sum().backward()
    same_state(ours, eager)
    assert counts(ours)[1] == 2


def test_a_network_of_ours(place: str) -> None:
    eager, ours = pair(place, AttentionUNet(in_channels=1, num_classes=3, widths=(4, 8)))
    labels = torch.randint(3, (2, 16, 16), device=place)
    for seed in range(3):
        x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(seed)).to(place)
        for model in (eager, ours):
            F.cross_entropy(model(x), labels).backward()
    same_state(ours, eager)
    assert counts(ours) == (1, 3) and not eager_reasons(ours)


def test_wrappers_go_around_it(place: str) -> None:
    model = nn.DataParallel(Net().to(place))
    convert(model, cuda_graph=True)
    with pytest.warns(UserWarning, match="convert the module before wrapping it"):
        model(images(place))


def test_checkpoints_and_anomalies_run_eagerly(place: str) -> None:
    eager, ours = pair(place, Net())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in (eager, ours):
            x = images(place).requires_grad_()
            checkpoint(model, x, use_reentrant=False).square().sum().backward()
            with torch.autograd.detect_anomaly(check_nan=False):
                model(x).sum().backward()
    same_state(ours, eager)
    assert counts(ours) == (0, 0) and len(eager_reasons(ours)) == 2


def test_tracing_and_compiling_see_the_module_itself(place: str) -> None:
    layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).to(place)
    convert(layers, cuda_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced = torch.fx.symbolic_trace(layers)
    assert [str(n.target) for n in traced.graph.nodes][1:3] == ["0", "1"]
    _, ours = pair(place, Net())
    compiled = torch.compile(copy.deepcopy(ours), backend="eager", fullgraph=True)
    same(compiled(images(place)), ours(images(place)))


def test_graphs_within_graphs(place: str) -> None:
    model = nn.Sequential(Net(), nn.Linear(5, 2))
    eager, ours = pair(place, model)
    convert(ours[0], cuda_graph=True)
    for seed in (1, 2):
        for each in (eager, ours):
            each(images(place, seed=seed)).square().sum().backward()
    same_state(ours, eager)
    assert counts(ours) == (1, 2) and counts(ours[0]) == (0, 0)
    assert eager_reasons(ours[0]) == ["it is part of a module that is being captured"]
    assert type(revert(ours)[0]) is Net


def test_the_module_stays_the_same_and_there_is_a_way_back() -> None:
    model = Net()
    keys, parameters, kind = list(model.state_dict()), list(model.parameters()), type(model)
    report = convert(model, batch_norm=True, cuda_graph=True)
    assert report.cuda_graph and "run as CUDA graphs" in str(report)
    assert isinstance(model, kind) and type(model).__name__ == "Net"
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model.load_state_dict(Net().state_dict())
    assert convert(model, batch_norm=True).cuda_graph, "converted again, it keeps its graphs"
    assert not convert(model, cuda_graph=True).converted
    assert type(revert(model)) is kind and type(model.first) is nn.Conv2d
    assert not [name for name in model.__dict__ if name.startswith("_tritonconv")]
    assert not convert(model).cuda_graph


def test_a_single_layer() -> None:
    layer = nn.Conv2d(3, 4, 1)
    assert convert(layer, cuda_graph=True).cuda_graph
    assert isinstance(layer, tc.nn.Conv2d)
    assert not convert(layer).converted and isinstance(layer, tc.nn.Conv2d)
    assert type(revert(layer)) is nn.Conv2d


def test_copies_and_pickles_capture_anew(place: str) -> None:
    eager, ours = pair(place, Net())
    for model in (eager, ours):
        model(images(place)).sum().backward()
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(stream, weights_only=False),
    ]
    for model in copies:
        assert type(model) is type(ours) and counts(model) == (0, 0)
        model.zero_grad()
        ours.zero_grad()
        for each in (model, ours):
            each.load_state_dict(eager.state_dict())
            each(images(place, seed=2)).square().sum().backward()
        same_state(model, ours)
        assert counts(model) == (1, 1)
        assert type(revert(model)) is Net


def test_what_cannot_have_graphs_says_so() -> None:
    model = Net()
    model.forward = lambda x: x  # type: ignore[method-assign]
    report = convert(model, cuda_graph=True)
    assert not report.cuda_graph and report.reason == "its forward was replaced on the instance"
    assert "no CUDA graphs: its forward" in str(report)
    traced = torch.fx.symbolic_trace(Net())
    assert "writes its own class" in convert(traced, cuda_graph=True).reason
    with pytest.raises(ArgumentValueError, match="cuda_graph"):
        convert(Net().eval(), fold=True, cuda_graph=True)
    with pytest.raises(ArgumentTypeError, match="model"):
        cuda_graph_report(Net())


def test_on_a_cpu_all_of_it_is_eager() -> None:
    model = Net()
    convert(model, cuda_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images("cpu")).sum().backward()
    assert eager_reasons(model) == ["its tensors are on cpu"]
    assert "eager calls: 1, as its tensors are on cpu" in str(cuda_graph_report(model))


class Asks(nn.Module):
    """Control flow by data, behind a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.conv = nn.Dropout(0.5), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.drop(x))
        return y if float(y.detach().sum()) > 0 else -y


def test_settings_are_part_of_a_kind(place: str) -> None:
    eager, ours = pair(place, Net())
    for step in range(3):
        for backend in ("auto", "torch"):
            with tc.backend(backend):
                for model in (eager, ours):
                    model(images(place, seed=step)).square().sum().backward()
    same_state(ours, eager)
    assert counts(ours) == (2, 6)


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_nothing_behind() -> None:
    model = Asks().cuda()
    convert(model, cuda_graph=True)
    x = images("cuda")
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="it cannot be captured"):
        model(x).sum().backward()
    assert torch.cuda.current_stream() == stream
    torch.manual_seed(1)
    one = model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), one)
    assert F.dropout(torch.ones(64, device="cuda")).count_nonzero() < 64
    _, other = pair("cuda", Net(0.5))
    for seed in range(3):
        other(images("cuda", seed=seed)).sum().backward()
    assert counts(other) == (1, 3), "captures still work"


@pytest.mark.gpu
def test_the_memory_of_kinds_is_shared() -> None:
    wide = nn.Sequential(*[nn.Sequential(nn.Conv2d(32, 32, 1), nn.Tanh()) for _ in range(64)])
    _, model = pair("cuda", wide)
    taken = []
    for batch in (64, 60, 62):
        model(torch.randn(batch, 32, 32, 32, device="cuda")).sum().backward()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        taken.append(torch.cuda.memory_reserved())
    assert counts(model) == (3, 3)
    activations = 64 * 64 * 32 * 32 * 32 * 4
    assert taken[2] - taken[0] < activations / 2


@pytest.mark.gpu
def test_replays_on_other_streams_follow_each_other() -> None:
    eager, ours = pair("cuda", Net())
    for model in (eager, ours):
        for step in range(4):
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
                model(images("cuda", seed=step)).square().sum().backward()
                torch.cuda.default_stream().wait_stream(torch.cuda.current_stream())
            torch.cuda.synchronize()
    same_state(ours, eager)
    assert counts(ours) == (1, 4)
