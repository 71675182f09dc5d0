"""The one module that knows versions of Triton and PyTorch."""

from __future__ import annotations

import functools
import inspect
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

TRITON_VERSION: tuple[int, int] = tuple(  # type: ignore[assignment]  # two groups, always
    int(part)
    for part in re.match(r"(\d+)\.(\d+)", triton.__version__).groups()  # type: ignore[union-attr]
)

# The direct launch below was checked on a GPU with these releases only; every other one goes
# through Triton's own dispatcher, which is slower on the host and always right.
DIRECT_LAUNCH_VERSIONS = frozenset({(3, 6)})


COMPILE_ERRORS: tuple[type[Exception], ...] = (CompilationError, PTXASError)
"""What compiling a kernel raises, besides a plain RuntimeError of the pass manager."""


def unfit(error: Exception) -> str:
    """Why a kernel with this config cannot run here; empty where the error says nothing of that.

    Example:
        >>> unfit(RuntimeError("PassManager::run failed")), unfit(RuntimeError("CUDA error"))
        ('does not compile here', '')
    """
    if isinstance(error, OutOfResources):
        return "needs more than this device has"
    failed = type(error) is RuntimeError and "PassManager::run failed" in str(error)
    return "does not compile here" if failed or isinstance(error, COMPILE_ERRORS) else ""


def interpreting() -> bool:
    """Whether Triton kernels run through the interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def ptxas_version(arch: str) -> str:
    """Release of the ptxas that Triton compiles with for ``sm_90`` and its like; else empty.

    Example:
        >>> ptxas_version("gfx942")
        ''
    """
    if not arch.startswith("sm_"):
        return ""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return str(get_ptxas(int(arch[3:])).version)
    except Exception:  # no such file, not executable, a backend that was not built
        return ""


def tensor_descriptor(
    base: Any, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]
) -> Any:
    """A view of a tensor for a kernel that reads boxes of it; zeros are read outside."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(base, list(shape), list(strides), list(block))


def tensor_maps(
    compiled: Any, views: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[Callable[[int], Any]] | None:
    """For every tensor descriptor of a compiled kernel, a function from its pointer to its map.

    A map says all that the copy engine knows of a tensor; a kernel takes it in the place of the
    descriptor. Those of the last pointers are kept: the same tensors come again and again.

    Args:
        compiled: the kernel.
        views: (shape, strides) of its descriptors in the order of its parameters.

    Returns:
        None where this release has no verified way, or the kernel was compiled without the engine.
    """
    described = getattr(compiled.metadata, "tensordesc_meta", None) or ()
    if TRITON_VERSION not in DIRECT_LAUNCH_VERSIONS or len(described) != len(views):
        return None
    if any(meta is None or meta["fp4_padded"] for meta in described):
        return None
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    fill = triton.runtime.driver.active.utils.fill_tma_descriptor

    def maps_of(meta: Any, shape: list[int], strides: list[int]) -> Callable[[int], Any]:
        kind = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
        swizzle, size, block = meta["swizzle"], meta["elem_size"], list(meta["block_size"])

        @functools.lru_cache(maxsize=256)
        def map_of(pointer: int) -> Any:
            return fill(pointer, swizzle, size, kind, block, shape, strides, 0)

        return map_of

    return [
        maps_of(meta, list(shape), list(strides))
        for meta, (shape, strides) in zip(described, views, strict=True)
    ]


def direct_launcher(compiled: Any, maps: bool = False) -> Callable[..., None] | None:
    """A function ``(grid_x, grid_y, grid_z, stream, arguments)`` that launches a compiled kernel.

    ``arguments`` holds every parameter of the kernel in order, constexprs included, with device
    pointers as integers; with ``maps`` a tensor descriptor is its map (see :func:`tensor_maps`),
    its sizes and its strides. Returns None where this release of Triton has no verified direct
    launch, or the kernel needs scratch memory, which only the regular path allocates.
    """
    if TRITON_VERSION not in DIRECT_LAUNCH_VERSIONS:
        return None
    run = compiled.run
    if getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1):
        return None
    # Where a kernel takes tensor descriptors, what encodes them stands before the launch itself.
    launch = inspect.getclosurevars(run.launch).nonlocals["launcher"] if maps else run.launch
    function = compiled.function
    metadata = compiled.packed_metadata
    cooperative, pdl = run.launch_cooperative_grid, run.launch_pdl

    def call(grid_x: int, grid_y: int, grid_z: int, stream: int, arguments: list[Any]) -> None:
        launch(
            grid_x,
            grid_y,
            grid_z,
            stream,
            function,
            cooperative,
            pdl,
            None,
            None,
            metadata,
            None,
            None,
            None,
            *arguments,
        )

    return call


