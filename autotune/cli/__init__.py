"""The command ``autotune``; one small file per verb."""

from __future__ import annotations

from .app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the command."""
    app(prog_name="autotune")
