"""``autotune clean``: remove what no lookup uses, after showing it."""

from __future__ import annotations

import datetime
import re
from typing import Annotated

import typer

from tritonconv.runtime.errors import bad_value

from ..clean import Removable, find, remove
from ..store import Store
from .common import (
    CacheDirOption,
    JsonOption,
    NoColorOption,
    OpOption,
    QuietOption,
    VerboseOption,
    fields_text,
    setup,
    table,
)

_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


def clean(
    op: OpOption = None,
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", help="Also entries made before: 12h, 30d, 8w."),
    ] = None,
    stale: Annotated[
        bool, typer.Option("--stale", help="Only entries whose winner has changed since.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete, instead of showing.")] = False,
    json_: JsonOption = False,
    cache_dir: CacheDirOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
    no_color: NoColorOption = False,
) -> None:
    """Show which files of the user's table can go, and delete them with --yes.

    Those are stale entries, unreadable files, and what killed writers left.
    """
    out = setup(as_json=json_, cache_dir=cache_dir, quiet=quiet, verbose=verbose, no_color=no_color)
    store = Store()
    age = None if older_than is None else parse_age(older_than)
    operators = None if op is None else _folders(store, op)
    found = find(store, operators=operators, older_than=age, only_stale=stale)
    deleted = remove(found) if yes else []
    shown = table("why", "operator", "problem", "file")
    for row in found:
        shown.add_row(
            str(row.why),
            row.path.parent.name,
            "" if row.entry is None else fields_text(row.entry.problem),
            row.path.name,
        )
    payload = {
        "tables": str(store.root),
        "deleted": len(deleted),
        "files": [_json(row, deleted) for row in found],
    }
    out.result(payload, *([shown] if found else []))
    if not found:
        out.say(f"nothing to clean in {store.root}")
    elif yes:
        out.say(f"{len(deleted)} file(s) deleted")
    else:
        out.say(f"{len(found)} file(s) can go; --yes deletes them")


def _folders(store: Store, op: str) -> frozenset[str]:
    """Operators of a name or family that have a folder, known to this process or not."""
    names = {path.name for path in store.root.glob("v*/*/*") if path.is_dir()}
    found = {name for name in names if name == op or name.startswith(f"{op}.")}
    if names and not found:
        raise bad_value("--op", " | ".join(sorted(names)), repr(op))
    return frozenset(found)


def parse_age(text: str) -> datetime.timedelta:
    """A span of time from ``12h``, ``30d`` or ``8w``.

    Raises:
        ArgumentValueError: another form.

    Example:
        >>> parse_age("8w").days
        56
    """
    match = re.fullmatch(r"(\d+)([hdw])", text.strip())
    if match is None or len(match[1]) > 6:
        raise bad_value("--older-than", "12h, 30d or 8w", repr(text))
    return datetime.timedelta(**{_UNITS[match[2]]: int(match[1])})


def _json(row: Removable, deleted: list[Removable]) -> dict[str, object]:
    return {
        "path": str(row.path),
        "why": str(row.why),
        "operator": row.path.parent.name,
        "problem": None if row.entry is None else dict(row.entry.problem),
        "deleted": any(other is row for other in deleted),
    }
