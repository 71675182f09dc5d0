"""A user's own ``@triton.jit`` kernel as an operator that the tuner knows how to tune.

One call of the kernel is one problem; its configs are the candidates of a single algorithm. What is
right is what the first config computes: the other finalists must agree with it in every tensor
that the kernel was given, and leave the memory around the tensors alone.
"""

from __future__ import annotations

import copy
import inspect
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import triton

from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.errors import bad_value
from tritonconv.runtime.operators import Algorithm, Config, Field, Operator, Problem
from tritonconv.runtime.plan import KernelCall, LaunchPlan, Slot

from .kernel_call import KernelCallArguments, TensorSlot
from .kernel_config import ABSENT, KernelConfig, is_lasting, stored_values, text_of
from .kernel_source import (
    KernelNotFoundError,
    KernelPlace,
    constexpr_parameters,
    jit_of,
    load,
    python_function,
    source_hash,
)

if TYPE_CHECKING:
    from .decorator import Autotuner

ALGORITHM = "triton"

# How far two right configs may differ: they sum in another order, and round in between to the
# coarsest format that the call uses; tl.dot rounds float32 to TF32.
_TF32_EPS = 2.0**-10
_COARSEST_EPS = 2.0**-7
_FLOAT64_EPS = 2.0**-40

_COMPARED = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


Grid = tuple[int, int, int]


