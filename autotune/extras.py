"""Optional packages: what needs them says which, and how to get them."""

from __future__ import annotations

import importlib
from typing import Any

from tritonconv.runtime.errors import TritonConvError


class MissingExtraError(TritonConvError, ImportError):
    """An optional package is needed and not installed; the message says how to install it."""


def need(module: str, purpose: str, install: str) -> Any:
    """Import an optional package.

    Args:
        module: what to import.
        purpose: what needs it, the subject of the message.
        install: what to give to ``pip install``.

    Raises:
        MissingExtraError: it is not installed.

    Example:
        >>> need("math", "arithmetic", "math").sqrt(9.0)
        3.0
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A package that is there and lacks one of its own is another problem.
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingExtraError(
            f"{purpose} needs the package {module.split('.')[0]}: pip install '{install}'"
        ) from None
