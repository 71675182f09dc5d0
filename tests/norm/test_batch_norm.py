"""Batch normalisation with an activation: kernels and modules against PyTorch in float64."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonconv as tc
from tritonconv.norm.activation import activation_key
from tritonconv.norm.api import batch_norm
from tritonconv.norm.ops import BATCH_NORM_APPLY, BATCH_NORM_BACKWARD, BATCH_NORM_STATISTICS
from tritonconv.norm.problem import (
    NormView,
    channels_innermost,
    reduction_config,
    reduction_steps,
)
from tritonconv.runtime.accuracy import check
from tritonconv.runtime.device import nominal_device
from tritonconv.runtime.errors import ArgumentTypeError, ArgumentValueError

pytestmark = pytest.mark.interpreter

RANKS = {
    1: (nn.BatchNorm1d, tc.nn.BatchNorm1d),
    2: (nn.BatchNorm2d, tc.nn.BatchNorm2d),
    3: (nn.BatchNorm3d, tc.nn.BatchNorm3d),
}
ACTIVATIONS: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "leaky": functools.partial(F.leaky_relu, negative_slope=0.2),
}
# (shape, memory format): one channel, odd ones, two values a channel, several parts of a sum.
SHAPES = {
    "2x63": ((2, 63), "first"),
    "197x7": ((197, 7), "first"),
    "1000x1": ((1000, 1), "first"),
    "lines": ((3, 7, 41), "first"),
    "lines-last": ((3, 7, 41), "last"),
    "last": ((4, 63, 7, 7), "last"),
    "first": ((4, 63, 7, 7), "first"),
    "one-channel": ((5, 1, 3, 9), "first"),
    "pooled": ((197, 3, 1, 1), "first"),
    "aligned-last": ((2, 64, 8, 16), "last"),
    "eights-last": ((2, 40, 9, 9), "last"),
    "fours-first": ((3, 5, 2, 10), "first"),
    "aligned-first": ((2, 2, 16, 32), "first"),
    "tall-last": ((3, 5, 40, 41), "last"),
    "tall-first": ((9, 2, 33, 37), "first"),
    "volume-last": ((2, 7, 3, 4, 5), "last"),
    "volume": ((2, 7, 3, 4, 5), "first"),
    "sliced": ((2, 7, 6, 5), "sliced"),
    "rows-apart": ((2, 7, 6, 5), "apart"),
}


def sample(name: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """A map in its memory format, far from zero for its spread."""
    shape, form = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) + 3).to(device, dtype)
    if form == "last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if form == "sliced":  # every other channel is another tensor's
        wide = torch.stack([x, x], -1).movedim(1, -1).flatten(-2).contiguous()
        return wide.movedim(-1, 1)[:, : x.shape[1]].copy_(x)
    if form == "apart":
        return torch.stack([x, x], -1)[..., 0]
    return x


def plain(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: Any
) -> Tensor:
    y = F.batch_norm(x, None, None, weight, bias, True)
    y = y if residual is None else y + residual
    return y if activation is None else activation(y)


def accurate(found: Tensor, exact: Tensor, other: Tensor, what: object) -> None:
    assert found.shape == exact.shape and found.dtype == other.dtype, what
    verdict = check(found, exact, other, dtype=found.dtype)
    assert verdict.ok, (what, verdict)


def compare(
    shape: str,
    dtype: torch.dtype,
    activation: Any,
    device: torch.device,
    residual: bool = False,
    parameters: torch.dtype | None = None,
) -> None:
    """Result and first-order gradients, all within the budget of the dtype."""
    x = sample(shape, dtype, device)
    generator = torch.Generator().manual_seed(1)
    channels = x.shape[1]
    weight, bias = (torch.randn(channels, generator=generator).to(device) for _ in "12")
    weight, bias = (t.to(parameters or torch.float32) for t in (weight + 1, bias))
    tensors = [x, weight, bias]
    if residual:
        tensors.append(torch.randn(x.shape, generator=generator).to(device, dtype))
    v = torch.randn(x.shape, generator=generator)
    # Partly along the map: a channel's weight gradient that all but cancels has the error of its
    # terms, and the only one of a single channel would be judged by PyTorch's luck with it.
    v = (v + 0.5 * (x.float().cpu() - 3)).to(device, dtype)
    results = []
    for wide in (None, torch.float64, dtype):
        leaves = [t.detach().to(wide or t.dtype).requires_grad_() for t in tensors]
        more = leaves[3] if residual else None
        if wide is None:
            args = (leaves[0], None, None, leaves[1], leaves[2], True)
            y = batch_norm(*args, activation=activation, residual=more)
        else:
            w, b = leaves[1:3]
            if wide is not torch.float64 and device.type == "cpu" and dtype is torch.float16:
                w, b = w.to(dtype), b.to(dtype)
            y = plain(leaves[0], w, b, more, activation)
        results.append([y, *torch.autograd.grad(y, leaves, v.to(y.dtype))])
    ours, exact, other = results
    if channels_innermost(x.shape, x.stride()) is not None:
        assert ours[0].stride() == torch.empty_like(x).stride()
    names = ("y", "x", "weight", "bias", "residual")
    for name, a, b, c in zip(names, ours, exact, other, strict=False):
        accurate(a, b, c.to(a.dtype), (shape, name))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape: str, device: torch.device) -> None:
    compare(shape, torch.float32, F.relu, device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_every_activation(activation: str, residual: bool, device: torch.device) -> None:
    shape = "last" if residual else "first"
    compare(shape, torch.float32, ACTIVATIONS[activation], device, residual)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("half", [False, True], ids=["float32-weights", "half-weights"])
def test_half_precision(dtype: torch.dtype, half: bool, device: torch.device) -> None:
    compare("tall-last", dtype, F.silu, device, residual=True, parameters=dtype if half else None)
    compare("first", dtype, F.relu, device, parameters=dtype if half else None)


def test_statistics_far_from_zero(device: torch.device) -> None:
    """A mean of 10,000 spreads of the values; one value a million times the others."""
    x = torch.randn(6, 9, 11, 13, generator=torch.Generator().manual_seed(0)).to(device) + 1e4
    x[:, 3] = 1.0
    x[0, 4, 0, 0] = 1e10
    for form in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=form)
        mean, var = BATCH_NORM_STATISTICS(y, None, None, None, 0.1)
        exact = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(mean.double(), exact[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var.double(), exact[0], rtol=1e-4, atol=1e-6)
        assert var[3] == 0


def test_a_repeated_call_gives_the_same_bits(device: torch.device) -> None:
    x = sample("tall-last", torch.float32, device)
    first, second = (BATCH_NORM_STATISTICS(x, None, None, None, 0.1) for _ in "12")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nan_and_infinity_are_not_lost(device: torch.device) -> None:
    x = sample("last", torch.float32, device)
    x[0, 5, 0, 0] = float("nan")
    y = batch_norm(x, None, None, training=True, activation=F.relu)
    assert y[:, 5].isnan().all() and not y[:, 6].isnan().any()


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("momentum", [0.1, 0.5, None], ids=str)
@pytest.mark.parametrize("track", [True, False], ids=["track", "no-track"])
def test_modules_are_pytorchs(
    rank: int, momentum: float | None, track: bool, device: torch.device
) -> None:
    theirs, ours = RANKS[rank]
    torch.manual_seed(0)
    options = {"momentum": momentum, "track_running_stats": track, "eps": 1e-3}
    a, b = theirs(7, **options).to(device), ours(7, **options).to(device)
    nn.init.normal_(a.weight), nn.init.normal_(a.bias)
    b.load_state_dict(a.state_dict())
    for step in range(3):
        x = torch.randn(3, 7, *[4] * rank, device=device) * (step + 1) + step
        torch.testing.assert_close(b(x), a(x), rtol=1e-4, atol=1e-5)
        assert list(a.state_dict()) == list(b.state_dict())
        for one, other in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    a.eval(), b.eval()
    before = copy.deepcopy(b.state_dict())
    leaves = [torch.randn(3, 7, *[4] * rank, device=device).requires_grad_() for _ in "12"]
    leaves[1].data.copy_(leaves[0].data)
    y, z = a(leaves[0]), b(leaves[1])
    torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-5)
    v = torch.randn_like(y)
    wanted = torch.autograd.grad(y, [leaves[0], *a.parameters()], v)
    found = torch.autograd.grad(z, [leaves[1], *b.parameters()], v)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    after = b.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_half_precision_running_statistics(device: torch.device) -> None:
    a, b = (kind(7).to(device, torch.bfloat16) for kind in RANKS[2])
    x = sample("volume", torch.bfloat16, device).flatten(3)[:, :7]
    for _ in range(2):
        torch.testing.assert_close(b(x), a(x), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(b.running_var, a.running_var, rtol=1e-2, atol=1e-2)
    assert int(b.num_batches_tracked) == 2


def test_changed_buffers_are_noticed(device: torch.device) -> None:
    norm = tc.nn.BatchNorm2d(7).to(device)
    versions = [t._version for t in norm.buffers()]
    norm(sample("sliced", torch.float32, device))
    assert all(t._version > v for t, v in zip(norm.buffers(), versions, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu", "hardswish"])
@pytest.mark.parametrize("form", ["last", "first"])
def test_second_order(training: bool, activation: str, form: str, device: torch.device) -> None:
    """The kernels' gradients of gradients, by every input and by the cotangent."""
    fn = ACTIVATIONS[activation]
    x = sample(form, torch.float32, device)[:, :5, :3].contiguous(
        memory_format=torch.channels_last if form == "last" else torch.contiguous_format
    )
    tensors = [x, *(torch.randn(5, device=device) for _ in "12"), torch.randn_like(x)]
    running = torch.randn(5, device=device), torch.rand(5, device=device) + 0.5
    v, results = torch.randn_like(x), []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        u = v.to(dtype).requires_grad_()
        stats = [t.to(dtype).clone() for t in running]
        if dtype is torch.float32:
            options = {"activation": fn, "residual": leaves[3]}
            y = batch_norm(leaves[0], *stats, *leaves[1:3], training, **options)
        else:
            y = F.batch_norm(leaves[0], *stats, *leaves[1:3], training) + leaves[3]
            y = y if fn is None else fn(y)
        grads = torch.autograd.grad(y, leaves, u, create_graph=True)
        mixed = sum((g * g).sum() + g.sum() for g in grads)
        results.append(torch.autograd.grad(mixed, [*leaves, u], materialize_grads=True))
    for found, exact in zip(*results, strict=True):
        scale = exact.abs().max().clamp(min=1)
        assert (found.double() - exact).abs().max() <= 1e-4 * scale


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", [None, F.silu, F.gelu, torch.tanh])
def test_gradcheck(training: bool, activation: Any) -> None:
    torch.manual_seed(0)
    x, r = (torch.randn(3, 2, 2, 2, dtype=torch.float64).requires_grad_() for _ in "12")
    weight, bias = (torch.randn(2, dtype=torch.float64).requires_grad_() for _ in "12")
    stats = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5

    def fn(x: Tensor, weight: Tensor, bias: Tensor, r: Tensor) -> Tensor:
        fresh = [t.clone() for t in stats]
        return batch_norm(x, *fresh, weight, bias, training, activation=activation, residual=r)

    inputs = (x, weight, bias, r)
    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_gradients_that_are_not_wanted(frozen: str, device: torch.device) -> None:
    torch.manual_seed(0)
    tensors = {"x": sample("last", torch.float32, device)}
    tensors |= {name: torch.randn(63, device=device) for name in ("weight", "bias")}
    leaves = {n: t.clone().requires_grad_(n != frozen) for n, t in tensors.items()}
    y = batch_norm(
        leaves["x"], None, None, leaves["weight"], leaves["bias"], True, activation=F.silu
    )
    y.sum().backward()
    assert [n for n, t in leaves.items() if t.grad is None] == [frozen]
    other = {n: t.clone().requires_grad_(n != frozen) for n, t in tensors.items()}
    plain(*other.values(), None, F.silu).sum().backward()
    for name, t in leaves.items():
        if name != frozen:
            torch.testing.assert_close(t.grad, other[name].grad, rtol=1e-4, atol=1e-3)


