"""Trace a Python function of 0-d tensors into a :class:`ScalarFunction`, once."""

from __future__ import annotations

import contextlib
import functools
import inspect
import linecache
import os
import textwrap
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from ..runtime.errors import bad_type, bad_value
from .errors import (
    DataDependentControlFlowError,
    NotScalarError,
    ScalarArityError,
)
from .program import (
    LOAD,
    STOP,
    Argument,
    Capture,
    Load,
    Origin,
    Output,
    Program,
    Role,
    ScalarFunction,
    compute_dtype,
)
from .simplify import canonical

_INDEX_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)
_CAPTURE_DTYPES = (
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


class _PartialRead:
    """A captured tensor of which some dimensions are indexed: ``bias[h]`` of a 2-d ``bias``."""

    def __init__(
        self, mode: _ScalarMode, source: Tensor, index: tuple[Any, ...], stop: bool = False
    ) -> None:
        self._mode, self._source, self._index, self._stop = mode, source, index, stop

    def __getitem__(self, index: Any) -> Any:
        return self._mode.read(self, index)

    def __getattr__(self, name: str) -> Any:
        raise self._mode.not_indexed(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        partial = next(
            x for x in tree_flatten((args, kwargs or {}))[0] if isinstance(x, _PartialRead)
        )
        raise partial._mode.not_indexed(partial)

    def _arithmetic(self, *_: Any) -> Any:
        raise self._mode.not_indexed(self)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _arithmetic
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __neg__ = __abs__ = _arithmetic
    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __float__ = __int__ = _arithmetic


class _ScalarMode(TorchFunctionMode):
    """Turns reads of captured tensors into loads, and reads of values by Python into errors."""

    def __init__(self, origin: Origin, fake_mode: Any) -> None:
        super().__init__()
        self.origin = origin
        self.fake_mode = fake_mode
        self.captures: list[Tensor] = []
        self.slots = 0

    def traced(self, x: Any) -> bool:
        return isinstance(x, FakeTensor) and x.fake_mode is self.fake_mode

    def not_indexed(self, source: Any) -> NotScalarError:
        if isinstance(source, _PartialRead):
            source = source._source
        return NotScalarError(
            f"{self.origin}: a captured tensor of shape {tuple(source.shape)} is used as a whole; "
            "a scalar function reads one element of it: index every dimension"
        )

    def load(self, source: Tensor, index: list[Tensor]) -> Tensor:
        if source.dtype not in _CAPTURE_DTYPES:
            names = ", ".join(str(d) for d in _CAPTURE_DTYPES)
            raise bad_type(f"{self.origin}: captured tensor", names, source.dtype)
        known = [k for k, capture in enumerate(self.captures) if capture is source]
        position = known[0] if known else len(self.captures)
        if not known:
            self.captures.append(source)
        self.slots += 1
        return LOAD(index, self.slots - 1, position, compute_dtype(source.dtype))

    def read(self, source: Tensor | _PartialRead, index: Any) -> Any:
        """``source[index]``: a load when every dimension is indexed, else a partial read."""
        stop = False
        if isinstance(source, _PartialRead):
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
            return _PartialRead(self, base, tuple(result), stop)
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
                return _constant(args[0], dtype, torch.get_default_dtype())
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
                return _PartialRead(self, source, (None,) * source.dim(), stop=True)
            return STOP(self.load(source, []))
        partial = next((x for x in leaves if isinstance(x, _PartialRead)), None)
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


def _constant(value: float, dtype: torch.dtype | None, float_dtype: torch.dtype) -> Tensor:
    if dtype is None:
        if isinstance(value, bool):
            dtype = torch.bool
        else:
            dtype = torch.int64 if isinstance(value, int) else float_dtype
    return torch.full((), value, dtype=dtype)


def _unwrap(fn: Any) -> Any:
    """The plain Python function inside methods, partials and callable objects, for its source."""
    while True:
        if isinstance(fn, functools.partial):
            fn = fn.func
        elif isinstance(fn, types.MethodType):
            fn = fn.__func__
        elif isinstance(fn, torch.nn.Module):
            fn = type(fn).forward
        elif not isinstance(fn, types.FunctionType) and isinstance(
            vars(type(fn)).get("__call__"), types.FunctionType
        ):
            fn = type(fn).__call__
        else:
            return fn


def _origin(fn: Any) -> Origin:
    plain = _unwrap(fn)
    code = getattr(plain, "__code__", None)
    name = getattr(fn, "__name__", None) or type(fn).__name__
    if isinstance(fn, functools.partial):
        name = getattr(plain, "__name__", name)
    if code is None:
        return Origin(name, "built-in", 0, "")
    # A file that was edited after its import would be quoted wrongly without this check.
    linecache.checkcache(code.co_filename)
    try:
        text = textwrap.dedent(inspect.getsource(plain)).rstrip()
    except (OSError, TypeError, IndentationError):
        text = ""
    return Origin(name, os.path.basename(code.co_filename), code.co_firstlineno, text)


def _bind(
    fn: Any, arguments: tuple[Argument, ...], origin: Origin
) -> tuple[list[int], dict[str, int]]:
    """Positions of the arguments that are passed by position, and of those passed by name."""
    positional = list(range(len(arguments)))
    named: dict[str, int] = {}
    try:
        signature = inspect.signature(fn)
    except (ValueError, TypeError):
        return positional, named
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            for k, argument in enumerate(arguments):
                if argument.name == parameter.name:
                    named[parameter.name] = k
                    positional.remove(k)
    try:
        signature.bind(*positional, **dict.fromkeys(named))
    except TypeError as error:
        names = ", ".join(a.name for a in arguments)
        raise ScalarArityError(
            f"{origin}: it is called with {len(arguments)} arguments ({names}), "
            f"but its signature is {signature}: {error}"
        ) from None
    return positional, named


def _check_arguments(arguments: tuple[Argument, ...]) -> None:
    seen = set()
    for argument in arguments:
        if not argument.name.isidentifier() and not argument.name.startswith("grad_"):
            raise bad_value("arguments", "names that are Python identifiers", repr(argument.name))
        if argument.name in seen:
            raise bad_value("arguments", "distinct names", f"{argument.name!r} twice")
        if argument.dtype not in _CAPTURE_DTYPES or argument.dtype != compute_dtype(argument.dtype):
            raise bad_type(
                f"arguments: {argument.name}",
                "float32 (half precision is computed in it), float64, bool or an integer dtype",
                argument.dtype,
            )
        if argument.role is Role.COORD and argument.dtype not in (torch.int32, torch.int64):
            raise bad_type(f"arguments: {argument.name}", "int32 or int64", argument.dtype)
        seen.add(argument.name)


def _result(value: Any, arguments: tuple[Argument, ...], origin: Origin) -> Tensor:
    if isinstance(value, (bool, int, float)):
        floating = (a.dtype for a in arguments if a.dtype.is_floating_point)
        return _constant(value, None, next(floating, torch.get_default_dtype()))
    if not isinstance(value, Tensor):
        got = (
            f"{type(value).__name__} of length {len(value)}"
            if isinstance(value, (tuple, list))
            else type(value).__name__
        )
        raise NotScalarError(f"{origin}: expected one 0-d tensor or a number as result, got {got}")
    if value.dim():
        raise NotScalarError(
            f"{origin}: expected a 0-d tensor as result, got shape {tuple(value.shape)}"
        )
    if value.is_complex():
        raise NotScalarError(f"{origin}: expected a real result, got {value.dtype}")
    return value


def trace_graph(
    function: Callable[..., tuple[Tensor, ...]],
    dtypes: list[torch.dtype],
    decompositions: dict[Any, Any] | None = None,
) -> fx.Graph:
    """``make_fx`` of a function of 0-d tensors of these dtypes, whatever modes are active."""
    if torch._C._are_functorch_transforms_active():
        # A torch.func transform that is under way would wrap the scalars of the trace. Transforms
        # belong to a thread: another one is free of them.
        with ThreadPoolExecutor(max_workers=1) as executor:
            return executor.submit(trace_graph, function, dtypes, decompositions).result()
    with _LOCK, _disable_current_modes(), torch.autocast("cpu", enabled=False):
        inputs = [torch.zeros((), dtype=dtype) for dtype in dtypes]
        traced = make_fx(function, decomposition_table=decompositions, tracing_mode="fake")(*inputs)
    return traced.graph


_LOCK = threading.RLock()


def _trace(fn: Any, arguments: tuple[Argument, ...]) -> tuple[Program, tuple[Tensor, ...]]:
    _check_arguments(arguments)
    origin = _origin(fn)
    positional, named = _bind(fn, arguments, origin)
    modes: list[_ScalarMode] = []

    def run(*scalars: Tensor) -> tuple[Tensor, ...]:
        fake_mode = scalars[0].fake_mode if scalars else None  # type: ignore[attr-defined]
        modes.append(_ScalarMode(origin, fake_mode))
        with modes[0]:
            value = fn(
                *(scalars[k] for k in positional), **{n: scalars[k] for n, k in named.items()}
            )
        if isinstance(value, Tensor) and not modes[0].traced(value):
            if value.dim():
                raise modes[0].not_indexed(value)
            value = modes[0].load(value, [])
        elif isinstance(value, _PartialRead):
            raise modes[0].not_indexed(value)
        return (_result(value, arguments, origin),)

    from torch._subclasses.fake_tensor import DataDependentOutputException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    if not arguments:
        raise bad_value("arguments", "at least one argument", "none")
    try:
        graph = trace_graph(run, [a.dtype for a in arguments])
    except (GuardOnDataDependentSymNode, DataDependentOutputException) as error:
        raise DataDependentControlFlowError("an operation", str(origin)) from error
    graph = canonical(graph, str(origin))
    captures = tuple(modes[0].captures)
    loads, used = _number_loads(graph, arguments, captures)
    output = next(n for n in graph.nodes if n.op == "output").args[0][0]
    program = Program(
        origin=origin,
        order=0,
        arguments=arguments,
        outputs=(Output("out", output.meta["dtype"]),),
        captures=tuple(
            Capture(tuple(t.shape), t.dtype, _name_of(t, fn)) for t in (captures[k] for k in used)
        ),
        loads=loads,
        graph=graph,
    )
    return program, tuple(captures[k] for k in used)


def _name_of(tensor: Tensor, fn: Any) -> str:
    """What the function calls a captured tensor, where a variable or attribute holds it."""
    plain = _unwrap(fn)
    if not isinstance(plain, types.FunctionType):
        return ""
    names: dict[str, Any] = {}
    for name, cell in zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=False):
        with contextlib.suppress(ValueError):
            names[name] = cell.cell_contents
    for name in _global_names(plain.__code__):
        if name in plain.__globals__:
            names.setdefault(name, plain.__globals__[name])
    owner = fn if isinstance(fn, torch.nn.Module) else getattr(fn, "__self__", None)
    for holder in (owner, names.get("self")):
        if isinstance(holder, torch.nn.Module):
            names.update(dict(holder.named_parameters()) | dict(holder.named_buffers()))
    return next((name for name, value in names.items() if value is tensor), "")


def _number_loads(
    graph: fx.Graph, arguments: tuple[Argument, ...], captures: tuple[Tensor, ...]
) -> tuple[tuple[Load, ...], list[int]]:
    """Number loads and captures in order of appearance; drop captures that are never read."""
    coords = {}
    position = iter(arguments)
    for node in graph.nodes:
        if node.op == "placeholder":
            argument = next(position)
            if argument.role is Role.COORD:
                coords[node] = argument.name
    used: list[int] = []
    loads: list[Load] = []
    for node in graph.nodes:
        if node.target is not LOAD:
            continue
        index, _, capture, dtype = node.args
        if capture not in used:
            used.append(capture)
        names = [coords.get(i) for i in index]
        plain = all(names) and len(set(names)) == len(names)
        node.args = (index, len(loads), used.index(capture), dtype)
        loads.append(
            Load(used.index(capture), dtype, tuple(n for n in names if n) if plain else None)
        )
    return tuple(loads), used


_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device)
_CODE_NAMES: dict[types.CodeType, tuple[str, ...]] = {}
_CACHE: dict[Any, tuple[Program, tuple[Any, ...], tuple[Any, ...]]] = {}


