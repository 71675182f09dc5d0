"""Faults that were found once: far operands, layouts, global settings."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import tritonconv as tc
from tritonconv.conv import ops
from tritonconv.conv.dispatch import OPERATORS, make_runner
from tritonconv.conv.problem import ConvProblem, Direction
from tritonconv.runtime.accuracy import check
from tritonconv.runtime.device import device_facts
from tritonconv.runtime.tables import Choice, Tier

from .cases import KINDS, PROBLEMS, rank_of
from .oracle import assert_accurate, plain_conv
from .test_algorithms import ids, served
from .test_stale_calls import BOTH, operands, server

__all__ = ["server"]  # a fixture of this file too

pytestmark = pytest.mark.interpreter


# ---- offsets beyond 2^31 elements ---------------------------------------------------------------

_NO_RESERVE = 0x4000  # Linux: pages count when they are touched, not before


def reach(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory, on the CPU only address space, or a skipped test."""
    try:
        if device.type != "cpu":
            return torch.empty(count, dtype=dtype, device=device)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags), dtype=dtype)
    except (RuntimeError, OSError) as error:
        pytest.skip(f"no {count * dtype.itemsize >> 30} GiB in one piece: {error}")


def far(values: Tensor, axis: int) -> Tensor:
    """The same values with the axis outermost and offsets that pass 2^31.

    The 2^31 elements in front hold an offset that wraps: a failed comparison, not a crash.
    """
    rest = [size for k, size in enumerate(values.shape) if k != axis]
    strides = list(torch.empty(rest, device="meta").stride())
    inner = sum((size - 1) * hop for size, hop in zip(rest, strides, strict=True))
    strides.insert(axis, 2**31 // (values.shape[axis] - 1) + inner + 1)
    span = sum((size - 1) * hop for size, hop in zip(values.shape, strides, strict=True))
    buffer = reach(2**31 + span + 1, values.dtype, values.device)
    view = buffer.as_strided(values.shape, strides, 2**31)
    return view.copy_(values)


@pytest.mark.parametrize(
    ("case", "direction", "algorithm"), served(KINDS, kernels_only=True), ids=ids
)
def test_far_operands_of_every_algorithm(
    case: str, direction: Direction, algorithm: str, device: torch.device
) -> None:
    operator = OPERATORS[direction, rank_of(PROBLEMS[case])]
    problem = operator.parse({**PROBLEMS[case], "dtype": "float16"})
    assert isinstance(problem, ConvProblem) and not problem.wide
    plain = operator.make_tensors(problem, device, torch.Generator(device).manual_seed(0))
    exact = operator.reference(problem, plain, torch.float64)
    rounded = operator.reference(problem, plain, problem.dtype)
    sides = {"input": "x", "grad_input": "x", "weight": "w", "grad_weight": "w"}
    for slot, tensor in plain.items():
        for axis in (1, 2):
            if tensor.shape[axis] == 1:
                continue
            moved = far(tensor, axis)
            field = f"{sides.get(slot, 'y')}_strides"
            wide = replace(problem, **{field: tuple(moved.stride())})
            assert wide.wide
            implementation = operator.algorithm(algorithm)
            if implementation.supports(wide) is not None:
                continue
            config = implementation.configs(wide, device_facts())[0]
            run = make_runner(wide, Choice(algorithm, config, Tier.DEFAULT))
            tensors = {**plain, slot: moved}
            run(*tensors.values())
            for output in operator.outputs(problem):
                verdict = check(
                    tensors[output], exact[output], rounded[output], dtype=problem.dtype
                )
                assert verdict.ok, f"{slot} axis {axis}: {verdict}"


FAR = {
    "few channels": ((1, 3, 6, 6), (4, 3, 3, 3), {}),
    "dense": ((2, 9, 6, 5), (4, 9, 3, 3), dict(padding=1)),
    "depthwise": ((2, 4, 6, 5), (4, 1, 3, 3), dict(padding=1, groups=4)),
}


@pytest.mark.parametrize("kind", FAR)
def test_far_tensors_of_a_call(kind: str, device: torch.device) -> None:
    x_shape, w_shape, options = FAR[kind]
    x, w = (torch.randn(s, device=device, dtype=torch.float16) for s in (x_shape, w_shape))
    for axis in (1, 2):
        moved = far(x, axis)
        leaf = w.clone().requires_grad_()
        result = tc.conv2d(moved, leaf, **options)
        exact = plain_conv(x.double(), w.double(), **options)
        assert_accurate(result, exact, plain_conv(x, w, **options))
        g = torch.randn_like(exact).half()
        (found,) = torch.autograd.grad(result, leaf, far(g, axis))
        wanted = [
            torch.autograd.grad(plain_conv(x.to(d), v, **options), v, g.to(d))[0]
            for d in (torch.float64, torch.float16)
            for v in [w.to(d).requires_grad_()]
        ]
        assert_accurate(found, *wanted)


@BOTH
@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("axis", [1, 2])
def test_a_far_operand_of_the_epilogue(axis: int, device: torch.device) -> None:
    x, w, y = operands(device)
    r = torch.randn(1, 4, 4, 4, device=device, dtype=torch.float16)
    result = tc.conv2d(x, w, epilogue=torch.add, epilogue_args=(far(r, axis),))
    torch.testing.assert_close(result, y + r)


@BOTH
@pytest.mark.usefixtures("server")
def test_a_far_element_of_a_captured_tensor(device: torch.device) -> None:
    x, w, y = operands(device)
    rows = 2**22
    table = reach(2**31 + (rows + 1) * 512, torch.int8, device)[2**31 :].view(rows + 1, 512)
    table[rows, :4] = torch.arange(4, device=device)
    result = tc.conv2d(x, w, epilogue=lambda y, *, c: y + table[rows - 0 * c, c])
    torch.testing.assert_close(result, y + torch.arange(4, device=device)[:, None, None])


def test_the_gradient_of_a_far_operand_of_the_epilogue(device: torch.device) -> None:
    x, w, y = operands(device)
    r = torch.randn(1, 4, 4, 4, device=device)
    leaf = far(r, 1).requires_grad_()
    weight = w.clone().requires_grad_()
    result = tc.conv2d(x, weight, epilogue=lambda y, r: torch.tanh(y) * r, epilogue_args=(leaf,))
    torch.testing.assert_close(result, y.tanh() * r)
    found = torch.autograd.grad(result.sum(), (leaf, weight))
    weight_too = w.clone().requires_grad_()
    (wanted,) = torch.autograd.grad((plain_conv(x, weight_too).tanh() * r).sum(), weight_too)
    torch.testing.assert_close(found[0], y.tanh())
    torch.testing.assert_close(found[1], wanted, rtol=1e-4, atol=1e-4)


# ---- memory formats -----------------------------------------------------------------------------

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@BOTH
@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_strides_are_those_of_the_fake(
    groups: int, dtype: torch.dtype, device: torch.device
) -> None:
    geometry = ([1, 1], [0] * 4, [1, 1], groups, "ieee")
    for first in FORMATS.values():
        for second in FORMATS.values():

            def made(*shape: int, form: torch.memory_format) -> Tensor:
                t = torch.randn(shape, dtype=dtype, device=device)
                return t.contiguous(memory_format=form)

            x, w = made(2, 8, 6, 6, form=first), made(8, 8 // groups, 3, 3, form=second)
            g, x_too = made(2, 8, 4, 4, form=first), made(2, 8, 6, 6, form=second)
            assert tc.conv2d(x, w, groups=groups).is_contiguous(memory_format=first)
            for op, args in (
                (ops.CONV, (x, w, *geometry)),
                (ops.CONV_DGRAD, (g, w, [6, 6], *geometry)),
                (ops.CONV_WGRAD, (g, x_too, [3, 3], *geometry)),
            ):
                mode = FakeTensorMode()
                real = op.overload(*args)
                with mode:
                    fake = op.overload(
                        *[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
                    )
                assert real.stride() == fake.stride(), (op.overload, first, second)


@BOTH
@pytest.mark.usefixtures("server")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("groups", "dtype"), [(1, torch.float32), (2, torch.float32), (1, torch.float64)], ids=str
)
def test_opcheck_with_two_memory_formats(
    groups: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.use_deterministic_algorithms(False)
    x = torch.randn(2, 8, 6, 6, dtype=dtype, device=device)
    w = torch.randn(8, 8 // groups, 3, 3, dtype=dtype, device=device)
    w = w.contiguous(memory_format=torch.channels_last)
    for args in ((x, w), (x.clone().requires_grad_(), w.clone().requires_grad_())):
        torch.library.opcheck(
            torch.ops.tritonconv.conv.default, (*args, [1, 1], [0] * 4, [1, 1], groups, "ieee")
        )


# ---- errors, determinism ------------------------------------------------------------------------

CONV = (torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3))
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "bias, a number": (
        lambda: tc.conv2d(*CONV, 3),  # type: ignore[arg-type]
        TypeError,
        "bias: expected a tensor, got int",
    ),
    "a kernel without taps": (
        lambda: tc.conv2d(CONV[0], torch.randn(4, 3, 0, 3)),
        ValueError,
        r"weight: expected .*tap.*, got \(4, 3, 0, 3\)",
    ),
    "epilogue_args, a tensor": (
        lambda: tc.conv2d(*CONV, epilogue=torch.add, epilogue_args=torch.randn(1, 4, 4, 4)),
        TypeError,
        "epilogue_args: expected a tuple of tensors, got Tensor",
    ),
    "an empty batch of vmap": (
        lambda: torch.func.vmap(lambda a: tc.conv2d(a, CONV[1]))(torch.randn(0, 1, 3, 6, 6)),
        ValueError,
        "vmap: expected .*at least one",
    ),
}


@BOTH
@pytest.mark.usefixtures("server")
@pytest.mark.filterwarnings("ignore:.*vmap")
@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(
    case: tuple[Callable[[], Any], type[Exception], str],
) -> None:
    call, error, message = case
    with pytest.raises(error, match=message) as info:
        call()
    assert isinstance(info.value, tc.TritonConvError)


@BOTH
@pytest.mark.usefixtures("server")
def test_gradients_at_computed_indices_repeat_bitwise(device: torch.device) -> None:
    torch.use_deterministic_algorithms(False)
    x, w = torch.randn(4, 3, 18, 18, device=device), torch.randn(8, 3, 3, 3, device=device)
    table = torch.randn(5, device=device, requires_grad=True)
    first, *others = [
        torch.autograd.grad(
            tc.conv2d(x, w, epilogue=lambda y, *, c, h, w: y * table[(h * w + c) % 5]).sum(), table
        )[0]
        for _ in range(4)
    ]
    assert all(torch.equal(first, other) for other in others)


# ---- settings of the process --------------------------------------------------------------------


def in_a_fresh_process(source: str) -> list[str]:
    """Lines that a new interpreter prints, with the environment of the tests."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


PRECISION = """
import torch
import tritonconv as tc
from tritonconv.conv.arguments import default_precision

x, w = torch.randn(1, 9, 6, 6), torch.randn(4, 9, 3, 3)
for value in {values}:
    {setting} = value
    seen = torch.backends.cudnn.conv.fp32_precision
    for dtype in (torch.float32, torch.float64):
        a, b = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        y = tc.conv2d(a, b)
        torch.autograd.grad(y.sum(), (a, b))
        torch.testing.assert_close(
            y, torch.nn.functional.conv2d(a, b), rtol=1e-2, atol=1e-1 if value == "tf32" else 1e-4
        )
    assert torch.backends.cudnn.conv.fp32_precision == seen, "a call changed the setting"
    print(value, default_precision())
"""


NEWER = "torch.backends"
SETTINGS = {
    f"{NEWER}.fp32_precision": ("tf32",),
    f"{NEWER}.cudnn.fp32_precision": ("ieee",),
    f"{NEWER}.cudnn.conv.fp32_precision = {NEWER}.cuda.matmul.fp32_precision": ("tf32", "ieee"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_newer_precision_settings(setting: str) -> None:
    values = SETTINGS[setting]
    lines = in_a_fresh_process(PRECISION.format(setting=setting, values=values))
    assert lines == [f"{value} {value}" for value in values]


def test_a_plain_call_leaves_the_tuner_alone() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter's choice needs no table")
    lines = in_a_fresh_process(
        "import sys, torch\n"
        "import tritonconv as tc\n"
        "tc.conv2d(torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3))\n"
        "print([m for m in sys.modules if m.startswith('tritonconv.autotune')])\n"
    )
    assert lines == ["[]"]
