"""Find a decorated kernel again in another process, and hash what it computes.

A kernel travels as the place of its definition, never as code. A module that can be imported is
imported; of a script only the statements that the kernel needs are executed, so that nothing that
the script *does* happens again.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import os
import sys
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tritonconv.runtime.errors import TritonConvError


class KernelNotFoundError(TritonConvError):
    """A kernel cannot be found by its place, or is another one there now."""


def chain(fn: Any) -> Iterator[Any]:
    """A decorated kernel and everything it wraps; the Python function comes last."""
    while True:
        yield fn
        if inspect.isfunction(fn) or not hasattr(fn, "fn"):
            return
        fn = fn.fn


def python_function(fn: Any) -> types.FunctionType:
    """The Python function below all decorators."""
    function = list(chain(fn))[-1]
    assert isinstance(function, types.FunctionType), fn
    return function


def jit_of(fn: Any) -> Any:
    """What ``triton.jit`` made, below heuristics and tuners."""
    return list(chain(fn))[-2]


@functools.cache
def constexpr_parameters(function: types.FunctionType) -> frozenset[str]:
    """Names of the parameters annotated as ``tl.constexpr``."""
    names = set()
    for name, parameter in inspect.signature(function).parameters.items():
        annotation = parameter.annotation
        if "constexpr" in (annotation if isinstance(annotation, str) else repr(annotation)):
            names.add(name)
    return frozenset(names)


def source_hash(fn: Any) -> str:
    """Hash of a kernel, the device functions it calls and the constants it reads.

    Comments, formatting and line numbers do not count; heuristics below the tuner do.
    """
    parts: list[str] = []
    for layer in chain(fn):
        values = getattr(layer, "values", None)
        if isinstance(values, Mapping):  # triton.heuristics
            parts += [f"{name}={code_hash(function)}" for name, function in values.items()]
    _describe(jit_of(fn), parts, set())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def code_hash(function: Any) -> str:
    """Hash of a plain Python function by its code, which for a lambda is all there is."""
    code = getattr(function, "__code__", None)
    if code is None:
        return f"{type(function).__module__}.{type(function).__qualname__}"
    parts: list[str] = []
    stack = [code]
    while stack:
        current = stack.pop()
        parts.append(f"{current.co_code.hex()} {current.co_names} {current.co_varnames}")
        for constant in current.co_consts:
            if isinstance(constant, types.CodeType):
                stack.append(constant)
            else:
                parts.append(repr(constant))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _describe(jitted: Any, parts: list[str], seen: set[types.FunctionType]) -> None:
    """Append a device function and, depth first, those it names."""
    function = python_function(jitted)
    if function in seen:
        return
    seen.add(function)
    tree = _definition(jitted, function)
    options = [
        f"{name}={getattr(jitted, name, None)!r}"
        for name in ("do_not_specialize", "do_not_specialize_on_alignment", "noinline", "debug")
    ]
    parts.append(f"{ast.unparse(tree)}\n{options}")
    scope = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    local = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    local |= {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Name, ast.Attribute)):
            continue
        found = _lookup(node, scope, local)
        if hasattr(found, "fn") and not isinstance(found, type):
            # Triton's own device functions change with its version, which entries are keyed by.
            if not python_function(found).__module__.startswith("triton."):
                _describe(found, parts, seen)
        elif type(found).__name__ == "constexpr" or isinstance(found, (int, float, str, tuple)):
            parts.append(f"{ast.unparse(node)}={found!r}")


def _definition(jitted: Any, function: types.FunctionType) -> ast.AST:
    """The function's syntax tree without decorators."""
    source = getattr(jitted, "src", None)
    if not isinstance(source, str):
        source = textwrap.dedent("".join(inspect.getsourcelines(function)[0]))
    (tree,) = ast.parse(source).body[:1]
    if isinstance(tree, ast.FunctionDef):
        tree.decorator_list = []
    return tree


def _lookup(node: ast.AST, scope: Mapping[str, Any], local: set[str]) -> Any:
    if isinstance(node, ast.Name):
        return None if node.id in local else scope.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _lookup(node.value, scope, local)
        # Attributes of modules only: those of a value are the value's own business.
        if isinstance(owner, types.ModuleType):
            return getattr(owner, node.attr, None)
    return None


@dataclass(frozen=True)
class KernelPlace:
    """Where a decorated kernel is defined.

    Attributes:
        file: path of the Python file.
        module: importable name; empty for a script.
        name: global name, ``kernel`` or ``Class.kernel``.
        depth: how many decorators lie above it.
        search_path: ``sys.path`` of the process that defines it.
    """

    file: str
    module: str
    name: str
    depth: int
    search_path: tuple[str, ...]


