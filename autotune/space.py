"""The candidates of a problem: every algorithm that serves it with every config of its space."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.operators import Algorithm, Config, Operator, Problem
from tritonconv.runtime.space import ConfigSpace
from tritonconv.runtime.tables import digest

from .hardware import Model, limits

PYTORCH_ALGORITHM = "aten"
"""What every family calls its algorithm that runs PyTorch's own kernel."""


@dataclass(frozen=True)
class Candidate:
    """One algorithm with one config."""

    algorithm: str
    config: Config

    def as_key(self) -> CandidateKey:
        """The identity under which a stored trial is found again."""
        return candidate_key(self.algorithm, self.config.as_dict())

    def __str__(self) -> str:
        return describe(self.algorithm, self.config.as_dict())


CandidateKey = tuple[str, tuple[tuple[str, int], ...]]


Identity = tuple[str, str, Problem, CandidateKey]


def identity(operator: Operator, problem: Problem, candidate: Candidate) -> Identity:
    """What a verdict on a candidate is remembered under: a kernel that was edited is another."""
    source = operator.source_hashes().get(candidate.algorithm, "")
    return operator.name, source, problem, candidate.as_key()


def candidate_key(algorithm: str, config: Mapping[str, int]) -> CandidateKey:
    """Identity of a candidate, whether it comes from a space or from a stored trial."""
    return algorithm, tuple(sorted(config.items()))


def describe(algorithm: str, config: Mapping[str, int]) -> str:
    """One candidate in words: ``tiled(block_m=64, block_n=32)``."""
    return f"{algorithm}({', '.join(f'{name}={value}' for name, value in config.items())})"


@dataclass(frozen=True)
class Dropped:
    """A candidate that cannot run on the device, and why."""

    candidate: Candidate
    constraint: str
    reason: str


@dataclass(frozen=True)
class Space:
    """All candidates of a problem in their fixed order, the untuned default first.

    Attributes:
        candidates: without repeats; ties are broken in this order.
        heads: the first config of every algorithm, the default included.
        plausible: what algorithms want to have tried next.
        unsupported: algorithms that do not serve the problem, and why.
        dropped: candidates that break a hard limit of the device; the default never is.
        predicted: microseconds that the hardware model expects, where an algorithm gives it a
            footprint.
        configs: the config space of every algorithm, by name.
    """

    candidates: tuple[Candidate, ...]
    heads: tuple[Candidate, ...]
    unsupported: Mapping[str, str]
    dropped: tuple[Dropped, ...] = ()
    predicted: Mapping[CandidateKey, float] = field(default_factory=dict)
    configs: Mapping[str, ConfigSpace[Any]] = field(default_factory=dict)
    plausible: tuple[Candidate, ...] = ()

    @property
    def default(self) -> Candidate:
        """What an untuned call runs."""
        return self.candidates[0]

    @cached_property
    def by_key(self) -> Mapping[CandidateKey, Candidate]:
        """The candidates by their identity."""
        return {candidate.as_key(): candidate for candidate in self.candidates}

    @cached_property
    def hash(self) -> str:
        """Equal for spaces of the same candidates in the same order."""
        return digest([[name, list(config)] for name, config in self.by_key])

    @cached_property
    def hashes(self) -> Mapping[str, str]:
        """The same for the candidates of every algorithm, by its name."""
        configs: dict[str, list[Any]] = {name: [] for name in self.configs}
        for name, config in self.by_key:
            configs[name].append(list(config))
        return {name: digest(listed) for name, listed in configs.items()}

    def neighbours(self, candidate: Candidate) -> tuple[Candidate, ...]:
        """Candidates of the same algorithm that are one step away (see ``ConfigSpace``)."""
        return self._moved(candidate, ConfigSpace.neighbours)

    def exchanges(self, candidate: Candidate) -> tuple[Candidate, ...]:
        """Candidates of the same algorithm with one size doubled and another halved."""
        return self._moved(candidate, ConfigSpace.exchanges)

    def _moved(
        self, candidate: Candidate, move: Callable[[ConfigSpace[Any], Config], Sequence[Config]]
    ) -> tuple[Candidate, ...]:
        configs = self.configs.get(candidate.algorithm)
        if configs is None:
            return ()
        moved = (Candidate(candidate.algorithm, c) for c in move(configs, candidate.config))
        return tuple(found for found in moved if found.as_key() in self.by_key)

    def reasons(self) -> Mapping[tuple[str, str], int]:
        """How many candidates were dropped, by algorithm and constraint."""
        counts: dict[tuple[str, str], int] = {}
        for row in self.dropped:
            key = (row.candidate.algorithm, row.constraint)
            counts[key] = counts.get(key, 0) + 1
        return counts

    def restricted(self, keys: Collection[CandidateKey]) -> Space:
        """The part of the space that ``keys`` name, which must hold the default."""
        kept = tuple(c for key, c in self.by_key.items() if key in keys)
        heads = tuple(candidate for candidate in self.heads if candidate.as_key() in keys)
        plausible = tuple(candidate for candidate in self.plausible if candidate.as_key() in keys)
        return replace(self, candidates=kept, heads=heads, plausible=plausible)


def space(operator: Operator, problem: Problem, device: DeviceFacts) -> Space:
    """List the candidates of a problem on a device, without those that cannot run on it."""
    first = operator.default_algorithm(problem, device)
    unsupported: dict[str, str] = {}
    ordered: list[Algorithm] = [first]
    for algorithm in operator.algorithms:
        reason = algorithm.supports(problem)
        if reason is not None:
            unsupported[algorithm.name] = reason
        elif algorithm.name != first.name:
            ordered.append(algorithm)
    model = Model.of(device, problem.fields(), problem.bytes_moved())
    candidates: list[Candidate] = []
    heads: list[Candidate] = []
    dropped: list[Dropped] = []
    predicted: dict[CandidateKey, float] = {}
    configs: dict[str, ConfigSpace[Any]] = {}
    for algorithm in ordered:
        configs[algorithm.name] = operator.space(algorithm, problem, device)
        before = len(candidates)
        for config in configs[algorithm.name]:
            candidate = Candidate(algorithm.name, config)
            footprint = algorithm.footprint(problem, config, device)
            if footprint is not None:
                broken = limits(footprint, device)
                if broken and candidates:  # the default is tried whatever the model says
                    dropped.append(Dropped(candidate, broken[0].constraint, broken[0].reason))
                    continue
                predicted[candidate.as_key()] = model.predicted_us(footprint)
            candidates.append(candidate)
        heads += candidates[before : before + 1]
    wanted = {Candidate(name, config) for name, s in configs.items() for config in s.plausible}
    return Space(
        tuple(candidates),
        tuple(heads),
        unsupported,
        tuple(dropped),
        predicted,
        configs,
        tuple(candidate for candidate in candidates if candidate in wanted),
    )
