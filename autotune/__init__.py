"""Tune tritonconv's operators for a GPU: measure, choose, check, store; the command ``autotune``.

From Python::

    from tritonconv.autotune.tune import tune
    from tritonconv.runtime.operators import get_operator

    operator = get_operator("conv2d.forward")
    problem = operator.parse({"batch": 8, "in_channels": 64, "out_channels": 64, "height": 56})
    reports = tune(operator, [problem])

For a Triton kernel of your own, in place of ``triton.autotune``::

    from tritonconv.autotune import autotune

To compile in parallel what a training step of a model runs, before it does::

    from tritonconv.autotune import precompile
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decorator import autotune
    from .precompiling import precompile

__all__ = ["autotune", "precompile"]


def __getattr__(name: str) -> Any:
    # Most who import this package want a module of it, and should not wait for the others.
    if name == "autotune":
        from .decorator import autotune

        return autotune
    if name == "precompile":
        from .precompiling import precompile

        return precompile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
