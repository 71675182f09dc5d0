"""``autotune export``: a table as one file to give away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from tritonconv.runtime.device import device_facts
from tritonconv.runtime.environment import Environment, environment
from tritonconv.runtime.errors import bad_value
from tritonconv.runtime.sources import DirectorySource

from ..bundle import describe_environment, file_name, write
from ..bundle import export as export_bundle
from ..store import Store
from .common import (
    CacheDirOption,
    ExitCode,
    JsonOption,
    NoColorOption,
    OpOption,
    QuietOption,
    VerboseOption,
    expand_operators,
    setup,
)


def export(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="The bundle; in a directory, by device name.")
    ],
    op: OpOption = None,
    min_speedup: Annotated[
        float | None,
        typer.Option("--min-speedup", min=0.0, help="Only winners so much faster: 1.05."),
    ] = None,
    environment_hash: Annotated[
        str | None,
        typer.Option("--environment", help="Of this hash, or the beginning of one."),
    ] = None,
    json_: JsonOption = False,
    cache_dir: CacheDirOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    no_color: NoColorOption = False,
) -> None:
    """Write the tuned entries of one device and its versions to a bundle."""
    out = setup(as_json=json_, cache_dir=cache_dir, quiet=quiet, verbose=verbose, no_color=no_color)
    names = expand_operators([op]) if op else None
    store = Store()
    env = _environment(store, environment_hash)
    bundle = export_bundle(store, env, operators=names, min_speedup=min_speedup)
    if not bundle.entries:
        out.say(f"no tuned entries of {describe_environment(env.as_dict())} pass; nothing written")
        raise typer.Exit(ExitCode.NOTHING_PASSED)
    target = path / file_name(env) if path.is_dir() else path
    write(bundle, target)
    counts: dict[str, int] = {}
    for entry in bundle.entries:
        counts[entry.operator] = counts.get(entry.operator, 0) + 1
    size = target.stat().st_size
    payload = {
        "path": str(target),
        "environment": env.as_dict(),
        "environment_hash": env.hash,
        "entries": len(bundle.entries),
        "by_operator": counts,
        "bytes": size,
    }
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    out.result(payload, f"{target}: {len(bundle.entries)} entries ({listed}), {size} bytes")


def _environment(store: Store, prefix: str | None) -> Environment:
    """The environment that is asked for, else this machine's, else the only one there is."""
    present = list(DirectorySource("user", store.root).environments())
    if prefix is not None:
        present = [env for env in present if env.hash.startswith(prefix)]
    elif torch.cuda.is_available():
        return environment(device_facts())
    if len(present) != 1:
        known = [f"{env.hash[:8]} {describe_environment(env.as_dict())}" for env in present]
        raise bad_value(
            "--environment", "the hash of one that has entries", "; ".join(known) or "none"
        )
    return present[0]
