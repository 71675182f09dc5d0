"""``autotune``: ``triton.autotune`` with tuned tables, stable choices and isolated measuring.

A call costs one dictionary lookup over the bare launch. Only a call whose key was never met goes
further: tuned tables first, then, if it may, measuring.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.runtime.autotuner import Autotuner as TritonAutotuner

from tritonconv.runtime.operators import Field
from tritonconv.runtime.settings import settings

from .kernel_source import constexpr_parameters, is_loading, jit_of

_MAX_RAW_KEYS = 1024
_IGNORED = ("warmup", "rep", "use_cuda_graph", "do_bench", "cache_results")


def autotune(
    configs: Sequence[triton.Config],
    key: Sequence[str],
    prune_configs_by: Mapping[str, Any] | None = None,
    reset_to_zero: Sequence[str] | None = None,
    restore_value: Sequence[str] | None = None,
    pre_hook: Callable[..., Any] | None = None,
    post_hook: Callable[..., Any] | None = None,
    warmup: int | None = None,
    rep: int | None = None,
    use_cuda_graph: bool = False,
    do_bench: Callable[..., Any] | None = None,
    cache_results: bool = False,
    *,
    isolated: bool = True,
    budget_s: float | None = None,
) -> Callable[[Any], Autotuner]:
    """Decorate a ``@triton.jit`` kernel so that every call runs the config tuned for it.

    In place of ``triton.autotune``, with the same arguments and the same way to call the kernel.
    What is tuned is stored and found by later processes; configs are measured in a process of
    their own, and one whose results differ from the first config's cannot win.

    Args:
        configs: the candidates; the first is the default, and right by definition.
        key: arguments whose values distinguish tuned entries.
        prune_configs_by: ``perf_model``, ``top_k``, ``early_config_prune``, as in Triton.
        reset_to_zero: tensors that are zeroed before every measured run.
        restore_value: tensors that are restored before every measured run.
        pre_hook: called before every measured run, instead of the two above.
        post_hook: called after every measured run.
        warmup: ignored with a warning, as are the following four: how to measure and whether to
            keep the result are the tuner's.
        rep: ignored.
        use_cuda_graph: ignored.
        do_bench: ignored.
        cache_results: ignored.
        isolated: measure in a process of its own; False where the kernel needs this one's state.
        budget_s: seconds to tune one key; no limit when None.

    Example:
        >>> import triton, triton.language as tl
        >>> @autotune(
        ...     configs=[triton.Config({"BLOCK": 256}), triton.Config({"BLOCK": 1024})],
        ...     key=["size"],
        ... )
        ... @triton.jit
        ... def double(x_ptr, size, BLOCK: tl.constexpr):
        ...     offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        ...     x = tl.load(x_ptr + offsets, mask=offsets < size)
        ...     tl.store(x_ptr + offsets, 2 * x, mask=offsets < size)
        >>> len(double.configs), double.keys
        (2, ['size'])
    """
    given = (warmup, rep, use_cuda_graph, do_bench, cache_results)
    ignored = [name for name, value in zip(_IGNORED, given, strict=True) if value]
    if ignored:
        warnings.warn(
            f"tritonconv's autotune ignores {', '.join(ignored)}: it measures in its own way and "
            "always keeps results",
            stacklevel=2,
        )
    scope = sys._getframe(1).f_globals

    def decorate(fn: Any) -> Autotuner:
        return Autotuner(
            fn,
            fn.arg_names,
            list(configs),
            list(key),
            reset_to_zero,
            restore_value,
            pre_hook=pre_hook,
            post_hook=post_hook,
            prune_configs_by=dict(prune_configs_by) if prune_configs_by else None,
            scope=scope,
            isolated=isolated,
            budget_s=budget_s,
        )

    return decorate


@dataclass(frozen=True)
class _Decision:
    """The config for a key; ``options`` is what it adds to a launch."""

    config: triton.Config
    options: dict[str, Any]
    pre_hook: Callable[..., Any] | None


_live: weakref.WeakSet[Autotuner] = weakref.WeakSet()


def _forget_all() -> None:
    for tuner in list(_live):
        tuner.forget()


settings.watch(("autotune", "deterministic", "cache_dir", "cache_path", "device_name"), _forget_all)


class Autotuner(TritonAutotuner):  # type: ignore[misc]  # Triton is untyped
    """A kernel under the tuner; what :func:`autotune` makes.

    ``configs``, ``keys``, ``fn``, ``arg_names``, ``best_config``, ``cache``, ``configs_timings``,
    ``warmup`` and ``prune_configs`` are those of Triton's class, which this one extends so that
    ``torch.compile`` and others know it.
    """

    def __init__(
        self,
        fn: Any,
        arg_names: Sequence[str],
        configs: list[triton.Config],
        key: list[str],
        reset_to_zero: Sequence[str] | None,
        restore_value: Sequence[str] | None,
        pre_hook: Callable[..., Any] | None = None,
        post_hook: Callable[..., Any] | None = None,
        prune_configs_by: dict[str, Any] | None = None,
        *,
        scope: Mapping[str, Any],
        isolated: bool = True,
        budget_s: float | None = None,
    ) -> None:
        super().__init__(
            fn,
            arg_names,
            configs,
            key,
            reset_to_zero,
            restore_value,
            pre_hook=pre_hook,
            post_hook=post_hook,
            prune_configs_by=prune_configs_by,
        )
        self.isolated = isolated
        self.budget_s = budget_s
        self.configs_timings: dict[triton.Config, list[float]] = {}
        self.scope = scope
        self.nargs: dict[str, Any] | None = None
        self._constexprs = constexpr_parameters(self.base_fn)
        unspecialized = getattr(jit_of(self), "do_not_specialize", None) or ()
        self._unspecialized = frozenset(
            name if isinstance(name, str) else arg_names[name] for name in unspecialized
        )
        # From a call's raw key to its decision; from what distinguishes entries to the same.
        self._raw: dict[Any, _Decision] = {}
        self._known: dict[Any, _Decision] = {}
        self._raw_keys: dict[tuple[int | str, ...], Callable[..., Any]] = {}
        self._classes_only = False
        self._lock = threading.RLock()
        self._tuning: Any = None
        _live.add(self)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        """The launch on a grid: a tuple, or a function of the arguments and the config."""

        def launch(*args: Any, **kwargs: Any) -> Any:
            # Each layer of calls and each copy of the arguments costs as much as the lookup.
            try:
                decision = self._raw[self._raw_keys[len(args), *kwargs](args, kwargs)]
            except (KeyError, AttributeError, TypeError):
                return self.run(*args, grid=grid, warmup=False, **kwargs)
            if decision.pre_hook is not None:
                return self.run(*args, grid=grid, warmup=False, **kwargs)
            self.best_config = decision.config
            return self.fn.run(*args, grid=grid, warmup=False, **kwargs, **decision.options)

        return launch

    def run(self, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        """Launch with the config of this call's key; what heuristics above this one call."""
        try:
            decision = self._raw[self._raw_keys[len(args), *kwargs](args, kwargs)]
        except (KeyError, AttributeError, TypeError):
            decision = self._decide(args, kwargs, grid, warmup)
        launch = {"grid": grid, "warmup": warmup}
        if decision.pre_hook is not None:
            named = dict(zip(self.arg_names, args, strict=False))
            decision.pre_hook({**named, **kwargs, **launch, **decision.options})
        self.best_config = decision.config
        return self.fn.run(*args, **launch, **kwargs, **decision.options)

    def forget(self) -> None:
        """Look every key up again at its next call."""
        with self._lock:
            self._raw.clear()
            self._known.clear()
            self.cache.clear()

    def has_effects(self) -> bool:
        """Whether a measured run is more than zeroing tensors and the launch."""
        return bool(self.user_defined_pre_hook or self.user_defined_post_hook or self.restore_value)

    def resets_by_itself(self) -> bool:
        """Whether ``reset_to_zero`` and ``restore_value`` count: a ``pre_hook`` replaces them."""
        return not self.user_defined_pre_hook

    def run_as_measured(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        config: triton.Config,
        pristine: Mapping[str, torch.Tensor],
    ) -> None:
        """One run as it is measured: resets, hooks and the launch.

        Args:
            args: positional arguments.
            kwargs: keyword arguments and the grid.
            config: what to run.
            pristine: the values to restore, by argument.
        """
        current = {**kwargs, **config.all_kwargs(), "warmup": False}
        named = {**dict(zip(self.arg_names, args, strict=False)), **current}
        for name, value in pristine.items():
            named[name].copy_(value)
        if config.pre_hook is not None:
            config.pre_hook(named)
        if self.user_defined_pre_hook:
            self.pre_hook(named)
        else:
            for name in self.reset_to_zero:
                if named.get(name) is not None:
                    named[name].zero_()
        try:
            self.fn.run(*args, **current)
        except Exception as error:
            if self.user_defined_post_hook:
                self.post_hook(named, exception=error)
            raise
        if self.user_defined_post_hook:
            self.post_hook(named, exception=None)

    def _decide(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any, warmup: bool
    ) -> _Decision:
        """The decision for a call that is not known yet in this form."""
        if len(self.configs) == 1:
            decision = _decision(self.configs[0])
            return self._remember(args, kwargs, decision)
        named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        fields = self.fields(named)
        known = (tuple(fields.items()), _device_of(named))
        with self._lock:
            decision_or_none = self._known.get(known)
            if decision_or_none is not None:
                return self._remember(args, kwargs, decision_or_none)
            decision, keep = self._resolve(args, kwargs, grid, warmup, fields)
            if not keep:
                return decision
            self._known[known] = decision
            self.cache[self._triton_key(named)] = decision.config
            return self._remember(args, kwargs, decision)

    def _resolve(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        grid: Any,
        warmup: bool,
        fields: dict[str, Field],
    ) -> tuple[_Decision, bool]:
        """Find or tune the config for a key, and whether that holds for later calls."""
        from . import foreign_tuning

        positional = dict(zip(self.arg_names, args, strict=False))
        named = {**positional, **kwargs}
        clash = sorted({name for c in self.configs for name in c.kwargs} & kwargs.keys())
        if clash:
            raise ValueError(
                f"Conflicting meta-parameters: {', '.join(clash)}. Make sure that you don't "
                "re-define auto-tuned symbols."
            )
        self.nargs = positional
        try:
            pruned = self.prune_configs({**kwargs, "grid": grid, "warmup": warmup})
            configs = list(dict.fromkeys(pruned))
        finally:
            self.nargs = None
        if len(configs) == 1:
            return _decision(configs[0]), True
        if warmup or is_loading():
            return _decision(configs[0]), False
        if self._tuning is None:
            self._tuning = foreign_tuning.Tuning(self)
        found = self._tuning.find(args, kwargs, grid, configs, fields, named)
        decision = _decision(found.config)
        if found.keep:
            # As triton.autotune leaves the tensors of the first call of a key.
            launch = {"grid": grid, "warmup": warmup}
            self.pre_hook({**named, **launch, **decision.options}, reset_only=True)
        return decision, found.keep

    def _remember(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], decision: _Decision
    ) -> _Decision:
        """Make the next such call a single lookup."""
        form: tuple[int | str, ...] = (len(args), *kwargs)
        if len(self._raw) >= _MAX_RAW_KEYS:
            # Some argument takes ever new values: from now on only its class is part of the key.
            self._raw.clear()
            if not self._classes_only:
                self._classes_only = True
                self._raw_keys.clear()
        if form not in self._raw_keys:
            self._raw_keys[form] = self._raw_key(args, kwargs)
        # Where the first such call had a tensor and this one has none, it takes the long way.
        with contextlib.suppress(AttributeError, TypeError):
            self._raw[self._raw_keys[form](args, kwargs)] = decision
        return decision

    def _raw_key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
        """Write the function of ``(args, kwargs)`` that gives a call's raw key.

        It is written for the types of this call, because looking at types costs more than the
        lookup. Integers are in it as they are, unless they turn out to change all the time.
        """
        parts: list[str] = []
        pointers: list[str] = []
        where = {name: f"a[{index}]" for index, name in enumerate(self.arg_names[: len(args)])}
        where |= {name: f"k[{name!r}]" for name in kwargs}
        values = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        several = torch.cuda.is_available() and torch.cuda.device_count() > 1
        for name, at in where.items():
            value = values[name]
            if isinstance(value, torch.Tensor):
                if several and not pointers:
                    parts.append(f"{at}.get_device()")
                parts.append(f"{at}.dtype")
                pointers.append(f"{at}.data_ptr()")
                if name in self.keys:
                    parts.append(f"{at}.shape")
            elif hasattr(value, "dtype"):
                parts.append(f"{at}.dtype")
                if hasattr(value, "data_ptr"):
                    pointers.append(f"{at}.data_ptr()")
            elif name in self.keys:
                parts.append(at)
            elif name in self._constexprs or isinstance(value, float):
                continue
            elif type(value) is int and self._classes_only:
                parts.append(f"0 if {at} == 1 else 1 if not {at} & 15 else 2")
            elif value is None or isinstance(value, (int, str)):
                parts.append(at)
            else:
                parts.append(f"{at}.__class__")
        if pointers:
            each = ", ".join(f"not {pointer} & 15" for pointer in pointers)
            parts.append(f"({' | '.join(pointers)}) & 15 and ({each},)")
        body = "".join(f"({part}), " for part in parts)
        key: Callable[..., Any] = eval(f"lambda a, k: ({body})")
        return key

    def fields(self, named: Mapping[str, Any]) -> dict[str, Field]:
        """What distinguishes the stored entries of this kernel, but for the list of configs.

        Beside the values of ``key`` and the dtypes, as in Triton, it is what Triton specialises
        the compiled kernel on: alignment of pointers, integers that are 1 or multiples of 16 (the
        strides among them).
        """
        from .kernel_config import text_of

        values: dict[str, Field] = {}
        dtypes: list[str] = []
        classes: list[str] = []
        for name in self.arg_names:
            if name not in named:
                continue
            value = named[name]
            if name in self.keys:
                plain = isinstance(value, (int, str))
                values[f"key.{name}"] = value if plain else text_of(value)
            if hasattr(value, "dtype"):
                dtypes.append(f"{name}={str(value.dtype).removeprefix('torch.')}")
                if hasattr(value, "data_ptr"):
                    classes.append(f"{name}={_alignment(value.data_ptr())}")
            elif name in self._constexprs or isinstance(value, (float, str)):
                continue
            elif isinstance(value, int):
                if name not in self._unspecialized and type(value) is int:
                    classes.append(f"{name}={'1' if value == 1 else _alignment(value)}")
            else:
                classes.append(f"{name}={type(value).__name__}")
        return {**values, "dtypes": " ".join(dtypes), "specialization": " ".join(classes)}

    def _triton_key(self, named: Mapping[str, Any]) -> tuple[Any, ...]:
        """The key under which Triton's class would keep the config in ``cache``."""
        known = {name: value for name, value in named.items() if name in self.arg_names}
        key = [known[name] for name in self.keys if name in known]
        key += [str(value.dtype) for value in known.values() if hasattr(value, "dtype")]
        return tuple(key)


def _decision(config: triton.Config) -> _Decision:
    return _Decision(config, config.all_kwargs(), config.pre_hook)


def _alignment(value: int) -> str:
    return "16" if value % 16 == 0 else "n"


def _device_of(named: Mapping[str, Any]) -> int | None:
    for value in named.values():
        if isinstance(value, torch.Tensor):
            return value.get_device()
    return None
