"""MkDocs hooks: the reference is read from the three folders laid out as they are installed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

_LAID_OUT = tempfile.TemporaryDirectory(prefix="tritonconv-docs-")


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config: Any) -> Any:
    """Link the folders into one package, and let mkdocstrings look for it there."""
    root = Path(config.config_file_path).parent
    package = Path(_LAID_OUT.name) / "tritonconv"
    if not package.exists():  # `mkdocs serve` comes here at every change
        package.mkdir()
        for entry in (root / "tritonconv").iterdir():
            (package / entry.name).symlink_to(entry)
        for folder in ("autotune", "models"):
            (package / folder).symlink_to(root / folder)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_LAID_OUT.name]
    return config
