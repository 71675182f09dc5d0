"""``autotune merge``: several bundles as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tritonconv.runtime.errors import bad_value

from ..bundle import load_tables, write
from ..bundle import merge as merge_bundles
from .common import (
    CacheDirOption,
    JsonOption,
    NoColorOption,
    QuietOption,
    VerboseOption,
    setup,
)


def merge(
    paths: Annotated[
        list[Path], typer.Argument(metavar="IN...", help="Bundles, or table directories.")
    ],
    output: Annotated[Path, typer.Option("--out", "-o", help="The bundle to write.")],
    json_: JsonOption = False,
    cache_dir: CacheDirOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    no_color: NoColorOption = False,
) -> None:
    """Merge tables of one device and version; of each problem the lower median stays."""
    out = setup(as_json=json_, cache_dir=cache_dir, quiet=quiet, verbose=verbose, no_color=no_color)
    if output.is_dir():
        raise bad_value("--out", "a file", output)
    bundles = [bundle for path in paths for bundle in load_tables(path)]
    merged = merge_bundles(bundles)
    write(merged, output)
    given = sum(len(bundle.entries) for bundle in bundles)
    out.result(
        {"path": str(output), "given": given, "entries": len(merged.entries)},
        f"{output}: {len(merged.entries)} entries of {given}",
    )
