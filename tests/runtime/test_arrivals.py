"""Arrival counters: zeros for one stream, or one captured graph, at a time."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch

from tritonconv.runtime import arrivals
from tritonconv.runtime.arrivals import arrival_counters


def test_counters_of_a_cpu_are_fresh_zeros() -> None:
    first = arrival_counters(5, torch.device("cpu"))
    first += 1
    second = arrival_counters(5, torch.device("cpu"))
    assert second.dtype is torch.int32 and second.tolist() == [0] * 5


def test_slices_are_aligned_disjoint_and_never_given_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arrivals, "_slabs", {})
    monkeypatch.setattr(
        arrivals, "_fresh", lambda index, count: torch.zeros(count, dtype=torch.int32)
    )
    assert arrivals._slice(0, 5, captured=True) is None  # a graph cannot allocate
    given = [arrivals._slice(0, count, captured=False) for count in (1, 128, 129, 70000)]
    given += [arrivals._slice(0, 300, captured=True)]
    spans = []
    for piece in given:
        assert piece is not None and piece.data_ptr() % 16 == 0
        spans.append((piece.data_ptr(), piece.data_ptr() + 4 * piece.numel()))
    spans.sort()
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    while arrivals._slice(0, 4096, captured=True) is not None:
        pass  # until the slab is used up
    assert arrivals._slice(0, 4096, captured=False) is not None
    assert arrivals._slice(0, 4096, captured=True) is not None


def test_memory_of_replaced_counters_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "_slabs", {})
    monkeypatch.setattr(
        arrivals, "_fresh", lambda index, count: torch.zeros(count, dtype=torch.int32)
    )
    arrivals._slice(0, 128, captured=False)
    first = weakref.ref(arrivals._slabs[0][0])
    arrivals._slice(0, arrivals._SLAB, captured=False)
    assert first() is not None and first() is not arrivals._slabs[0][0]


def test_failed_allocation_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(index: int) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch.cuda, "Stream", full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        arrivals._fresh(0, 128)


@pytest.mark.gpu
def test_streams_and_graphs_have_their_own() -> None:
    device = torch.device("cuda")
    eager = arrival_counters(10, device)
    assert arrival_counters(10, device).data_ptr() == eager.data_ptr() and not eager.any()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert arrival_counters(10, device).data_ptr() != eager.data_ptr()
    seen = set()
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first, second = (arrival_counters(10, device) for _ in range(2))
            torch.empty(1, device=device).zero_()
        assert first.data_ptr() == second.data_ptr()
        seen.add(first.data_ptr())
    assert len(seen) == 2 and eager.data_ptr() not in seen
