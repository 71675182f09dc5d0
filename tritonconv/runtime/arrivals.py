"""Arrival counters: integers that are zero before a kernel and that the kernel leaves at zero.

Programs that share a sum count themselves in, and the last one finishes it. Zeroing the counters
for every launch would cost a launch of its own, so they live on: one set for each stream, on which
kernels follow each other, and one for each captured graph (and stream within it), as graphs may be
replayed on several streams at once.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

_UNIT = 128  # counters are handed out in multiples: 512 bytes, so that pointers are aligned
_SLAB = 1 << 18  # counters; 1 MiB
_RESERVE = 1 << 16  # so many stay free for graphs, which cannot ask for another slab

_LOCK = threading.Lock()
_Key = tuple[int, int, int]
"""Device, stream, captured graph (0: none)."""
_held: dict[_Key, torch.Tensor] = {}
_slabs: dict[int, tuple[torch.Tensor, int]] = {}
"""By device: zeroed memory, and how much of it is given away."""
_kept: list[torch.Tensor] = []
"""All of it, for ever: kernels under way and captured graphs use slices that nobody holds."""


def arrival_counters(count: int, device: torch.device) -> torch.Tensor:
    """At least ``count`` int32 zeros for a kernel on the current stream that leaves them zero.

    Args:
        count: how many.
        device: where; on a CPU, whose kernels are interpreted, they are fresh.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    current = torch._C._cuda_getDevice()
    index = current if device.index is None else device.index
    if index != current:
        with torch.cuda.device(index):
            return arrival_counters(count, device)
    stream = torch._C._cuda_getCurrentRawStream(index)
    graph = 0
    if torch.cuda.is_current_stream_capturing():
        graph = _graph_of(stream)
        if graph == 0:
            return torch.zeros(count, dtype=torch.int32, device=device)
    key = (index, stream, graph)
    found = _held.get(key)
    if found is None or found.numel() < count:
        with _LOCK:
            found = _slice(index, count, captured=graph != 0)
            if found is None:  # zeroed by the graph itself, before every use
                return torch.zeros(count, dtype=torch.int32, device=device)
            _held[key] = found
    return found


def counters_on_stream(count: int, device: torch.device, stream: int) -> torch.Tensor:
    """:func:`arrival_counters` for a caller that knows the current device's stream."""
    if not torch._C._cuda_isCurrentStreamCapturing():
        found = _held.get((device.index, stream, 0))
        if found is not None and found.numel() >= count:
            return found
    return arrival_counters(count, device)


def _slice(index: int, count: int, captured: bool) -> torch.Tensor | None:
    """Zeros that nobody else has; None where a graph being captured finds none left."""
    size = -(-count // _UNIT) * _UNIT
    slab, used = _slabs.get(index, (None, 0))
    room = 0 if slab is None else slab.numel() - used
    if captured and room < size:
        return None
    if slab is None or (not captured and room < size + _RESERVE):
        slab, used = _fresh(index, max(_SLAB, size + _RESERVE)), 0
        _kept.append(slab)
    _slabs[index] = (slab, used + size)
    return slab[used : used + size]


def _fresh(index: int, count: int) -> torch.Tensor:
    """Zeros outside every memory pool that the caller may be in, complete for all streams."""

    def make() -> torch.Tensor:
        with torch.inference_mode(False), torch.cuda.stream(torch.cuda.Stream(index)):
            made = torch.zeros(count, dtype=torch.int32, device=torch.device("cuda", index))
            torch.cuda.current_stream(index).synchronize()
        return made

    # A pool for graphs takes what its thread, or its stream, allocates.
    with ThreadPoolExecutor(1) as other:
        return other.submit(make).result()


_CAPTURING = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE


def _graph_of(stream: int) -> int:
    """The driver's number of the graph that a stream is captured into; 0 where it does not say."""
    query = _capture_query()
    if query is None:
        return 0
    status, number = ctypes.c_int(), ctypes.c_uint64()
    code = query(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    return number.value if code == 0 and status.value == _CAPTURING else 0


@functools.cache
def _capture_query() -> ctypes._NamedFuncPointer | None:
    if torch.version.hip:
        return None
    try:
        return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None
