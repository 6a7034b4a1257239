"""What an error in an actor tells of: the clip, the device's memory, or the machine."""

import errno

import pytest
import torch

from cineray.jobs.gangs.faults import explain_shortage, fault_of, with_memory

# as PyTorch 2.x words them
CUDA = (
    "CUDA out of memory. Tried to allocate 5.06 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.20 GiB is "
    "free. Process 77 has 40.00 GiB memory in use. Of the allocated memory 30.00 GiB is allocated by PyTorch."
)
NCCL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.27.3\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
)
CALLOC = "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error\nLast error:\nFailed to CUDA calloc async 2432 bytes"
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
HOST = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000 bytes. Error code 12 (Cannot allocate memory)"
)


class _Unprintable(Exception):
    def __str__(self):
        raise ValueError


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (torch.OutOfMemoryError(CUDA), "memory"),
        (MemoryError(), "memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
        (torch.distributed.DistBackendError(NCCL), "memory"),
        (torch.distributed.DistBackendError(CALLOC), "memory"),
        (RuntimeError(CUBLAS), "memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "memory"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), "memory"),
        (RuntimeError(HOST), "memory"),
        (ConnectionResetError("x"), "machine"),
        (TimeoutError(), "machine"),
        (torch.distributed.DistBackendError("x"), "machine"),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), "machine"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "machine"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), "machine"),
        (RuntimeError("The size of tensor a (4) must match the size of tensor b (5)"), "step"),
        (KeyError("socket"), "step"),
        (KeyError("out of memory"), "step"),
        (_Unprintable(), "step"),
        (OSError("image file is truncated"), "input"),
        (ValueError("a prompt about running out of memory"), "input"),
    ],
)
def test_an_error_tells_of_the_clip_of_memory_or_of_the_machine(error, fault):
    assert fault_of(error) == fault


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError(CUDA), "out of memory: needs 5.06 GiB more, has 1.20 GiB free of 79.10 GiB"),
        (RuntimeError(HOST), "out of memory: needs 4000000000 bytes more"),
        (RuntimeError(CUBLAS), f"out of memory: RuntimeError: {CUBLAS}"),
        (MemoryError(), "out of memory: MemoryError"),
    ],
)
def test_a_shortage_is_told_with_what_is_needed_and_what_is_there(error, said):
    assert explain_shortage(error) == said


def test_work_is_tried_once_more_where_memory_was_too_short_and_only_there():
    calls = []

    def work(*errors):
        calls.append(1)
        if len(calls) <= len(errors):
            raise errors[len(calls) - 1]
        return "done"

    assert with_memory(lambda: work(torch.OutOfMemoryError(CUDA))) == "done"
    assert len(calls) == 2
    calls.clear()
    with pytest.raises(MemoryError):
        with_memory(lambda: work(RuntimeError(CUBLAS), MemoryError()))
    assert len(calls) == 2
    calls.clear()
    with pytest.raises(KeyError):
        with_memory(lambda: work(KeyError(1)))
    assert len(calls) == 1