def test_a_gradient_of_other_strides(device: torch.device) -> None:
    """As mean pooling hands it back: expanded, with strides of zero."""
    x = sample("last", torch.float32, device).requires_grad_()
    z = x.detach().double().requires_grad_()
    batch_norm(x, None, None, training=True, activation=F.silu).mean(
        (2, 3)
    ).square().sum().backward()
    F.silu(F.batch_norm(z, None, None, training=True)).mean((2, 3)).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), z.grad, rtol=1e-3, atol=1e-6)
    assert x.grad.stride() == x.stride()


def test_an_activation_that_reads_tensors_and_coordinates(device: torch.device) -> None:
    slope = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], device=device, requires_grad=True)

    def leaky(y: Tensor, *, c: Tensor) -> Tensor:
        return torch.where(y > 0, y, y * slope[c])

    for rank, (theirs, ours) in RANKS.items():
        norm, other = (kind(7).to(device) for kind in (ours, theirs))
        norm.activation = leaky
        x = torch.randn(3, 7, *[4] * rank, device=device)
        y, z = norm(x), F.prelu(other(x), slope)
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
        v = torch.randn_like(y)
        found = torch.autograd.grad(y, [slope, norm.weight], v)
        wanted = torch.autograd.grad(z, [slope, other.weight], v)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ArgumentValueError, match="activation: expected"):
        batch_norm(x, None, None, training=True, activation=leaky)


