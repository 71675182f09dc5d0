"""Run the Python blocks of a page in order in one namespace; ``run_page.py PAGE``."""

from __future__ import annotations

import doctest
import sys
from pathlib import Path

from blocks import Block, blocks


def run(block: Block, page: str, namespace: dict[str, object]) -> None:
    """Run a block; tracebacks show the page and its line."""
    if block.language == "pycon":
        parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=FLAGS)
        test = parser.get_doctest(block.text, namespace, page, page, block.line)
        runner.run(test, clear_globs=False)
        namespace.update(test.globs)
        if runner.failures:
            raise SystemExit(f"{page}: the session at line {block.line} failed")
        return
    code = compile("\n" * (block.line - 1) + block.text, page, "exec")
    if block.runs:
        exec(code, namespace)


FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def main() -> None:
    """Run one page."""
    page = Path(sys.argv[1])
    namespace: dict[str, object] = {"__name__": "__page__"}
    for block in blocks(page):
        if block.language in ("python", "pycon"):
            run(block, str(page), namespace)


if __name__ == "__main__":
    main()
