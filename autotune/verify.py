"""Check stored winners numerically again, against the same float64 budget as in tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from tritonconv.runtime.accuracy import Accuracy
from tritonconv.runtime.entries import Entry, canonical
from tritonconv.runtime.freshness import changes, is_stale
from tritonconv.runtime.operators import Operator, Problem, get_operator, operator_names

from .measure import CandidateError, Lab
from .space import Candidate


class Standing(StrEnum):
    """What a check found."""

    PASSED = "passed"
    WRONG = "wrong"
    """The result is outside its budget, or the kernel does not run."""
    SKIPPED = "skipped"
    """There is nothing to check here: stale, of an unknown operator, not serving its problem."""


@dataclass(frozen=True)
class Verified:
    """One entry's winner.

    Attributes:
        entry, standing: what was checked, and what came out.
        reason: why it did not pass.
        accuracy: where it ran.
        outdated: what else has changed since the entry was tuned, in words.
    """

    entry: Entry
    standing: Standing
    reason: str = ""
    accuracy: Accuracy | None = None
    outdated: str = ""


def rebuild(entry: Entry) -> tuple[Operator, Problem, Candidate] | str:
    """What an entry stands for here, or why it stands for nothing."""
    if entry.operator not in operator_names():
        return f"operator {entry.operator} is not known here"
    if is_stale(entry):
        return f"stale: {entry.best.algorithm} has changed since"
    operator = get_operator(entry.operator)
    try:
        problem = operator.parse(entry.problem)
        algorithm = operator.algorithm(entry.best.algorithm)
        config = algorithm.config_type.from_dict(entry.best.config)
    except (ValueError, TypeError) as error:
        return str(error)
    if canonical(problem.fields()) != canonical(entry.problem):
        return "the problem cannot be made from its fields"
    unsupported = algorithm.supports(problem)
    if unsupported is not None:
        return f"{algorithm.name} does not serve it: {unsupported}"
    return operator, problem, Candidate(algorithm.name, config)


def quick(entries: Iterable[Entry]) -> list[Entry]:
    """Of each kernel (operator, algorithm, config, dtype) the entry with the smallest problem."""
    smallest: dict[str, tuple[int, str, Entry]] = {}
    for entry in entries:
        found = rebuild(entry)
        size = 0 if isinstance(found, str) else found[1].bytes_moved()
        kernel = canonical({**entry.best.config, "": entry.best.algorithm})
        key = f"{entry.operator} {kernel} {entry.problem.get('dtype')} {isinstance(found, str)}"
        smallest[key] = min(
            smallest.get(key, (size, entry.key(), entry)), (size, entry.key(), entry)
        )
    return [row[2] for row in smallest.values()]


def verify(
    entries: Iterable[Entry],
    lab: Lab,
    *,
    seed: int = 0,
    progress: Callable[[Verified], None] | None = None,
) -> list[Verified]:
    """Run and check the winners of entries.

    Args:
        entries: of this lab's environment.
        lab: where they run.
        seed: of the tensors.
        progress: told of every verdict.
    """
    results = []
    for entry in entries:
        verdict = _verify(entry, lab, seed)
        results.append(verdict)
        if progress is not None:
            progress(verdict)
    return results


def _verify(entry: Entry, lab: Lab, seed: int) -> Verified:
    found = rebuild(entry)
    if isinstance(found, str):
        return Verified(entry, Standing.SKIPPED, found)
    operator, problem, candidate = found
    try:
        accuracy = lab.checker(operator, problem, seed)(candidate)
    except CandidateError as error:
        return Verified(entry, Standing.WRONG, str(error))
    standing = Standing.PASSED if accuracy.ok else Standing.WRONG
    since = str(changes(entry))
    return Verified(entry, standing, "" if accuracy.ok else str(accuracy), accuracy, since)
