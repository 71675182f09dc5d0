"""Convolution with batch normalisation: PyTorch's layers, one by one and as a chain."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonconv as tc
from tritonconv.runtime.errors import ArgumentTypeError, ArgumentValueError

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """What float32 is compared with here is not of TF32, and neither is ours then."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


RANKS = {
    1: (nn.Conv1d, nn.BatchNorm1d, tc.nn.ConvBatchNorm1d),
    2: (nn.Conv2d, nn.BatchNorm2d, tc.nn.ConvBatchNorm2d),
    3: (nn.Conv3d, nn.BatchNorm3d, tc.nn.ConvBatchNorm3d),
}


def pair(
    rank: int, channels: int, filters: int, activation: Callable[..., Any] | None, **options: Any
) -> tuple[nn.Sequential, Any]:
    """PyTorch's layers, and ours of a copy of them."""
    conv, norm, ours = RANKS[rank]
    layers = [conv(channels, filters, 3, padding=1, **options), norm(filters, momentum=0.3)]
    nn.init.normal_(layers[1].weight, 1.0, 0.3)
    nn.init.normal_(layers[1].bias, 0.5, 0.3)
    mine = ours.of(copy.deepcopy(layers[0]), copy.deepcopy(layers[1]), activation)
    behind = [] if activation is None else [Activation(activation)]
    return nn.Sequential(*layers, *behind), mine


class Activation(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def penalty(gradients: Any) -> Tensor:
    return sum(g.square().sum() for g in gradients)


def buffers(module: nn.Module) -> list[Tensor]:
    return [b for _, b in module.named_buffers()]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("activation", [None, torch.relu, torch.tanh])
def test_a_layer(rank: int, activation: Any, device: torch.device) -> None:
    torch.manual_seed(0)
    plain, ours = (m.to(device) for m in pair(rank, 3, 5, activation, bias=True))
    x = torch.randn(2, 3, *[4] * rank, device=device).requires_grad_()
    for _ in range(2):
        same(ours(x), plain(x))
    same(buffers(ours), buffers(plain))
    y, z = ours(x), plain(x)
    v = torch.randn_like(y)
    mine, other = list(ours.parameters()), list(plain.parameters())
    same(torch.autograd.grad(y, [x, *mine], v), torch.autograd.grad(z, [x, *other], v))
    ours.eval(), plain.eval()
    same(ours(x), plain(x))
    assert isinstance(ours.pending(x), Tensor)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_chain_hands_its_normalisation_on(
    form: torch.memory_format, device: torch.device
) -> None:
    """conv, norm, relu, conv, norm: the map between is never normalised in memory."""
    torch.manual_seed(1)
    first, ours_first = (m.to(device) for m in pair(2, 3, 6, torch.tanh, bias=False))
    second, ours_second = (m.to(device) for m in pair(2, 6, 4, None, bias=False))
    plain, ours = nn.Sequential(first, second), nn.ModuleList([ours_first, ours_second])
    x = torch.randn(2, 3, 5, 6, device=device).contiguous(memory_format=form).requires_grad_()
    pending = ours_first.pending(x)
    assert isinstance(pending, tc.nn.Unnormalised)
    y, z = ours_second(pending), plain(x)
    same(y, z)
    same(buffers(ours), buffers(plain))
    v = torch.randn_like(z)
    mine, other = list(ours.parameters()), list(plain.parameters())
    found = torch.autograd.grad(y, [x, *mine], v, create_graph=True)
    wanted = torch.autograd.grad(z, [x, *other], v, create_graph=True)
    same(found, wanted)
    # The gradient of a gradient penalty.
    mine, other = [x, *mine], [x, *other]
    second = torch.autograd.grad(penalty(found), mine, materialize_grads=True)
    expected = torch.autograd.grad(penalty(wanted), other, materialize_grads=True)
    for a, b in zip(second, expected, strict=True):  # large numbers that nearly cancel
        assert (a - b).norm() <= 1e-4 * b.norm()
    ours.eval(), plain.eval()
    same(ours_second(ours_first.pending(x)), plain(x))


def test_a_pair_of_inputs_and_cumulative_statistics(device: torch.device) -> None:
    torch.manual_seed(2)
    plain, ours = (m.to(device) for m in pair(2, 5, 4, torch.relu, bias=True))
    plain[1].momentum = ours.norm.momentum = None
    for _ in range(3):
        a, b = (torch.randn(2, c, 4, 4, device=device) for c in (2, 3))
        same(ours((a, b)), plain(torch.cat((a, b), 1)))
    same(buffers(ours), buffers(plain))


def test_other_padding_and_frozen_statistics(device: torch.device) -> None:
    torch.manual_seed(3)
    plain, ours = pair(2, 3, 4, torch.relu, bias=False, padding_mode="reflect")
    plain, ours = plain.to(device), ours.to(device)
    _, before = (m.to(device) for m in pair(2, 3, 3, torch.tanh))
    x = torch.randn(2, 3, 4, 4, device=device)
    same(ours(before.pending(x)), plain(before(x)))
    plain[1].eval(), ours.norm.eval()
    same(ours(x), plain(x))


def test_arguments() -> None:
    layer = tc.nn.ConvBatchNorm2d(3, 4, 3, stride=2, padding=1, activation=torch.relu, eps=1e-3)
    assert layer.conv.bias is None and layer.norm.eps == 1e-3
    assert "relu" in repr(layer)
    assert copy.deepcopy(layer)(torch.randn(2, 3, 4, 4)).shape == (2, 4, 2, 2)
    free = tc.nn.ConvBatchNorm2d(3, 4, 3, affine=False, track_running_stats=False).eval()
    assert free(torch.randn(2, 3, 4, 4)).mean().abs() < 1e-5
    with pytest.raises(ArgumentValueError, match="more than one value"):
        tc.nn.ConvBatchNorm2d(3, 4, 1)(torch.randn(1, 3, 1, 1))
    with pytest.raises(ArgumentValueError, match="features"):
        tc.nn.ConvBatchNorm2d.of(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5))
    with pytest.raises(ArgumentTypeError, match="conv"):
        tc.nn.ConvBatchNorm2d.of(nn.Conv3d(3, 4, 3), nn.BatchNorm2d(4))


