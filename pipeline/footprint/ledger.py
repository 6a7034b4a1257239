"""What code on a fake GPU allocates, computes, sends and reads, operation by operation."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from cineray.pipeline.footprint.exchange_log import Exchange, read_exchange
from cineray.pipeline.footprint.small_values import SmallValues

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default
_BLOCK = 512  # bytes; CUDA's allocator rounds up to it (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)


class Ledger(TorchDispatchMode):
    """Counts within a `FakeTensorMode` that stands outside of it.

    Attributes:
        live_bytes: of storages on the GPU now.
        peak_bytes: the most since `begin`.
        peak_at: the operation that reached it, and the shapes that it was given.
        flop: multiplications and additions of matrix products and convolutions since `begin`.
        num_host_reads: times that code waited for a number of the GPU, since `begin`.
        num_masked, num_unmasked: calls of an attention kernel with a mask, and without, since `begin`.
        exchanges: with other ranks, in order, since `begin`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self._sizes: dict[int, int] = {}
        self._values = SmallValues()
        self.begin()

    def begin(self) -> None:
        """Starts a new stretch."""
        self.peak_bytes = self.live_bytes
        self.peak_at = ""
        self.flop = 0
        self.num_operations = 0
        self.num_host_reads = 0
        self.num_masked = 0
        self.num_unmasked = 0
        self.exchanges: list[Exchange] = []

    def begin_peak(self) -> None:
        """Looks for a new peak; the counts go on."""
        self.peak_bytes, self.peak_at = self.live_bytes, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(is_traceable_wrapper_subclass(a) for a in tree_iter((args, kwargs))):
            # of parts, a sharded tensor's or a quantized one's: it does the same to them, which is what takes memory
            return NotImplemented
        self.num_operations += 1
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.read(args[0])
        if func is torch.ops.aten.allclose.default:
            self.num_host_reads += args[0].device.type == "cuda"
            return self._values.are_close(*args[:2], **kwargs)
        if func.namespace == "c10d":
            return self._exchange(func, args, kwargs)
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], self._placed(args[1]))
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flop += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        if func is _FLASH:
            self.num_unmasked += 1
        elif func is _EFFICIENT:
            is_masked = args[3] is not None
            self.num_masked, self.num_unmasked = self.num_masked + is_masked, self.num_unmasked + (not is_masked)
        self._values.follow(func, args, kwargs, out)
        self._account(func, args, out)
        return out

    def read(self, tensor: torch.Tensor) -> Any:
        """Its number, or its numbers as nested lists: one wait for the GPU."""
        self.num_host_reads += tensor.device.type == "cuda"
        return self._values.read(tensor)

    def _placed(self, indices: Any) -> list[Any]:
        """Indices without masks: how many places one names decides the result's shape, for which the host waits."""
        found: list[Any] = []
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                self.num_host_reads += index.device.type == "cuda"
                found += self._values.places(index)
            else:
                found.append(index)
        return found

    def _exchange(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name.removeprefix("c10d::")
        exchange = read_exchange(name, args)
        out = func(*args, **kwargs)
        if exchange is not None:
            self.exchanges.append(exchange)
            self._values.deliver(name, args, len(exchange.ranks))
        return out

    def _account(self, func: Any, args: Any, out: Any) -> None:
        before = self.peak_bytes
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                self._add(tensor.untyped_storage())
        if self.peak_bytes > before:
            shapes = [tuple(a.shape) for a in tree_iter(args) if isinstance(a, torch.Tensor)]
            self.peak_at = f"{func} {shapes[:3]}"

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        size = _rounded(storage.nbytes())
        self._sizes[key] = size
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._remove, key)

    def resize(self, storage: torch.UntypedStorage) -> None:
        """A storage has grown or shrunk in place, as FSDP does to what it gathers."""
        key = storage._cdata
        if key in self._sizes:
            size = _rounded(storage.nbytes())
            self.live_bytes += size - self._sizes[key]
            self._sizes[key] = size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _remove(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key, 0)


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // _BLOCK) * _BLOCK
