"""The operators inside PyTorch: opcheck, compile, autocast, checkpoint, functional transforms."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import tritonconv as tc

from .oracle import assert_accurate, gradients, plain_conv


class Recorder(TorchDispatchMode):
    """Collects the calls of this library's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "tritonconv":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    def names(self) -> list[str]:
        return [str(func).split(".")[1] for func, _ in self.calls]


def leaves(*shapes: tuple[int, ...], device: torch.device | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(device).requires_grad_() for s in shapes]


def fused(x: Tensor, w: Tensor, b: Tensor, r: Tensor, slope: Tensor, **options: Any) -> Tensor:
    return tc.conv2d(
        x,
        w,
        b,
        padding=1,
        epilogue=lambda y, r, *, c: torch.tanh(y * slope[c]) + r * y,
        epilogue_args=(r,),
        **options,
    )


def fused_transposed(x: Tensor, w: Tensor, b: Tensor, r: Tensor, slope: Tensor) -> Tensor:
    return tc.conv_transpose2d(
        x,
        w.transpose(0, 1),
        b,
        padding=1,
        epilogue=lambda y, r, *, c: torch.tanh(y * slope[c]) + r * y,
        epilogue_args=(r,),
    )


def plain_fused(x: Tensor, w: Tensor, b: Tensor, r: Tensor, slope: Tensor) -> Tensor:
    y = plain_conv(x, w, b, padding=1)
    return torch.tanh(y * slope[:, None, None]) + r * y