REFUSED = {
    "input: expected more than one value": lambda m: m(torch.randn(1, 3, 1, 1)),
    "4D input": lambda m: m(torch.randn(4, 3)),
    "running_mean: expected": lambda m: m(torch.randn(2, 4, 3, 3)),
    "residual: expected the input's shape": lambda m: m(
        torch.randn(2, 3, 3, 3), torch.randn(2, 3, 3, 1)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str) -> None:
    norm = tc.nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match=message):
        REFUSED[message](norm)
    assert int(norm.num_batches_tracked) == 0 and not norm.running_mean.any()


def test_refused_types() -> None:
    with pytest.raises(ArgumentTypeError, match="activation"):
        tc.nn.BatchNorm2d(3, activation=1)(torch.randn(2, 3, 3, 3))  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="input: expected a floating"):
        batch_norm(torch.ones(2, 3, dtype=torch.int32), None, None, training=True)


def test_copies_and_files() -> None:
    norm = tc.nn.BatchNorm2d(3, activation=F.relu)
    x = torch.randn(2, 3, 4, 4)
    norm(x)
    twin, file = copy.deepcopy(norm), io.BytesIO()
    torch.save(norm.state_dict(), file)
    file.seek(0)
    loaded = nn.BatchNorm2d(3)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(norm.eval()(x), twin.eval()(x))
    torch.testing.assert_close(norm(x), loaded.eval()(x).relu())
    assert "activation=relu" in repr(norm)


