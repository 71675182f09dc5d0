"""``autotune import``: take bundles into the user's table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bundle import describe_environment, load_tables, outdated, stale, take_in
from ..store import Store
from .common import (
    CacheDirOption,
    JsonOption,
    NoColorOption,
    QuietOption,
    VerboseOption,
    setup,
    table,
)


def import_(
    paths: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Bundles, or table directories.")
    ],
    json_: JsonOption = False,
    cache_dir: CacheDirOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    no_color: NoColorOption = False,
) -> None:
    """Add entries to the user's table; where one serves already, the lower median stays."""
    out = setup(as_json=json_, cache_dir=cache_dir, quiet=quiet, verbose=verbose, no_color=no_color)
    store = Store()
    shown = table("from", "environment", "imported>", "kept>", "stale>", "outdated>")
    rows = []
    for path in paths:
        for bundle in load_tables(path):
            found = take_in(bundle, store)
            described = describe_environment(dict(bundle.environment))
            old, since = len(stale(bundle)), len(outdated(bundle))
            rows.append(
                {
                    "path": str(path),
                    "environment": dict(bundle.environment),
                    "imported": len(found.written),
                    "kept": len(found.kept),
                    "stale": old,
                    "outdated": since,
                }
            )
            counts = (len(found.written), len(found.kept), old, since)
            shown.add_row(str(path), described, *map(str, counts))
    out.result({"tables": str(store.root), "bundles": rows}, shown)
