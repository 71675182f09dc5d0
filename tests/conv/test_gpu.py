"""Convolution on a real GPU: ``pytest -m gpu``. The other kernel tests run there as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tritonconv as tc
from tritonconv.conv.dispatch import OPERATORS, make_runner
from tritonconv.conv.problem import Direction
from tritonconv.runtime.compat import DIRECT_LAUNCH_VERSIONS, TRITON_VERSION
from tritonconv.runtime.device import device_facts
from tritonconv.runtime.settings import settings
from tritonconv.runtime.tables import Choice, Tier

from .aot_plans import LAYERS, fitting, representative
from .cases import rank_of
from .oracle import assert_accurate, plain_conv
from .test_algorithms import run_and_check

pytestmark = pytest.mark.gpu

PRECISIONS = {
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "ieee": {"dtype": "float32", "precision": "ieee"},
    "tf32": {"dtype": "float32", "precision": "tf32"},
    "tf32x3": {"dtype": "float32", "precision": "tf32x3"},
}


def served() -> list[tuple[str, Direction, str]]:
    return [
        (layer, direction, algorithm.name)
        for (direction, rank), operator in OPERATORS.items()
        for layer, fields in LAYERS.items()
        if rank == rank_of(fields)
        for algorithm in operator.candidates(operator.parse(fields))
        if algorithm.name != "aten"
    ]


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("layer", "direction", "algorithm"), served(), ids=str)
def test_layers_of_real_networks(
    layer: str, direction: Direction, algorithm: str, precision: str, layout: str
) -> None:
    fields = {**LAYERS[layer], **PRECISIONS[precision], "layout": layout, "N": 3}
    run_and_check(fields, direction, algorithm, torch.device("cuda"))


@pytest.mark.parametrize(("layer", "direction", "algorithm"), served(), ids=str)
def test_representative_configs(layer: str, direction: Direction, algorithm: str) -> None:
    operator = OPERATORS[direction, rank_of(LAYERS[layer])]
    fields = {**LAYERS[layer], "dtype": "bfloat16", "N": 3}
    space = fitting(operator.algorithm(algorithm), operator.parse(fields), device_facts())
    for config in representative(space).values():
        run_and_check(fields, direction, algorithm, torch.device("cuda"), config)


@pytest.mark.parametrize(("layer", "direction", "algorithm"), served(), ids=str)
def test_fast_and_slow_launch_give_the_same_bits(
    layer: str, direction: Direction, algorithm: str
) -> None:
    operator = OPERATORS[direction, rank_of(LAYERS[layer])]
    problem = operator.parse({**LAYERS[layer], "dtype": "bfloat16", "N": 2})
    config = operator.algorithm(algorithm).configs(problem, device_facts())[0]
    results = []
    for fast in (False, True):
        with settings.override(fast_launch=fast):
            run = make_runner(problem, Choice(algorithm, config, Tier.DEFAULT))
            for _ in range(3):
                generator = torch.Generator("cuda").manual_seed(0)
                tensors = operator.make_tensors(problem, torch.device("cuda"), generator)
                run(*tensors.values())
                results.append([tensors[name] for name in operator.outputs(problem)])
        assert run.executable is not None
        if not fast or TRITON_VERSION not in DIRECT_LAUNCH_VERSIONS:
            assert not run.executable.ready
        else:
            assert run.executable.ready
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def step(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> list[Tensor]:
    """A forward pass, a gradient penalty and its gradients."""
    y = tc.conv2d(x, w, b, padding=1, epilogue=lambda y, r: torch.tanh(y) * r, epilogue_args=(r,))
    (grad_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return [y, *torch.autograd.grad(y.sum() + grad_x.square().sum(), (x, w, b, r))]


def step_inputs(seed: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = ((4, 16, 20, 20), (24, 16, 3, 3), (24,), (4, 24, 20, 20))
    scales = (1.0, 0.1, 1.0, 1.0)
    return [
        (torch.randn(shape, generator=generator, device="cuda") * scale).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def test_cuda_graph() -> None:
    held = step_inputs(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*held)
    for seed in (1, 2):
        fresh = step_inputs(seed)
        with torch.no_grad():
            for old, new in zip(held, fresh, strict=True):
                old.copy_(new)
        graph.replay()
        for a, b in zip(captured, step(*fresh), strict=True):
            assert torch.equal(a, b)


def test_other_streams() -> None:
    inputs = step_inputs(3)
    expected = step(*inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = step(*inputs)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_inductor(dynamic: bool) -> None:
    torch._dynamo.reset()

    def model(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        y = tc.conv2d(torch.sin(x), w, b, padding=1, epilogue=torch.relu)
        return torch.cos(y * 2) + r

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for size in (20, 12):
        inputs = step_inputs(4)
        inputs[0] = inputs[0].detach()[..., :size, :size].requires_grad_()
        inputs[3] = inputs[3].detach()[..., :size, :size].requires_grad_()
        expected, found = model(*inputs), compiled(*inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        wanted = torch.autograd.grad(expected.sum(), inputs)
        grads = torch.autograd.grad(found.sum(), inputs)
        torch.testing.assert_close(grads, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    inputs = step_inputs(5)
    with torch.autocast("cuda", dtype):
        y = tc.conv2d(*inputs[:3], padding=1)
    assert y.dtype is dtype
    grads = torch.autograd.grad(y.float().sum(), inputs[:3])
    assert all(g.dtype is torch.float32 for g in grads)
    low = [t.detach().to(dtype) for t in inputs[:3]]
    exact = plain_conv(*[t.double() for t in low], padding=1)
    assert_accurate(y, exact, plain_conv(*low, padding=1))


def needs_memory(gigabytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


# More than 2^31 elements of the input (batch, channels) or of the output.
LARGE: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "input, dense": ((33, 64, 1024, 1024), (8, 64, 3, 3), {"padding": 1}),
    "output, few channels": ((33, 3, 1024, 1024), (64, 3, 3, 3), {"padding": 1}),
    "input and output, depthwise": (
        (33, 64, 1024, 1024),
        (64, 1, 3, 3),
        {"padding": 1, "groups": 64},
    ),
    "input, 1x1": ((33, 64, 1024, 1024), (8, 64, 1, 1), {}),
    "input, patches": ((33, 64, 1024, 1024), (8, 64, 4, 4), {"stride": 4}),
    "one image, grouped": ((1, 130, 4096, 4096), (10, 13, 3, 3), {"groups": 10, "stride": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE)
def test_offsets_beyond_32_bits(case: str) -> None:
    needs_memory(24)
    x_shape, w_shape, options = LARGE[case]
    x = torch.empty(x_shape, dtype=torch.bfloat16, device="cuda").normal_()
    w = (torch.randn(w_shape, device="cuda") * 0.1).bfloat16()
    leaves = (x.requires_grad_(), w.requires_grad_())
    y = tc.conv2d(*leaves, **options)
    # A gradient of ones has stride 0, so that only the results take memory.
    (grad_x,) = torch.autograd.grad(y, x, torch.ones_like(y[:1, :1, :1, :1]).expand_as(y))
    del leaves
    groups = options.get("groups", 1)
    whole = slice(None)
    if x_shape[0] > 1:  # the first and the last image
        parts = [(whole, whole, image, options) for image in (slice(1), slice(-1, None))]
    else:  # the first and the last group of channels
        options = {**options, "groups": 1}
        parts = []
        for group in (0, groups - 1):
            inner = slice(group * w_shape[1], (group + 1) * w_shape[1])
            outer = slice(group * (w_shape[0] // groups), (group + 1) * (w_shape[0] // groups))
            parts.append((inner, outer, whole, options))
    for inner, outer, image, few in parts:
        low, v = x[image, inner].detach().requires_grad_(), w[outer].detach()
        plain = plain_conv(low, v, **few)
        wide = low.detach().double().requires_grad_()
        exact = plain_conv(wide, v.double(), **few)
        (exact_grad,) = torch.autograd.grad(exact, wide, torch.ones_like(exact))
        (plain_grad,) = torch.autograd.grad(plain, low, torch.ones_like(plain))
        assert_accurate(y[image, outer].detach(), exact.detach(), plain.detach())
        assert_accurate(grad_x[image, inner], exact_grad, plain_grad)
