"""The candidates of a problem: every algorithm that serves it with every config of its space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tritonconv.runtime.device import DeviceFacts
from tritonconv.runtime.operators import Algorithm, Config, Operator, Problem


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


def candidate_key(algorithm: str, config: Mapping[str, int]) -> CandidateKey:
    """Identity of a candidate, whether it comes from a space or from a stored trial."""
    return algorithm, tuple(sorted(config.items()))


def describe(algorithm: str, config: Mapping[str, int]) -> str:
    """One candidate in words: ``tiled(block_m=64, block_n=32)``."""
    return f"{algorithm}({', '.join(f'{name}={value}' for name, value in config.items())})"


@dataclass(frozen=True)
class Space:
    """All candidates of a problem in their fixed order, the untuned default first.

    Attributes:
        candidates: without repeats; ties are broken in this order.
        heads: the first config of every algorithm, the default included.
        unsupported: algorithms that do not serve the problem, and why.
    """

    candidates: tuple[Candidate, ...]
    heads: tuple[Candidate, ...]
    unsupported: Mapping[str, str]

    @property
    def default(self) -> Candidate:
        """What an untuned call runs."""
        return self.candidates[0]


def space(operator: Operator, problem: Problem, device: DeviceFacts) -> Space:
    """List the candidates of a problem on a device."""
    first = operator.default_algorithm(problem, device)
    unsupported: dict[str, str] = {}
    ordered: list[Algorithm] = [first]
    for algorithm in operator.algorithms:
        reason = algorithm.supports(problem)
        if reason is not None:
            unsupported[algorithm.name] = reason
        elif algorithm.name != first.name:
            ordered.append(algorithm)
    candidates: dict[CandidateKey, Candidate] = {}
    heads: list[Candidate] = []
    for algorithm in ordered:
        listed = [Candidate(algorithm.name, c) for c in algorithm.configs(problem, device)]
        heads += listed[:1]
        for candidate in listed:
            candidates.setdefault(candidate.as_key(), candidate)
    return Space(tuple(candidates.values()), tuple(heads), unsupported)
