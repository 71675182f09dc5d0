"""Renew tuned entries after a change that left the launches they were timed with as they were.

A tuned entry is bound to hashes of whole files: whatever is edited in them, timings of before say
nothing until somebody has looked. This module looks. Every timed trial keeps a digest of its plan:
the kernels by what they compute, their arguments, grids, warps and workspaces. Where all trials of
an algorithm in an entry are planned today as they were, its timings hold, and the entry takes
today's hash of the algorithm. Nothing is timed, and no GPU is needed.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl

from tritonconv.runtime.entries import Entry, Trial
from tritonconv.runtime.environment import Environment, environment
from tritonconv.runtime.errors import TritonConvError
from tritonconv.runtime.freshness import is_stale
from tritonconv.runtime.operators import Operator, Problem, get_operator, operator_names
from tritonconv.runtime.plan import KernelCall, LaunchPlan

from .kernel_source import source_hash
from .space import space

_kernel_hash = functools.cache(source_hash)


class UndescribedError(TritonConvError, TypeError):
    """A plan holds something whose meaning has no text."""


def plan_digest(plan: LaunchPlan | None) -> str:
    """Hash of everything that a plan launches; empty where there is no plan, as for PyTorch's own.

    Equal digests are equal launches; comments, files and other code make no difference. Where the
    source of a fused function is generated otherwise by another PyTorch or Triton, digests differ.

    Example:
        >>> from tritonconv.runtime.device import nominal_device
        >>> operator = get_operator("conv2d.forward")
        >>> problem = operator.parse({"N": 1, "C": 64, "M": 64, "H": 56, "K": 3, "P": 1})
        >>> dense = operator.algorithm("dense")
        >>> first, second, *_ = dense.space(problem, nominal_device("sm_90"))
        >>> first, second = dense.plan(problem, first), dense.plan(problem, second)
        >>> plan_digest(first) == plan_digest(first) != plan_digest(second)
        True
    """
    if plan is None:
        return ""
    parts = [
        *map(_call_text, plan.calls),
        _text(dict(plan.dtypes)),
        *(f"{w.name} {w.shape} {w.dtype} {w.counters}" for w in plan.workspaces),
        f"zeroed {plan.zeroed}",
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _call_text(call: KernelCall) -> str:
    kernel = f"{_kernel_hash(call.kernel)} {call.grid} {call.num_warps} {call.num_stages}"
    return f"{kernel} {_text(call.args)} {_text(dict(call.constexprs))}"


def _text(value: Any) -> str:
    """The same text for what means the same in another process."""
    if isinstance(value, Mapping):
        return str(sorted((str(name), _text(inner)) for name, inner in value.items()))
    if isinstance(value, tuple):
        return str([_text(inner) for inner in value])
    if hasattr(value, "fn"):  # a device function, such as an epilogue's
        return _kernel_hash(value)
    if isinstance(value, tl.constexpr):
        return _text(value.value)
    text = str(value) if isinstance(value, (torch.dtype, tl.dtype)) else repr(value)
    if " at 0x" in text:
        raise UndescribedError(f"a plan holds {text}, which another process cannot tell again")
    return text


def trial_plan(operator: Operator, problem: Problem, trial: Trial) -> str:
    """Digest of what a trial's config launches today; empty where it launches nothing of ours."""
    try:
        algorithm = operator.algorithm(trial.algorithm)
        if algorithm.supports(problem) is not None:
            return ""
        return plan_digest(algorithm.plan(problem, algorithm.config_type.from_dict(trial.config)))
    except (TritonConvError, ValueError, TypeError, OSError):  # gone, or of a kernel without source
        return ""


@dataclass(frozen=True)
class Renewal:
    """What looking at an entry came to.

    Attributes:
        entry: as it is worth storing now.
        algorithms: those whose hashes were renewed.
        noted: how many trials got the digest of their plan now.
        other_space: something was renewed, and the space is another than the one that was searched:
            there may be configs that nobody has timed.
    """

    entry: Entry
    algorithms: tuple[str, ...] = ()
    noted: int = 0
    other_space: bool = False

    @property
    def changed(self) -> bool:
        """There is something new to store."""
        return bool(self.algorithms or self.noted)

    @property
    def stale(self) -> bool:
        """The entry serves nothing, after all."""
        return is_stale(self.entry)


def renew(entry: Entry) -> Renewal:
    """Look at an entry's trials again, without running any.

    Trials of algorithms that are as they were get the digest of their plan, where they lack it, and
    where today's plan is what was timed: generated functions differ between releases. An algorithm
    that has changed is renewed if every timed trial of it in the entry has a digest and is planned
    to the same today; its trials that failed are forgotten, so that tuning tries them again.
    """
    if entry.operator not in operator_names():
        return Renewal(entry)
    operator = get_operator(entry.operator)
    try:
        problem = operator.parse(entry.problem)
    except (ValueError, TypeError):
        return Renewal(entry)
    today = operator.source_hashes()
    old = entry.sources
    as_generated = not _is_fused(entry) or _of_these_versions(entry)
    noted = {
        index: trial_plan(operator, problem, trial)
        for index, trial in enumerate(entry.trials)
        if trial.timing
        and not trial.plan
        and as_generated
        and old.get(trial.algorithm) == today.get(trial.algorithm)
    }
    noted = {index: plan for index, plan in noted.items() if plan}
    changed = [name for name in old if name in today and old[name] != today[name]]
    renewed = tuple(n for n in changed if _as_planned(operator, problem, entry.trials, n))
    if not noted and not renewed:
        return Renewal(entry)
    trials = tuple(
        replace(trial, plan=noted.get(index, trial.plan))
        for index, trial in enumerate(entry.trials)
    )

    def moved(trial: Trial) -> Trial:
        return trials[entry.trials.index(trial)] if trial in entry.trials else trial

    default, best = moved(entry.default), moved(entry.best)
    kept = tuple(
        trial
        for trial in trials
        if trial.timing or trial.algorithm not in renewed or trial in (default, best)
    )
    recorded = dict(entry.recorded)
    if len(kept) < len(trials):
        recorded.pop("completed", None)
    made = replace(
        entry,
        sources={**old, **{name: today[name] for name in renewed}},
        trials=kept,
        default=default,
        best=best,
        recorded=recorded,
    )
    return Renewal(made, renewed, len(noted), bool(renewed) and _grown(operator, problem, entry))


def _is_fused(entry: Entry) -> bool:
    """Whether a function was generated for what was timed."""
    return any(entry.problem.get(name, "none") != "none" for name in ("epilogue", "prologue"))


def _of_these_versions(entry: Entry) -> bool:
    """Whether an entry was timed with the PyTorch and the Triton that are here."""
    env = Environment.from_dict(entry.environment)
    here = environment(env.device)
    return (env.torch, env.triton) == (here.torch, here.triton)


def _grown(operator: Operator, problem: Problem, entry: Entry) -> bool:
    facts = Environment.from_dict(entry.environment).device
    return bool(entry.space_hash) and space(operator, problem, facts).hash != entry.space_hash


def _as_planned(
    operator: Operator, problem: Problem, trials: Iterable[Trial], algorithm: str
) -> bool:
    timed = [trial for trial in trials if trial.algorithm == algorithm and trial.timing is not None]
    return bool(timed) and all(
        trial.plan and trial.plan == trial_plan(operator, problem, trial) for trial in timed
    )


__all__ = ["Renewal", "UndescribedError", "plan_digest", "renew", "trial_plan"]
