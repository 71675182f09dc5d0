"""What a device can do with a config: hard limits before compiling, and a predicted time.

The limits drop only what cannot run: the estimates behind them err to the small side where they
would matter. The prediction orders candidates, no more; its terms are a roofline whose arithmetic
is counted per multiprocessor (a last wave of few blocks takes as long as a full one), the time that
dependent steps of a loop wait for memory, and what a launch costs at least.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.operators import Field
from tritonconv.runtime.space import Footprint, Violation

from .roofline import Ceilings, arithmetic_of, ceilings

MAX_THREADS = 1024
REGISTERS_PER_THREAD = 255
REGISTERS = 65536
"""32-bit registers of a multiprocessor (compute capability 8.0 to 12.0)."""
SPILL_ALLOWANCE = 256
"""Bytes of local memory per thread that a config may use: a few spilled values cost nothing."""
COPY_ALIGNMENT = 16
"""Rows that a copy engine moves are multiples of so many bytes."""

_MAX_BLOCKS = 32
_MAX_RESIDENT_THREADS = 2048
_BLOCK_OVERHEAD_BYTES = 1024  # of shared memory, which the driver takes per block
_ADDRESS_REGISTERS = 48  # indices, pointers and masks beside the accumulator

# Constants of the prediction: orders of magnitude of current data-centre GPUs.
_LAUNCH_US = 2.0
_NEXT_LAUNCH_US = 1.5
_L2_OVER_MEMORY = 2.2  # bandwidth of the L2 cache over that of memory
_GATHER_US = 1.2  # from a block's store to another block that was told of it and loads it
_BLOCK_RATE = 80e9  # bytes per second that one multiprocessor draws from the L2 cache
_LATENCY_US = 0.7  # of a load that misses the L1 cache, with its address arithmetic
_FALLBACK_RATE = 50.0  # flops per byte of memory bandwidth, where the rates are unknown


class ResourcesLike(Protocol):
    """What compiling says about a kernel; None where no tool reports it."""

    @property
    def registers(self) -> int | None:
        """Per thread."""
        ...

    @property
    def spill_bytes(self) -> int | None:
        """Local memory per thread."""
        ...

    @property
    def shared_bytes(self) -> int | None:
        """Per block."""
        ...


def limits(footprint: Footprint, device: DeviceFacts) -> tuple[Violation, ...]:
    """Hard limits of a device that a config breaks, before anything is compiled.

    Example:
        >>> from tritonconv.runtime.device import nominal_device
        >>> wide = Footprint(programs=1, threads=2048, shared_bytes=0, accumulators=8,
        ...                  bytes_loaded=0, bytes_stored=0, flops=0)
        >>> [violation.reason for violation in limits(wide, nominal_device("sm_90"))]
        ['2048 threads in a block, the device allows 1024']
    """
    found = []
    if footprint.threads > MAX_THREADS:
        reason = f"{footprint.threads} threads in a block, the device allows {MAX_THREADS}"
        found.append(Violation("threads", reason))
    # On AMD the compiler keeps operands in registers at its own discretion: nothing is certain.
    if footprint.shared_bytes > device.shared_bytes and device.arch.startswith("sm_"):
        reason = (
            f"about {footprint.shared_bytes >> 10} KiB of shared memory, "
            f"a block may use {device.shared_bytes >> 10}"
        )
        found.append(Violation("shared memory", reason))
    if footprint.accumulators > REGISTERS_PER_THREAD:
        reason = (
            f"the accumulator alone takes {footprint.accumulators} registers of a thread, "
            f"which has {REGISTERS_PER_THREAD}"
        )
        found.append(Violation("registers", reason))
    for row in footprint.copied_rows:
        if row % COPY_ALIGNMENT:
            reason = (
                f"the copy engine would move rows of {row} bytes, "
                f"not a multiple of {COPY_ALIGNMENT}"
            )
            found.append(Violation("copy engine", reason))
            break
    return tuple(found)


def compiled_limits(
    resources: ResourcesLike, device: DeviceFacts, threads: int | None = None
) -> tuple[Violation, ...]:
    """What real registers, spills and shared memory of a compiled kernel rule out."""
    found = []
    spilled = resources.spill_bytes or 0
    if spilled > SPILL_ALLOWANCE:
        reason = f"spills {spilled} bytes per thread, more than {SPILL_ALLOWANCE}"
        found.append(Violation("spills", reason))
    shared = resources.shared_bytes or 0
    if shared > device.shared_bytes:
        reason = f"{shared} bytes of shared memory, a block may use {device.shared_bytes}"
        found.append(Violation("shared memory", reason))
    if threads is not None and resources.registers is not None:
        total = threads * resources.registers
        if total > REGISTERS:
            reason = f"{total} registers in a block, a multiprocessor has {REGISTERS}"
            found.append(Violation("registers", reason))
    return tuple(found)


@dataclass(frozen=True)
class Model:
    """Predicts times on one device for one kind of arithmetic.

    Attributes:
        device: the device.
        bandwidth: of memory, bytes per second.
        matrix_rate, scalar_rate: floating-point operations per second.
        compulsory: bytes that any config has to move.
    """

    device: DeviceFacts
    bandwidth: float
    matrix_rate: float
    scalar_rate: float
    compulsory: int

    @classmethod
    def of(cls, device: DeviceFacts, fields: Mapping[str, Field], compulsory: int) -> Model:
        """The model for problems whose ``dtype`` and ``precision`` fields name the arithmetic."""
        table = ceilings(device) or _guess(device)
        arithmetic = arithmetic_of(fields)
        scalar = table.rates.get("float32", table.bandwidth * _FALLBACK_RATE)
        matrix = table.rates.get(arithmetic, scalar)
        if fields.get("precision") == "tf32x3":
            matrix = table.rates.get("tf32", scalar) / 3
        return cls(device, table.bandwidth, matrix, scalar, compulsory)

    def resident(self, footprint: Footprint) -> int:
        """Blocks that one multiprocessor holds at a time, at least one."""
        registers = footprint.threads * min(
            REGISTERS_PER_THREAD, footprint.accumulators + _ADDRESS_REGISTERS
        )
        shared = self.device.shared_bytes // (footprint.shared_bytes + _BLOCK_OVERHEAD_BYTES)
        return max(
            1,
            min(
                REGISTERS // max(registers, 1),
                shared,
                _MAX_RESIDENT_THREADS // max(footprint.threads, 1),
                _MAX_BLOCKS,
            ),
        )

    def predicted_us(self, footprint: Footprint) -> float:
        """Microseconds that a config takes, roughly."""
        if footprint.programs <= 0:
            return _LAUNCH_US
        sms = self.device.sm_count
        resident = self.resident(footprint)
        busiest = -(-footprint.programs // sms)  # blocks of the multiprocessor that has most
        waves = -(-footprint.programs // (sms * resident))
        rate = self.matrix_rate if footprint.matrix else self.scalar_rate
        # Few warps leave the arithmetic units waiting for each other.
        warps = min(busiest, resident) * footprint.threads / 32
        saturation = min(1.0, warps / 8) if footprint.matrix else min(1.0, warps / 16)
        per_block = footprint.flops / footprint.programs
        arithmetic = busiest * per_block * sms / (rate * max(saturation, 0.125))
        moved = max(self.compulsory, footprint.bytes_stored)
        # A grid smaller than the device cannot draw its full bandwidth: too few threads wait for
        # loads, or too few bytes are on their way where copies run in the background.
        share = min(1.0, footprint.programs * footprint.threads / (sms * 256))
        l2_rate = self.bandwidth * _L2_OVER_MEMORY
        if footprint.in_flight > 1:
            under_way = footprint.bytes_loaded / max(1, footprint.steps) * footprint.in_flight
            enough = l2_rate * _LATENCY_US * 1e-6
            drawn = footprint.programs * _BLOCK_RATE / l2_rate
            share = max(share, min(1.0, under_way / enough, drawn))
        memory = moved / (self.bandwidth * share)
        cache = (footprint.bytes_loaded + footprint.bytes_stored) / (l2_rate * share)
        # Blocks of a multiprocessor hide each other's waits; steps of one block do not.
        waiting = waves * (1 + footprint.steps / footprint.in_flight) * _LATENCY_US
        busy = max(arithmetic, memory, cache) * 1e6
        start = _LAUNCH_US + (footprint.launches - 1) * (_NEXT_LAUNCH_US + _LATENCY_US)
        if footprint.gathered_bytes:
            start += _GATHER_US + footprint.gathered_bytes / _BLOCK_RATE * 1e6
        return start + max(busy, waiting) + 0.15 * min(busy, waiting)


def _guess(device: DeviceFacts) -> Ceilings:
    """Ceilings of a device that nobody measured: its bandwidth class and usual ratios to it."""
    bandwidth = device.memory_gbps * 1e9
    rates = {"bfloat16": 220.0, "float16": 220.0, "tf32": 110.0, "float32": 18.0, "float64": 9.0}
    return Ceilings(bandwidth, {name: bandwidth * r for name, r in rates.items()}, measured=False)
