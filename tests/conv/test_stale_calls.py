"""Prepared calls are never stale: whatever an epilogue reads may change between them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.testing._internal.two_tensor import TwoTensor

import tritonconv as tc
from tritonconv.conv import calls
from tritonconv.conv.epilogue import static_identity

from .oracle import plain_conv

pytestmark = pytest.mark.interpreter


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[None]:
    with tc.backend(request.param):
        yield


BOTH = pytest.mark.parametrize("server", ["auto", "torch"], ids=["kernels", "torch"], indirect=True)


def evaluated(text: str, scope: dict[str, Any]) -> Any:
    """A function whose globals are ``scope``, made anew by every call from equal code."""
    return eval(compile(text, "epilogue", "eval"), scope)


def operands(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    x, w = torch.randn(1, 3, 6, 6, device=device), torch.randn(4, 3, 3, 3, device=device)
    return x, w, plain_conv(x, w)


@BOTH
@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("anew", [True, False], ids=["made anew", "one function"])
def test_a_rebound_global_function(anew: bool, device: torch.device) -> None:
    x, w, y = operands(device)
    scope: dict[str, Any] = {"act": None}
    made = evaluated("lambda y: act(y)", scope)
    for act in (torch.relu, torch.tanh, lambda y: 7 * y, torch.relu):
        scope["act"] = act
        for _ in range(2):
            epilogue = evaluated("lambda y: act(y)", scope) if anew else made
            torch.testing.assert_close(tc.conv2d(x, w, epilogue=epilogue), act(y))


@BOTH
@pytest.mark.usefixtures("server")
def test_a_rebound_global_number(device: torch.device) -> None:
    x, w, y = operands(device)
    scope: dict[str, Any] = {}
    for slope in (2, 0.5, 2.0, True, 2):
        scope["slope"] = slope
        for _ in range(2):
            epilogue = evaluated("lambda y: y * slope", scope)
            torch.testing.assert_close(tc.conv2d(x, w, epilogue=epilogue), y * slope)


@BOTH
@pytest.mark.usefixtures("server")
def test_globals_that_are_none_keep_their_place(device: torch.device) -> None:
    x, w, y = operands(device)
    scope: dict[str, Any] = {}
    text = "lambda y: (y * 2 if a is None else y * a) + (100 if b is None else b)"
    for a, b in ((None, 2), (2, None), (None, None), (3, 3), (None, 2)):
        scope.update(a=a, b=b)
        epilogue = evaluated(text, scope)
        torch.testing.assert_close(tc.conv2d(x, w, epilogue=epilogue), epilogue(y))


@BOTH
@pytest.mark.usefixtures("server")
def test_zeros_of_two_signs(device: torch.device) -> None:
    x, w, _ = operands(device)
    scope: dict[str, Any] = {"torch": torch}
    for zero in (-0.0, 0.0, -0.0):
        scope["zero"] = zero
        for _ in range(2):
            epilogue = evaluated("lambda y: torch.where(y > 1e9, y, zero)", scope)
            result = tc.conv2d(x, w, epilogue=epilogue)
            assert bool(result.signbit().all()) == (str(zero) == "-0.0")


@BOTH
@pytest.mark.usefixtures("server")
def test_a_changed_activation_module(device: torch.device) -> None:
    x, w, y = operands(device)
    act = torch.nn.LeakyReLU(0.5)
    for slope in (0.5, 0.1, 0.5):
        act.negative_slope = slope
        for _ in range(2):
            expected = functional.leaky_relu(y, slope)
            torch.testing.assert_close(tc.conv2d(x, w, epilogue=act), expected)
    act.forward = torch.tanh  # type: ignore[method-assign]
    torch.testing.assert_close(tc.conv2d(x, w, epilogue=act), torch.tanh(y))
    assert static_identity(torch.nn.PReLU()) is None
    assert static_identity(torch.nn.SiLU()) == static_identity(torch.nn.SiLU()) is not None
    assert static_identity(torch.nn.GELU()) != static_identity(torch.nn.GELU("tanh"))


def test_functions_that_cannot_change_need_no_look_at_their_state() -> None:
    scope = {"torch": torch, "F": functional, "act": torch.relu, "relu": [], "slope": 0.1}
    for text in (
        "lambda y: torch.relu(y)",  # an attribute, not the global of that name
        "lambda y: F.silu(y) + abs(y)",
        "lambda y: (lambda z: act(z))(y) * slope",
    ):
        fn = evaluated(text, scope)
        assert static_identity(fn) == static_identity(evaluated(text, scope)) is not None
    for fixed in (torch.relu, functional.silu, functional.gelu, functional.leaky_relu):
        assert static_identity(fixed) is fixed
    for text in ("lambda y: relu[0](y)", "lambda y, f=abs: f(y)"):
        assert static_identity(evaluated(text, scope)) is None

    def imports(y: Tensor) -> Tensor:
        import math

        return y * math.pi

    assert static_identity(imports) is None
    one, other = evaluated("lambda y: y * n", {"n": 1}), evaluated("lambda y: y * n", {"n": 1.0})
    assert static_identity(one) != static_identity(other)


@BOTH
@pytest.mark.usefixtures("server")
def test_a_changed_attribute_of_a_module(device: torch.device) -> None:
    x, w, y = operands(device)
    cfg = types.ModuleType("cfg")
    for slope in (0.5, 2.0, 0.5):
        cfg.SLOPE = slope
        for _ in range(2):
            epilogue = evaluated("lambda y: y * cfg.SLOPE", {"cfg": cfg})
            torch.testing.assert_close(tc.conv2d(x, w, epilogue=epilogue), slope * y)


@BOTH
@pytest.mark.usefixtures("server")
def test_equal_code_in_two_namespaces(device: torch.device) -> None:
    x, w, y = operands(device)
    for act in (torch.sin, torch.cos, torch.sin):
        epilogue = evaluated("lambda y: act(y)", {"act": act})
        torch.testing.assert_close(tc.conv2d(x, w, epilogue=epilogue), act(y))


@BOTH
@pytest.mark.usefixtures("server")
def test_a_captured_tensor_behind_a_module(device: torch.device) -> None:
    x, w, y = operands(device)
    cfg = types.ModuleType("cfg")
    cfg.TABLE = torch.arange(4.0, device=device)
    for _ in range(3):
        epilogue = evaluated("lambda y, *, c: y * cfg.TABLE[c]", {"cfg": cfg})
        result = tc.conv2d(x, w, epilogue=epilogue)
        torch.testing.assert_close(result, y * cfg.TABLE[:, None, None])


@BOTH
@pytest.mark.usefixtures("server")
def test_a_built_in_method_of_a_tensor(device: torch.device) -> None:
    x, w, y = operands(device)
    for factor in (2.0, 3.0):
        scale = torch.tensor(factor, device=device)
        for _ in range(3):
            torch.testing.assert_close(tc.conv2d(x, w, epilogue=scale.mul), factor * y)


@BOTH
@pytest.mark.usefixtures("server")
def test_a_global_function_without_a_module(device: torch.device) -> None:
    x, w, y = operands(device)
    for factor in (2.0, 5.0):
        helper = evaluated(f"lambda z: z * {factor}", {})
        helper.__module__ = None
        for _ in range(2):
            epilogue = evaluated("lambda y: helper(y)", {"helper": helper})
            torch.testing.assert_close(tc.conv2d(x, w, epilogue=epilogue), factor * y)


class Gain:
    """What an epilogue may read a number from."""

    gain = 1.0


class Slots:
    """The same without a dictionary."""

    __slots__ = ("gain",)


class Scaled(torch.nn.Module):
    gain = 1.0

    def forward(self, y: Tensor) -> Tensor:
        return y * self.gain


def through(config: Any, fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda y: fn(config, y)


@BOTH
@pytest.mark.usefixtures("server")
def test_attributes_of_objects_classes_and_slots(device: torch.device) -> None:
    x, w, y = operands(device)
    box, slots, module = Gain(), Slots(), Scaled()

    def own(y: Any) -> Any:
        return y * own.gain  # type: ignore[attr-defined]

    epilogues: list[Callable[..., Any]] = [
        through(box, lambda c, y: y * c.gain),
        through(slots, lambda c, y: y * c.gain),
        lambda y, c=box, fn=lambda c, y: y * c.gain: fn(c, y),
        evaluated("lambda y: y * Gain.gain", {"Gain": Gain}),
        module,
        module.forward,
        own,
    ]
    try:
        for gain in (2.0, 4.0, 2.0):
            Gain.gain = slots.gain = Scaled.gain = own.gain = gain  # type: ignore[attr-defined]
            for epilogue in epilogues:
                for _ in range(2):
                    torch.testing.assert_close(tc.conv2d(x, w, epilogue=epilogue), gain * y)
    finally:
        Gain.gain = Scaled.gain = 1.0


@BOTH
@pytest.mark.usefixtures("server")
def test_a_captured_tensor_that_changes_shape_and_dtype(device: torch.device) -> None:
    x, w, y = operands(device)
    table = torch.arange(4.0, device=device)
    for data in (torch.arange(4.0), torch.arange(8.0), torch.arange(3, 7)):
        table.data = data.to(device)
        for _ in range(2):
            result = tc.conv2d(x, w, epilogue=lambda y, *, c: y * table[c])
            torch.testing.assert_close(result, y * table[:4, None, None])


@BOTH
@pytest.mark.usefixtures("server")
def test_decorated_functions_of_different_signatures(device: torch.device) -> None:
    x, w, y = operands(device)

    def decorated(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def inner(*args: Any, **kwargs: Any) -> Any:
            return fn(*args, **kwargs)

        return inner

    channels = torch.arange(4.0, device=device)[:, None, None]
    torch.testing.assert_close(tc.conv2d(x, w, epilogue=decorated(lambda y: 2 * y)), 2 * y)
    result = tc.conv2d(x, w, epilogue=decorated(lambda y, *, c: y * c))
    torch.testing.assert_close(result, y * channels)


def no_plain_bias(kind: str, b: Tensor) -> Tensor:
    if kind == "subclass":
        return TwoTensor(b, b + 1)
    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(b)


@BOTH
@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("kind", ["subclass", "fake"])
def test_a_bias_that_is_no_plain_tensor_is_prepared_for_nothing(
    kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, _ = operands(device)
    b = torch.randn(4, device=device)
    tc.conv2d(x, w, b)

    class Prepared(Exception):
        pass

    class Validated(Exception):
        pass

    def prepared(*args: object) -> None:
        raise Prepared

    def validated(*args: object) -> None:
        raise Validated

    monkeypatch.setattr(calls.PreparedCall, "__call__", prepared)
    monkeypatch.setattr(calls, "_fused", validated)
    with pytest.raises(Prepared):
        tc.conv2d(x, w, b)
    with pytest.raises(Validated):
        tc.conv2d(x, w, no_plain_bias(kind, b))


# Not with kernels: they would read memory that is none.
@pytest.mark.parametrize("kind", ["subclass", "fake"])
def test_a_bias_that_is_no_plain_tensor(kind: str, device: torch.device) -> None:
    x, w, _ = operands(device)
    b = torch.randn(4, device=device)
    bias = no_plain_bias(kind, b)
    with tc.backend("torch"):
        expected = tc.conv2d(x, w, b)
        result = tc.conv2d(x, w, bias)
    assert type(result) is type(bias) and result.shape == expected.shape
    if isinstance(result, TwoTensor):
        torch.testing.assert_close(result.a, expected)
        torch.testing.assert_close(result.b, expected + 1)
