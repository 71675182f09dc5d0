"""What is prepared for tensors of one kind: a launch, and which of them are copied first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..runtime.backend import uses_triton
from ..runtime.launch import Executable
from ..runtime.recording import epoch
from .plans import NormProblem
from .problem import DTYPES, channels_innermost, view_of

Tensor = torch.Tensor


@dataclass(frozen=True)
class Prepared:
    """A launch for tensors of one kind.

    Attributes:
        executable: what runs; None where PyTorch computes.
        channels_last: what a map that is not dense is copied into.
        copied: for every map of the call, the input first, whether it is to be copied.
    """

    executable: Executable | None
    channels_last: bool = False
    copied: tuple[bool, ...] = ()

    def dense(self, *maps: Tensor | None) -> list[Tensor | None]:
        """The maps in one order of memory."""
        if True not in self.copied:
            return list(maps)
        first = maps[0]
        assert first is not None
        form = torch.contiguous_format
        if self.channels_last:
            form = torch.channels_last if first.dim() == 4 else torch.channels_last_3d
        results = [first.contiguous(memory_format=form) if self.copied[0] else first]
        for t, copied in zip(maps[1:], self.copied[1:], strict=True):
            copy = copied and t is not None
            results.append(torch.empty_like(results[0]).copy_(t) if copy else t)  # type: ignore[arg-type]
        return list(results)


PREPARED: dict[Any, Prepared] = {}
_MAX_PREPARED = 4096
_epoch = -1
WITH_TORCH = Prepared(None)


def refresh() -> None:
    """Forget what is prepared when settings have changed, or there is too much of it."""
    global _epoch
    if _epoch != epoch() or len(PREPARED) > _MAX_PREPARED:
        _epoch = epoch()
        PREPARED.clear()


def kind(vector: Tensor | None) -> Any:
    """What a launch depends on of a vector over channels."""
    return None if vector is None else (vector.dtype, vector.is_contiguous())


def _wants_channels_last(x: Tensor) -> bool:
    """Whether a map that is dense in no order is copied into channels_last."""
    return x.dim() in (4, 5) and x.stride(1) == 1 and x.shape[1] > 1


def serves(x: Tensor, vectors: Sequence[Tensor | None]) -> bool:
    """Whether the kernels take a map and these vectors over its channels."""
    return (
        uses_triton(x.device)
        and x.dtype in DTYPES
        and x.numel() > 0
        and all(t is None or t.is_contiguous() for t in vectors)
    )


def layout(x: Tensor, *others: Tensor | None) -> tuple[bool, bool, tuple[bool, ...]]:
    """Whether channels are innermost, whether a copy is to be channels_last, what is copied."""
    found = channels_innermost(x.shape, x.stride())
    wanted = found
    if found is None:
        wanted = _wants_channels_last(x)
        if x.shape[2:].numel() == 1:
            wanted = True
    copied = [found is None]
    for t in others:
        copied.append(t is not None and channels_innermost(t.shape, t.stride()) is not wanted)
    return bool(wanted), _wants_channels_last(x), tuple(copied)


def problem_of(
    x: Tensor,
    last: bool,
    mean: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    function: str = "",
    eps: float = 0.0,
    batch: bool = True,
) -> NormProblem:
    """The normalisation of these tensors."""
    return NormProblem(
        view_of(x.shape, last),
        x.dtype,
        None if weight is None else weight.dtype,
        None if bias is None else bias.dtype,
        torch.float32 if mean is None else mean.dtype,
        residual is not None,
        function,
        eps,
        batch,
    )


def named(**tensors: Tensor | None) -> dict[str, Tensor]:
    """The tensors that there are, by slot name."""
    return {name: t for name, t in tensors.items() if t is not None}


def empty_like(x: Tensor) -> Tensor:
    """An empty result: in the order of a dense input, else as the input is copied."""
    if channels_innermost(x.shape, x.stride()) is not None:
        return torch.empty_like(x)
    form = torch.contiguous_format
    if _wants_channels_last(x):
        form = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.empty_like(x, memory_format=form)
