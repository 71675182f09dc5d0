"""What a graph cannot do: it runs eagerly and says why; conversion, copies and the way back."""

from __future__ import annotations

import copy
import io
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tritonconv as tc
from tritonconv.models.vision.attention_unet import AttentionUNet
from tritonconv.nn import convert, cuda_graph_report, revert
from tritonconv.runtime.errors import ArgumentTypeError, ArgumentValueError

from .graph_cases import Net, counts, eager_reasons, images, pair, same, same_state


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
