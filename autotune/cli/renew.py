"""``autotune renew``: keep timings whose kernels are launched today as they were."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..bundle import load_bundle_file, write
from ..renew import Renewal
from ..renew import renew as look_again
from ..store import Store
from .common import (
    CacheDirOption,
    JsonOption,
    NoColorOption,
    QuietOption,
    VerboseOption,
    fields_text,
    setup,
)


def renew(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[BUNDLE]...", help="Bundle files; by default the user's table."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Write, instead of showing.")] = False,
    json_: JsonOption = False,
    cache_dir: CacheDirOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    no_color: NoColorOption = False,
) -> None:
    """Keep entries whose kernels changed in nothing that is launched, and show what is stale.

    After an update or an edit, entries are stale because a file of their algorithm has another
    hash. Each timed config is planned again: the same kernels, arguments and grids are the same
    timing. Needs no GPU.
    """
    out = setup(as_json=json_, cache_dir=cache_dir, quiet=quiet, verbose=verbose, no_color=no_color)
    looked: list[Renewal] = []
    skipped = 0
    # All are read before one is written, and a link stays a link.
    for path, bundle in [(p.resolve(), load_bundle_file(p)) for p in bundles or ()]:
        found = [look_again(entry) for entry in bundle.entries]
        if yes and any(row.changed for row in found):
            write(replace(bundle, entries=tuple(row.entry for row in found)), path)
        looked += found
    if not bundles:
        store = Store()
        for stored in store.entries():
            row = look_again(stored.entry)
            if yes and row.changed and not store.rewrite(stored.path, stored.entry, row.entry):
                skipped += 1
                row = Renewal(stored.entry)
            looked.append(row)
    renewed = Counter(name for row in looked for name in row.algorithms)
    stale = [row.entry for row in looked if row.stale]
    if out.verbosity >= 1:
        for entry in stale:
            out.say(
                f"stale: {entry.operator} {fields_text(entry.problem)} ({entry.best.algorithm})"
            )
    payload = {
        "entries": len(looked),
        "renewed": sum(bool(row.algorithms) for row in looked),
        "algorithms": dict(sorted(renewed.items())),
        "plans_noted": sum(row.noted for row in looked),
        "stale": len(stale),
        "other_space": sum(row.other_space for row in looked),
        "changed_meanwhile": skipped,
        "written": yes,
    }
    out.result(
        payload,
        f"{payload['renewed']} of {len(looked)} entries renewed, {payload['plans_noted']} plans "
        f"noted, {len(stale)} stale",
    )
    if payload["other_space"]:
        out.say(
            f"{payload['other_space']} of them were searched in another space: "
            "`autotune tune` times what is new there"
        )
    if skipped:
        out.say(f"{skipped} were changed by another process meanwhile and left alone")
    if not yes and any(row.changed for row in looked):
        out.say("nothing was written; --yes does")