def repair_interpreter() -> None:
    """Mend faults of Triton's interpreter; importing this module does it when interpreting.

    A comparison carries the dtype of its operands there, so that broadcasting one of two float
    scalars makes a block of floats, on which ``&`` and ``|`` fail (Triton 3.6 to 3.9). A scalar
    that is kept as an array of one element cannot bound a loop once NumPy (2.4) refuses to make an
    integer of it (Triton 3.6). Numbers are cut off where they should be rounded to float8, and NaN
    of float8 is read as 480 (Triton 3.6 to 3.9).
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    create_splat = interpreter.InterpreterBuilder.create_splat
    create_fp_to_fp = interpreter.InterpreterBuilder.create_fp_to_fp
    patch_tensor = interpreter._patch_lang_tensor
    if getattr(create_splat, "repaired", False):
        return

    def repaired_splat(self: Any, ret_ty: Any, arg: Any) -> Any:
        result = create_splat(self, ret_ty, arg)
        if arg.data.dtype == np.bool_:
            result = interpreter.TensorHandle(result.data.astype(np.bool_), tl.int1)
        return result

    def repaired_patch(tensor: Any, *scope: Any) -> None:
        # Triton undoes its own patch of __index__ after the launch, and with it this one.
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    def repaired_cast(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        other = target if source == tl.float8e4nv else source
        if tl.float8e4nv not in (source, target) or other not in (tl.float32, tl.float16):
            return create_fp_to_fp(self, src, dst_type, rounding_mode)
        data = torch.from_numpy(np.array(src.data))
        if source == tl.float8e4nv:
            wide = torch.float32 if target == tl.float32 else torch.float16
            data = data.view(torch.float8_e4m3fn).to(wide)
        else:
            data = data.to(torch.float8_e4m3fn).view(torch.uint8)
        return interpreter.TensorHandle(data.numpy(), target)

    repaired_splat.repaired = True  # type: ignore[attr-defined]
    interpreter.InterpreterBuilder.create_splat = repaired_splat
    interpreter.InterpreterBuilder.create_fp_to_fp = repaired_cast
    interpreter._patch_lang_tensor = repaired_patch


def interpreter_tensor(data: Any, like: Any) -> Any:
    """Wrap a NumPy array as an interpreted value of the dtype and block shape of ``like``."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    return tl.tensor(TensorHandle(data, like.dtype), like.type)


if interpreting():
    repair_interpreter()


def tf32_allowed() -> bool:
    """Whether PyTorch's settings let float32 convolutions use TF32 products."""
    try:
        return torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        # The newer fp32_precision settings are in use, and the older ones refuse to be read.
        cudnn: Any = torch.backends.cudnn  # the stubs do not know the newer settings
        return bool(cudnn.conv.fp32_precision == "tf32")


_CUDNN_LOCK = threading.RLock()


class _CudnnOrder:
    """PyTorch's convolutions with sums in a fixed order where that is demanded.

    A generator would cost the host more than all of its work.
    """

    __slots__ = ("_demand", "_deterministic")

    def __init__(self, deterministic: bool) -> None:
        self._deterministic = deterministic
        self._demand = False

    def __enter__(self) -> None:
        _CUDNN_LOCK.acquire()
        try:
            if self._deterministic and not torch._C._get_cudnn_deterministic():
                self._demand = True
                torch._C._set_cudnn_deterministic(True)
        except BaseException:  # Ctrl-C: nobody would release it
            self.__exit__()
            raise

    def __exit__(self, *raised: object) -> None:
        if self._demand:
            torch._C._set_cudnn_deterministic(False)
        _CUDNN_LOCK.release()


def cudnn_settings(*, allow_tf32: bool | None, deterministic: bool) -> AbstractContextManager[None]:
    """cuDNN with these settings; they are PyTorch's globals, so threads take turns.

    Args:
        allow_tf32: for float32 products; None where there are none, which leaves it alone.
        deterministic: demand sums in a fixed order (never lifts the user's own demand).
    """
    if allow_tf32 is None:  # reading the setting costs more than a launch may
        return _CudnnOrder(deterministic)
    return _cudnn_precision("tf32" if allow_tf32 else "ieee", deterministic)


@contextmanager
def _cudnn_precision(wanted: str, deterministic: bool) -> Iterator[None]:
    backend: Any = torch.backends.cudnn  # the stubs do not know its settings by operator
    with _CudnnOrder(deterministic):
        precision = backend.conv.fp32_precision
        change = wanted != precision and (precision, wanted) != ("none", "ieee")
        if change:
            backend.conv.fp32_precision = wanted
        try:
            yield
        finally:
            if change:
                # What was read may be inherited from a wider setting: it must stay inherited, or
                # a later change of that setting would not reach convolutions any more.
                backend.conv.fp32_precision = "none"
                if backend.conv.fp32_precision != precision:
                    backend.conv.fp32_precision = precision
