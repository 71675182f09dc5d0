"""Facts about a GPU that tuning and heuristics need."""

from __future__ import annotations

import functools
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .aot import SHARED_MEMORY_LIMIT
from .errors import bad_value
from .settings import settings


@dataclass(frozen=True)
class DeviceFacts:
    """What identifies a GPU for tuning; the fields are part of every tuned entry's key.

    Attributes:
        name: marketing name as the driver gives it.
        arch: ``sm_90``, ``gfx942``.
        sm_count: multiprocessors (compute units).
        l2_bytes: L2 cache, bytes.
        shared_bytes: shared memory one block may use, bytes.
        memory_gbps: memory bandwidth class, GB/s: the datasheet figure of the board that ``name``
            names.
    """

    name: str
    arch: str
    sm_count: int
    l2_bytes: int
    shared_bytes: int
    memory_gbps: int

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)


# Datasheet bandwidths, GB/s, by whole words of the device name; first match wins.
_BANDWIDTH_CLASS: tuple[tuple[str, int], ...] = (
    ("GB200", 8000),
    ("B200", 8000),
    ("B100", 8000),
    ("GH200", 4000),
    ("H200", 4800),
    ("H100 PCIe", 2039),
    ("H100 NVL", 3938),
    ("H100", 3352),
    ("A100-SXM4-80GB", 2039),
    ("A100 80GB", 1935),
    ("A100", 1555),
    ("L40S", 864),
    ("L40", 864),
    ("L4", 300),
    ("A10G", 600),
    ("A10", 600),
    ("RTX 5090", 1792),
    ("RTX 4090", 1008),
    ("RTX 3090", 936),
    ("MI300X", 5325),
)
_UNKNOWN_BANDWIDTH = 1000

# Facts for targets that are compiled for without a GPU: the board each is commonly found on.
_NOMINAL: dict[str, DeviceFacts] = {
    "sm_80": DeviceFacts("NVIDIA A100-SXM4-80GB", "sm_80", 108, 40 << 20, 163 << 10, 2039),
    "sm_86": DeviceFacts("NVIDIA GeForce RTX 3090", "sm_86", 82, 6 << 20, 99 << 10, 936),
    "sm_89": DeviceFacts("NVIDIA GeForce RTX 4090", "sm_89", 128, 72 << 20, 99 << 10, 1008),
    "sm_90": DeviceFacts("NVIDIA H100 80GB HBM3", "sm_90", 132, 50 << 20, 227 << 10, 3352),
    "sm_100": DeviceFacts("NVIDIA B200", "sm_100", 148, 126 << 20, 227 << 10, 8000),
    "sm_120": DeviceFacts("NVIDIA GeForce RTX 5090", "sm_120", 170, 96 << 20, 99 << 10, 1792),
    "gfx942": DeviceFacts("AMD Instinct MI300X", "gfx942", 304, 4 << 20, 64 << 10, 5325),
}


def nominal_device(target: str) -> DeviceFacts:
    """Facts of the board that a compile-only target stands for.

    Raises:
        ArgumentValueError: no facts are known for the target.
    """
    if target not in _NOMINAL:
        raise bad_value("target", " | ".join(_NOMINAL), repr(target))
    return _NOMINAL[target]


def _bandwidth_class(name: str, unknown: int = _UNKNOWN_BANDWIDTH) -> int:
    found = (rate for words, rate in _BANDWIDTH_CLASS if re.search(rf"\b{words}\b", name))
    return next(found, unknown)


@functools.cache
def _renamed(facts: DeviceFacts, name: str) -> DeviceFacts:
    """Facts under another name: one object, as lookups remember devices by identity."""
    return replace(facts, name=name, memory_gbps=_bandwidth_class(name, facts.memory_gbps))


@functools.cache
def _cuda_facts(index: int) -> DeviceFacts:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    return DeviceFacts(
        name=properties.name,
        arch=arch,
        sm_count=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
        shared_bytes=shared or SHARED_MEMORY_LIMIT.get(arch, 48 * 1024),
        memory_gbps=_bandwidth_class(properties.name),
    )


def device_facts(device: torch.device | int | None = None) -> DeviceFacts:
    """Facts of a GPU; of the nominal H100 when none is there (interpreter, compile-only).

    Args:
        device: CUDA device or its index; the current device when None.
    """
    if not torch.cuda.is_available():
        facts = nominal_device("sm_90")
    else:
        index = device if isinstance(device, int) else device.index if device is not None else None
        facts = _cuda_facts(torch.cuda.current_device() if index is None else index)
    if settings.device_name is not None:
        return _renamed(facts, settings.device_name)
    return facts
