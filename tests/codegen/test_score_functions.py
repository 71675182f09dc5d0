"""What FlexAttention takes as a score function is taken here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tritonconv.codegen import Argument, NotScalarError, Role, trace

from .run_scalar import run

pytestmark = pytest.mark.interpreter

B, H, N = 2, 3, 6
NAMES = ("b", "h", "q_idx", "kv_idx")
ARGUMENTS = (
    Argument("score", torch.float32, Role.VALUE),
    *(Argument(name, torch.int32, Role.COORD) for name in NAMES),
)

torch.manual_seed(0)
slopes = torch.exp2(-torch.arange(1.0, H + 1)).requires_grad_()
relative = torch.randn(H, 2 * N - 1, requires_grad=True)
half_bias = torch.randn(H, N, N).to(torch.bfloat16).requires_grad_()
document = torch.tensor([0, 0, 1, 1, 1, 2])
offsets = torch.tensor([0, 2, 5])
prefix = torch.tensor([2, 4])
scale = torch.tensor(0.7, requires_grad=True)


def alibi(score, b, h, q_idx, kv_idx):
    return score + slopes[h] * (kv_idx - q_idx)


def relative_bias(score, b, h, q_idx, kv_idx):
    return score + relative[h, q_idx - kv_idx + N - 1]


def soft_cap(score, b, h, q_idx, kv_idx):
    return 20.0 * torch.tanh(score / 20.0)


def document_mask(score, b, h, q_idx, kv_idx):
    return torch.where(document[q_idx] == document[kv_idx], score, -float("inf"))


def sliding_window(score, b, h, q_idx, kv_idx):
    inside = (q_idx - kv_idx <= 2) & (q_idx >= kv_idx)
    return torch.where(inside, score, float("-inf"))


def causal(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx >= kv_idx, score, -float("inf"))


def prefix_lm(score, b, h, q_idx, kv_idx):
    return torch.where((kv_idx < prefix[b]) | (q_idx >= kv_idx), score, -float("inf"))


def document_offsets(score, b, h, q_idx, kv_idx):
    position = q_idx - offsets[document[q_idx]]
    other = kv_idx - offsets[document[kv_idx]]
    return score + slopes[h] * (position - other).abs() * scale


def half_precision_bias(score, b, h, q_idx, kv_idx):
    return score * scale + half_bias[h, q_idx, kv_idx]


def constant_index(score, b, h, q_idx, kv_idx):
    return score + relative[-1, 0] + relative[h, -2]


SCORES = [
    alibi,
    relative_bias,
    soft_cap,
    document_mask,
    sliding_window,
    causal,
    prefix_lm,
    document_offsets,
    half_precision_bias,
    constant_index,
]


def grid() -> list[torch.Tensor]:
    axes = torch.meshgrid(*(torch.arange(n) for n in (B, H, N, N)), indexing="ij")
    return [axis.reshape(-1).to(torch.int32) for axis in axes]


@pytest.mark.parametrize("score", SCORES, ids=lambda f: f.__name__)
def test_score_function(score):
    coords = grid()
    scores = torch.randn(coords[0].numel())
    function = trace(score, ARGUMENTS)
    x = scores.clone().requires_grad_()
    vectors = [c.long() for c in coords]
    expected = score(x, *vectors)
    (got,) = run(function, scores, *coords)
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-5)

    grad = torch.randn_like(scores)
    learned = [t for t in function.captures if t.requires_grad]
    wanted = torch.autograd.grad(expected, [x, *learned], grad)
    floating = [k for k, load in enumerate(function.loads) if load.dtype.is_floating_point]
    vjp = function.vjp(("score", *(f"load:{k}" for k in floating)))
    parts = run(vjp.with_roles(grad_out=Role.VALUE), scores, *coords, grad)
    torch.testing.assert_close(parts[0], wanted[0], rtol=1e-5, atol=1e-5)
    sums = {id(t): torch.zeros(t.numel()) for t in learned}
    for position, k in enumerate(floating):
        tensor = function.captures[function.loads[k].capture]
        sums[id(tensor)].index_add_(0, parts[2 + 2 * position], parts[1 + 2 * position])
    for tensor, target in zip(learned, wanted[1:], strict=True):
        tolerance = 1e-4 if tensor.dtype is torch.float32 else 2e-2
        found = sums[id(tensor)].view(tensor.shape)
        torch.testing.assert_close(found, target.float(), rtol=tolerance, atol=tolerance)


def test_indexing_in_steps():
    def steps(score, b, h, q_idx, kv_idx):
        return score + relative[h][q_idx] + half_bias[..., kv_idx][-1, 2:][q_idx]

    with pytest.raises(NotScalarError, match="slice"):
        trace(steps, ARGUMENTS)

    def whole(score, b, h, q_idx, kv_idx):
        return score + relative[h][q_idx] + half_bias[..., kv_idx][-1, :][q_idx]

    coords = grid()
    scores = torch.randn(coords[0].numel())
    _, h, q, k = (c.long() for c in coords)
    (got,) = run(trace(whole, ARGUMENTS), scores, *coords)
    expected = scores + relative[h, q] + half_bias[-1, q, k].float()
    torch.testing.assert_close(got, expected.detach())


def test_load_patterns():
    per_head = trace(alibi, ARGUMENTS)
    assert per_head.load_pattern(0) == ("h",)
    assert trace(relative_bias, ARGUMENTS).load_pattern(0) is None
    whole = trace(half_precision_bias, ARGUMENTS)
    assert [whole.load_pattern(k) for k in range(2)] == [(), ("h", "q_idx", "kv_idx")]
    assert whole.loads[1].dtype is torch.float32
    assert whole.captures[1] is half_bias


def test_reads():
    function = trace(alibi, ARGUMENTS)
    assert [function.reads(n) for n in ("score", *NAMES)] == [True, False, True, True, True]
    vjp = function.vjp(("score",))
    assert not vjp.reads("score")
    assert not vjp.reads("load:0")
    assert vjp.reads("grad_out")


def test_wide_addresses_are_64_bit():
    function = trace(relative_bias, ARGUMENTS).with_wide()
    assert "tl.cast(h, tl.int64) * strides[0]" in function.source
    coords = grid()
    scores = torch.randn(coords[0].numel())
    (got,) = run(function, scores, *coords)
    torch.testing.assert_close(got, function(scores, *coords).detach())


def test_blocks_of_broadcast_shapes(device):
    """Scalars, columns and rows of coordinates meet a two-dimensional block of scores."""
    from tritonconv.codegen.modules import load, write

    source = """import triton
