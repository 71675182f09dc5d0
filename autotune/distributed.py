"""Tune on the ranks of a torchrun job, and tell tables apart.

Ranks exchange entries as JSON over gloo, so that all of them end with one table.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from tritonconv.runtime import tables
from tritonconv.runtime.device import DeviceFacts, device_facts
from tritonconv.runtime.errors import TritonConvError, bad_value
from tritonconv.runtime.freshness import is_stale
from tritonconv.runtime.operators import Operator, Problem
from tritonconv.runtime.settings import settings
from tritonconv.runtime.tables import Entry, Environment, digest, environment

from .answers import answers, differences, in_words, known_operators, sources
from .laboratory import Setup, laboratory
from .measure import Lab
from .session import Compiler
from .store import Store
from .tune import (
    Options,
    Progress,
    Report,
    Result,
    TuningStoppedError,
    tune_pairs,
    unique_pairs,
)

Pair = tuple[Operator, Problem]

_SHOWN = 10
_PATIENCE_SECONDS = 24 * 3600.0


class TablesDifferError(TritonConvError):
    """Ranks would run different configs; ``lines`` names the entries that differ."""

    def __init__(self, lines: Sequence[str]) -> None:
        shown = [f"  {line}" for line in lines[:_SHOWN]]
        if len(lines) > _SHOWN:
            shown.append(f"  and {len(lines) - _SHOWN} more")
        super().__init__("\n".join(["the ranks' tuned tables differ:", *shown]))
        self.lines = tuple(lines)


def under_torchrun() -> bool:
    """Whether this process is one of several ranks that torchrun (or its like) started."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


class Ranks:
    """The ranks of a job, and JSON values exchanged among them.

    A process group that exists already is left alone: a group of its own carries the exchange.
    """

    def __init__(self, patience_s: float = _PATIENCE_SECONDS) -> None:
        timeout = datetime.timedelta(seconds=patience_s)
        self._owns_all = False
        self._group: Any = None
        if dist.is_available() and dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        elif under_torchrun():
            dist.init_process_group("gloo", timeout=timeout)
            self._owns_all = True
        connected = self._group is not None or self._owns_all
        self.rank = dist.get_rank() if connected else 0
        self.world = dist.get_world_size() if connected else 1

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._owns_all:
            dist.destroy_process_group()
        elif self._group is not None:
            dist.destroy_process_group(self._group)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order; every rank has to call this."""
        if self.world == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor([own.numel()])
        sizes = [torch.zeros_like(size) for _ in range(self.world)]
        dist.all_gather(sizes, size, group=self._group)
        longest = int(max(sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: own.numel()] = own
        texts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(texts, padded, group=self._group)
        return [
            json.loads(bytes(text[: int(count)].tolist()))
            for text, count in zip(texts, sizes, strict=True)
        ]


@dataclass(frozen=True)
class Sharded:
    """What a rank knows when all ranks have tuned their share.

    Attributes:
        reports: of this rank's problems.
        fingerprint: of the table that all ranks have now.
        missing: problems without an entry, in words.
        lost: ranks that could not finish, and why; what they had finished is not lost.
    """

    reports: tuple[Report, ...]
    fingerprint: str
    missing: tuple[str, ...]
    lost: Mapping[int, str]


def tune_sharded(
    pairs: Iterable[Pair],
    device: torch.device | int | None = None,
    *,
    budget_s: float | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
    store: Store | None = None,
    lab: Lab | None = None,
    setup: Setup | None = None,
    patience_s: float = _PATIENCE_SECONDS,
) -> Sharded:
    """Tune every ``world``-th problem on this rank, and leave all ranks with the same table.

    All ranks of the job call this with the same pairs. Entries of earlier runs that only some
    ranks have are shared too.

    Args:
        pairs: operators and problems, the same on all ranks.
        device: this rank's GPU; that of ``LOCAL_RANK`` when None.
        budget_s: seconds for this rank's share.
        options: as for :func:`~tritonconv.autotune.tune.tune`.
        progress: told of this rank's steps.
        store: where entries go.
        lab: where candidates run, instead of what ``setup`` makes; without compiling ahead.
        setup: processes that compile and measure; the ranks of a host share its processors.
        patience_s: how long to wait for ranks that are still tuning.

    Raises:
        ArgumentValueError: the ranks have different pairs, GPUs or versions.
        TablesDifferError: the tables differ in spite of the exchange, because the ranks read
            different shared or packaged tables.
    """
    store = store or Store()
    plan = unique_pairs(pairs)
    operators = list({operator.name: operator for operator, _ in plan}.values())
    with Ranks(patience_s) as ranks:
        facts = device_facts(_local_device() if device is None else device)
        facts = facts if lab is None else lab.facts
        env = environment(facts)
        _require_equal(
            ranks,
            {
                "pairs": digest([[op.name, dict(problem.fields())] for op, problem in plan]),
                "environment": env.as_dict(),
                "sources": {op.name: dict(op.source_hashes()) for op in operators},
            },
        )
        with ExitStack() as stack:
            reports, failure = _tune_share(
                plan[ranks.rank :: ranks.world],
                lambda: (
                    (lab, None)
                    if lab is not None
                    else stack.enter_context(
                        laboratory(
                            _local_device() if device is None else device,
                            setup,
                            shared_by=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
                        )
                    )
                ),
                budget_s,
                options,
                progress,
                store,
            )
        tuned = [r.entry for r in reports if r.entry is not None and r.result is Result.TUNED]
        kept = [s.entry for op in operators for s in store.entries(env, op.name)]
        messages = ranks.gather(
            {
                "tuned": [entry.to_json() for entry in tuned],
                "kept": [entry.to_json() for entry in kept],
                "failure": failure,
            }
        )
        table = _union(messages)
        _adopt(table, store, env, kept)
        tables.invalidate()
        mark = digest([_winners(store, env, operators), tables.fingerprint(operators, facts)])
        if len(set(ranks.gather(mark))) > 1:
            known = ranks.gather({**_winners(store, env, operators), **answers(operators, facts)})
            raise TablesDifferError(differences(known) or ["in shared or packaged tables"])
    present = {(entry.operator, digest(dict(entry.problem))) for entry in table.values()}
    missing = tuple(
        str(problem)
        for operator, problem in plan
        if (operator.name, digest(dict(problem.fields()))) not in present
    )
    lost = {rank: m["failure"] for rank, m in enumerate(messages) if m["failure"]}
    return Sharded(tuple(reports), mark, missing, lost)


def _local_device() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _require_equal(ranks: Ranks, mine: Mapping[str, Any]) -> None:
    """Refuse to go on unless all ranks have the same of everything."""
    everyone = ranks.gather(mine)
    for name in mine:
        found = {json.dumps(one[name], sort_keys=True) for one in everyone}
        if len(found) > 1:
            listed = "; ".join(f"rank {i}: {one[name]}" for i, one in enumerate(everyone))
            raise bad_value(name, "the same on all ranks", listed)


def _tune_share(
    share: Sequence[Pair],
    equip: Callable[[], tuple[Lab, Compiler | None]],
    budget_s: float | None,
    options: Options | None,
    progress: Progress | None,
    store: Store,
) -> tuple[list[Report], str]:
    """This rank's reports, and why there are no more of them."""
    try:
        lab, compiler = equip()
        reports = tune_pairs(
            share,
            budget_s=budget_s,
            options=options,
            progress=progress,
            store=store,
            lab=lab,
            compiler=compiler,
        )
    except TuningStoppedError as error:
        return list(error.reports), str(error)
    except Exception as error:  # the others wait for this rank's message
        return [], f"{type(error).__name__}: {error}"
    return reports, ""


