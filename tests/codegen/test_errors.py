"""Errors name the user's function, its place, and what to do."""

from __future__ import annotations

import math

import pytest
import torch

from tritonconv.codegen import (
    Argument,
    DataDependentControlFlowError,
    NotScalarError,
    Role,
    ScalarArityError,
    UnsupportedOpError,
    trace,
)
from tritonconv.runtime.errors import TritonConvError

X = Argument("x", torch.float32, Role.VALUE)
C = Argument("c", torch.int32, Role.COORD)
table = torch.randn(3, 4)


def branch(x):
    if x > 0:
        return x
    return -x


@pytest.mark.parametrize(
    "fn",
    [
        branch,
        lambda x: x * x.item(),
        lambda x: x * int(x),
        lambda x: x * float(x),
        lambda x: x and 1.0,
        lambda x: not x,
        lambda x: math.exp(x),
        lambda x: [1.0, 2.0][x.to(torch.int32)],
        lambda x: x * max(x, x * 2),
        lambda x: x.tolist() + 1,
    ],
)
def test_control_flow_on_values(fn):
    with pytest.raises(DataDependentControlFlowError, match=r"torch\.where") as error:
        trace(fn, (X,))
    assert "test_errors.py:" in str(error.value)
    assert fn.__name__ in str(error.value)


def test_unsupported_operator_is_named():
    def bessel(x):
        return torch.special.bessel_j0(x)

    with pytest.raises(UnsupportedOpError, match=r"bessel_j0.*aten\.tanh\.default") as error:
        trace(bessel, (X,))
    assert "bessel" in error.value.op
    assert "'bessel' (test_errors.py:" in str(error.value)
    assert isinstance(error.value, TritonConvError)
    with pytest.raises(UnsupportedOpError, match="digamma"):
        print(trace(torch.lgamma, (X,)).vjp(("x",)).source)


@pytest.mark.parametrize("fn", [lambda x: x, lambda x, c, d: x, lambda x, *, e: x])
def test_arity(fn):
    with pytest.raises(ScalarArityError, match=r"2 arguments \(x, c\).*signature"):
        trace(fn, (X, C))


def test_keyword_only_parameters_take_the_argument_of_their_name():
    f = trace(lambda c, *, x: x * c, (X, C))
    assert f(torch.tensor(2.0), torch.tensor(3)) == 6


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (x, x),
        lambda x: None,
        lambda x: "x",
        lambda x: x.reshape(1),
        lambda x: torch.stack([x, x]),
        lambda x: x + table,
        lambda x: x + table[0],
        lambda x: table[0] * x,
        lambda x: table,
        lambda x: table[0],
        lambda x: x + table[0, 1, 2],
        lambda x: x + table[x, 0],
        lambda x: x + table[None, 0],
    ],
)
def test_not_scalar(fn):
    with pytest.raises(NotScalarError, match=r"test_errors\.py"):
        trace(fn, (X,))


def test_index_out_of_bounds():
    with pytest.raises(IndexError, match="index 4 is out of bounds for dimension 1 of size 4"):
        trace(lambda x: x + table[0, 4], (X,))


@pytest.mark.parametrize("value", [2, 2.5, True])
def test_number_as_result(value):
    got = trace(lambda x: value, (X,))(torch.zeros(3))
    expected = torch.full((3,), value)
    torch.testing.assert_close(got, expected)


def test_bad_arguments():
    with pytest.raises(TypeError, match="half precision"):
        trace(lambda x: x, (Argument("x", torch.float16, Role.VALUE),))
    with pytest.raises(ValueError, match="distinct names"):
        trace(lambda x, y: x, (X, X))
    with pytest.raises(TypeError, match="int32 or int64"):
        trace(lambda x: x, (Argument("x", torch.float32, Role.COORD),))
    f = trace(lambda x, c: x * c, (X, C))
    with pytest.raises(ValueError, match=r"wrt.*'y'"):
        f.vjp(("y",))
    with pytest.raises(TypeError, match="wrt: c"):
        f.vjp(("c",))
    with pytest.raises(ValueError, match="with_roles"):
        f.with_roles(y=Role.VALUE)
    with pytest.raises(ValueError, match="with_frame"):
        f.with_frame(("n", "h"))
    with pytest.raises(ValueError, match=r"2 \(x, c\)"):
        f(torch.zeros(1))