def test_autocast(device: torch.device) -> None:
    net = nn.Sequential(nn.Conv2d(3, 7, 3), tc.nn.BatchNorm2d(7, activation=F.relu)).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        y = net(torch.randn(2, 3, 6, 6, device=device))
    assert y.dtype is torch.bfloat16 and net[1].running_mean.dtype is torch.float32
    y.sum().backward()
    assert net[1].weight.grad.dtype is torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, device: torch.device) -> None:
    norm = tc.nn.BatchNorm2d(7, activation=F.silu).to(device)
    other = copy.deepcopy(norm)
    x = sample("sliced", torch.float32, device).requires_grad_()
    z = x.detach().clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=reentrant).square().sum().backward()
    other(z).square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad)
    torch.testing.assert_close(norm.weight.grad, other.weight.grad)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled(training: bool, device: torch.device) -> None:
    torch._dynamo.reset()
    norm = tc.nn.BatchNorm2d(7, activation=F.relu).to(device).train(training)
    other = copy.deepcopy(norm)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    for size in (5, 6):
        x = torch.randn(2, 7, size, 4, device=device)
        leaves = [x.clone().requires_grad_() for _ in "12"]
        y, z = compiled(leaves[0]), other(leaves[1])
        torch.testing.assert_close(y, z)
        v = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(y, [leaves[0], *norm.parameters()], v),
            torch.autograd.grad(z, [leaves[1], *other.parameters()], v),
        )
    for one, two in zip(norm.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(one, two)


def test_functional_transforms(device: torch.device) -> None:
    x, weight = torch.randn(3, 2, 4, device=device), torch.randn(2, device=device)

    def loss(x: Tensor, weight: Tensor, ours: bool) -> Tensor:
        if ours:
            y = batch_norm(x, None, None, weight, None, True, activation=F.silu)
        else:
            y = F.silu(F.batch_norm(x, None, None, weight, None, True))
        return (y * y * y).sum()

    found, wanted = (
        torch.func.grad(loss, argnums=(0, 1))(x, weight, ours) for ours in (True, False)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_operators(device: torch.device) -> None:
    key = activation_key(F.silu, torch.float32)
    x = sample("last", torch.float32, device)[:, :5].contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(5, device=device).requires_grad_() for _ in "12")
    stats = [torch.zeros(5, device=device), torch.ones(5, device=device)]
    count = torch.tensor(0, device=device)
    torch.library.opcheck(BATCH_NORM_STATISTICS.overload, (x, *stats, count, 0.1))
    torch.library.opcheck(BATCH_NORM_STATISTICS.overload, (x, None, None, None, 0.1))
    mean, var = BATCH_NORM_STATISTICS(x, None, None, None, 0.1)
    leaf, residual = x.clone().requires_grad_(), torch.randn_like(x).requires_grad_()
    for more in (None, residual):
        given = (mean, var, weight, bias, more, key, 1e-5, True)
        torch.library.opcheck(BATCH_NORM_APPLY.overload, (leaf, *given))
        needed = [True, True, True, more is not None]
        torch.library.opcheck(
            BATCH_NORM_BACKWARD.overload, (torch.randn_like(x), leaf, *given, needed)
        )


VIEWS = [
    NormView(images, channels, pixels, last)
    for images in (1, 2, 64)
    for channels in (1, 7, 64, 2048)
    for pixels in (1, 49, 3136)
    for last in (True, False)
]


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("value_bytes", [2, 12])
def test_how_sums_are_shared_out(view: NormView, value_bytes: int) -> None:
    config = reduction_config(view, nominal_device("sm_90"), value_bytes)
    assert 1 <= config.parts <= reduction_steps(view, config)
    for size in (config.block_r, config.block_c, config.merge, config.num_warps):
        assert size & (size - 1) == 0
    under_way = (config.stages - 1) * config.block_r * config.block_c * value_bytes
    assert under_way <= 48 * 1024


def test_large_maps_are_addressed_in_64_bits() -> None:
    assert NormView(1 << 10, 1 << 10, 1 << 10, True).wide
    assert not NormView(64, 256, 3136, True).wide


@pytest.mark.parametrize("form", ["last", "first"])
def test_wide_addresses_give_the_same(
    form: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(NormView, "wide", property(lambda self: True))
    x = sample(form, torch.float32, device)[:1].clone(memory_format=torch.preserve_format)
    x = x.requires_grad_()
    z = x.detach().double().requires_grad_()
    y = batch_norm(x, None, None, training=True, activation=F.relu)
    exact = F.relu(F.batch_norm(z, None, None, training=True))
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    v = torch.randn_like(y)
    y.backward(v), exact.backward(v.double())
    torch.testing.assert_close(x.grad.double(), z.grad, rtol=1e-4, atol=1e-5)
