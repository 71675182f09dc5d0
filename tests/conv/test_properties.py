"""What a convolution is, whatever computes it: linear, shift-equivariant, with exact adjoints."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import tritonconv as tc

pytestmark = pytest.mark.interpreter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)

# (input channels, output channels, groups, kernel, stride, padding, dilation)
GEOMETRIES = st.sampled_from(
    [
        (3, 4, 1, 3, 1, 1, 1),
        (9, 5, 1, 3, 2, 1, 1),
        (9, 5, 1, 2, 1, 0, 3),
        (9, 7, 1, 1, 1, 0, 1),
        (3, 6, 1, 2, 2, 0, 1),
        (4, 6, 2, 3, 1, 2, 1),
        (4, 8, 4, 3, 2, 1, 1),
    ]
)
SIZES = st.tuples(st.integers(1, 2), st.integers(5, 8), st.integers(5, 8))
SEEDS = st.integers(0, 1000)


def drawn(
    geometry: tuple[int, ...], size: tuple[int, int, int], seed: int, count: int = 1
) -> tuple[list[Tensor], Tensor, dict[str, int]]:
    """Inputs, a weight and the options of a call, of small integers: every sum is exact."""
    channels, filters, groups, kernel, stride, padding, dilation = geometry
    n, h, w = size
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator).float().to(DEVICE)

    inputs = [integers(n, channels, h, w) for _ in range(count)]
    weight = integers(filters, channels // groups, kernel, kernel)
    options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    return inputs, weight, options


@few
@given(GEOMETRIES, SIZES, SEEDS, st.integers(-3, 3))
def test_linear_in_the_input_and_in_the_weight(
    geometry: tuple[int, ...], size: tuple[int, int, int], seed: int, factor: int
) -> None:
    (a, b), w, options = drawn(geometry, size, seed, 2)
    combined = tc.conv2d(factor * a + b, w, **options)
    assert torch.equal(combined, factor * tc.conv2d(a, w, **options) + tc.conv2d(b, w, **options))
    v = w.flip(0)
    combined = tc.conv2d(a, factor * w + v, **options)
    assert torch.equal(combined, factor * tc.conv2d(a, w, **options) + tc.conv2d(a, v, **options))


@few
@given(GEOMETRIES, SIZES, SEEDS, st.integers(0, 2), st.integers(0, 2))
def test_shift_equivariant(
    geometry: tuple[int, ...], size: tuple[int, int, int], seed: int, down: int, right: int
) -> None:
    """An input moved by whole strides in a frame of zeros gives the moved output."""
    (x,), w, options = drawn(geometry, size, seed)
    stride, reach = options["stride"], 2 * options["stride"]
    moved = torch.nn.functional.pad(
        x,
        (right * stride, reach - right * stride, down * stride, reach - down * stride),
    )
    frame = torch.nn.functional.pad(x, (0, reach, 0, reach))
    shifted, y = tc.conv2d(moved, w, **options), tc.conv2d(frame, w, **options)
    height, width = y.shape[2] - down, y.shape[3] - right
    # Outputs that saw the low padding before the shift see it moved in: zeros either way.
    assert torch.equal(shifted[..., down:, right:], y[..., :height, :width])


@few
@given(GEOMETRIES, SIZES, SEEDS)
def test_gradients_are_the_adjoints(
    geometry: tuple[int, ...], size: tuple[int, int, int], seed: int
) -> None:
    """<conv(x, w), g> = <x, dgrad(g, w)> = <w, wgrad(g, x)>, exactly in integers."""
    (x,), w, options = drawn(geometry, size, seed)
    x.requires_grad_(), w.requires_grad_()
    y = tc.conv2d(x, w, **options)
    g = torch.randint(-3, 4, y.shape, generator=torch.Generator().manual_seed(seed)).to(y)
    grad_x, grad_w = torch.autograd.grad(y, (x, w), g)
    products = [(a.double() * b.double()).sum() for a, b in ((y, g), (x, grad_x), (w, grad_w))]
    assert products[0] == products[1] == products[2]


@few
@given(GEOMETRIES, SIZES, SEEDS)
def test_images_of_a_batch_do_not_meet(
    geometry: tuple[int, ...], size: tuple[int, int, int], seed: int
) -> None:
    (a, b), w, options = drawn(geometry, size, seed, 2)
    together = tc.conv2d(torch.cat([a, b]), w, **options)
    apart = torch.cat([tc.conv2d(a, w, **options), tc.conv2d(b, w, **options)])
    assert torch.equal(together, apart)


@few
@given(GEOMETRIES, SIZES, SEEDS)
def test_the_same_bits_twice(
    geometry: tuple[int, ...], size: tuple[int, int, int], seed: int
) -> None:
    (x,), w, options = drawn(geometry, size, seed)
    x, w = torch.sin(x).requires_grad_(), torch.cos(w).requires_grad_()
    runs = []
    for _ in range(2):
        y = tc.conv2d(x, w, epilogue=torch.tanh, **options)
        runs.append((y, *torch.autograd.grad(y.sum(), (x, w))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
