"""Run a :class:`~tritonconv.runtime.plan.LaunchPlan`: the regular path and the fast one.

Triton's dispatcher binds, specialises and hashes every argument at every call. Within one problem
all integers are fixed and only pointers change, so after the first call an :class:`Executable`
launches the compiled kernel directly, with a pointer list patched into a prepared argument list.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .arrivals import arrival_counters, counters_on_stream
from .compat import direct_launcher, interpreting, tensor_descriptor, tensor_maps, unfit
from .errors import bad_value
from .plan import Boxes, KernelCall, LaunchPlan, Slot
from .settings import settings

_ALIGNMENT_MASK = 15  # Triton specialises on 16-byte alignment of pointers
_PLACE = 128  # bytes; workspaces of one allocation begin at multiples, as lines of the cache do


class _BoundCall:
    """One kernel call with slot names resolved to positions in the executable's tensor list."""

    def __init__(self, call: KernelCall, position: dict[str, int]) -> None:
        self.kernel = call.kernel
        self.grid = call.grid
        self.options = {"num_warps": call.num_warps, "num_stages": call.num_stages}
        self.constexprs = dict(call.constexprs)
        self.template: list[Any] = []
        self.scalar_slots: list[tuple[int, int]] = []
        self.tuple_slots: list[tuple[int, tuple[int, ...]]] = []
        self.box_slots: list[tuple[int, int, Boxes]] = []
        for index, arg in enumerate(call.args):
            if isinstance(arg, Slot):
                self.scalar_slots.append((index, position[arg.name]))
                self.template.append(None)
            elif isinstance(arg, Boxes):
                self.box_slots.append((index, position[arg.name], arg))
                self.template.append(None)
            elif isinstance(arg, tuple) and any(isinstance(item, Slot) for item in arg):
                slots = [position[item.name] for item in arg if isinstance(item, Slot)]
                if len(slots) != len(arg):
                    raise bad_value("KernelCall.args", "tuples of slots or of scalars", arg)
                self.tuple_slots.append((index, tuple(slots)))
                self.template.append(None)
            else:
                self.template.append(arg)

    def arguments(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """Run-time arguments in parameter order, as Triton's dispatcher takes them."""
        args = self._filled(tensors)
        for index, slot, boxes in self.box_slots:
            base = _aligned(tensors[slot])
            args[index] = tensor_descriptor(base, boxes.shape, boxes.strides, boxes.block)
        return args

    def _filled(self, values: Sequence[Any]) -> list[Any]:
        """The arguments with ``values``, tensors or pointers, in all slots but descriptors."""
        args = self.template.copy()
        for index, slot in self.scalar_slots:
            args[index] = values[slot]
        for index, slots in self.tuple_slots:
            args[index] = tuple(values[slot] for slot in slots)
        return args

    def dispatch(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Launch through Triton's dispatcher and return the compiled kernel."""
        args = self.arguments(tensors)
        return self.kernel[self.grid](*args, **self.constexprs, **self.options)

    def fast(self, compiled: Any) -> Callable[[list[int], int], None] | None:
        """A function of (pointers, stream) that launches the compiled kernel directly.

        None where this release of Triton has no such way.
        """
        launcher = direct_launcher(compiled, maps=bool(self.box_slots))
        if launcher is None:
            return None
        # The compiled kernel takes every parameter, constexprs included, in declaration order.
        names = list(self.kernel.arg_names)[len(self.template) :]
        tail = tuple([self.constexprs[name] for name in names])
        grid_x, grid_y, grid_z = self.grid
        if self.box_slots:
            return self._fast_with_maps(compiled, launcher, tail)
        leading = [slot for _, slot in self.scalar_slots]
        plain = not self.tuple_slots and [i for i, _ in self.scalar_slots] == list(
            range(len(leading))
        )
        if plain:
            # Pointers first, then what never changes: no list is patched per launch.
            rest = (*self.template[len(leading) :], *tail)

            def launch_plain(pointers: list[int], stream: int) -> None:
                launcher(grid_x, grid_y, grid_z, stream, [*[pointers[k] for k in leading], *rest])

            return launch_plain

        def launch(pointers: list[int], stream: int) -> None:
            launcher(grid_x, grid_y, grid_z, stream, [*self._filled(pointers), *tail])

        return launch

    def _fast_with_maps(
        self, compiled: Any, launcher: Callable[..., None], tail: tuple[Any, ...]
    ) -> Callable[[list[int], int], None] | None:
        """The same for a kernel with tensor descriptors, each followed by its sizes and strides."""
        views = [boxes for _, _, boxes in self.box_slots]
        maps = tensor_maps(compiled, [(boxes.shape, boxes.strides) for boxes in views])
        if maps is None:
            return None
        grid_x, grid_y, grid_z = self.grid
        patched = [
            (index, slot, map_of)
            for (index, slot, _), map_of in zip(self.box_slots, maps, strict=True)
        ]
        # Sizes and strides are put in from the last descriptor to the first: places stay as named.
        sizes = [
            (index, (*boxes.shape, *boxes.strides)) for index, _, boxes in reversed(self.box_slots)
        ]

        def launch(pointers: list[int], stream: int) -> None:
            args = self._filled(pointers)
            for index, slot, map_of in patched:
                args[index] = map_of(pointers[slot])
            for index, values in sizes:
                args[index + 1 : index + 1] = values
            launcher(grid_x, grid_y, grid_z, stream, [*args, *tail])

        return launch


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where its first element is not where a tensor descriptor needs it."""
    if tensor.data_ptr() & _ALIGNMENT_MASK == 0:
        return tensor
    copy = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return copy.copy_(tensor)


class Executable:
    """A plan ready to run on one device; call it with the tensors in the order of ``slots``."""

    def __init__(
        self,
        plan: LaunchPlan,
        slots: tuple[str, ...],
        instead: Callable[[], LaunchPlan] | None = None,
    ) -> None:
        """Bind a plan.

        Args:
            plan: what to run.
            slots: names of the tensors in the order of a call.
            instead: makes the plan to fall back on where the device has too little for ``plan`` or
                the compiler refuses it: a config that was tuned for another problem, device or
                compiler may not fit here.
        """
        self._instead = instead
        self.fell_back = False
        self._bind(plan, slots)

    def _bind(self, plan: LaunchPlan, slots: tuple[str, ...]) -> None:
        self.plan = plan
        self.slots = slots
        self.workspaces = plan.workspaces
        names = slots + tuple(space.name for space in plan.workspaces)
        position = {name: index for index, name in enumerate(names)}
        self.zeroed = tuple(position[name] for name in plan.zeroed)
        # For the fast path: the size of one allocation, and of every workspace its place in it, or
        # how many counters it is of.
        self._scratch = 0
        self._places: list[tuple[int, bool]] = []
        for space in plan.workspaces:
            count = math.prod(space.shape)
            if space.counters:
                self._places.append((count, True))
            else:
                self._places.append((self._scratch, False))
                self._scratch += -(-count * space.dtype.itemsize // _PLACE) * _PLACE
        self.calls = [_BoundCall(call, position) for call in plan.calls if 0 not in call.grid]
        self._fast: Callable[[list[int], int], None] | None = None

    @property
    def ready(self) -> bool:
        """Whether calls go straight to the compiled kernels."""
        return self._fast is not None

    def at(self, pointers: list[int], device: torch.device) -> bool:
        """Run on the memory at these addresses, which the caller keeps alive until it returns.

        Args:
            pointers: of the tensors in the order of ``slots``; workspaces are added to them.
            device: where they are.

        Returns:
            Whether it ran; if not, nothing has happened, and the call needs its tensors.
        """
        fast = self._fast
        if fast is None or self.zeroed:
            return False
        index = device.index
        if index != torch._C._cuda_getDevice():
            return False
        merged = 0
        for pointer in pointers:
            merged |= pointer
        if merged & _ALIGNMENT_MASK:
            return False
        stream = torch._C._cuda_getCurrentRawStream(index)
        if self._places:
            base = 0
            if self._scratch:
                scratch = torch.empty(self._scratch, dtype=torch.uint8, device=device)
                base = scratch.data_ptr()
            kept = []  # in a captured graph counters may be memory like any other
            for place, counters in self._places:
                if counters:
                    kept.append(counters_on_stream(place, device, stream))
                    pointers.append(kept[-1].data_ptr())
                else:
                    pointers.append(base + place)
        fast(pointers, stream)
        return True

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Run the plan; outputs are written in place."""
        device = tensors[0].device
        ready = self._fast is not None and not self.zeroed
        if ready and self.at([tensor.data_ptr() for tensor in tensors], device):
            return
        held: Sequence[torch.Tensor] = tensors
        if self.workspaces or self.zeroed:
            held = list(tensors)
            for space in self.workspaces:
                if space.counters:
                    held.append(arrival_counters(math.prod(space.shape), device))
                else:
                    held.append(torch.empty(space.shape, dtype=space.dtype, device=device))
            for index in self.zeroed:
                held[index].zero_()
        if self._fast is not None and self.zeroed:
            pointers = [tensor.data_ptr() for tensor in held]
            merged = 0
            for pointer in pointers:
                merged |= pointer
            index = device.index
            if not merged & _ALIGNMENT_MASK and index == torch._C._cuda_getDevice():
                self._fast(pointers, torch._C._cuda_getCurrentRawStream(index))
                return
        self._dispatch(held, device)

    def _dispatch(self, held: Sequence[torch.Tensor], device: torch.device) -> None:
        try:
            if device.type != "cuda":
                for call in self.calls:
                    call.dispatch(held)
                return
            with torch.cuda.device(device):
                compiled = [call.dispatch(held) for call in self.calls]
        except Exception as error:
            reason = unfit(error) if self._instead is not None else ""
            if self._instead is None or not reason:
                raise
            make, self._instead = self._instead, None
            warnings.warn(f"a tuned config {reason} ({error}); the default runs", stacklevel=2)
            self._bind(make(), self.slots)
            self.fell_back = True
            self(*held[: len(self.slots)])
            return
        if self.ready or interpreting() or not settings.fast_launch:
            return
        if any(tensor.data_ptr() & _ALIGNMENT_MASK for tensor in held):
            return
        found = [call.fast(kernel) for call, kernel in zip(self.calls, compiled, strict=True)]
        steps = [step for step in found if step is not None]
        if len(steps) == len(found):
            self._fast = steps[0] if len(steps) == 1 else _in_turn(steps)


def _in_turn(steps: list[Callable[[list[int], int], None]]) -> Callable[[list[int], int], None]:
    def run(pointers: list[int], stream: int) -> None:
        for step in steps:
            step(pointers, stream)

    return run
