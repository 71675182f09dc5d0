"""Device functions that generated code calls, compiled and interpreted.

Functions of libdevice come from ``triton.language.extra.libdevice``, which Triton maps to the
library of the target (CUDA or HIP). Triton's interpreter cannot run them: there, PyTorch's own CPU
functions stand in. The rest is written in Triton and is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..runtime.compat import interpreter_tensor, interpreting

_INTERPRETED = interpreting()


def _host(function: Callable[..., Any]) -> Callable[..., Any]:
    """A PyTorch CPU function as a device function of the interpreter."""
    import numpy as np
    import torch

    def call(*operands: Any) -> Any:
        like = operands[0]
        for operand in operands[1:]:
            like = like + operand
        arrays = np.broadcast_arrays(*(operand.handle.data for operand in operands))
        result = function(*(torch.from_numpy(np.array(array)) for array in arrays))
        return interpreter_tensor(result.numpy(), like)

    return call


if _INTERPRETED:
    import numpy as _np
    import torch as _torch

    tan = _host(_torch.tan)
    asin = _host(_torch.asin)
    acos = _host(_torch.acos)
    atan = _host(_torch.atan)
    atan2 = _host(_torch.atan2)
    sinh = _host(_torch.sinh)
    cosh = _host(_torch.cosh)
    tanh = _host(_torch.tanh)
    asinh = _host(_torch.asinh)
    acosh = _host(_torch.acosh)
    atanh = _host(_torch.atanh)
    log10 = _host(_torch.log10)
    log1p = _host(_torch.log1p)
    expm1 = _host(_torch.expm1)
    erfc = _host(_torch.erfc)
    erfinv = _host(_torch.erfinv)
    lgamma = _host(_torch.lgamma)
    pow = _host(_torch.pow)
    # PyTorch's vectorised fmod makes NaN of subnormal divisors.
    fmod = _host(lambda x, y: _torch.from_numpy(_np.fmod(x.numpy(), y.numpy())))
    hypot = _host(_torch.hypot)
    copysign = _host(_torch.copysign)
    nextafter = _host(_torch.nextafter)
    trunc = _host(_torch.trunc)
    rint = _host(_torch.round)
    sqrt = _host(_torch.sqrt)
    # The interpreter rounds to bfloat16 by truncation.
    round_bf16 = _host(lambda x: x.to(_torch.bfloat16).to(x.dtype))
    round_fp16 = _host(lambda x: x.to(_torch.float16).to(x.dtype))
else:

    @triton.jit
    def tan(x):
        return libdevice.tan(x)

    @triton.jit
    def asin(x):
        return libdevice.asin(x)

    @triton.jit
    def acos(x):
        return libdevice.acos(x)

    @triton.jit
    def atan(x):
        return libdevice.atan(x)

    @triton.jit
    def atan2(y, x):
        return libdevice.atan2(y, x)

    @triton.jit
    def sinh(x):
        return libdevice.sinh(x)

    @triton.jit
    def cosh(x):
        return libdevice.cosh(x)

    @triton.jit
    def tanh(x):
        return libdevice.tanh(x)

    @triton.jit
    def asinh(x):
        return libdevice.asinh(x)

    @triton.jit
    def acosh(x):
        return libdevice.acosh(x)

    @triton.jit
    def atanh(x):
        return libdevice.atanh(x)

    @triton.jit
    def log10(x):
        return libdevice.log10(x)

    @triton.jit
    def log1p(x):
        return libdevice.log1p(x)

    @triton.jit
    def expm1(x):
        return libdevice.expm1(x)

    @triton.jit
    def erfc(x):
        return libdevice.erfc(x)

    @triton.jit
    def erfinv(x):
        return libdevice.erfinv(x)

    @triton.jit
    def lgamma(x):
        return libdevice.lgamma(x)

    @triton.jit
    def pow(x, y):
        return libdevice.pow(x, y)

    @triton.jit
    def fmod(x, y):
        return libdevice.fmod(x, y)

    @triton.jit
    def hypot(x, y):
        return libdevice.hypot(x, y)

    @triton.jit
    def copysign(x, y):
        return libdevice.copysign(x, y)

    @triton.jit
    def nextafter(x, y):
        return libdevice.nextafter(x, y)

    @triton.jit
    def trunc(x):
        return libdevice.trunc(x)

    @triton.jit
    def rint(x):
        return libdevice.nearbyint(x)

    @triton.jit
    def sqrt(x):
        # tl.sqrt is approximate in float32.
        if x.dtype == tl.float32:
            return tl.sqrt_rn(x)
        else:
            return tl.sqrt(x)

    @triton.jit
    def round_bf16(x):
        return x.to(tl.bfloat16).to(x.dtype)

    @triton.jit
    def round_fp16(x):
        return x.to(tl.float16).to(x.dtype)


@triton.jit
def load(ptr, mask):
    """``ptr`` where ``mask`` is set, else 0; one load when all lanes read one address."""
    if len(ptr.shape) == 0 and len(mask.shape) != 0:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=mask, other=0)


@triton.jit
def minimum(a, b):
    """The smaller operand; NaN if either is NaN."""
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def maximum(a, b):
    """The larger operand; NaN if either is NaN."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def fmin(a, b):
    """The smaller operand; the other one if one is NaN."""
    return tl.where((a < b) | (b != b), a, b)