def _global_names(code: types.CodeType) -> tuple[str, ...]:
    names = _CODE_NAMES.get(code)
    if names is None:
        found = dict.fromkeys(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                found.update(dict.fromkeys(_global_names(constant)))
        names = _CODE_NAMES[code] = tuple(found)
    return names


class _Fingerprint:
    """What a trace depends on: values of plain data, identities of everything else.

    Of an object it also sees the attributes whose names occur in the function's code: what
    ``self.slope`` or ``config.eps`` reads now.
    """

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self._open: set[int] = set()
        self._names: set[str] = set()

    def of(self, x: Any) -> Any:
        kind = type(x)
        if kind in _PLAIN or isinstance(x, torch.dtype):
            # 1, 1.0 and True are equal but trace differently; -0.0 equals 0.0 and NaN nothing.
            return (kind, repr(x)) if kind in (float, complex) else (kind, x)
        if kind is tuple or kind is list:
            return (kind, *[self.of(item) for item in x])
        if kind is types.FunctionType:
            return self.function(x)
        if kind is types.MethodType:
            return ("method", self.of(x.__func__), self.of(x.__self__))
        if kind is functools.partial:
            keywords = tuple((k, self.of(v)) for k, v in x.keywords.items())
            return ("partial", self.of(x.func), self.of(x.args), keywords)
        self.objects.append(x)
        return (id(x), *self._attributes(x))

    def _attributes(self, x: Any) -> Iterator[Any]:
        if isinstance(x, Tensor) or id(x) in self._open:
            return
        if isinstance(x, types.ModuleType) and x.__name__.split(".")[0] in ("torch", "math"):
            return
        plain = _unwrap(x)
        if isinstance(plain, types.FunctionType):
            self._names.update(_global_names(plain.__code__))
        spaces = [getattr(x, "__dict__", {})]
        if isinstance(x, torch.nn.Module):
            spaces += [x._parameters, x._buffers, x._modules]
        self._open.add(id(x))
        for space in spaces:
            for name in sorted(self._names.intersection(space)):
                yield name, self.of(space[name])
        self._open.discard(id(x))

    def function(self, fn: types.FunctionType) -> Any:
        if id(fn) in self._open:
            return "recursion"
        self._open.add(id(fn))
        code, scope = fn.__code__, fn.__globals__
        self._names.update(_global_names(code))
        parts: list[Any] = [code]
        if fn.__closure__:
            for cell in fn.__closure__:
                try:
                    parts.append(self.of(cell.cell_contents))
                except ValueError:
                    parts.append("empty cell")
        if fn.__defaults__:
            parts.append(self.of(fn.__defaults__))
        if fn.__kwdefaults__:
            parts.extend((k, self.of(v)) for k, v in fn.__kwdefaults__.items())
        for name in _global_names(code):
            if name in scope:
                parts.append(self.of(scope[name]))
        self._open.discard(id(fn))
        return tuple(parts)


def _weak(x: Any, drop: Callable[[Any], None]) -> Callable[[], Any]:
    """A reference that does not keep ``x`` alive, where its type allows that."""
    try:
        return weakref.ref(x, drop)
    except TypeError:
        return lambda: x


def trace(
    fn: Callable[..., Any], arguments: tuple[Argument, ...] | list[Argument]
) -> ScalarFunction:
    """Trace a Python function of 0-d tensors.

    The function is run once on symbolic scalars; what it does becomes a program that can be
    evaluated, differentiated any number of times and emitted as a Triton function. It may use any
    operator of :func:`tritonconv.codegen.supported_ops`, Python numbers, and tensors of its
    closure or globals, read at computed indices (``bias[h, q - k + n]``).

    Results are cached by code object, closure cells, defaults, bound object and the globals that
    the code names (numbers by value, tensors and other objects by identity), together with
    ``arguments``. A new lambda of the same code and cells is found; a changed number traces again.
    So are the attributes of such objects that the code names (``self.scale``, ``config.eps``). What
    is read from a dictionary, by ``getattr`` or through a property is fixed at the first trace.

    A Python index that is negative counts from the end. An index computed at run time must lie
    inside the tensor wherever the mask is set: nothing checks or wraps it on the GPU.

    Args:
        fn: The function. Keyword-only parameters receive the argument of the same name.
        arguments: What the kernel supplies, in the order of the function's parameters.

    Raises:
        UnsupportedOpError: An operator has no lowering.
        DataDependentControlFlowError: Python asked for the value of a scalar.
        ScalarArityError: The function takes other arguments.
        NotScalarError: A result or an operand is not 0-d.

    Example:
        >>> import torch
        >>> from tritonconv.codegen import Argument, Role, trace
        >>> f = trace(lambda x: x * torch.sigmoid(x), (Argument("x", torch.float32, Role.VALUE),))
        >>> f(torch.tensor([0.0, 2.0]))
        tensor([0.0000, 1.7616])
    """
    arguments = tuple(arguments)
    fingerprint = _Fingerprint()
    key = (fingerprint.of(fn), arguments, torch.get_default_dtype())
    entry = _CACHE.get(key)
    if entry is not None:
        program, references, _ = entry
        captures = tuple([reference() for reference in references])
        if all(capture is not None for capture in captures):
            return ScalarFunction(program, captures)
    program, tensors = _trace(fn, arguments)

    # Python reuses the identity of an object that died, so its death ends the entry.
    def drop(_: Any, key: Any = key) -> None:
        _CACHE.pop(key, None)

    keep = tuple(_weak(x, drop) for x in fingerprint.objects)
    _CACHE[key] = (program, tuple(_weak(t, drop) for t in tensors), keep)
    return ScalarFunction(program, tensors)


def clear_cache() -> None:
    """Forget every trace."""
    _CACHE.clear()
