"""What an error in an actor tells of: the clip, the device's memory, or the machine. Pure functions of the error."""

import errno
import re
from collections.abc import Callable
from typing import Literal, TypeVar

import torch

from cineray.pipeline.request import explain

# what a step of a clip raises because of its size or its cache; other errors are the clip's if every rank has the same
CLIP_ERRORS = (ValueError, OSError)
# torch.OutOfMemoryError is the caching allocator's; NCCL, cuBLAS, cuDNN, CUDA and torch's allocator for CPUs say it in
# plain RuntimeErrors (torch/csrc/distributed/c10d/NCCLUtils.cpp, c10/core/impl/alloc_cpu.cpp)
_OF_MEMORY = re.compile(
    r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation"
    r"|not enough memory|can't allocate memory|failed to cuda (?:host )?[cm]?alloc",
    re.IGNORECASE,
)
# what ranks say of each other and of their devices: gloo, NCCL and CUDA raise plain RuntimeErrors
_OF_MACHINE = re.compile(
    r"gloo|nccl|rendezvous|connection|socket|broken pipe|timed? ?out|cuda error|cublas|cudnn|device-side", re.IGNORECASE
)
MAX_CHARS = 4000  # of a message that are looked at: CUDA's go on about environment variables
_SIZE = r"(\d+(?:\.\d+)? ?(?:bytes|[KMGT]i?B))"
# torch's own sentence (c10/cuda/CUDACachingAllocator.cpp): "Tried to allocate 5.06 GiB. GPU 0 has a total capacity of
# 79.10 GiB of which 1.20 GiB is free."; that of its CPU allocator: "you tried to allocate 123 bytes"
_WANTED = re.compile(rf"tried to allocate {_SIZE}", re.IGNORECASE)
_FREE = re.compile(rf"total capacity of {_SIZE} of which {_SIZE} is free", re.IGNORECASE)

Fault = Literal["memory", "machine", "input", "step"]
T = TypeVar("T")


def fault_of(error: BaseException) -> Fault:
    """What an error tells of.

    Returns:
        "memory": the device, or the host, had too little of it; another one may have more.
        "machine": other ranks, or a device that is not well; it says nothing about the clip.
        "input": what a step raises because of the clip's size or its cache.
        "step": anything else; the clip's fault if every rank says the same.
    """
    text = explain(error, MAX_CHARS)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "memory"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return "memory"
    if isinstance(error, RuntimeError) and _OF_MEMORY.search(text):  # DistBackendError is one
        return "memory"
    if isinstance(error, ConnectionError | TimeoutError | EOFError | torch.distributed.DistError):
        return "machine"
    if isinstance(error, RuntimeError) and _OF_MACHINE.search(text):
        return "machine"
    return "input" if isinstance(error, CLIP_ERRORS) else "step"


def explain_shortage(error: BaseException) -> str:
    """`out of memory: needs 5.06 GiB more, has 1.20 GiB free of 79.10 GiB`, as far as the error says so."""
    text = explain(error, MAX_CHARS)
    wanted, free = _WANTED.search(text), _FREE.search(text)
    if wanted is None:
        return f"out of memory: {explain(error)}"
    has = "" if free is None else f", has {free[2]} free of {free[1]}"
    return f"out of memory: needs {wanted[1]} more{has}"


def with_memory(work: Callable[[], T]) -> T:
    """What `work` returns, tried once more with emptied caches where memory was too short.

    Raises:
        Exception: what it raised the second time, or at first of another kind.
    """
    try:
        return work()
    except Exception as error:
        if fault_of(error) != "memory":
            raise
    free_memory()  # here, where the error and all that its frames held are gone
    return work()


def free_memory() -> None:
    """Gives back what PyTorch has cached of this process's GPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
