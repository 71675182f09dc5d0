"""Launch plans: what an algorithm would run for a problem, as data.

A plan is a pure function of (problem, config). It names its tensors by slot and holds none, so the
same plan is launched on a GPU, run through the interpreter and compiled ahead of time for a GPU
that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Slot:
    """Names a tensor in the arguments of a :class:`KernelCall`."""

    name: str


@dataclass(frozen=True)
class Boxes:
    """A tensor that a kernel reads by boxes of a fixed shape, through a tensor descriptor.

    The copy engine of a GPU that has one (sm_90 on) fills with zeros what lies outside ``shape``.

    Attributes:
        name: slot of the tensor; its first element is the first of the view.
        shape, strides: of the view, in elements; the last stride is 1, all others are multiples of
            16 bytes.
        block: shape of a box.
    """

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


Scalar = int | float
Arg = Slot | Boxes | Scalar | tuple[Slot, ...] | tuple[Scalar, ...]


@dataclass(frozen=True)
class KernelCall:
    """One kernel launch: its run-time arguments in the order of the kernel's parameters."""

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple[Arg, ...]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3

    def slots(self) -> tuple[str, ...]:
        """Names of the tensors the kernel reads or writes, in order, repeats included."""
        names: list[str] = []
        for arg in self.args:
            for item in arg if isinstance(arg, tuple) else (arg,):
                if isinstance(item, (Slot, Boxes)):
                    names.append(item.name)
        return tuple(names)


@dataclass(frozen=True)
class Workspace:
    """A temporary tensor that the executor allocates for one run of the plan.

    Attributes:
        name: of its slot.
        shape: its sizes, at least.
        dtype: of its elements; int32 where they are counters.
        counters: all elements are zero before the kernels run, which leave them zero. A plan has
            one such workspace at most.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    counters: bool = False


@dataclass(frozen=True)
class LaunchPlan:
    """The kernel calls of one run, their temporaries, and the dtype of every slot."""

    calls: tuple[KernelCall, ...]
    dtypes: Mapping[str, torch.dtype]
    workspaces: tuple[Workspace, ...] = field(default=())
    zeroed: tuple[str, ...] = ()
    """Slots that are filled with zeros first, because the kernels do not write every element."""
