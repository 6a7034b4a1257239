"""A GPU that is not there: the real code runs on it, at its real size, in seconds and without its memory.

Tensors are PyTorch's own fake ones, which have a shape, a type and the device `cuda:0`, and no values. What a machine
without a GPU lacks is lent for a while, and taken back on the way out: a device guard, a process group whose ranks are
pretended, streams, and the choice of an attention kernel.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import accelerate.hooks
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from cineray.pipeline.footprint.device_guard import cuda_guard_that_does_nothing
from cineray.pipeline.footprint.ledger import Ledger

GPU = torch.device("cuda:0")
_CAPABILITY = (9, 0)  # an H100's
_HUNYUAN15_VAE = "diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15"
_SDE_NOISE = "torchsde._brownian.brownian_interval"  # where Stable Audio Open's scheduler has its noise from


@dataclass(frozen=True, slots=True)
class FakeGPU:
    """The GPU that is not there, and what happens on it."""

    ledger: Ledger = field(default_factory=Ledger)


@contextmanager
def fake_gpu() -> Iterator[FakeGPU]:
    """Within it, tensors that are made on `cuda:0` take no memory; afterwards this process is as before.

    Raises:
        RuntimeError: this PyTorch cannot do it, or torch.distributed is up.
    """
    if dist.is_initialized():
        raise RuntimeError(
            "a fake GPU makes process groups of its own; torch.distributed is up in this process already"
        )
    gpu = FakeGPU()
    with ExitStack() as undo:
        undo.enter_context(cuda_guard_that_does_nothing())
        undo.callback(lambda: dist.is_initialized() and dist.destroy_process_group())
        undo.enter_context(_replaced(torch.cuda, "set_device", lambda *_: None))
        undo.enter_context(_replaced(torch.cuda, "current_device", lambda: GPU.index))
        undo.enter_context(_replaced(torch.cuda, "get_device_capability", lambda *_: _CAPABILITY))
        undo.enter_context(_replaced(functional, "scaled_dot_product_attention", _Attention()))
        undo.enter_context(_replaced(FakeTensor, "tolist", lambda tensor: gpu.ledger.read(tensor)))
        undo.enter_context(_replaced(FakeTensor, "numpy", _no_pixels))
        undo.enter_context(_replaced(FakeTensor, "__deepcopy__", _deep_copy))
        for name in ("Stream", "Event", "current_stream"):
            undo.enter_context(_replaced(torch.cuda, name, _Stream))
        undo.enter_context(_replaced(torch.cuda, "stream", nullcontext))
        undo.enter_context(_replaced(DeviceMesh, "from_group", _with_values(DeviceMesh.from_group)))
        undo.enter_context(_replaced(nn.Module, "_apply", _apply))
        undo.enter_context(_replaced(torch.UntypedStorage, "resize_", _resizing(gpu.ledger)))
        undo.enter_context(_replaced(accelerate.hooks, "set_module_tensor_to_device", _move))
        undo.enter_context(_replaced(dist, "new_group", _new_fake_group(dist.new_group)))
        if importlib.util.find_spec("torchsde") is not None:
            undo.enter_context(_replaced(importlib.import_module(_SDE_NOISE), "_randn", _noise))
        attention = importlib.import_module(_HUNYUAN15_VAE).HunyuanVideo15AttnBlock
        undo.enter_context(_replaced(attention, "prepare_causal_attention_mask", staticmethod(_mask_of_frames)))
        undo.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        undo.enter_context(gpu.ledger)
        undo.enter_context(torch.no_grad())
        yield gpu


def join_fake_world(world_size: int, rank: int) -> None:
    """Brings torch.distributed up as one rank among others that are not there; call it within `fake_gpu`."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    is_own = name in vars(owner)  # else inherited: then it is taken away again
    before = vars(owner).get(name)  # as it stands there: a static method's attribute is its function
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if is_own else delattr(owner, name)


def _deep_copy(tensor: FakeTensor, memo: dict[int, Any]) -> torch.Tensor:
    """As a tensor's own, which looks for memory to copy."""
    return memo.setdefault(id(tensor), tensor.clone())


class _Stream:
    """A stream of the GPU, or an event on one: all is done in the order in which it is asked for."""

    device = GPU

    def __init__(self, *_: Any, **_more: Any) -> None:
        pass

    def __getattr__(self, _: str) -> Any:
        return lambda *_, **_more: None


def _with_values(real: Any) -> Any:
    """A function whose tensors have values: it looks into them."""

    def call(*arguments: Any, **more: Any) -> Any:
        with _disable_current_modes(), unset_fake_temporarily():
            return real(*arguments, **more)

    return staticmethod(call)


def _apply(module: nn.Module, change: Any, recurse: bool = True) -> nn.Module:
    """As a module's own, which swaps tensors in place and cannot swap fake ones."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for name, own in list(module._parameters.items()):
        if own is not None and (new := change(own)) is not own:
            module._parameters[name] = nn.Parameter(new, requires_grad=own.requires_grad)
    for name, own in list(module._buffers.items()):
        module._buffers[name] = own if own is None else change(own)
    return module


def _noise(size: tuple[int, ...], dtype: torch.dtype, device: torch.device, _seed: int) -> torch.Tensor:
    """As torchsde's own, which asks CUDA for a generator."""
    return torch.empty(size, dtype=dtype, device=device)


def _mask_of_frames(
    n_frame: int, n_hw: int, dtype: torch.dtype, device: torch.device, batch_size: int | None = None
) -> torch.Tensor:
    """As HunyuanVideo 1.5's own, which writes into it row by row, one for each latent."""
    mask = torch.empty(n_frame * n_hw, n_frame * n_hw, dtype=dtype, device=device)
    return mask if batch_size is None else mask.expand(batch_size, -1, -1)


def _resizing(ledger: Ledger) -> Any:
    real = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        out = real(storage, size)
        ledger.resize(storage)
        return out

    return resize_


def _move(module: nn.Module, name: str, device: Any, value: torch.Tensor | None = None, **_more: Any) -> None:
    """As accelerate's own, which calls a tensor's class to make another of it."""
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    own: torch.Tensor = getattr(owner, last)
    moved = (own if value is None else value).to(device)
    setattr(owner, last, moved if last in owner._buffers else nn.Parameter(moved, requires_grad=False))


def _no_pixels(tensor: FakeTensor) -> np.ndarray:
    """An array that nothing is written to and so takes no memory."""
    return np.empty(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


def _new_fake_group(real: Any) -> Any:
    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, **more: Any) -> Any:  # noqa: ARG001
        return real(ranks, timeout=timeout, backend="fake", **more)

    return new_group


class _Attention:
    """scaled_dot_product_attention as a GPU runs it; a build for CPUs would take the formula, [N, N] and all.

    Flash attention takes 16-bit values, heads of up to 256 channels and no mask; everything else goes to the
    memory-efficient kernel, which wants a mask of the scores' whole shape, in rows of 16 values
    (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
    """

    def __init__(self) -> None:
        self._real = functional.scaled_dot_product_attention

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if query.device.type != "cuda":
            return self._real(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if enable_gqa and key.shape[1] != query.shape[1]:
            key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
        is_half = query.dtype in (torch.bfloat16, torch.float16)
        if attn_mask is None and is_half and query.shape[-1] <= 256:
            return torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
        bias = None if attn_mask is None else _bias(attn_mask, query, key)
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, False, dropout_p, is_causal, scale=scale
        )[0]


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    num_keys = key.shape[2]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, float("-inf"))
    if num_keys % 16:
        mask = functional.pad(mask, (0, -num_keys % 16))[..., :num_keys]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], num_keys)
