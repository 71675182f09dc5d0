"""What the trace of a function depends on, as a key under which it is found again."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def unwrap(fn: Any) -> Any:
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


_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device)
_CODE_NAMES: dict[types.CodeType, tuple[str, ...]] = {}


def global_names(code: types.CodeType) -> tuple[str, ...]:
    """Names that a function's code, and the functions inside it, may read as globals."""
    names = _CODE_NAMES.get(code)
    if names is None:
        found = dict.fromkeys(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                found.update(dict.fromkeys(global_names(constant)))
        names = _CODE_NAMES[code] = tuple(found)
    return names


_MAX_ROUNDS = 8
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code made, not one of C


_FIXED = frozenset({"torch", "tritonconv", "triton", "numpy"})
_LIBRARIES = tuple(
    os.path.realpath(path) + os.sep
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
    if (path := sysconfig.get_paths().get(name))
)


def _fixed(top: str) -> bool:
    """Whether a top-level package is one whose functions are never the user's own."""
    return top in _FIXED or top in sys.stdlib_module_names


@functools.cache
def _installed(name: str) -> bool:
    """Whether a module belongs to Python or to a library: what it does, it goes on doing."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    return file is not None and os.path.realpath(file).startswith(_LIBRARIES)


class Fingerprint:
    """What a trace depends on: values of plain data, identities of everything else.

    Of an object it also sees the attributes, its own and its class's, whose names occur in the
    code: what ``self.slope`` or ``config.eps`` reads now.
    """

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self._met: dict[int, int] = {}
        self._home = ""
        self._names: set[str] = set()
        self._names_at_first_look: int | None = None

    def key_of(self, fn: Any) -> Any:
        """The key of a traced function.

        An object may be met before the function that names its attribute, so the walk is repeated
        until no name is new. Where no object has attributes, one walk is enough.
        """
        module = getattr(unwrap(fn), "__module__", None)
        self._home = module.partition(".")[0] if isinstance(module, str) else ""
        for _ in range(_MAX_ROUNDS):
            self.objects.clear()
            self._met.clear()
            self._names_at_first_look = None
            key = self.of(fn)
            if self._names_at_first_look in (None, len(self._names)):
                break
        return key

    def of(self, x: Any) -> Any:
        """The part of the key that stands for one value."""
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
        if isinstance(x, Tensor):  # both may change in place, by resize_ or .data
            return (id(x), x.shape, x.dtype)
        if kind is types.BuiltinFunctionType:
            return (id(x),)
        return (id(x), *self._attributes(x))

    def _again(self, x: Any) -> bool:
        """Whether an object was met before in this walk: what it holds is in the key already.

        Without this a graph of objects that share others would be walked as a tree.
        """
        known = id(x) in self._met
        self._met.setdefault(id(x), len(self._met))
        return known

    def _opaque(self, name: Any) -> bool:
        """Whether the insides of a module are none of the key's business."""
        if not isinstance(name, str):
            return False
        top = name.partition(".")[0]
        return _fixed(top) or (top != self._home and _installed(name))

    def _classes(self, kind: type) -> Iterator[type]:
        """A class and its bases, as far as users wrote them."""
        for base in kind.__mro__[:-1]:
            if base.__flags__ & _HEAP_TYPE and not self._opaque(base.__module__):
                yield base

    def _attributes(self, x: Any) -> Iterator[Any]:
        if self._again(x):
            return
        if isinstance(x, types.ModuleType) and self._opaque(x.__name__):
            return
        plain = unwrap(x)
        if isinstance(plain, types.FunctionType):
            self._names.update(global_names(plain.__code__))
        if isinstance(x, torch.nn.Module):
            self._names.add("forward")  # an instance may have its own
        self._look()
        spaces = [getattr(x, "__dict__", {})]
        if isinstance(x, torch.nn.Module):
            spaces += [x._parameters, x._buffers, x._modules]
        spaces += map(vars, self._classes(type(x)))
        if isinstance(x, type):
            spaces += map(vars, self._classes(x))
        for space in spaces:
            for name in sorted(self._names.intersection(space)):
                yield name, self._member(x, space[name])

    def _look(self) -> None:
        if self._names_at_first_look is None:
            self._names_at_first_look = len(self._names)

    def _member(self, x: Any, value: Any) -> Any:
        """The part of the key that stands for what a class or an instance keeps under a name."""
        if isinstance(value, types.MemberDescriptorType):  # a slot
            try:
                value = value.__get__(x, type(x))
            except (AttributeError, TypeError):  # empty, or x is the class that has the slot
                return "empty slot"
        elif isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        return self.of(value)

    def function(self, fn: types.FunctionType) -> Any:
        """The part of the key that stands for a function and all that it reads."""
        if self._again(fn):
            return ("met", self._met[id(fn)])  # by order: a new lambda has another identity
        code, scope = fn.__code__, fn.__globals__
        parts: list[Any] = [code]
        opaque = self._opaque(scope.get("__name__"))
        if not opaque:
            self._names.update(global_names(code))
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
        if not opaque:  # functions of libraries mean what they mean
            for name in global_names(code):
                if name in scope:
                    parts.append(self.of(scope[name]))
        if fn.__dict__:
            self._look()
            for name in sorted(self._names.intersection(fn.__dict__)):
                parts.append((name, self.of(fn.__dict__[name])))
        return tuple(parts)


def weak(x: Any, drop: Callable[[Any], None]) -> Callable[[], Any]:
    """A reference that does not keep ``x`` alive, where its type allows that."""
    try:
        return weakref.ref(x, drop)
    except TypeError:
        return lambda: x
