"""Operators as generated code of ``torch.compile`` calls them: what runs, and what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._inductor import compile_fx
from torch._inductor.utils import run_and_get_code
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tritonconv as tc
from tritonconv.conv import dispatch, ops
from tritonconv.norm import ops as norm_ops
from tritonconv.runtime import library, tables

pytestmark = pytest.mark.interpreter
LAST = torch.channels_last
GEOMETRY = ([1, 1], [1, 1, 1, 1], [1, 1], 1, "ieee")
ONE_SIDED = ([1, 1], [1, 0, 0, 1], [1, 1], 1, "ieee")


def made(*shape: int, device: torch.device) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)
    return values.to(memory_format=LAST) if len(shape) == 4 else values


def calls(device: torch.device) -> dict[str, tuple[library.Op, tuple[Any, ...]]]:
    """A call of every operator that a training step of convolutions and batch norms makes."""
    x, w, g = (made(*s, device=device) for s in ((2, 3, 5, 4), (6, 3, 3, 3), (2, 6, 5, 4)))
    mean, var, weight, bias = (made(6, device=device).abs() + 0.5 for _ in range(4))
    tracked = torch.zeros((), dtype=torch.int64, device=device)
    normalised = (g, mean, var, weight, bias, None, "", 1e-5, True)
    return {
        "conv": (ops.CONV, (x, w, *GEOMETRY)),
        "dgrad": (ops.CONV_DGRAD, (g, w, [5, 4], *GEOMETRY)),
        "wgrad": (ops.CONV_WGRAD, (g, x, [3, 3], *GEOMETRY)),
        "gradients": (ops.CONV_GRADIENTS, (g, x, w, *GEOMETRY)),
        "statistics": (norm_ops.BATCH_NORM_STATISTICS, (g, mean, var, tracked, 0.1)),
        "apply": (norm_ops.BATCH_NORM_APPLY, normalised),
        "backward": (norm_ops.BATCH_NORM_BACKWARD, (g, *normalised, [True, True, True, False])),
    }


OPERATORS = pytest.mark.parametrize(
    "name", ["conv", "dgrad", "wgrad", "gradients", "statistics", "apply", "backward"]
)


def copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(t.clone() if isinstance(t, Tensor) else t for t in args)


@pytest.fixture(params=["kernels", "pytorch"])
def _chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every product by kernels of the library, or by PyTorch's."""
    if request.param == "pytorch":
        monkeypatch.setattr(
            dispatch.ConvOperator, "default_algorithm", lambda self, problem, facts: dispatch.ATEN
        )
    tables.invalidate()
    yield
    tables.invalidate()


BOTH_CHOICES = pytest.mark.usefixtures("_chosen")


@OPERATORS
@BOTH_CHOICES
def test_overload_computes_the_bits_of_the_dispatched_call(name: str, device: torch.device) -> None:
    op, args = calls(device)[name]
    direct, through = copied(args), copied(args)
    with torch.no_grad():
        found, expected = op.overload(*direct), op.dispatched(*through)
        again = op.overload(*copied(args))
    for result in (found, again):
        assert type(result) is type(expected)
        pairs = zip(
            *[(r,) if isinstance(r, Tensor) else r for r in (result, expected)], strict=True
        )
        for a, b in pairs:
            assert a.stride() == b.stride() and torch.equal(a, b)
    for a, b in zip(direct, through, strict=True):  # the running statistics move alike
        assert not isinstance(a, Tensor) or torch.equal(a, b)


