"""The arguments of one kernel call, kept so that the call can be made again on equal tensors.

Tensors are sent to another process by value: the bytes between the first and the last element
that any argument reaches, once per storage, so that arguments that share memory still do. Rebuilt,
they have their strides and alignment again, and a zone on each side whose bytes a kernel that
stays in bounds never changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

GUARD_BYTES = 4096
_GUARD_VALUE = 255  # a NaN in every floating-point format
_ALIGNMENT = 256


@dataclass(frozen=True)
class TensorSlot:
    """Stands in a call's arguments where a tensor was.

    Attributes:
        name: of the argument, with an index where the argument is a tuple.
        storage: position in :attr:`KernelCallArguments.storages`.
        offset: bytes from the start of that storage's range.
        wrapped: dtype that ``triton.reinterpret`` gave it, if it did.
    """

    name: str
    storage: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    wrapped: Any = None


@dataclass(frozen=True)
class StorageImage:
    """The bytes of one storage that a call reaches, and how they were aligned."""

    data: torch.Tensor
    alignment: int

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data.cpu(), "alignment": self.alignment}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclass(frozen=True)
class KernelCallArguments:
    """Arguments of a call with slots in place of tensors, and the tensors' bytes."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    slots: tuple[TensorSlot, ...]
    storages: tuple[StorageImage, ...]

    def tensors(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Fresh tensors by slot name, then two guard zones per storage."""
        buffers: list[tuple[torch.Tensor, int]] = []
        guards: dict[str, torch.Tensor] = {}
        for index, image in enumerate(self.storages):
            size = image.data.numel()
            start = GUARD_BYTES + image.alignment
            buffer = torch.full(
                (start + size + GUARD_BYTES,), _GUARD_VALUE, dtype=torch.uint8, device=device
            )
            buffer[start : start + size].copy_(image.data)
            buffers.append((buffer, start))
            guards[f"guard.{index}.front"] = buffer[:start]
            guards[f"guard.{index}.back"] = buffer[start + size :]
        tensors = {}
        for slot in self.slots:
            buffer, start = buffers[slot.storage]
            offset = (start + slot.offset) // slot.dtype.itemsize
            view = torch.empty(0, dtype=slot.dtype, device=device)
            view.set_(buffer.untyped_storage(), offset, slot.shape, slot.stride)
            tensors[slot.name] = view
        return {**tensors, **guards}

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments with tensors in their slots."""
        args = tuple(_fill(value, tensors) for value in self.args)
        return args, {name: _fill(value, tensors) for name, value in self.kwargs.items()}

    def nbytes(self) -> int:
        """Size of all tensors together, shared memory counted once."""
        return sum(image.data.numel() for image in self.storages)


def capture(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> KernelCallArguments:
    """Describe a call; the tensors' bytes are read when they are needed, not here.

    Args:
        names: parameters of the kernel, in order.
        args: positional arguments.
        kwargs: keyword arguments without ``grid`` and ``warmup``.
    """
    found: dict[str, tuple[torch.Tensor, Any]] = {}

    def visit(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            found[name] = (value, None)
            return _Found(name)
        if _is_wrapper(value):
            found[name] = (value.base, value.dtype)
            return _Found(name)
        if _is_descriptor(value):
            base = visit(f"{name}.base", value.base)
            return dataclasses.replace(value, base=_Stand(base, value.base.dtype))
        if isinstance(value, (tuple, list)):
            items = [visit(f"{name}.{index}", item) for index, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    positional = tuple(visit(name, value) for name, value in zip(names, args, strict=False))
    positional += tuple(args[len(names) :])
    keyword = {name: visit(name, value) for name, value in kwargs.items()}
    slots, storages = _layout(found)
    by_name = {slot.name: slot for slot in slots}
    return KernelCallArguments(
        tuple(_resolve(value, by_name) for value in positional),
        {name: _resolve(value, by_name) for name, value in keyword.items()},
        slots,
        storages,
    )


@dataclass(frozen=True)
class _Found:
    name: str


class _Stand:
    """What a tensor descriptor accepts as its base while it has none."""

    def __init__(self, item: Any, dtype: torch.dtype) -> None:
        self.item = item
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 0


def _layout(
    found: Mapping[str, tuple[torch.Tensor, Any]],
) -> tuple[tuple[TensorSlot, ...], tuple[StorageImage, ...]]:
    ranges: dict[int, tuple[int, int]] = {}
    examples: dict[int, torch.Tensor] = {}
    for tensor, _ in found.values():
        key = tensor.untyped_storage().data_ptr()
        begin, end = _extent(tensor)
        low, high = ranges.get(key, (begin, end))
        ranges[key] = (min(low, begin), max(high, end))
        examples[key] = tensor
    positions = {key: index for index, key in enumerate(ranges)}
    slots = tuple(
        TensorSlot(
            name,
            positions[tensor.untyped_storage().data_ptr()],
            tensor.data_ptr() - ranges[tensor.untyped_storage().data_ptr()][0],
            tensor.dtype,
            tuple(tensor.shape),
            tuple(tensor.stride()),
            wrapped,
        )
        for name, (tensor, wrapped) in found.items()
    )
    storages = []
    for key, (begin, end) in ranges.items():
        tensor = examples[key]
        data = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        data.set_(tensor.untyped_storage(), begin - key, (end - begin,), (1,))
        storages.append(StorageImage(data, begin % _ALIGNMENT))
    return slots, tuple(storages)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor and of the one after its last."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return begin, begin + (last + 1) * tensor.element_size()


def _is_wrapper(value: Any) -> bool:
    return type(value).__name__ == "TensorWrapper" and hasattr(value, "base")


def _is_descriptor(value: Any) -> bool:
    return type(value).__name__ == "TensorDescriptor" and dataclasses.is_dataclass(value)


def _resolve(value: Any, slots: Mapping[str, TensorSlot]) -> Any:
    """Put slots where :func:`capture` left marks."""
    if isinstance(value, _Found):
        return slots[value.name]
    if _is_descriptor(value):
        slot = slots[value.base.item.name]
        return dataclasses.replace(value, base=_Stand(slot, slot.dtype))
    if isinstance(value, (tuple, list)):
        items = [_resolve(item, slots) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _fill(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, TensorSlot):
        tensor = tensors[value.name]
        if value.wrapped is None:
            return tensor
        import triton

        return triton.reinterpret(tensor, value.wrapped)
    if _is_descriptor(value):
        # A copy of the lists too: hooks of configs assign the block shape in place.
        return dataclasses.replace(
            value, base=tensors[value.base.item.name], block_shape=list(value.block_shape)
        )
    if isinstance(value, (tuple, list)):
        items = [_fill(item, tensors) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