def place_of(kernel: Any, scope: Mapping[str, Any]) -> KernelPlace:
    """Where a decorated kernel can be found again.

    Args:
        kernel: the decorated object.
        scope: the globals in which it was decorated.

    Raises:
        KernelNotFoundError: it is no global of a module that lies in a file.
    """
    file = scope.get("__file__")
    if not file or not os.path.isfile(file):
        raise KernelNotFoundError("its module is not a file")
    spec = scope.get("__spec__")
    module = spec.name if spec is not None else scope["__name__"]
    if module == "__main__" or (spec is None and sys.modules.get(module) is None):
        module = ""
    for name, value in _globals(scope):
        for depth, layer in enumerate(chain(value)):
            if layer is kernel:
                return KernelPlace(os.path.realpath(file), module, name, depth, tuple(sys.path))
    raise KernelNotFoundError("it is not a global of its module")


def _globals(scope: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in list(scope.items()):
        if isinstance(value, type) and value.__module__ == scope.get("__name__"):
            for attribute, inner in list(vars(value).items()):
                yield f"{name}.{attribute}", inner
        elif hasattr(value, "fn"):
            yield name, value


_loading = 0


def is_loading() -> bool:
    """Whether a user's module is being loaded here: what it launches meanwhile is not tuned."""
    return _loading > 0


@contextmanager
def _load() -> Iterator[None]:
    global _loading
    _loading += 1
    try:
        yield
    finally:
        _loading -= 1


@functools.cache
def load(place: KernelPlace) -> Any:
    """The decorated kernel that lies at a place.

    Raises:
        KernelNotFoundError: there is none.
    """
    with _load():
        value: Any = _module_at(place)
        for part in place.name.split("."):
            if not hasattr(value, part):
                raise KernelNotFoundError(f"{place.file} defines no {place.name}")
            value = getattr(value, part)
    layers = list(chain(value))
    if len(layers) <= place.depth:
        raise KernelNotFoundError(f"{place.name} in {place.file} is another kernel now")
    return layers[place.depth]


def _module_at(place: KernelPlace) -> types.ModuleType:
    sys.path += [entry for entry in place.search_path if entry not in sys.path]
    if place.module:
        try:
            module = importlib.import_module(place.module)
        except ModuleNotFoundError as error:
            raise KernelNotFoundError(f"module {place.module}: {error}") from error
        if os.path.realpath(module.__file__ or "") == place.file:
            return module
    stem = os.path.splitext(os.path.basename(place.file))[0]
    module = types.ModuleType(f"_tuned_script_{stem}")
    module.__file__ = place.file
    sys.modules[module.__name__] = module  # where inspect and dataclasses look for it
    with open(place.file, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    tree.body = needed_statements(tree.body, place.name.split(".")[0])
    exec(compile(tree, place.file, "exec"), vars(module))
    return module


def needed_statements(body: Iterable[ast.stmt], name: str) -> list[ast.stmt]:
    """The module-level statements that define a name and all that its definition refers to.

    Besides those that bind a name that is needed, these are the ones that change such a value in
    place, as ``configs.append(...)`` does.

    Example:
        >>> tree = ast.parse("import math; n = 2; f = lambda: n; print(f())")
        >>> [ast.unparse(statement) for statement in needed_statements(tree.body, "f")]
        ['n = 2', 'f = lambda: n']
    """
    statements = list(body)
    binds = [_bound(statement) for statement in statements]
    assigned = {
        bound
        for statement, names in zip(statements, binds, strict=True)
        if not isinstance(statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
        for bound in names
    }
    chosen: set[int] = set()
    needed = {name}
    while True:
        before = len(chosen)
        changeable = (needed & assigned) - {name}
        for index, statement in enumerate(statements):
            if index in chosen:
                continue
            if binds[index] & (needed | {"*"}) or _changed(statement) & changeable:
                chosen.add(index)
                needed |= _read(statement)
        if len(chosen) == before:
            return [statements[index] for index in sorted(chosen)]


_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def _at_module_level(statement: ast.stmt) -> Iterator[ast.AST]:
    stack: list[ast.AST] = [statement]
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, _SCOPES):
            stack.extend(ast.iter_child_nodes(node))


def _bound(statement: ast.stmt) -> set[str]:
    """Names that a statement binds in the module; ``*`` for what must always be executed."""
    names = set()
    for node in _at_module_level(statement):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                names.add("*")
    return names


def _read(node: ast.AST) -> set[str]:
    """Global names that a statement reads, function bodies included."""
    if isinstance(node, ast.Name):
        return {node.id}
    names = set().union(*map(_read, ast.iter_child_nodes(node)))
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        outside = [node.args] if isinstance(node, ast.Lambda) else [node.args, *node.decorator_list]
        local = {argument.arg for argument in ast.walk(node) if isinstance(argument, ast.arg)}
        local |= {
            inner.id
            for inner in ast.walk(node)
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)
        }
        names = (names - local).union(*map(_read, outside))
    return names


def _changed(statement: ast.stmt) -> set[str]:
    """Names whose values a statement may change in place."""
    names = set()
    for node in _at_module_level(statement):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            names.add(_root(node.func.value))
        elif isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            names.add(_root(node.value))
    return names


def _root(node: ast.AST) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