@OPERATORS
def test_plain_calls_of_an_overload_skip_the_dispatcher(name: str, device: torch.device) -> None:
    op, args = calls(device)[name]
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen,
        torch.no_grad(),
    ):
        op.overload(*args)
    label = op.overload.name()
    assert label not in {event.key for event in seen.key_averages()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        op.dispatched(*args)
    assert label in {event.key for event in seen.key_averages()}


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_whoever_looks_at_operators_still_meets_them(device: torch.device) -> None:
    op, (x, w, *geometry) = calls(device)["conv"]
    expected = op.implementation(x, w, *geometry)
    with Seen() as modes:
        assert torch.equal(op.overload(x, w, *geometry), expected)
    assert "tritonconv::conv" in modes.names
    with SeenFunctions() as functions:
        assert torch.equal(op.overload(x, w, *geometry), expected)
    assert any("conv" in name for name in functions.names)
    meta = op.overload(x.to("meta"), w.to("meta"), *geometry)
    assert meta.is_meta and meta.stride() == expected.stride()
    assert torch.equal(op.overload(x, weight=w, **_named(geometry)), expected)
    y = op.overload(x.clone().requires_grad_(), w, *geometry)
    assert y.requires_grad and torch.equal(y, expected)
    (found,) = torch.func.vjp(lambda x: op(x, w, *geometry), x)[1](expected)
    assert torch.equal(found, ops.CONV_DGRAD(expected, w, [5, 4], *geometry))
    negated = torch._neg_view(x)
    assert torch.equal(op.overload(negated, w, *geometry), op.implementation(-x, w, *geometry))
    with pytest.raises(RuntimeError):
        op.overload(x, w)  # what is missing, the schema tells


def _named(geometry: list[Any]) -> dict[str, Any]:
    return dict(
        zip(("stride", "padding", "dilation", "groups", "precision"), geometry, strict=True)
    )


@pytest.fixture
def _autocast_as_on_a_gpu() -> Iterator[None]:
    """Autocast's list for GPUs has ``aten.convolution``, the one for CPUs does not."""

    def cast(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
        with torch._C._DisableAutocast():
            return torch.ops.aten.convolution.default(x.bfloat16(), w.bfloat16(), *rest)

    with torch.library._scoped_library("aten", "IMPL") as registered:
        registered.impl("convolution", cast, "AutocastCPU")
        yield


@BOTH_CHOICES
@pytest.mark.usefixtures("_autocast_as_on_a_gpu")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("geometry", [GEOMETRY, ONE_SIDED], ids=["symmetric", "one-sided"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_products_in_an_autocast_region_keep_their_dtype(
    backend: str, geometry: Any, device: torch.device
) -> None:
    # A backward may run inside of a region: its products are of the dtypes it was given.
    x, w = made(2, 3, 5, 4, device=device), made(6, 3, 3, 3, device=device)
    with tc.backend(backend), torch.no_grad():
        expected = ops.CONV.overload(x, w, *geometry)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found = [ops.CONV.overload(x, w, *geometry), ops.CONV.dispatched(x, w, *geometry)]
    for y in found:
        assert y.dtype is torch.float32 and torch.equal(y, expected)


@BOTH_CHOICES
@pytest.mark.usefixtures("_autocast_as_on_a_gpu")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_second_derivative_in_an_autocast_region(backend: str, device: torch.device) -> None:
    x, w = made(2, 3, 5, 4, device=device), made(6, 3, 3, 3, device=device)
    leaves = [x.requires_grad_(), w.requires_grad_()]

    def second(region: bool) -> tuple[Tensor, ...]:
        y = tc.conv2d(x, w, padding=1)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=region):
            total = sum(t.square().sum() for t in first)
            return torch.autograd.grad(total, leaves)

    with tc.backend(backend):
        for found, expected in zip(second(True), second(False), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@BOTH_CHOICES
def test_both_gradients_are_those_of_one_each(device: torch.device) -> None:
    g, x, w = calls(device)["gradients"][1][:3]
    for layout in (LAST, torch.contiguous_format):
        a, b, c = (t.contiguous(memory_format=layout) for t in (g, x, w))
        by_x, by_w = ops.CONV_GRADIENTS(a, b, c, *GEOMETRY)
        for found, expected in (
            (by_x, ops.CONV_DGRAD(a, c, [5, 4], *GEOMETRY)),
            (by_w, ops.CONV_WGRAD(a, b, [3, 3], *GEOMETRY)),
        ):
            assert found.stride() == expected.stride()
            assert torch.equal(found, expected)


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)], ids=["by x", "by w", "both"])
def test_second_derivatives_of_both_gradients(wanted: tuple[int, ...]) -> None:
    tensors = [
        made(*s, device=torch.device("cpu")).double()
        for s in ((1, 2, 3, 2), (1, 2, 3, 2), (2, 2, 3, 3))
    ]
    with tc.backend("torch"):
        torch.autograd.gradcheck(
            lambda g, x, w: tuple(ops.CONV_GRADIENTS(g, x, w, *GEOMETRY)[k] for k in wanted),
            [t.requires_grad_() for t in tensors],
        )


class Block(nn.Module):
    """A residual block with what joins it, as image models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.act2 = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.down(x)
        return self.act2(y)


def _converted() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), Block())
    tc.nn.convert(net, batch_norm=True)
    return net.to(memory_format=LAST)


def _step(model: Callable[[Tensor], Tensor], net: nn.Module, autocast: bool) -> list[Tensor]:
    x = made(2, 3, 8, 8, device=torch.device("cpu"))
    net.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().mean().backward()
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    return [y.detach(), *grads, *[t.clone() for t in net.buffers()]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_compiled_block(autocast: bool) -> None:
    """One graph, the eager results, and nothing in the generated code but the work itself."""
    torch._dynamo.reset()
    eager, compiled = _converted(), _converted()
    model = torch.compile(compiled, fullgraph=True)
    with tc.backend("torch"):
        expected = _step(eager, eager, autocast)
        with torch._inductor.config.patch(force_disable_caches=True):
            found, sources = run_and_get_code(lambda: _step(model, compiled, autocast))
    torch._dynamo.reset()
    tolerance = {"rtol": 0.05, "atol": 0.02} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    lines = [line.strip() for source in sources for line in source.splitlines()]
    called = [
        line.split("torch.ops.tritonconv.")[1] for line in lines if " = torch.ops.tri" in line
    ]
    names = [line.split(".")[0] for line in called]
    counts = {name: names.count(name) for name in set(names)}
    assert counts == {
        "conv": 4,
        "batch_norm_statistics": 4,
        "batch_norm_apply": 4,
        "batch_norm_backward": 4,
        "conv_gradients": 3,
        "conv_wgrad": 1,  # nobody wants the gradient of the images
    }
    # Neither the statistics, which the operator changes in place, nor a map is copied around an
    # operator. Every buffer of generated code is made by a line that names its size.
    code = "\n".join(lines)
    for never in ("auto_functionalized", "aten.copy_", "aten.clone", ".clone(", "as_strided"):
        assert never not in code, never
    for line in called:
        if line.startswith("batch_norm_statistics"):
            changed = line.split("default(")[1].split(", ")[1:4]
            assert all(name.startswith("primals") for name in changed), line
    if not autocast:
        # In float32 the only new maps are the sum of the two branches and, for its gradient, where
        # ReLU let it pass.
        maps = [line for line in lines if "= empty_strided_cpu((2, " in line]
        assert len(maps) <= 4, maps


@pytest.mark.filterwarnings("ignore")
def test_what_compiled_code_changes_may_be_in_a_captured_graph() -> None:
    """PyTorch captures a graph where only parameters and buffers, which stay in place, change."""
    changed: list[tuple[set[int], set[int]]] = []

    def inner(module: Any, inputs: Any, **options: Any) -> Any:
        made = compile_fx.compile_fx_inner(module, inputs, **options)
        changed.append((set(made.mutated_input_idxs), set(options["static_input_idxs"])))
        return made

    def backend(module: Any, inputs: Any) -> Any:
        return compile_fx.compile_fx(module, inputs, inner_compile=inner)

    torch._dynamo.reset()
    net = _converted()
    with tc.backend("torch"), torch._inductor.config.patch(force_disable_caches=True):
        _step(torch.compile(net, fullgraph=True, backend=backend), net, autocast=False)
    torch._dynamo.reset()
    (forward, static), (backward, _) = changed
    assert len(forward) == 12 and forward <= static  # three buffers of four batch norms
    assert not backward


def test_operators_may_be_captured_in_graphs() -> None:
    for op, _ in calls(torch.device("cpu")).values():
        tags = op.overload.tags
        assert torch.Tag.pt2_compliant_tag in tags
        unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
        assert unsafe is None or unsafe not in tags
        exact = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
        assert exact in tags  # results follow the strides of what they are given