def quantised(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():  # opcheck cannot compare operands of float8
        return tc.scaled_conv2d(
            x,
            w,
            scale_output=torch.full((), 0.5, device=x.device),
            epilogue=lambda y, r: torch.relu(y) + r,
            epilogue_args=(torch.ones(5, 4, device=x.device)[:3, :2],),
        )


FUSED_SHAPES = ((2, 3, 5, 4), (4, 3, 3, 3), (4,), (2, 4, 5, 4), (4,))


@functools.cache  # those who ask clone the operands
def recorded(device: torch.device, kernels: bool) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """One call of every operator: of the forward pass, a first and a second derivative."""
    x, w, *_ = inputs = leaves(*FUSED_SHAPES, device=device)
    with tc.backend("auto" if kernels else "torch"), Recorder() as recorder:
        gradients(functools.partial(tc.conv2d, padding=1), (x, w), 2)
        for function in (fused, fused_transposed):
            gradients(function, inputs, 2)
            with torch.no_grad():
                function(*inputs)
        quantised(x, w)
        gradients(lambda x, w: tc.conv2d((x[:, :1], x[:, 1:]), w, padding=1), (x, w), 1)
    return {str(func.name()): (func, args) for func, args in recorder.calls}


def _clone(value: Any, requires_grad: bool) -> Any:
    if isinstance(value, Tensor):
        copy = value.detach().clone(memory_format=torch.preserve_format)
        return copy.requires_grad_(requires_grad and copy.is_floating_point())
    if isinstance(value, (list, tuple)):
        return type(value)(_clone(item, requires_grad) for item in value)
    return value


NORMS = ("tritonconv::batch_norm_", "tritonconv::layer_norm")
"""Of another family, whose own tests check them: tests/norm."""


def operator_names() -> list[str]:
    """All that are registered: a new operator without a recorded call fails."""
    names = {n.split(".")[0] for n in torch._C._dispatch_get_all_op_names()}
    return sorted(n for n in names if n.startswith("tritonconv::") and not n.startswith(NORMS))


FORWARD_ONLY = ("tritonconv::conv_quantized",)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("name", operator_names())
def test_opcheck(name: str, requires_grad: bool, kernels: bool, device: torch.device) -> None:
    # opcheck compares with memory that other calls filled: NaN has no place in it.
    torch.use_deterministic_algorithms(False)
    if requires_grad and name in FORWARD_ONLY:
        pytest.skip("has no gradient, which it says where one is asked for")
    with tc.backend("auto" if kernels else "torch"):
        func, args = recorded(device, kernels)[name]
        torch.library.opcheck(func, _clone(args, requires_grad))


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """A plain convolution, one with a bias, and one with an epilogue and its operand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3)
        self.second = nn.Conv2d(3, 4, 3)
        self.slope = nn.Parameter(torch.rand(4))

    def epilogue(self) -> Callable[..., Tensor]:
        return lambda y, r: torch.tanh(y) + r

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        y = tc.conv2d(x, self.first.weight, stride=2, padding=1)
        y = tc.conv2d(torch.relu(y), self.first.weight, self.first.bias, padding=2, dilation=2)
        y = tc.conv2d(
            y,
            self.second.weight,
            self.second.bias,
            padding="same",
            epilogue=self.epilogue(),
            epilogue_args=(r,),
        )
        return y * self.slope[:, None, None]


class CapturingOutside(Net):
    """The epilogue reads a parameter; the function is made once, outside the compiled code."""

    def __init__(self) -> None:
        super().__init__()
        slope = self.slope
        self.made = lambda y, r, *, c: torch.where(y > 0, y, y * slope[c]) + r

    def epilogue(self) -> Callable[..., Tensor]:
        return self.made


class CapturingInside(Net):
    """The function that reads the parameter is made anew in the compiled code."""

    def epilogue(self) -> Callable[..., Tensor]:
        slope = self.slope
        return lambda y, r, *, c: torch.where(y > 0, y, y * slope[c]) + r


# Older releases refuse to compile a function made in compiled code that closes over a parameter.
COMPILES_CLOSURES = pytest.mark.skipif(
    TorchVersion(torch.__version__) < (2, 13),
    reason="torch.compile of a closure over a parameter needs PyTorch 2.13",
)
NETS = pytest.mark.parametrize(
    "net", [Net, CapturingOutside, pytest.param(CapturingInside, marks=COMPILES_CLOSURES)]
)


@NETS
@pytest.mark.interpreter
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(net: type[Net], dynamic: bool, kernels: bool, device: torch.device) -> None:
    with tc.backend("auto" if kernels else "torch"):
        # Not moved to the device afterwards: the captured parameter is the module's own.
        with device:
            model = net()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for n, size in ((2, 6), (3, 8), (2, 10)):
            x = torch.randn(n, 3, size, size, device=device, requires_grad=True)
            r = torch.randn(n, 4, size // 2, 1, device=device, requires_grad=True)
            inputs = [x, r, *model.parameters()]
            expected, result = model(x, r), compiled(x, r)
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
            wanted = torch.autograd.grad(expected.square().sum(), inputs)
            found = torch.autograd.grad(result.square().sum(), inputs)
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@NETS
@pytest.mark.usefixtures("dynamo")
def test_one_graph_serves_all_sizes(net: type[Net]) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net(), fullgraph=True, backend=counter, dynamic=True)
    for n, size in ((2, 14), (6, 16), (8, 18), (9, 22)):
        compiled(torch.randn(n, 3, size, size), torch.randn(n, 4, size // 2, size // 2))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("dynamo")
def test_compiled_results_keep_the_memory_format() -> None:
    model = Net().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x, torch.ones(1))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.interpreter
def test_autocast(device: torch.device) -> None:
    inputs = leaves(*FUSED_SHAPES, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        result = fused(*inputs)
        bare = tc.conv2d(inputs[0], inputs[1])
        double = tc.conv2d(inputs[0].double(), inputs[1].double())
    assert result.dtype == bare.dtype == torch.bfloat16 and double.dtype is torch.float64
    grads = torch.autograd.grad(result.float().sum(), inputs)
    assert all(g.dtype is torch.float32 for g in grads)
    x, w, b = (t.detach().bfloat16() for t in inputs[:3])
    exact = plain_fused(x.double(), w.double(), b.double(), *(t.double() for t in inputs[3:]))
    assert_accurate(result, exact, plain_fused(x, w, b, *inputs[3:]).bfloat16())


@pytest.mark.interpreter
def test_autocast_is_noticed_from_call_to_call(device: torch.device) -> None:
    x, w = leaves((2, 16, 6, 6), (16, 16, 3, 3), device=device)
    kinds = (None, torch.bfloat16, torch.float16, None)
    for dtype in kinds * 3:  # every kind first met, remembered, and met again after another
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            y = tc.conv2d(x, w, padding=1)
            plain = tc.conv2d(x.detach(), w.detach(), padding=1)
        wanted = dtype or torch.float32
        operands = [t.detach().to(wanted).requires_grad_() for t in (x, w)]
        expected = tc.conv2d(*operands, padding=1)
        assert y.dtype is plain.dtype is wanted
        assert torch.equal(y, expected) and torch.equal(plain, expected)
        grads = torch.autograd.grad(y, (x, w), torch.ones_like(y))
        for mine, theirs in zip(
            grads, torch.autograd.grad(expected, operands, torch.ones_like(y)), strict=True
        ):
            assert mine.dtype is torch.float32 and torch.equal(mine, theirs.float())


def counted(policy: CheckpointPolicy | None) -> tuple[list[str], list[Tensor]]:
    """Names of the operators of a forward and a backward pass, and the gradients."""
    inputs = leaves(*FUSED_SHAPES)
    options: dict[str, Any] = {"use_reentrant": False}
    if policy is not None:

        def choose(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            return policy if "tritonconv" in str(func) else CheckpointPolicy.PREFER_RECOMPUTE

        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, choose)
    with Recorder() as recorder:
        y = checkpoint(lambda *t: fused(*t).sin(), *inputs, **options)
        grads = torch.autograd.grad(y.sum(), inputs)
    return recorder.names(), list(grads)


def test_checkpoint_and_its_policies() -> None:
    inputs = leaves(*FUSED_SHAPES)
    expected = torch.autograd.grad(fused(*inputs).sin().sum(), inputs)
    forwards = {}
    for policy in (None, CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.MUST_SAVE):
        names, grads = counted(policy)
        torch.testing.assert_close(grads, list(expected))
        forwards[policy] = sum(name.startswith("conv_epilogue") for name in names)
    assert forwards == {
        None: 2,
        CheckpointPolicy.MUST_RECOMPUTE: 2,
        CheckpointPolicy.MUST_SAVE: 1,
    }


def test_func_grad() -> None:
    inputs = [t.detach() for t in leaves(*FUSED_SHAPES)]

    def loss(fn: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return fn(*tensors).sin().sum()

    for ours, plain, count in (
        (functools.partial(tc.conv2d, padding=1), functools.partial(plain_conv, padding=1), 2),
        (fused, plain_fused, 4),
    ):
        found = torch.func.grad(functools.partial(loss, ours), tuple(range(count)))
        wanted = torch.func.grad(functools.partial(loss, plain), tuple(range(count)))
        rest = inputs[: 2 if count == 2 else None]
        torch.testing.assert_close(found(*rest), wanted(*rest), rtol=1e-4, atol=1e-4)

        def twice(grad: Callable[..., Any], *tensors: Tensor) -> Tensor:
            return sum(g.square().sum() for g in grad(*tensors))  # type: ignore[return-value]

        second = [
            torch.func.grad(functools.partial(twice, grad), tuple(range(count)))(*rest)
            for grad in (found, wanted)
        ]
        torch.testing.assert_close(second[0], second[1], rtol=1e-3, atol=1e-3)


def test_func_grad_of_a_captured_tensor() -> None:
    inputs = [t.detach() for t in leaves(*FUSED_SHAPES)]
    grads = [
        torch.func.grad(lambda s, fn=fn: fn(*inputs[:4], s).sin().sum())(inputs[4])
        for fn in (fused, plain_fused)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("epilogue", [None, torch.tanh], ids=["plain", "epilogue"])
def test_forward_mode_is_right_or_refused(epilogue: Callable[..., Tensor] | None) -> None:
    x, w, *_ = (t.detach() for t in leaves(*FUSED_SHAPES))
    tangent = torch.randn(x.shape)
    try:
        _, found = torch.func.jvp(lambda x: tc.conv2d(x, w, epilogue=epilogue), (x,), (tangent,))
    except (RuntimeError, NotImplementedError):
        return
    _, wanted = torch.func.jvp(lambda x: plain_conv(x, w, epilogue=epilogue), (x,), (tangent,))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_vmap_falls_back_with_a_warning() -> None:
    x, w = torch.randn(3, 1, 2, 5, 5), torch.randn(4, 2, 3, 3)
    with pytest.warns(UserWarning, match=r"(?s)tritonconv.*vmap|vmap.*tritonconv"):
        result = torch.func.vmap(lambda x: tc.conv2d(x, w))(x)
    expected = torch.stack([plain_conv(one, w) for one in x])
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_vmap_is_right() -> None:
    x, w = torch.randn(3, 1, 2, 5, 5), torch.randn(4, 2, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = torch.func.vmap(lambda x: tc.conv2d(x, w))(x)
    expected = torch.stack([plain_conv(one, w) for one in x])
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_meta_and_fake_tensors() -> None:
    x, w = torch.empty(2, 3, 8, 8, device="meta"), torch.empty(4, 3, 3, 3, device="meta")
    assert tc.conv2d(x, w, stride=2).shape == (2, 4, 3, 3)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
        y = tc.conv2d(x, torch.empty(4, 3, 3, 3), torch.empty(4), epilogue=torch.relu)
    assert y.shape == (2, 4, 6, 6) and y.is_contiguous(memory_format=torch.channels_last)


def test_inference_mode_and_inference_tensors() -> None:
    x, w, b, *_ = leaves(*FUSED_SHAPES)
    with torch.inference_mode():
        y = tc.conv2d(x, w, b, epilogue=torch.tanh)
        again = tc.conv2d(torch.ones(1, 4, 3, 2), w.transpose(0, 1)[:, :, :1, :1])
    assert y.is_inference() and again.is_inference()
    torch.testing.assert_close(y, plain_conv(x, w, b).tanh(), rtol=1e-4, atol=1e-4)


def test_parts_that_need_no_gradient_get_none() -> None:
    for wanted in ((True, False), (False, True)):
        x, w = (
            torch.randn(s, requires_grad=r)
            for s, r in zip(((1, 3, 5, 5), (4, 3, 3, 3)), wanted, strict=True)
        )
        with Recorder() as recorder:
            tc.conv2d(x, w, epilogue=torch.tanh).sum().backward()
        assert ("conv_dgrad" in recorder.names(), "conv_wgrad" in recorder.names()) == wanted
        assert (x.grad is not None, w.grad is not None) == wanted
