"""Errors of tracing and lowering; each one names the user's function and where it stands."""

from __future__ import annotations

from collections.abc import Iterable

from ..runtime.errors import TritonConvError


class CodegenError(TritonConvError):
    """Base of what can go wrong between a scalar function and its Triton source."""


class UnsupportedOpError(CodegenError, NotImplementedError):
    """The function uses an operator that has no lowering.

    Attributes:
        op: The ATen name of the operator, such as ``aten.bessel_j0.default``.
        supported: The names of all operators that have a lowering.
    """

    def __init__(self, op: str, where: str, supported: Iterable[str]) -> None:
        self.op = op
        self.supported = tuple(sorted(supported))
        super().__init__(
            f"{where}: the operator {op} has no Triton lowering. "
            f"Supported: {', '.join(self.supported)}"
        )


class DataDependentControlFlowError(CodegenError):
    """The function asks Python for the value of a traced scalar (``if x > 0``, ``int(x)``)."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(
            f"{where}: {what} needs the value of a scalar while the function is traced, before any "
            "value exists. Write both branches and choose with torch.where(condition, a, b); "
            "combine conditions with & | ~; use x.to(dtype) to convert."
        )


class ScalarArityError(CodegenError, TypeError):
    """The function takes other arguments than the ones it is called with."""


class NotScalarError(CodegenError, ValueError):
    """A result or an intermediate value is not a 0-d tensor.

    Not a ``TypeError``: Python's operators take that for "not implemented" and hide the message.
    """