def test_a_map_without_a_batch_is_refused() -> None:
    layer = tc.nn.ConvBatchNorm2d(3, 8, 3, padding=1)
    before = layer.norm.running_mean.clone()
    for x in (torch.randn(3, 8, 8), (torch.randn(1, 8, 8), torch.randn(2, 8, 8))):
        with pytest.raises(ArgumentValueError, match="4 dimensions"):
            layer(x)
        with pytest.raises(ArgumentValueError, match="4 dimensions"):
            copy.deepcopy(layer).eval()(x)
    assert torch.equal(layer.norm.running_mean, before)


def test_a_synchronised_normalisation_is_refused() -> None:
    with pytest.raises(ArgumentTypeError, match="SyncBatchNorm"):
        tc.nn.ConvBatchNorm2d.of(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4))


def test_hooks_that_would_not_run_are_refused() -> None:
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    norm.register_forward_hook(lambda *_: None)
    with pytest.raises(ArgumentValueError, match="hooks"):
        tc.nn.ConvBatchNorm2d.of(conv, norm)
    conv.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ArgumentValueError, match="conv"):
        tc.nn.ConvBatchNorm2d.of(conv, nn.BatchNorm2d(4))


def test_a_normalisation_without_bias(device: torch.device) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(device)
    plain[1].bias = None
    nn.init.normal_(plain[1].weight, 1.0, 0.3)
    ours = tc.nn.ConvBatchNorm2d.of(*copy.deepcopy(plain))
    x = torch.randn(2, 3, 5, 5, device=device)
    # PyTorch 2.13 makes them so; where its own module cannot do without, the function can.
    for training in (True, False):
        ours.train(training)
        norm = plain[1]
        y = nn.functional.batch_norm(
            plain[0](x), norm.running_mean, norm.running_var, norm.weight, None, training
        )
        same(ours(x), y)


def test_evaluation_in_half_precision_has_its_eps(device: torch.device) -> None:
    layer = tc.nn.ConvBatchNorm2d(3, 4, 3, eps=1e-8, device=device).half().eval()
    layer.norm.running_var.fill_(0.0)
    x = torch.randn(2, 3, 5, 5, device=device).half() * 1e-3
    y = layer(x)
    assert y.isfinite().all()
    norm = layer.norm
    wide = nn.functional.conv2d(x.float(), layer.conv.weight.float())
    scale = norm.weight.float() * (norm.running_var.float() + 1e-8).rsqrt()
    torch.testing.assert_close(
        y.float(), wide * scale[:, None, None], rtol=5e-3, atol=5e-3 * wide.abs().max().item() * 1e4
    )


def test_an_activation_that_is_replaced() -> None:
    layer = tc.nn.ConvBatchNorm2d(3, 4, 3, activation=torch.relu)
    x = torch.randn(2, 3, 6, 6)
    assert layer(x).min() == 0
    layer.activation = None
    assert layer(x).min() < 0


@pytest.mark.parametrize("rank", [1, 2])
def test_compiled_without_a_break(rank: int, device: torch.device) -> None:
    layer = RANKS[rank][2](3, 4, 3, padding=1, activation=torch.relu, device=device)
    last = RANKS[rank][2](4, 2, 3, activation=lambda v: v * 2.0, device=device)
    x = torch.randn(2, 3, *(5,) * rank, device=device)

    def chain(x: Tensor) -> Tensor:
        return last(layer.pending(x)) + last(layer(x))

    def results(fn: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
        y = fn(x)
        return y, torch.autograd.grad(y.square().sum(), [*layer.parameters(), *last.parameters()])

    same(results(torch.compile(chain, backend="aot_eager", fullgraph=True)), results(chain))
