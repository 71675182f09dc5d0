from __future__ import annotations

import copy
import doctest

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tritonconv.models.vision import attention_unet
from tritonconv.models.vision.attention_unet import (
    AttentionUNet,
    ConvNorm,
    GridAttentionGate,
    build,
)


def count(**options: object) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(1, 4, **options).parameters())


def randomise_norms(module: nn.Module) -> None:
    """Give every normalisation statistics that a wrong fold would not survive."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
            nn.init.normal_(m.bias)
        elif isinstance(m, nn.modules.conv._ConvNd) and m.bias is not None:
            nn.init.normal_(m.bias)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({"gates_per_level": 0}, 5_888_004, id="unet"),
        pytest.param({"gates_per_level": 1}, 6_214_151, id="single-gate"),
        pytest.param({}, 6_473_322, id="multi-gate"),
        pytest.param({"separate_gating": False}, 6_407_018, id="no-gating-convolution"),
        pytest.param({"gate_subsample": 1}, 6_172_266, id="subsample-1"),
        pytest.param(
            {"gates_per_level": 0, "deep_supervision": False},
            5_888_004 - 1_044 + 68,
            id="no-supervision",
        ),
    ],
)
def test_parameters_are_those_of_the_3d_networks_of_the_paper(options, expected):
    assert count(dim=3, **options) == expected


@pytest.mark.parametrize(
    "size", [(16, 16), (1, 63), (17, 40), (33, 7), (123, 31)], ids=lambda s: f"{s[0]}x{s[1]}"
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_any_size(size, training):
    net = AttentionUNet(2, 3, widths=(2, 4, 4, 6, 8)).train(training)
    x = torch.randn(2, 2, *size)
    logits, attention = net(x, return_attention=True)
    assert logits.shape == (2, 3, *size)
    shapes = {level: a.shape for level, a in attention.items()}
    assert shapes == dict.fromkeys((2, 3, 4), (2, 2, *size))
    assert all(a.min() >= 0 and a.max() <= 1 for a in attention.values())
    logits.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_odd_sizes_are_extended_evenly_and_cropped_back():
    net = AttentionUNet(1, 2, widths=(2, 4, 4, 6, 8)).eval()
    x = torch.randn(1, 1, 19, 37)
    extended = F.pad(x, (5, 6, 6, 7), mode="replicate")
    assert extended.shape[2:] == (32, 48)
    torch.testing.assert_close(net(x), net(extended)[..., 6:25, 5:42])


def test_3d_runs_at_odd_sizes():
    net = AttentionUNet(1, 3, dim=3, widths=(2, 4, 6))
    logits, attention = net(torch.randn(2, 1, 5, 8, 11), return_attention=True)
    assert logits.shape == (2, 3, 5, 8, 11)
    assert attention[2].shape == (2, 2, 5, 8, 11)


@pytest.mark.parametrize(
    "options",
    [
        {"gates_per_level": 0},
        {"gates_per_level": 1, "deep_supervision": False},
        {"separate_gating": False, "gate_subsample": 1},
        {"widths": (3, 5)},
    ],
    ids=["plain", "single", "subsample-1", "one-level"],
)
def test_variants_train(options):
    net = build(1, 2, **({"widths": (2, 4, 6)} | options))
    net(torch.randn(2, 1, 16, 16)).sum().backward()
    unused = [n for n, p in net.named_parameters() if p.grad is None]
    assert not unused


def plain_gate(gate: GridAttentionGate, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The gate's equations in plain PyTorch, every intermediate written out."""
    p = dict(gate.named_parameters())
    theta = F.conv2d(x, p["theta.weight"], stride=gate.theta.stride)
    phi = F.conv2d(g, p["phi.weight"], p["phi.bias"])
    phi = F.interpolate(phi, theta.shape[2:], mode="bilinear", align_corners=False)
    alpha = torch.sigmoid(F.conv2d(torch.relu(theta + phi), p["psi.weight"], p["psi.bias"]))
    alpha = F.interpolate(alpha, x.shape[2:], mode="bilinear", align_corners=False)
    y = F.conv2d(alpha * x, p["W.conv.weight"], p["W.conv.bias"])
    norm = gate.W.norm
    y = F.batch_norm(
        y,
        None if gate.training else norm.running_mean,
        None if gate.training else norm.running_var,
        norm.weight,
        norm.bias,
        training=gate.training,
        eps=norm.eps,
    )
    return y, alpha


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("subsample", "coarse"), [(2, (4, 5)), (2, (3, 3)), (1, (4, 5))], ids=["2", "2-resize", "1"]
)
def test_gate_follows_its_equations_with_gradients(training, subsample, coarse):
    torch.manual_seed(0)
    gate = GridAttentionGate(4, 6, 3, subsample=subsample, pass_through_start=False).double()
    randomise_norms(gate)
    gate.train(training)
    x = torch.randn(2, 4, 8, 11, dtype=torch.double, requires_grad=True)
    g = torch.randn(2, 6, *coarse, dtype=torch.double, requires_grad=True)
    expected, expected_alpha = plain_gate(gate, x, g)
    out, alpha = gate(x, g, return_attention=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(alpha, expected_alpha)
    assert alpha.std() / alpha.mean() > 0.1

    inputs = (x, g, *gate.parameters())
    cotangent = torch.randn_like(out)
    ours = torch.autograd.grad(out, inputs, cotangent)
    theirs = torch.autograd.grad(expected, inputs, cotangent)
    torch.testing.assert_close(ours, theirs)


def test_gate_passes_gradcheck_and_gradgradcheck():
    torch.manual_seed(1)
    gate = GridAttentionGate(2, 3, 2, pass_through_start=False).double()
    randomise_norms(gate)
    gate.eval()
    x = torch.randn(1, 2, 4, 5, dtype=torch.double, requires_grad=True)
    g = torch.randn(1, 3, 2, 2, dtype=torch.double, requires_grad=True)
    names, values = zip(*gate.named_parameters(), strict=True)

    def run(x: Tensor, g: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(gate, dict(zip(names, parameters, strict=True)), (x, g))

    inputs = (x, g, *(v.detach().requires_grad_() for v in values))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_gates_start_open():
    gate = GridAttentionGate(4, 8)
    _, alpha = gate(torch.randn(2, 4, 6, 6), torch.randn(2, 8, 3, 3), return_attention=True)
    torch.testing.assert_close(alpha, torch.full_like(alpha, torch.tensor(3.0).sigmoid().item()))
    closed = GridAttentionGate(4, 8, pass_through_start=False)
    assert closed.psi.bias.item() == 0
    assert closed.psi.weight.abs().sum() > 0


def test_open_gates_learn_from_the_first_step_on():
    torch.manual_seed(0)
    net = build(1, 2, widths=(2, 4, 6))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = torch.randn(2, 1, 16, 16)
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    for gate in (m for m in net.modules() if isinstance(m, GridAttentionGate)):
        assert gate.psi.weight.abs().sum() > 0
        assert gate.theta.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_normalisation_in_the_epilogue_equals_normalisation_after(dim, relu):
    torch.manual_seed(0)
    block = ConvNorm(3, 5, 3, relu=relu, dim=dim).double()
    randomise_norms(block)
    block.eval()
    x = torch.randn(2, 3, *(5, 6, 7)[:dim], dtype=torch.double)
    expected = block.norm(block.conv(x))
    torch.testing.assert_close(block(x), torch.relu(expected) if relu else expected)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_attention_in_the_epilogue_equals_attention_before(training, relu):
    torch.manual_seed(0)
    block = ConvNorm(3, 5, 1, relu=relu).double().train(training)
    randomise_norms(block)
    x = torch.randn(2, 3, 6, 7, dtype=torch.double)
    attention = torch.rand(2, 1, 6, 7, dtype=torch.double)
    torch.testing.assert_close(block(x, attention), block(attention * x))
    with pytest.raises(ValueError, match="attention: expected None for a kernel wider than 1"):
        ConvNorm(3, 5, 3)(x.float(), attention.float())


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_pair_stands_for_its_concatenation_to_second_order(training, kernel_size, dim):
    torch.manual_seed(0)
    block = ConvNorm(5, 4, kernel_size, dim=dim).double().train(training)
    randomise_norms(block)
    size = (3, 4, 2)[:dim]
    pair = [torch.randn(2, c, *size, dtype=torch.double, requires_grad=True) for c in (3, 2)]
    leaves = [*pair, block.conv.weight]

    def derivatives(y: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(y.cos().sum(), leaves, create_graph=True)
        return [y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    ours = derivatives(block(tuple(pair)))
    torch.testing.assert_close(ours, derivatives(block(torch.cat(pair, 1))))


class Concatenations(TorchDispatchMode):
    """Notes the shape of everything that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.interpreter
@pytest.mark.parametrize("gates", [1, 2, 3])
def test_skips_are_not_concatenated_and_nothing_else_changes(gates, device, monkeypatch):
    torch.manual_seed(0)
    net = AttentionUNet(1, 2, widths=(4, 6, 8), gates_per_level=gates).to(device)
    randomise_norms(net)
    net.eval()
    x = torch.randn(1, 1, 8, 12, device=device)
    with torch.backends.cudnn.flags(allow_tf32=False), torch.no_grad(), Concatenations() as made:
        logits, attention = net(x, return_attention=True)
    # The maps of attention and the scores, which are of few channels; of three gates, two.
    widest = max(shape[1] for shape in made.shapes)
    assert widest == (2 * 6 if gates == 3 else max(gates, 2 * 2))

    plain = ConvNorm.forward

    def concatenating(self, x, attention=None):
        return plain(self, torch.cat(x, 1) if isinstance(x, tuple) else x, attention)

    monkeypatch.setattr(ConvNorm, "forward", concatenating)
    with torch.backends.cudnn.flags(allow_tf32=False), torch.no_grad():
        expected, maps = net(x, return_attention=True)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(attention, maps, rtol=1e-4, atol=1e-4)


def test_names_in_a_checkpoint_are_those_of_plain_layers():
    names = set(build(1, 2, widths=(2, 4), gates_per_level=0).state_dict())
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    layer = {"conv.weight", "conv.bias", *(f"norm.{name}" for name in norm)}
    blocks = ("encoder.0.0", "encoder.0.1", "centre.0", "centre.1", "decoder.0.0", "decoder.0.1")
    heads = {"heads.0.weight", "heads.0.bias", "fuse.weight", "fuse.bias"}
    assert names == {f"{block}.{name}" for block in blocks for name in layer} | heads


def test_initialisation():
    torch.manual_seed(0)
    net = build(1, 2)
    weight = net.centre[1].conv.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    norm = net.centre[1].norm
    assert norm.weight.mean().item() == pytest.approx(1, abs=0.01)
    assert norm.weight.std().item() == pytest.approx(0.02, rel=0.2)
    biases = {n: p for n, p in net.named_parameters() if n.endswith("bias")}
    assert all((p == (3 if "psi" in n else 0)).all() for n, p in biases.items())


def test_copies_and_state_round_trip():
    net = build(1, 2, widths=(2, 4, 6)).eval()
    twin = copy.deepcopy(net)
    other = build(1, 2, widths=(2, 4, 6)).eval()
    other.load_state_dict(net.state_dict())
    x = torch.randn(1, 1, 12, 12)
    torch.testing.assert_close(twin(x), net(x))
    torch.testing.assert_close(other(x), net(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(0), "in_channels: expected a positive integer, got 0"),
        (lambda: build(1, 1), "num_classes: expected at least 2"),
        (lambda: build(dim=4), "dim: expected 2 or 3, got 4"),
        (lambda: build(widths=(4,)), "widths: expected at least two"),
        (lambda: build(gates_per_level=-1), "gates_per_level: expected 0 or more"),
        (lambda: GridAttentionGate(4, 4, subsample=0), "subsample: expected"),
        (
            lambda: build(widths=(2, 4))(torch.zeros(1, 3, 8, 8)),
            r"input: expected shape \(N, 1, H, W\)",
        ),
        (lambda: build(widths=(2, 4))(torch.zeros(1, 8, 8)), "input: expected shape"),
        (lambda: build(widths=(2, 4))(torch.zeros(1, 1, 0, 8)), "input: expected spatial sides"),
        (
            lambda: GridAttentionGate(1, 1)(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 4)),
            "x: expected spatial sides",
        ),
    ],
)
def test_bad_values_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_integer_images_are_a_type_error():
    with pytest.raises(TypeError, match=r"input: expected a floating dtype, got torch\.uint8"):
        build(widths=(2, 4))(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))


def test_examples_run():
    result = doctest.testmod(attention_unet)
    assert result.attempted > 5
    assert result.failed == 0
