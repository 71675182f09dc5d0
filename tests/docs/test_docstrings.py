"""The examples in docstrings run as they are printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from blocks import plain_environment


def test_docstring_examples(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_doctests.py"))],
        cwd=tmp_path,
        env=plain_environment(tmp_path / "cache"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    count = re.search(r"(\d+) examples, 0 failed", done.stdout)
    assert count is not None
    assert int(count[1]) > 20
