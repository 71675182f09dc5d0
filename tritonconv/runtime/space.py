"""Config spaces: typed parameters, named constraints with reasons, one explicit default.

A space is declared, not listed: it can say why a config is not in it, and which configs are one
step away. It knows what makes sense for a problem; what fits on a device is decided from the
:class:`Footprint` of a config (``tritonconv.autotune.hardware``).

Example:
    >>> from dataclasses import dataclass
    >>> from tritonconv.runtime.config import Config
    >>> @dataclass(frozen=True)
    ... class BlockConfig(Config):
    ...     block: int
    ...     num_warps: int
    >>> found = ConfigSpace(
    ...     BlockConfig,
    ...     (PowerOfTwo("block", 64, 256), PowerOfTwo("num_warps", 2, 8)),
    ...     (Constraint("lanes", "threads without an element",
    ...                 lambda block, num_warps: 32 * num_warps <= block),),
    ...     BlockConfig(128, 4),
    ... )
    >>> [tuple(config.as_dict().values()) for config in found]
    [(128, 4), (64, 2), (128, 2), (256, 2), (256, 4), (256, 8)]
    >>> found.explain(BlockConfig(64, 8))
    (Violation(constraint='lanes', reason='threads without an element'),)
    >>> found.neighbours(BlockConfig(256, 4))
    (BlockConfig(block=128, num_warps=4), BlockConfig(block=256, num_warps=2), \
BlockConfig(block=256, num_warps=8))
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Generic, TypeVar, overload

from .config import Config
from .errors import bad_value

C_co = TypeVar("C_co", bound="Config", covariant=True)


@dataclass(frozen=True)
class PowerOfTwo:
    """Powers of two from ``low`` to ``high``, both included."""

    name: str
    low: int
    high: int

    def __post_init__(self) -> None:
        for value in (self.low, self.high):
            if value < 1 or value & (value - 1):
                raise bad_value(self.name, "powers of two", value)

    @property
    def values(self) -> tuple[int, ...]:
        """All values, ascending."""
        return tuple(1 << e for e in range(self.low.bit_length() - 1, self.high.bit_length()))


@dataclass(frozen=True)
class Int:
    """Integers from ``low`` to ``high``, both included where ``step`` meets them."""

    name: str
    low: int
    high: int
    step: int = 1

    @property
    def values(self) -> tuple[int, ...]:
        """All values, ascending."""
        return tuple(range(self.low, self.high + 1, self.step))


@dataclass(frozen=True)
class Bool:
    """Off or on: 0 or 1, as configs hold integers only."""

    name: str

    @property
    def values(self) -> tuple[int, ...]:
        """Off, on."""
        return (0, 1)


@dataclass(frozen=True)
class Choice:
    """Some integers: each is one step from every other, or from the next one when ``ordered``."""

    name: str
    values: tuple[int, ...]
    ordered: bool = False

    def __post_init__(self) -> None:
        if len(set(self.values)) != len(self.values) or not self.values:
            raise bad_value(self.name, "distinct values, at least one", self.values)


@dataclass(frozen=True)
class Derived:
    """A choice whose values follow from parameters that stand before it.

    Attributes:
        name: of the parameter.
        values_for: from those parameters, which its argument names name, to the distinct values.
            A position means the same for all of them (*half the estimate*, *twice the estimate*),
            so that a step in another parameter keeps the position.
    """

    name: str
    values_for: Callable[..., tuple[int, ...]]


Parameter = PowerOfTwo | Int | Bool | Choice | Derived


@dataclass(frozen=True)
class Constraint:
    """A rule that every config of a space keeps.

    Attributes:
        name: short, for tables.
        reason: why a config that breaks it is not worth trying.
        predicate: True for configs to keep; its argument names are names of parameters.
        over: the parameters instead, in the order of the arguments.
    """

    name: str
    reason: str
    predicate: Callable[..., bool]
    over: tuple[str, ...] = ()

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """What the predicate is called with."""
        return self.over or _arguments(self.predicate)


@dataclass(frozen=True)
class Violation:
    """A constraint that a config breaks."""

    constraint: str
    reason: str


@dataclass(frozen=True)
class Footprint:
    """What a config asks of the device, in closed form; of the launch that dominates.

    Attributes:
        programs: blocks of the grid.
        threads: per block.
        shared_bytes: shared memory per block, estimated from the tiles and the pipeline.
        accumulators: 32-bit registers per thread that hold the accumulator.
        bytes_loaded: by all blocks together, repeated reads counted each time.
        bytes_stored: by all blocks together, partial sums that are read again counted twice.
        flops: issued, padding of the tiles included.
        steps: iterations of a block's loop, one after the other.
        in_flight: iterations whose loads are under way at a time.
        launches: kernels, one after the other.
        gathered_bytes: that one block reads by itself once others have stored them.
        matrix: whether products run on matrix instructions.
        copied_rows: bytes of the contiguous rows that a copy engine moves, where a kernel uses one.
    """

    programs: int
    threads: int
    shared_bytes: int
    accumulators: int
    bytes_loaded: int
    bytes_stored: int
    flops: int
    steps: int = 1
    in_flight: int = 1
    launches: int = 1
    gathered_bytes: int = 0
    matrix: bool = True
    copied_rows: tuple[int, ...] = ()


def _arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    code = getattr(function, "__code__", None)
    if code is not None:
        return tuple(code.co_varnames[: code.co_argcount])
    return tuple(inspect.signature(function).parameters)


@dataclass(frozen=True, eq=False)
class ConfigSpace(Sequence[C_co], Generic[C_co]):
    """The configs of an algorithm for one problem: a sequence, the default first.

    Nothing is enumerated before it is asked for, so that the default alone is cheap.

    Attributes:
        config_type: dataclass of the configs; its fields are the parameters.
        parameters: one for each field; the last varies fastest in the order of the space.
        constraints: what every config but the default must keep.
        default: what an untuned call runs.
        plausible: configs of the space that are tried first, the likeliest first.
    """

    config_type: type[C_co]
    parameters: tuple[Parameter, ...]
    constraints: tuple[Constraint, ...]
    default: C_co
    plausible: tuple[C_co, ...] = ()

    def __post_init__(self) -> None:
        names = {parameter.name for parameter in self.parameters}
        expected = {field.name for field in fields(self.config_type)}
        if names != expected or len(names) != len(self.parameters):
            raise bad_value("parameters", f"one for each of {sorted(expected)}", sorted(names))

    @classmethod
    def listed(cls, configs: Sequence[C_co]) -> ConfigSpace[C_co]:
        """The space of an algorithm that lists its configs, in their order."""
        if not configs:
            raise bad_value("configs", "at least one config", "none")
        members = tuple(dict.fromkeys(configs))
        rows = [config.as_dict() for config in members]
        names = tuple(rows[0])
        known = {tuple(row.values()) for row in rows}
        listed = Constraint(
            "listed",
            "not one of the configs that the algorithm lists",
            lambda *values: values in known,
            over=names,
        )
        choices = (
            Choice(name, tuple(sorted({row[name] for row in rows})), ordered=True) for name in names
        )
        space = cls(type(members[0]), tuple(choices), (listed,), members[0])
        vars(space)["configs"] = members  # their order, not that of the values
        return space

    @cached_property
    def configs(self) -> tuple[C_co, ...]:
        """All configs: the default, the plausible ones, then in the order of parameters' values."""
        found = dict.fromkeys((self.default, *self.plausible))
        names = tuple(parameter.name for parameter in self.parameters)
        in_order = names == tuple(field.name for field in fields(self.config_type))
        for values in self._rows():
            config = (
                self.config_type(*values)
                if in_order
                else self.config_type(**dict(zip(names, values, strict=True)))
            )
            found.setdefault(config)
        return tuple(found)

    @cached_property
    def hash(self) -> str:
        """Equal for spaces of the same configs in the same order."""
        rows = [list(config.as_dict().items()) for config in self.configs]
        text = json.dumps([self.config_type.__name__, rows], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def explain(self, config: Config) -> tuple[Violation, ...]:
        """Why a config is not in the space; nothing when it is."""
        values = config.as_dict()
        if set(values) != {parameter.name for parameter in self.parameters}:
            names = ", ".join(parameter.name for parameter in self.parameters)
            return (Violation("fields", f"not a config of {names}"),)
        found: list[Violation] = []
        for parameter in self.parameters:
            allowed = _values_of(parameter, values)
            if values[parameter.name] not in allowed:
                shown = ", ".join(map(str, allowed))
                reason = f"{parameter.name}={values[parameter.name]} is not one of {shown}"
                found.append(Violation(parameter.name, reason))
        for constraint in self.constraints:
            arguments = [values[name] for name in constraint.parameters]
            if not constraint.predicate(*arguments):
                found.append(Violation(constraint.name, constraint.reason))
        return tuple(found)

    def neighbours(self, config: Config) -> tuple[C_co, ...]:
        """Configs that differ in one parameter: by one step, or to any other value of a choice.

        Steps skip values that break a constraint. A config with a value that its parameter does
        not have has no neighbours.
        """
        located = self._locate(config)
        if located is None:
            return ()
        held, positions = located
        found: list[C_co] = []
        for axis, parameter in enumerate(self.parameters):
            count = len(_values_of(parameter, held))
            here = positions[axis]
            if isinstance(parameter, Derived) or (
                isinstance(parameter, Choice) and not parameter.ordered
            ):
                ways = [[position] for position in range(count) if position != here]
            else:
                ways = [list(range(here - 1, -1, -1)), list(range(here + 1, count))]
            for way in ways:
                for position in way:
                    moved = self._at([*positions[:axis], position, *positions[axis + 1 :]])
                    if moved is not None and moved != config:
                        found.append(moved)
                        break
        return tuple(found)

    def exchanges(self, config: Config) -> tuple[C_co, ...]:
        """Configs with one power of two doubled and another halved: about the same resources.

        Such steps follow a valley between two parameters, both of whose own steps lead uphill.
        """
        located = self._locate(config)
        if located is None:
            return ()
        _, positions = located
        axes = [a for a, p in enumerate(self.parameters) if isinstance(p, PowerOfTwo)]
        found: list[C_co] = []
        for up in axes:
            for down in axes:
                if up == down or positions[down] == 0:
                    continue
                there = list(positions)
                there[up] += 1
                there[down] -= 1
                moved = self._at(there)
                if moved is not None:
                    found.append(moved)
        return tuple(found)

    def _locate(self, config: Config) -> tuple[dict[str, int], list[int]] | None:
        """The config's values and their positions; None where a parameter lacks its value."""
        held = config.as_dict()
        try:
            return held, [
                _values_of(parameter, held).index(held[parameter.name])
                for parameter in self.parameters
            ]
        except (KeyError, ValueError):
            return None

    def _at(self, positions: Sequence[int]) -> C_co | None:
        """The config at positions in the parameters' values; None when there is none."""
        values: dict[str, int] = {}
        for parameter, position in zip(self.parameters, positions, strict=True):
            allowed = _values_of(parameter, values)
            if position >= len(allowed):
                return None
            values[parameter.name] = allowed[position]
        config = self.config_type(**values)
        if config == self.default:
            return config
        for constraint in self.constraints:
            arguments = [values[name] for name in constraint.parameters]
            if not constraint.predicate(*arguments):
                return None
        return config

    def _rows(self) -> Iterator[tuple[int, ...]]:
        """Values of all configs that keep the constraints, each checked as early as it can be."""
        position = {parameter.name: axis for axis, parameter in enumerate(self.parameters)}
        checks: list[list[tuple[Callable[..., bool], tuple[int, ...]]]] = [[] for _ in position]
        for constraint in self.constraints:
            used = tuple(position[name] for name in constraint.parameters)
            checks[max(used, default=0)].append((constraint.predicate, used))
        sources: list[tuple[tuple[int, ...], tuple[int, ...], Any]] = []
        for parameter in self.parameters:
            if isinstance(parameter, Derived):
                used = tuple(position[name] for name in _arguments(parameter.values_for))
                sources.append(((), used, parameter.values_for))
            else:
                sources.append((parameter.values, (), None))
        last = len(sources) - 1
        row = [0] * len(sources)

        def extend(axis: int) -> Iterator[tuple[int, ...]]:
            values, used, function = sources[axis]
            if function is not None:
                values = function(*[row[index] for index in used])
            for value in values:
                row[axis] = value
                if all(check(*[row[index] for index in need]) for check, need in checks[axis]):
                    if axis == last:
                        yield tuple(row)
                    else:
                        yield from extend(axis + 1)

        return extend(0) if sources else iter(((),))

    def preferring(self, configs: Sequence[Any]) -> ConfigSpace[C_co]:
        """The same space with the first of ``configs`` as default and the others plausible.

        Those that are not in the space are left out; without any, the space stays as it is.
        """
        members = [config for config in dict.fromkeys(configs) if config in self]
        if not members:
            return self
        return replace(self, default=members[0], plausible=tuple(members[1:]))

    def __contains__(self, config: object) -> bool:
        return isinstance(config, self.config_type) and (
            config == self.default or not self.explain(config)
        )

    def __iter__(self) -> Iterator[C_co]:
        return iter(self.configs)

    def __len__(self) -> int:
        return len(self.configs)

    @overload
    def __getitem__(self, index: int) -> C_co: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[C_co]: ...
    def __getitem__(self, index: int | slice) -> C_co | Sequence[C_co]:
        if index == 0:
            return self.default  # what an untuned call asks for: without listing the rest
        return self.configs[index]


def _values_of(parameter: Parameter, values: Mapping[str, int]) -> tuple[int, ...]:
    if isinstance(parameter, Derived):
        names = _arguments(parameter.values_for)
        return parameter.values_for(*[values[name] for name in names])
    return parameter.values
