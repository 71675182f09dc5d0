"""Trace a Python function of 0-d tensors into a :class:`ScalarFunction`, once."""

from __future__ import annotations

import contextlib
import functools
import inspect
import linecache
import os
import textwrap
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..runtime.errors import bad_type, bad_value
from .errors import DataDependentControlFlowError, NotScalarError, ScalarArityError
from .fingerprint import Fingerprint, global_names, unwrap, weak
from .ir import LOAD, Argument, Capture, Load, Origin, Output, Role, compute_dtype, trace_graph
from .program import Program, ScalarFunction
from .scalar_mode import CAPTURE_DTYPES, PartialRead, ScalarMode, constant_of
from .simplify import canonical


def _origin(fn: Any) -> Origin:
    plain = unwrap(fn)
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
        if argument.dtype not in CAPTURE_DTYPES or argument.dtype != compute_dtype(argument.dtype):
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
        return constant_of(value, None, next(floating, torch.get_default_dtype()))
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


def _trace(fn: Any, arguments: tuple[Argument, ...]) -> tuple[Program, tuple[Tensor, ...]]:
    _check_arguments(arguments)
    origin = _origin(fn)
    positional, named = _bind(fn, arguments, origin)
    modes: list[ScalarMode] = []

    def run(*scalars: Tensor) -> tuple[Tensor, ...]:
        fake_mode = scalars[0].fake_mode if scalars else None  # type: ignore[attr-defined]
        modes.append(ScalarMode(origin, fake_mode))
        with modes[0]:
            value = fn(
                *(scalars[k] for k in positional), **{n: scalars[k] for n, k in named.items()}
            )
        if isinstance(value, Tensor) and not modes[0].traced(value):
            if value.dim():
                raise modes[0].not_indexed(value)
            value = modes[0].load(value, [])
        elif isinstance(value, PartialRead):
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
    plain = unwrap(fn)
    if not isinstance(plain, types.FunctionType):
        return ""
    names: dict[str, Any] = {}
    for name, cell in zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=False):
        with contextlib.suppress(ValueError):
            names[name] = cell.cell_contents
    for name in global_names(plain.__code__):
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


_CACHE: dict[Any, tuple[Program, tuple[Any, ...], tuple[Any, ...]]] = {}


def trace(
    fn: Callable[..., Any], arguments: tuple[Argument, ...] | list[Argument]
) -> ScalarFunction:
    """Trace a Python function of 0-d tensors.

    The function is run once on symbolic scalars; what it does becomes a program that can be
    evaluated, differentiated any number of times and emitted as a Triton function. It may use any
    operator of :func:`tritonconv.codegen.supported_ops`, Python numbers, and tensors of its
    closure or globals, read at computed indices (``bias[h, q - k + n]``).

    Results are cached by code object, closure cells, defaults, bound object and the globals that
    the code names (numbers by value, tensors by identity, shape and dtype, other objects by
    identity), together with ``arguments``. A new lambda of the same code and cells is found; a
    changed number traces again. So are the attributes of such objects and of their classes that
    the code names (``self.scale``, ``config.eps``). What is read from a dictionary or by
    ``getattr`` is fixed at the first trace.

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
    fingerprint = Fingerprint()
    key = (fingerprint.key_of(fn), arguments, torch.get_default_dtype())
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

    keep = tuple(weak(x, drop) for x in fingerprint.objects)
    _CACHE[key] = (program, tuple(weak(t, drop) for t in tensors), keep)
    return ScalarFunction(program, tensors)


def clear_cache() -> None:
    """Forget every trace."""
    _CACHE.clear()
