"""What a kernel family offers to dispatch and to the tuner: operators, algorithms, configs.

An *operator* (``conv2d.forward``) has *problems* (frozen descriptions of one call) and several
*algorithms*, each with a space of *configs*. The tuner, the command line and the tests work on
these three interfaces alone and know no family; a family registers its operators at import.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from .config import Config as Config  # the one place that algorithms import from
from .device import DeviceFacts
from .errors import bad_value
from .launch import Executable
from .plan import LaunchPlan
from .space import ConfigSpace, Footprint

Field = str | int | bool


@runtime_checkable
class Problem(Protocol):
    """A frozen, hashable description of one call."""

    @property
    def operator(self) -> str:
        """Name of the operator, such as ``conv2d.forward``."""
        ...

    def fields(self) -> Mapping[str, Field]:
        """What the tuned table is keyed by: strings are compared, integers have a distance."""
        ...

    def flops(self) -> int:
        """Floating-point operations of the call."""
        ...

    def bytes_moved(self) -> int:
        """Compulsory traffic: every input read once, every output written once."""
        ...


class Algorithm(ABC):
    """One way to compute an operator. Adding an algorithm is adding one such class in one file."""

    name: ClassVar[str]
    config_type: ClassVar[type[Config]] = Config
    sources: ClassVar[tuple[str, ...]] = ()
    """Modules that decide what the algorithm runs, beside its own: paths from its folder."""

    @abstractmethod
    def supports(self, problem: Any) -> str | None:
        """None when the algorithm serves the problem, otherwise the reason why it does not."""

    def configs(self, problem: Any, device: DeviceFacts) -> Sequence[Config]:
        """The configs for a problem on a device; the first entry is the untuned default.

        An algorithm overrides either this, with a list, or :meth:`space`.
        """
        if type(self).space is Algorithm.space:
            raise NotImplementedError(f"{type(self).__name__} defines neither configs nor space")
        return self.space(problem, device)

    def space(self, problem: Any, device: DeviceFacts) -> ConfigSpace[Any]:
        """The same as typed parameters, constraints and a default: what a search moves through.

        A list of ``configs`` makes a space whose steps lead from one listed value to the next.
        """
        return ConfigSpace.listed(self.configs(problem, device))

    def footprint(self, problem: Any, config: Any, device: DeviceFacts) -> Footprint | None:
        """What a config asks of the device, in closed form; None when nothing is known.

        The tuner drops configs that cannot fit before it compiles them, and tries promising ones
        first. Without a footprint all are tried, in no particular order.
        """
        return None

    @abstractmethod
    def plan(self, problem: Any, config: Any) -> LaunchPlan | None:
        """The kernels to run, as data; None when the algorithm calls PyTorch instead."""

    def launch(self, problem: Any, config: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Compute into the problem's output tensors.

        Args:
            problem: the call.
            config: one of ``configs``.
            tensors: inputs and preallocated outputs by slot name.
        """
        plan = self.plan(problem, config)
        assert plan is not None, "algorithms without a plan override launch"
        Executable(plan, tuple(tensors))(*tensors.values())

    def source_hash(self) -> str:
        """Hash of all that the algorithm runs: its own file and those of ``sources``.

        What was timed with another source says nothing about the algorithm of today.
        """
        return _class_hash(type(self))


class Operator(ABC):
    """One tunable operator of a family."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def algorithms(self) -> tuple[Algorithm, ...]:
        """Every algorithm, in the fixed order in which ties are broken."""

    @abstractmethod
    def parse(self, fields: Mapping[str, Any]) -> Problem:
        """Build a problem from named values (a suite row, the command line, a tuned entry)."""

    @abstractmethod
    def make_tensors(
        self, problem: Any, device: torch.device, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Fresh random inputs and NaN-poisoned outputs by slot name, in slot order."""

    @abstractmethod
    def outputs(self, problem: Any) -> tuple[str, ...]:
        """Slots that a launch writes."""

    @abstractmethod
    def reference(
        self, problem: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """Plain PyTorch outputs computed in ``dtype`` from the problem's inputs."""

    @abstractmethod
    def default_algorithm(self, problem: Any, device: DeviceFacts) -> Algorithm:
        """What an untuned call runs."""

    def space(self, algorithm: Algorithm, problem: Any, device: DeviceFacts) -> ConfigSpace[Any]:
        """The configs of one of the operator's algorithms for a problem."""
        return algorithm.space(problem, device)

    def elsewhere(self, problem: Any) -> tuple[Problem, ...]:
        """The same computation in other memory formats, where a rival may be faster."""
        return ()

    def candidates(self, problem: Any) -> tuple[Algorithm, ...]:
        """Algorithms that serve the problem."""
        return tuple(a for a in self.algorithms if a.supports(problem) is None)

    def algorithm(self, name: str) -> Algorithm:
        """The algorithm of that name.

        Raises:
            ArgumentValueError: there is none.
        """
        for algorithm in self.algorithms:
            if algorithm.name == name:
                return algorithm
        raise bad_value("algorithm", " | ".join(a.name for a in self.algorithms), repr(name))

    def source_hashes(self) -> Mapping[str, str]:
        """Hash of every algorithm's source, by its name."""
        return {algorithm.name: algorithm.source_hash() for algorithm in self.algorithms}

    def source_hash(self) -> str:
        """One hash over the sources of all algorithms."""
        text = " ".join(f"{name} {value}" for name, value in self.source_hashes().items())
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache  # the files of a running process are those that it has imported
def _class_hash(algorithm: type[Algorithm]) -> str:
    own = Path(inspect.getfile(algorithm))
    hashed = hashlib.sha256()
    for path in (own, *(own.parent / f"{name}.py" for name in sorted(algorithm.sources))):
        hashed.update(hashlib.sha256(path.read_bytes()).digest())
    return hashed.hexdigest()[:16]


_OPERATORS: dict[str, Operator] = {}


def register(operator: Operator) -> Operator:
    """Make an operator known to dispatch, the tuner and the command line."""
    # Now, as close as can be to their import: a file that is edited before the first lookup is not
    # what this process runs. Classes without a file are refused where the hash is needed.
    with contextlib.suppress(OSError, TypeError):
        operator.source_hashes()
    _OPERATORS[operator.name] = operator
    return operator


def operator_names() -> tuple[str, ...]:
    """Names of all registered operators."""
    return tuple(_OPERATORS)


def get_operator(name: str) -> Operator:
    """The operator of that name.

    Raises:
        ArgumentValueError: there is none.
    """
    if name not in _OPERATORS:
        raise bad_value("operator", " | ".join(_OPERATORS), repr(name))
    return _OPERATORS[name]


HostCalls = Callable[[Any, torch.device], Mapping[str, Callable[[], Any]]]
"""From a problem and a device to calls as users write them, by what one would write."""

_HOST_CALLS: dict[str, HostCalls] = {}


def register_host_calls(operator: str, make: HostCalls) -> None:
    """Offer eager calls whose host time ``autotune bench --host`` compares."""
    _HOST_CALLS[operator] = make


def host_calls_of(operator: str) -> HostCalls:
    """What :func:`register_host_calls` was given for an operator.

    Raises:
        ArgumentValueError: the operator offers none.
    """
    if operator not in _HOST_CALLS:
        raise bad_value("operator", " | ".join(_HOST_CALLS), repr(operator))
    return _HOST_CALLS[operator]
