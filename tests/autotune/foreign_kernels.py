"""Kernels as users write them, decorated with the tuner; the tests and their children load this."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from tritonconv.autotune import autotune


@triton.jit
def _twice(x):
    return x + x


@autotune(
    configs=[triton.Config({"BLOCK": block}) for block in (32, 64, 128)],
    key=["size"],
)
@triton.jit
def double(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """y = 2 x."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + offsets, mask=mask)
    tl.store(y_ptr + offsets, _twice(x), mask=mask)


@autotune(
    configs=[
        triton.Config({"BLOCK": 64, "OVERRUN": 0, "SCALE": 2}),
        triton.Config({"BLOCK": 64, "OVERRUN": 8, "SCALE": 2}),
        triton.Config({"BLOCK": 64, "OVERRUN": 0, "SCALE": 3}),
        triton.Config({"BLOCK": 128, "OVERRUN": 0, "SCALE": 2}),
    ],
    key=["size"],
)
@triton.jit
def sloppy(x_ptr, y_ptr, size, BLOCK: tl.constexpr, OVERRUN: tl.constexpr, SCALE: tl.constexpr):
    """y = 2 x; one config writes behind the end, another computes 3 x."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size)
    tl.store(y_ptr + offsets, SCALE * x, mask=offsets < size + OVERRUN)


@autotune(
    configs=[triton.Config({"BLOCK": block}) for block in (32, 64)],
    key=["size"],
    reset_to_zero=["y_ptr"],
)
@triton.jit
def accumulate(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """y += x."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + offsets, mask=mask)
    y = tl.load(y_ptr + offsets, mask=mask)
    tl.store(y_ptr + offsets, x + y, mask=mask)


@autotune(
    configs=[triton.Config({"BLOCK": block}) for block in (32, 64)],
    key=["size"],
    restore_value=["x_ptr"],
)
@triton.jit
def increment(x_ptr, size, BLOCK: tl.constexpr):
    """x += 1."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets, mask=mask) + 1, mask=mask)


def even_blocks(configs: list[triton.Config], args: dict[str, Any], **_: Any) -> list[Any]:
    """Keep the configs whose block divides the size."""
    return [config for config in configs if args["size"] % config.kwargs["BLOCK"] == 0]


@autotune(
    configs=[triton.Config({"BLOCK": block}) for block in (128, 64, 32)],
    key=["size"],
    prune_configs_by={"early_config_prune": even_blocks},
)
@triton.jit
def unmasked(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """y = 2 x, without a mask."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, 2 * tl.load(x_ptr + offsets))


@autotune(configs=[triton.Config({"SPLIT": split}) for split in (2, 4)], key=["size"])
@triton.heuristics({"BLOCK": lambda args: triton.next_power_of_2(args["size"]) // args["SPLIT"]})
@triton.jit
def heuristic_below(x_ptr, y_ptr, size, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """y = 2 x in SPLIT blocks."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(y_ptr + offsets, 2 * tl.load(x_ptr + offsets, mask=mask), mask=mask)


@triton.heuristics({"ODD": lambda args: args["size"] % 2 == 1})
@autotune(configs=[triton.Config({"BLOCK": block}) for block in (32, 64)], key=["ODD"])
@triton.jit
def heuristic_above(x_ptr, y_ptr, size, ODD: tl.constexpr, BLOCK: tl.constexpr):
    """y = 2 x."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(y_ptr + offsets, 2 * tl.load(x_ptr + offsets, mask=mask), mask=mask)


def _announce(args: dict[str, Any]) -> None:
    args["seen"].append(args["BLOCK"])


@autotune(
    configs=[triton.Config({"BLOCK": 32}), triton.Config({"BLOCK": 64}, pre_hook=_announce)],
    key=["size"],
)
@triton.jit
def hooked(x_ptr, y_ptr, size, seen, BLOCK: tl.constexpr):
    """y = 2 x."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(y_ptr + offsets, 2 * tl.load(x_ptr + offsets, mask=mask), mask=mask)


def make_local(factor: int) -> Any:
    """A kernel that no other process can find."""

    @autotune(configs=[triton.Config({"BLOCK": block}) for block in (32, 64)], key=["size"])
    @triton.jit
    def local(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < size
        tl.store(y_ptr + offsets, 2 * tl.load(x_ptr + offsets, mask=mask), mask=mask)

    return local
