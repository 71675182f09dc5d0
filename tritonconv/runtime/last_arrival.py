"""How programs count themselves in at the counters that :mod:`.arrivals` hands out."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def last_to_arrive(counter_ptr, parts):
    """Whether all ``parts`` programs have arrived at a counter; the last one sets it to zero.

    What the others stored before they arrived is visible to the last one, wherever it is loaded
    past the L1 cache.
    """
    # All threads of this program have stored before one of them counts it in.
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == parts - 1
    tl.store(counter_ptr, 0, mask=last)
    return last
