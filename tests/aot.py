"""Run a module of the tests in a fresh process that compiles kernels instead of interpreting them.

Triton decides at import whether it interprets, so nothing can be compiled in an interpreting
process. The module prints one line of JSON last.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_POOL = ThreadPoolExecutor(2)


def start(module: str, *arguments: str) -> Future[Any]:
    """Start ``python -m module``; the future holds the value of its last line of output."""
    return _POOL.submit(_run, module, arguments)


def _run(module: str, arguments: tuple[str, ...]) -> Any:
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])
