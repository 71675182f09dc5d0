"""Fenced code blocks of a Markdown page."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = tuple(
    sorted(
        [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")],
        key=lambda path: path.relative_to(ROOT).parts,
    )
)
_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`]*)$")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        language: first word of the info string.
        title: its title, such as ``GPU``.
        line: number of the first line of the text in the page.
        text: what stands between the fences, indentation removed.
    """

    language: str
    title: str
    line: int
    text: str

    @property
    def runs(self) -> bool:
        """Whether the block is run; one that needs a GPU is only compiled."""
        return "GPU" not in self.title


def blocks(page: Path) -> Iterator[Block]:
    """All fenced blocks of a page, in order."""
    opened: re.Match[str] | None = None
    begin, kept = 0, []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        found = _FENCE.match(line)
        if opened is None:
            if found:
                opened, begin, kept = found, number + 1, []
        elif found and found["ticks"] == opened["ticks"] and not found["info"].strip():
            language, _, options = opened["info"].strip().partition(" ")
            title = re.search(r'title="([^"]*)"', options)
            text = "\n".join(kept) + "\n"
            yield Block(language, title[1] if title else "", begin, text)
            opened = None
        else:
            kept.append(line.removeprefix(opened["indent"]))
    assert opened is None, f"{page}: the block at line {begin} is not closed"


def plain_environment(cache: Path) -> dict[str, str]:
    """The environment of a user without a GPU: no interpreter, caches of its own."""
    names = ("TRITON_INTERPRET", "PYTHONPATH")
    kept = {k: v for k, v in os.environ.items() if k not in names and "TRITONCONV" not in k}
    return {
        **kept,
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "2",
        "TRITONCONV_CACHE_DIR": str(cache),
    }