import triton.language as tl


@triton.jit
def kernel(x_ptr, o_ptr, ptrs, strides, b, h, FN: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    q = tl.arange(0, M)[:, None]
    k = tl.arange(0, N)[None, :]
    mask = (q < 6) & (k < 6)
    x = tl.load(x_ptr + q * 6 + k, mask=mask, other=0)
    tl.store(o_ptr + q * 6 + k, FN(x, b, h, q, k, mask, ptrs, strides), mask=mask)
"""
    kernel = load(write(source)).kernel

    def score(score, b, h, q_idx, kv_idx):
        allowed = ((scale > 0) & (h >= 0)) & (q_idx >= kv_idx)
        return torch.where(allowed, score * slopes[h] + relative[h, q_idx - kv_idx + 5], 0.0)

    function = trace(score, ARGUMENTS)
    x, out = torch.randn(6, 6), torch.full((6, 6), float("nan"))
    captures = tuple(c.detach().to(device) for c in function.captures)
    strides = tuple(s for c in captures for s in c.stride())
    out = out.to(device)
    kernel[(1,)](x.to(device), out, captures, strides, 1, 2, FN=function.jit, M=8, N=8)
    q, k = torch.arange(6)[:, None], torch.arange(6)[None, :]
    expected = score(x, torch.tensor(1), torch.tensor(2), q, k)
    torch.testing.assert_close(out.cpu(), expected.detach())


def test_float64_constants_are_not_rounded():
    argument = (Argument("x", torch.float64, Role.VALUE),)

    def f(x):
        return torch.where(x > 0.1, x * 0.1 + 1e-300, 0.3) + F.softplus(x, beta=1.1)

    x = torch.randn(32, dtype=torch.float64)
    x[:2] = torch.tensor([0.1, float(torch.tensor(0.1))], dtype=torch.float64)
    (got,) = run(trace(f, argument), x)
    torch.testing.assert_close(got, f(x), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_explicit_half_precision_casts_round(dtype):
    def f(x):
        # 0.75 is exact: PyTorch's CPU kernel of + rounds a number beside bfloat16, CUDA's does not.
        return (x.to(dtype) * 1.1 + 0.75).float() * x

    x = torch.randn(64)
    (got,) = run(trace(f, (Argument("x", torch.float32, Role.VALUE),)), x)
    torch.testing.assert_close(got, f(x), rtol=0, atol=0)
