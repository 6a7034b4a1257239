"""Lets a build of PyTorch without CUDA, or a machine without a GPU, index fake tensors that say they are on `cuda:0`.

Before an operation PyTorch asks the tensor's device type for a guard, which makes its device the current one. A build
for CPUs has none for CUDA and raises. The guard of the `meta` device does nothing at all, and PyTorch keeps all guards
in one table that its library exports, so that one is lent to CUDA for a while: no compiler, nothing left behind.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# c10::impl::device_guard_impl_registry, an array of pointers (c10/core/impl/DeviceGuardImplInterface.h)
_TABLE = "_ZN3c104impl26device_guard_impl_registryE"
_CUDA, _META = 1, 14  # c10/core/DeviceType.h; they are written into saved models and so do not change


@contextmanager
def cuda_guard_that_does_nothing() -> Iterator[None]:
    """Within it, tensors may say that they are on CUDA; afterwards all is as before. Nothing is done where a GPU is.

    Raises:
        RuntimeError: this PyTorch does not have its guards where they are looked for.
    """
    if torch.cuda.is_available():
        yield
        return
    table = _guards()
    own = table[_CUDA]
    table[_CUDA] = table[_META]
    try:
        yield
    finally:
        table[_CUDA] = own


def _guards() -> ctypes.Array[ctypes.c_void_p]:
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libc10.so", "libc10.dylib", "c10.dll"):
        if not (folder / name).is_file():
            continue
        try:
            table = (ctypes.c_void_p * (_META + 1)).in_dll(ctypes.CDLL(str(folder / name)), _TABLE)
        except (OSError, ValueError):
            break
        if table[_META] is not None:
            return table
    raise RuntimeError(
        f"PyTorch {torch.__version__} has no GPU here and its device guards are not in {folder}; fake GPUs work with "
        "PyTorch 2.6 to 2.13, or on a machine with a GPU"
    )
