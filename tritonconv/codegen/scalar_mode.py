"""What a user's function may do with scalars and captured tensors while it is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from ..runtime.errors import bad_type
from .errors import DataDependentControlFlowError, NotScalarError
from .ir import LOAD, STOP, Origin, compute_dtype

_INDEX_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)
CAPTURE_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)

_VALUE_READS = {
    torch.Tensor.__bool__: "a truth test (if, while, and, or, not)",
    torch.Tensor.__int__: "int()",
    torch.Tensor.__float__: "float()",
    torch.Tensor.__complex__: "complex()",
    torch.Tensor.__index__: "use as a Python index",
    torch.Tensor.item: ".item()",
    torch.Tensor.tolist: ".tolist()",
    torch.Tensor.numpy: ".numpy()",
    torch.Tensor.__array__: "conversion to a NumPy array",
    torch.Tensor.__contains__: "`in`",
    torch.Tensor.is_nonzero: ".is_nonzero()",
    torch.is_nonzero: "torch.is_nonzero",
    torch.equal: "torch.equal",
    torch.Tensor.equal: ".equal()",
    torch.allclose: "torch.allclose",
    torch.Tensor.allclose: ".allclose()",
}

_METADATA = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.ndimension,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.stride,
    torch.Tensor.__len__,
    torch.Tensor.is_floating_point,
    torch.is_floating_point,
    torch.Tensor.element_size,
    torch.numel,
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout")
    ),
}


class PartialRead:
    """A captured tensor of which some dimensions are indexed: ``bias[h]`` of a 2-d ``bias``."""

    def __init__(
        self, mode: ScalarMode, source: Tensor, index: tuple[Any, ...], stop: bool = False
    ) -> None:
        self._mode, self._source, self._index, self._stop = mode, source, index, stop

    def __getitem__(self, index: Any) -> Any:
        return self._mode.read(self, index)

    def __getattr__(self, name: str) -> Any:
        raise self._mode.not_indexed(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        partial = next(
            x for x in tree_flatten((args, kwargs or {}))[0] if isinstance(x, PartialRead)
        )
        raise partial._mode.not_indexed(partial)

    def _arithmetic(self, *_: Any) -> Any:
        raise self._mode.not_indexed(self)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _arithmetic
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __neg__ = __abs__ = _arithmetic
    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __float__ = __int__ = _arithmetic


class ScalarMode(TorchFunctionMode):
    """Turns reads of captured tensors into loads, and reads of values by Python into errors."""

    def __init__(self, origin: Origin, fake_mode: Any) -> None:
        super().__init__()
        self.origin = origin
        self.fake_mode = fake_mode
        self.captures: list[Tensor] = []
        self.slots = 0

    def traced(self, x: Any) -> bool:
        """Whether this is one of the trace's own symbolic scalars."""
        return isinstance(x, FakeTensor) and x.fake_mode is self.fake_mode

    def not_indexed(self, source: Any) -> NotScalarError:
        """The error for a captured tensor that is not read element by element."""
        if isinstance(source, PartialRead):
            source = source._source
        return NotScalarError(
            f"{self.origin}: a captured tensor of shape {tuple(source.shape)} is used as a whole; "
            "a scalar function reads one element of it: index every dimension"
        )

    def load(self, source: Tensor, index: list[Tensor]) -> Tensor:
        """Record the read of one element."""
        if source.dtype not in CAPTURE_DTYPES:
            names = ", ".join(str(d) for d in CAPTURE_DTYPES)
            raise bad_type(f"{self.origin}: captured tensor", names, source.dtype)
        known = [k for k, capture in enumerate(self.captures) if capture is source]
        position = known[0] if known else len(self.captures)
        if not known:
            self.captures.append(source)
        self.slots += 1
        return LOAD(index, self.slots - 1, position, compute_dtype(source.dtype))

    def read(self, source: Tensor | PartialRead, index: Any) -> Any:
        """``source[index]``: a load when every dimension is indexed, else a partial read."""
        stop = False
        if isinstance(source, PartialRead):
            base, done, stop = source._source, source._index, source._stop
        else:
            base, done = source, (None,) * source.dim()
        items = index if isinstance(index, tuple) else (index,)
        free = [d for d, known in enumerate(done) if known is None]
        if any(item is Ellipsis for item in items):
            at = next(k for k, item in enumerate(items) if item is Ellipsis)
            fill = (slice(None),) * (len(free) - len(items) + 1)
            items = (*items[:at], *fill, *items[at + 1 :])
        if len(items) > len(free):
            raise NotScalarError(
                f"{self.origin}: {len(items)} indices for {len(free)} dimensions of a captured "
                f"tensor of shape {tuple(base.shape)}"
            )
        result = list(done)
        for d, item in zip(free, items, strict=False):
            if isinstance(item, slice) and item == slice(None):
                continue
            result[d] = self._index(base, d, item)
        if any(item is None for item in result):
            return PartialRead(self, base, tuple(result), stop)
        value = self.load(base, result)
        return STOP(value) if stop else value

    def _index(self, base: Tensor, d: int, item: Any) -> Tensor:
        if isinstance(item, Tensor) and not self.traced(item) and item.dim() == 0:
            item = self.load(item, [])
        if isinstance(item, Tensor):
            if item.dim() == 0 and item.dtype in (torch.int32, torch.int64):
                return item
            if item.dim() == 0 and item.dtype in _INDEX_DTYPES:
                return item.to(torch.int32)
            raise NotScalarError(
                f"{self.origin}: index {d} of a captured tensor: expected a 0-d signed integer "
                f"tensor, got shape {tuple(item.shape)} and dtype {item.dtype}"
            )
        if not isinstance(item, bool) and hasattr(item, "__index__"):
            size, value = base.shape[d], int(item.__index__())
            if not -size <= value < size:
                raise IndexError(
                    f"{self.origin}: index {value} is out of bounds for dimension {d} of size "
                    f"{size} of a captured tensor"
                )
            return torch.full((), value % size, dtype=torch.int32)
        raise NotScalarError(
            f"{self.origin}: index {d} of a captured tensor: expected an integer or a 0-d integer "
            f"tensor, got {item!r}"
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _VALUE_READS:
            raise DataDependentControlFlowError(_VALUE_READS[func], str(self.origin))
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and args:
            if isinstance(args[0], (bool, int, float)):
                dtype = kwargs.get("dtype") or (args[1] if len(args) > 1 else None)
                return constant_of(args[0], dtype, torch.get_default_dtype())
            if self.traced(args[0]):
                return args[0] if not kwargs.get("dtype") else args[0].to(kwargs["dtype"])
        leaves = tree_flatten((args, kwargs))[0]
        captured = [x for x in leaves if isinstance(x, Tensor) and not self.traced(x)]
        if func in _METADATA:
            return func(*args, **kwargs)
        data: Any = torch.Tensor.data
        if func in (torch.Tensor.detach, data.__get__, torch.detach):
            source = args[0]
            if self.traced(source):
                return STOP(source)
            if source.dim():
                return PartialRead(self, source, (None,) * source.dim(), stop=True)
            return STOP(self.load(source, []))
        partial = next((x for x in leaves if isinstance(x, PartialRead)), None)
        if partial is not None:
            raise self.not_indexed(partial)
        if not captured:
            return func(*args, **kwargs)
        if func is torch.Tensor.__getitem__ and not self.traced(args[0]):
            return self.read(args[0], args[1])
        if func in (torch.Tensor.select, torch.select) and not kwargs:
            source, d, item = args
            return self.read(source, (*(slice(None),) * (d % max(source.dim(), 1)), item))

        def replace(x: Any) -> Any:
            if isinstance(x, Tensor) and not self.traced(x):
                if x.dim():
                    raise self.not_indexed(x)
                return self.load(x, [])
            return x

        args, kwargs = tree_map(replace, (args, kwargs))
        return func(*args, **kwargs)


def constant_of(value: float, dtype: torch.dtype | None, float_dtype: torch.dtype) -> Tensor:
    """A Python number as a 0-d tensor of the dtype that PyTorch gives it."""
    if dtype is None:
        if isinstance(value, bool):
            dtype = torch.bool
        else:
            dtype = torch.int64 if isinstance(value, int) else float_dtype
    return torch.full((), value, dtype=dtype)
