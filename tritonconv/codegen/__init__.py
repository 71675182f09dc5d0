"""Scalar functions: Python functions of 0-d tensors, traced, differentiated, emitted as Triton."""

from .errors import (
    CodegenError,
    DataDependentControlFlowError,
    NotScalarError,
    ScalarArityError,
    UnsupportedOpError,
)
from .ir import Argument, Capture, Load, Output, Role
from .lowering import supported_ops
from .modules import CacheSecurityError
from .program import ScalarFunction
from .show import show
from .trace import clear_cache, trace

__all__ = [
    "Argument",
    "CacheSecurityError",
    "Capture",
    "CodegenError",
    "DataDependentControlFlowError",
    "Load",
    "NotScalarError",
    "Output",
    "Role",
    "ScalarArityError",
    "ScalarFunction",
    "UnsupportedOpError",
    "clear_cache",
    "show",
    "supported_ops",
    "trace",
]
