"""Conversion and folding of one- and three-dimensional and of transposed convolutions."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import tritonconv as tc
from tritonconv.nn import convert, revert

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SIZE = (6, 8, 4)
RANKS = pytest.mark.parametrize("rank", CONVS)


class Autoencoder(nn.Module):
    """Down and up again: strided, dilated, depthwise and transposed convolutions with norms."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        conv, up, norm = CONVS[rank], TRANSPOSED[rank], NORMS[rank]
        self.down = nn.Sequential(
            conv(2, 4, 3, stride=2, padding=1, bias=False), norm(4), nn.ReLU(inplace=True)
        )
        self.depthwise = nn.Sequential(conv(4, 4, 3, padding="same", groups=4), norm(4), nn.SiLU())
        self.dilated = conv(4, 4, 3, padding=2, dilation=2)
        self.up = nn.Sequential(
            up(4, 4, 3, stride=2, padding=1, output_padding=1, bias=False), norm(4), nn.GELU()
        )
        self.sized, self.sized_norm = up(4, 3, 2, stride=2), norm(3)
        self.size = [2 * size + 1 for size in SIZE[:rank]]

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        y = y + torch.tanh(self.dilated(self.depthwise(y)))
        y = self.up(y)
        return self.sized_norm(self.sized(y, output_size=self.size))


def trained(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in module.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


def sample(rank: int) -> Tensor:
    return torch.randn(2, 2, *SIZE[:rank], generator=torch.Generator().manual_seed(1))


@RANKS
@pytest.mark.parametrize("fold", [False, True], ids=["swap", "fold"])
def test_results_gradients_and_state_stay(rank: int, fold: bool) -> None:
    torch.manual_seed(0)
    model = trained(Autoencoder(rank))
    plain, state = copy.deepcopy(model), dict(model.state_dict(keep_vars=True))
    x = sample(rank)
    report = convert(model, fold=fold)
    assert len(report.converted) == 5 and not report.kept
    assert {row.kind for row in report.converted} == {f"Conv{rank}d", f"ConvTranspose{rank}d"}
    assert f"tritonconv.nn.ConvTranspose{rank}d" in str(report)
    assert all(model.state_dict(keep_vars=True)[name] is value for name, value in state.items())
    expected, result = plain(x), model(x)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), list(plain.parameters()))
    found = torch.autograd.grad(result.square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    revert(model)
    for name, module in plain.named_modules():
        assert type(model.get_submodule(name)) is type(module)
        assert set(model.get_submodule(name).__dict__) == set(module.__dict__)
    assert torch.equal(model(x), expected)


@RANKS
def test_what_is_folded(rank: int) -> None:
    model = trained(Autoencoder(rank))
    report = convert(model, fold=True)
    assert {row.name: row.folded for row in report.converted} == {
        "down.0": ("down.1", "down.2"),
        "depthwise.0": ("depthwise.1", "depthwise.2"),
        "dilated": (),
        "up.0": ("up.1", "up.2"),
        "sized": ("sized_norm",),
    }
    assert f"folds BatchNorm{rank}d + GELU" in repr(model)
    again = pickle.loads(pickle.dumps(model))
    x = sample(rank)
    torch.testing.assert_close(again(x), model(x))
    assert isinstance(again.up[0], TRANSPOSED[rank])


def test_a_norm_of_another_rank_is_not_folded() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 3, (1, 3)), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x).squeeze(2))

    class Unbatched(Rows):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))  # (channels, 1, width) of an unbatched map

    for kind, x in ((Rows, torch.randn(2, 2, 1, 5)), (Unbatched, torch.randn(2, 3, 5))):
        model = trained(kind())
        expected = model(x)
        (row,) = convert(model, fold=True).converted
        assert row.folded == () and row.reason
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_causal_layer_of_ours_is_folded_and_given_back() -> None:
    model = trained(
        nn.Sequential(tc.nn.Conv1d(2, 4, 3, padding="causal", dilation=2), nn.BatchNorm1d(4))
    )
    x = sample(1)
    with torch.no_grad():
        expected = model(x)
        (row,) = convert(model, fold=True).converted
        assert row.folded == ("1",) and row.kind == "Conv1d"
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        revert(model)
    assert type(model[0]) is tc.nn.Conv1d and model[0].epilogue is None


@RANKS
def test_folded_and_compiled(rank: int) -> None:
    torch._dynamo.reset()
    model = trained(Autoencoder(rank))
    x = sample(rank)
    with torch.no_grad():
        expected = model(x)
        convert(model, fold=True)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
