"""What must be equal for a timing to be valid: the device and the compilers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

from .compat import ptxas_version
from .device import DeviceFacts
from .entries import InvalidEntryError, digest


@dataclass(frozen=True)
class Environment:
    """Part of every entry's key. Driver, clocks and dates are recorded with entries, not here."""

    device: DeviceFacts
    triton: str
    torch: str
    ptxas: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return {
            "device": self.device.as_dict(),
            "triton": self.triton,
            "ptxas": self.ptxas,
            "torch": self.torch,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Environment:
        """Rebuild an environment from JSON.

        Raises:
            InvalidEntryError: the value is no environment.
        """
        try:
            facts = dict(value["device"])
            for name in ("sm_count", "l2_bytes", "shared_bytes", "memory_gbps"):
                facts[name] = int(facts[name])
            return cls(
                DeviceFacts(**facts),
                str(value["triton"]),
                str(value["torch"]),
                str(value.get("ptxas", "")),
            )
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise InvalidEntryError(f"no environment: {type(error).__name__}: {error}") from None

    @functools.cached_property
    def hash(self) -> str:
        """Directory name of this environment."""
        return digest(self.as_dict())


@functools.cache
def environment(device: DeviceFacts) -> Environment:
    """The running environment on a device."""
    torch_version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    return Environment(device, triton.__version__, torch_version, ptxas_version(device.arch))