def _identity(entry: Entry) -> str:
    return digest([entry.operator, dict(entry.problem), entry.policy])


def _union(messages: Sequence[Mapping[str, Any]]) -> dict[str, Entry]:
    """One entry per problem: that of the rank that tuned it now, else the newest that serves."""
    found: dict[str, Entry] = {}
    for message in messages:
        for value in message["tuned"]:
            entry = Entry.from_json(value)
            found.setdefault(_identity(entry), entry)
    tuned = set(found)
    for message in messages:
        for value in message["kept"]:
            entry = Entry.from_json(value)
            name = _identity(entry)
            if name not in tuned and (name not in found or _order(entry) > _order(found[name])):
                found[name] = entry
    return found


def _order(entry: Entry) -> tuple[bool, str]:
    return not is_stale(entry), str(entry.recorded.get("created", ""))


def _adopt(
    table: Mapping[str, Entry], store: Store, env: Environment, kept: Iterable[Entry]
) -> None:
    """Store what this rank does not have, or has otherwise."""
    present = {_identity(entry): entry for entry in kept}
    for name, entry in table.items():
        if present.get(name) != entry:
            store.save(env, entry, replace_old=True)


def _winners(store: Store, env: Environment, operators: Iterable[Operator]) -> dict[str, str]:
    return {
        f"{in_words(stored.entry)} [{_identity(stored.entry)}]": json.dumps(
            [stored.entry.best.algorithm, dict(stored.entry.best.config)], sort_keys=True
        )
        for operator in operators
        for stored in store.entries(env, operator.name)
    }


def assert_same_tables(
    operators: Iterable[Operator] | None = None, device: torch.device | int | None = None
) -> str:
    """Make sure that all ranks of a distributed job would run the same configs.

    All ranks have to call this, after ``init_process_group``; without a job it does nothing.

    Args:
        operators: whose tables to compare; all registered operators and the decorated kernels
            of this process when None.
        device: this rank's GPU; the current one when None.

    Returns:
        The fingerprint of the table.

    Raises:
        TablesDifferError: on every rank, naming the entries that differ.
    """
    compared = known_operators() if operators is None else list(operators)
    facts = device_facts(device)
    with Ranks() as ranks:
        return _assert_same(ranks, compared, facts)


def _assert_same(ranks: Ranks, operators: Sequence[Operator], facts: DeviceFacts) -> str:
    env = environment(facts)
    state = {
        "environment": json.dumps(env.as_dict(), sort_keys=True),
        "settings.autotune": settings.autotune,
        "settings.deterministic": str(settings.deterministic),
        **sources(operators),
    }
    mark = digest([state, tables.fingerprint(operators, facts)])
    if len(set(ranks.gather(mark))) > 1:
        known = ranks.gather({**state, **answers(operators, facts)})
        raise TablesDifferError(differences(known) or ["in a packaged or related device's table"])
    return mark
