"""Run the examples in the docstrings of the whole package; prints how many there are."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import sys

import tritonconv

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def main() -> int:
    """Test every module; the exit status is 1 when an example fails."""
    failed = attempted = 0
    for found in pkgutil.walk_packages(tritonconv.__path__, "tritonconv."):
        module = importlib.import_module(found.name)
        result = doctest.testmod(module, optionflags=FLAGS)
        failed, attempted = failed + result.failed, attempted + result.attempted
    print(f"{attempted} examples, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