@dataclass(frozen=True)
class KernelProblem:
    """One call of a user's kernel.

    Attributes:
        operator: name of the kernel's operator.
        key: what the stored entry is keyed by.
        arguments: the call.
        configs: the candidates, the first being the one that is right by definition.
        grids: grid of every candidate, or why there is none.
        trusted: position of the config whose results the others must reproduce.
    """

    operator: str
    key: tuple[tuple[str, Field], ...]
    arguments: KernelCallArguments = field(compare=False, repr=False)
    configs: tuple[triton.Config, ...] = field(compare=False, repr=False)
    grids: tuple[Grid | str, ...] = field(compare=False, repr=False)
    trusted: int = field(default=0, compare=False, repr=False)

    variants: ClassVar[tuple[str, ...]] = ("configs",)
    """Fields in which entries may differ and give each other timings."""

    def fields(self) -> Mapping[str, Field]:
        """Key values, dtypes, specialisation; the kernel's source and the list of configs."""
        return dict(self.key)

    def flops(self) -> int:
        """Unknown: 0."""
        return 0

    def bytes_moved(self) -> int:
        """The size of all tensors, which is a guess."""
        return self.arguments.nbytes()

    def __str__(self) -> str:
        values = ", ".join(
            f"{name.removeprefix('key.')}={value}"
            for name, value in self.key
            if name.startswith("key.")
        )
        return f"{self.operator}({values})"

    def configs_to_send(self) -> tuple[triton.Config, ...]:
        """The configs without their hooks, which are found again with the kernel."""
        configs = tuple(copy.copy(config) for config in self.configs)
        for config in configs:
            config.pre_hook = None
        return configs

    def __getstate__(self) -> dict[str, Any]:
        hooked = tuple(config.pre_hook is not None for config in self.configs)
        configs = self.configs_to_send()
        return {**self.__dict__, "configs": configs, "_hooked": hooked, "_values": self.values()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def position(self, config: KernelConfig) -> int:
        """Where a stored config stands among the candidates.

        Raises:
            ArgumentValueError: it is none of them.
        """
        values = config.as_dict()
        for index, known in enumerate(self.values()):
            if known == values:
                return index
        raise bad_value("config", "one of the kernel's configs", values)

    def values(self) -> Sequence[dict[str, int]]:
        """The candidates as they are stored."""
        sent: Sequence[dict[str, int]] | None = self.__dict__.get("_values")
        return sent if sent is not None else stored_values(self.configs)

    def lasts(self) -> bool:
        """Whether an entry of this call would mean the same in another process."""
        values = [value for config in self.configs for value in config.all_kwargs().values()]
        return all(map(is_lasting, [*map(text_of, values), *(str(field) for _, field in self.key)]))

    def without_tensors(self) -> KernelProblem:
        """The same problem for one who does not run it: nothing but types and sizes."""
        return replace(self, arguments=replace(self.arguments, storages=()))

    def triton_config(self, position: int, tuner: Autotuner) -> triton.Config:
        """A candidate with its hook, which in another process is the found kernel's."""
        config = self.configs[position]
        hooked = self.__dict__.get("_hooked")
        if hooked is None or not hooked[position] or config.pre_hook is not None:
            return config
        wanted = self.values()[position]
        for known in tuner.configs:
            if {**dict.fromkeys(wanted, ABSENT), **stored_values([known])[0]} == wanted:
                return known
        raise KernelNotFoundError(f"no config of {self.operator} has the hook of {config}")


class KernelAlgorithm(Algorithm):
    """Launch the kernel with one of its configs."""

    name: ClassVar[str] = ALGORITHM
    config_type = KernelConfig

    def __init__(self, operator: KernelOperator) -> None:
        self.operator = operator

    def supports(self, problem: KernelProblem) -> str | None:
        """Every call."""
        return None

    def configs(self, problem: KernelProblem, device: DeviceFacts) -> Sequence[Config]:
        """The user's list after pruning, in its order."""
        return self.listed(problem)

    def listed(self, problem: KernelProblem) -> list[KernelConfig]:
        """The configs, which are the same on every device."""
        return [KernelConfig.from_dict(values) for values in problem.values()]

    def source_hash(self) -> str:
        """The kernel's."""
        return self.operator.source_hash()

    def plan(self, problem: KernelProblem, config: KernelConfig) -> LaunchPlan | None:
        """The launch as data where it is nothing but a launch: then it can be compiled ahead."""
        position = problem.position(config)
        grid = problem.grids[position]
        tuner = self.operator.tuner()
        chosen = problem.triton_config(position, tuner)
        if isinstance(grid, str) or chosen.pre_hook is not None or tuner.has_effects():
            return None
        return _plan(tuner, problem.arguments, chosen, grid)

    def launch(
        self, problem: KernelProblem, config: KernelConfig, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Run the kernel as the decorated one would: hooks, resets, restored values."""
        position = problem.position(config)
        grid = problem.grids[position]
        if isinstance(grid, str):
            raise bad_value("grid", "a grid for every config", grid)
        tuner = self.operator.tuner()
        args, kwargs = problem.arguments.fill(tensors)
        tuner.run_as_measured(
            args,
            {**kwargs, "grid": grid},
            problem.triton_config(position, tuner),
            {name: tensors[f"restore.{name}"] for name in _restored(tuner, problem.arguments)},
        )


def _restored(tuner: Autotuner, arguments: KernelCallArguments) -> list[str]:
    names = {slot.name for slot in arguments.slots}
    return [name for name in tuner.restore_value if name in names and tuner.resets_by_itself()]


_SINGLE = (int, float, str, bool, type(None))


def _plan(
    tuner: Autotuner, arguments: KernelCallArguments, config: triton.Config, grid: Grid
) -> LaunchPlan | None:
    """The launch as a plan; None where plans cannot say it."""
    options = dict(config.all_kwargs())
    num_warps, num_stages = options.pop("num_warps"), options.pop("num_stages")
    if tuner.fn is not jit_of(tuner) or options.pop("num_ctas", 1) != 1:
        return None
    names = list(tuner.arg_names)
    constexprs = constexpr_parameters(tuner.base_fn)
    given = {
        **_defaults(tuner.base_fn),
        **dict(zip(names, arguments.args, strict=False)),
        **arguments.kwargs,
        **options,
    }
    run_time = [name for name in names if name not in constexprs]
    if not given.keys() <= set(names) or names[: len(run_time)] != run_time:
        return None
    if any(name not in given for name in run_time):
        return None
    values: list[Slot | int | float] = []
    for name in run_time:
        value = given[name]
        if isinstance(value, TensorSlot) and value.wrapped is None:
            values.append(Slot(name))
        elif type(value) in (int, float):
            values.append(value)
        else:
            return None
    constants = {name: given[name] for name in constexprs if name in given}
    if constants.keys() != constexprs or not all(
        isinstance(v, _SINGLE) for v in constants.values()
    ):
        return None
    dtypes = {slot.name: slot.dtype for slot in arguments.slots}
    zeroed = tuple(name for name in tuner.reset_to_zero if name in dtypes)
    call = KernelCall(tuner.fn, grid, tuple(values), constants, num_warps, num_stages)
    return LaunchPlan((call,), dtypes, zeroed=zeroed)


def _defaults(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


class KernelOperator(Operator):
    """A decorated kernel; several calls of it are problems of the one operator."""

    def __init__(self, tuner: Autotuner, place: KernelPlace | None) -> None:
        self.name = operator_name(tuner)  # type: ignore[misc]  # one per kernel, not per class
        self.place = place
        self._source = source_hash(tuner)
        self._tuner: Autotuner | None = tuner
        self._agreed: dict[str, torch.Tensor] = {}
        self._asked: weakref.ref[torch.Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tuner": None, "_agreed": {}, "_asked": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def tuner(self) -> Autotuner:
        """The decorated kernel, found again if this is another process.

        Raises:
            KernelNotFoundError: it is not there, or is another one now.
        """
        if self._tuner is None:
            assert self.place is not None
            found = load(self.place)
            if source_hash(found) != self._source:
                raise KernelNotFoundError(f"{self.place.name} in {self.place.file} has changed")
            self._tuner = found
        assert self._tuner is not None
        return self._tuner

    @property
    def algorithms(self) -> tuple[Algorithm, ...]:
        """The kernel itself."""
        return (KernelAlgorithm(self),)

    def source_hash(self) -> str:
        """Hash of the kernel and what it calls."""
        return self._source

    def parse(self, fields: Mapping[str, Any]) -> Problem:
        """Only a call makes a problem of a user's kernel."""
        raise bad_value(self.name, "to be tuned by calling the kernel", dict(fields))

    def make_tensors(
        self, problem: KernelProblem, device: torch.device, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Copies of the caller's tensors, and of those to restore a second one."""
        tensors = problem.arguments.tensors(device)
        for name in _restored(self.tuner(), problem.arguments):
            tensors[f"restore.{name}"] = tensors[name].clone()
        return tensors

    def outputs(self, problem: KernelProblem) -> tuple[str, ...]:
        """Every tensor, because nobody says which ones the kernel writes; and the guard zones."""
        arguments = problem.arguments
        names = [slot.name for slot in arguments.slots if slot.dtype in _COMPARED]
        for index in range(len(arguments.storages)):
            names += [f"guard.{index}.front", f"guard.{index}.back"]
        return tuple(names)

    def reference(
        self, problem: KernelProblem, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """What the trusted config computes; asked again, the same with the error it may have."""
        leader = next(iter(tensors.values()))
        if self._asked is None or self._asked() is not leader:
            exact, self._agreed = self._agreement(problem, leader.device)
            self._asked = weakref.ref(leader)
            return exact
        return self._agreed

    def _agreement(
        self, problem: KernelProblem, device: torch.device
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Results of the trusted config, and the same off by the error that is allowed.

        An element that a second run gives differently (atomics, an order that is left open) is
        NaN in the latter, which exempts it from the comparison.
        """
        names = self.outputs(problem)
        first, second = (self._trusted_run(problem, device) for _ in range(2))
        before = problem.arguments.tensors(device)
        step = _allowed(problem)
        agreed = {}
        for name in names:
            exact = first[name]
            if torch.equal(exact, before[name]):
                agreed[name] = exact if exact.dtype.is_floating_point else exact.to(torch.float64)
                continue
            if not exact.dtype.is_floating_point:
                steady = exact == second[name]
                agreed[name] = torch.where(steady, exact.to(torch.float64), torch.nan)
                continue
            wide = torch.float64 if exact.dtype is torch.float64 else torch.float32
            value, other = exact.to(wide), second[name].to(wide)
            bound = 2 * step * value[torch.isfinite(value)].abs().max() if value.numel() else 0.0
            steady = (value - other).abs() <= bound
            agreed[name] = torch.where(steady, value * (1 + step), torch.nan)
        return first, agreed

    def _trusted_run(self, problem: KernelProblem, device: torch.device) -> dict[str, torch.Tensor]:
        """Run the trusted config, or the first after it that runs at all."""
        algorithm = KernelAlgorithm(self)
        configs = algorithm.listed(problem)[problem.trusted :]
        for config in configs:
            tensors = self.make_tensors(problem, device, torch.Generator())
            try:
                algorithm.launch(problem, config, tensors)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except Exception:
                if config is configs[-1]:
                    raise
                continue
            break
        return tensors

    def default_algorithm(self, problem: KernelProblem, device: DeviceFacts) -> Algorithm:
        """There is only one."""
        return self.algorithms[0]


def _allowed(problem: KernelProblem) -> float:
    """Half of the relative difference between two configs that is put down to rounding."""
    eps = 0.0
    for slot in problem.arguments.slots:
        if slot.dtype is torch.float64:
            eps = max(eps, _FLOAT64_EPS)
        elif slot.dtype.is_floating_point:
            eps = max(eps, _TF32_EPS, torch.finfo(slot.dtype).eps)
    return min(eps, _COARSEST_EPS)


def operator_name(tuner: Autotuner) -> str:
    """``kernel.<module>.<qualified name>``, fit for a directory.

    A script's kernels are named after its file, because ``__main__`` is every script's name.
    """
    function = python_function(tuner)
    module = function.__module__
    if module == "__main__":
        file = function.__code__.co_filename
        module = re.split(r"[\\/]", file)[-1].removesuffix(".py")
    name = f"kernel.{module}.{function.__qualname__}"
    return re.sub(r"[^\w.]", "_", name)[:150]


def grids_of(
    grid: Any, configs: Sequence[triton.Config], meta: Callable[[triton.Config], Mapping[str, Any]]
) -> tuple[Grid | str, ...]:
    """The grid of every config, as integers, so that no function has to travel."""
    found: list[Grid | str] = []
    for config in configs:
        try:
            value = grid(meta(config)) if callable(grid) else grid
            value = tuple(int(size) for size in value)
        except Exception as error:  # a user's function, which may demand what a config lacks
            found.append(f"{type(error).__name__}: {error}")
            continue
        found.append((*value, 1, 1)[:3])
    return tuple(found)