@triton.jit
def fmax(a, b):
    """The larger operand; the other one if one is NaN."""
    return tl.where((a > b) | (b != b), a, b)


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN, as PyTorch has it."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def sgn(x):
    """The derivative of ``abs``."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def divide_exact(a, b):
    """``a / b`` correctly rounded; the operator ``/`` is off by up to 2 ulp in float32."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def floor_divide(a, b):
    """Float division rounded down, from the exact remainder, as PyTorch and Python do."""
    quotient = divide_exact(a, b)
    rest = fmod(a, b)
    whole = divide_exact(a - rest, b)
    whole = tl.where((rest != 0) & ((b < 0) != (rest < 0)), whole - 1, whole)
    down = tl.floor(whole)
    down = tl.where(whole - down > 0.5, down + 1, down)
    signed_zero = copysign(tl.zeros_like(quotient), quotient)
    return tl.where(b == 0, quotient, tl.where(whole != 0, down, signed_zero))


@triton.jit
def trunc_divide(a, b):
    """Float division rounded toward zero."""
    return trunc(divide_exact(a, b))


@triton.jit
def remainder(a, b):
    """Float remainder with the sign of the divisor."""
    rest = fmod(a, b)
    return tl.where((rest != 0) & ((b < 0) != (rest < 0)), rest + b, rest)


@triton.jit
def floor_divide_int(a, b):
    """Integer division rounded down; the operator ``//`` rounds toward zero."""
    quotient = a // b
    return tl.where((a % b != 0) & ((a < 0) != (b < 0)), quotient - 1, quotient)


@triton.jit
def remainder_int(a, b):
    """Integer remainder with the sign of the divisor; the operator ``%`` has the dividend's."""
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def pow_int(base, exponent, BITS: tl.constexpr):
    """Integer power by squaring, wrapping on overflow; negative exponents as PyTorch has them."""
    result = tl.zeros_like(base + exponent) + 1
    odd = (exponent & 1) != 0
    left = exponent
    square = base
    for _ in tl.static_range(BITS):
        result = tl.where((left & 1) != 0, result * square, result)
        square = square * square
        left = left >> 1
    if result.dtype == tl.uint8:
        return result
    else:
        ones = tl.where(base == 1, 1, tl.where(base == -1, tl.where(odd, -1, 1), 0))
        return tl.where(exponent < 0, ones.to(result.dtype), result)


@triton.jit
def shift_left(a, b, BITS: tl.constexpr):
    """``a << b``; 0 when the distance is negative or not less than the width."""
    inside = (b >= 0) & (b < BITS)
    return tl.where(inside, a << tl.where(inside, b, 0).to(a.dtype), 0).to(a.dtype)


@triton.jit
def shift_right(a, b, BITS: tl.constexpr):
    """``a >> b`` arithmetically; all sign bits when the distance is out of range."""
    inside = (b >= 0) & (b < BITS)
    return a >> tl.where(inside, b, BITS - 1).to(a.dtype)


@triton.jit
def unsigned_shift_right(a, b, BITS: tl.constexpr):
    """``a >> b`` for unsigned ``a``; 0 when the distance is out of range."""
    inside = b < BITS
    return tl.where(inside, a >> tl.where(inside, b, 0).to(a.dtype), 0).to(a.dtype)


@triton.jit
def sigmoid(x):
    """``1 / (1 + exp(-x))``."""
    return 1.0 / (1.0 + tl.exp(x * -1.0))


@triton.jit
def one_plus_erf(x):
    """``1 + erf(x)`` in 14 instructions without a branch, off by 3e-7, or 1e-4 of a small result.

    It is ``erfc(-x)``. ``log2(erfc(a))`` is nearly a parabola: a polynomial, fitted over [0, 4.4]
    with weights for both bounds, whose leading coefficient is negative, so that it falls for ever.
    libdevice takes one of two polynomials an element, behind a branch that all of a warp wait at.
    """
    a = tl.abs(x)
    p = a * -7.7358072584064e-06 + 9.798414803016221e-05
    p = p * a - 2.2758004496809317e-04
    p = p * a - 3.0630026513628603e-03
    p = p * a + 3.0444849341494735e-02
    p = p * a - 1.4956288611575103e-01
    p = p * a - 9.181683529139781e-01
    p = p * a - 1.6279291267710636
    e = tl.exp2(p * a + 2.7185564385147296e-07)
    return tl.where(x < 0, e, 2.0 - e)


@triton.jit
def frac(x):
    """``x - trunc(x)``."""
    return x - trunc(x)


@triton.jit
def signbit(x):
    """Whether the sign bit is set, zeros and NaN included."""
    return copysign(tl.zeros_like(x) + 1, x) < 0
