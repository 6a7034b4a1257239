"""Decodes latents to video on all ranks of a gang, each a band of rows.

A decoder's middle block attends over the whole frame and is cheap: it runs on every rank. Behind it each rank keeps
its rows; from there on convolutions take one row of each neighbour, group norms add up their sums, and the last
convolution's rows are put together. Nothing overlaps and nothing is blended, so there are no seams.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from cineray.distributed.mesh import Axis
from cineray.distributed.rows import group_norm_over_rows, with_neighbour_rows
from cineray.distributed.tokens import TokenShards, gather_tokens, split_tokens

_HOOK = "cineray_rows"


@contextmanager
def decoding_by_rows(vae: Any, convolutions: tuple[str, ...], axis: Axis) -> Iterator[None]:
    """Within it, `vae.decode` of the same latents on every rank of the axis gives the whole video on every rank.

    Latents with fewer rows than ranks are decoded whole on every rank.

    Args:
        convolutions: as `Model.row_convolutions` names them.
    """
    if axis.group is None:
        yield
        return
    decoder, rows = vae.decoder, _Rows(axis)
    hooks: list[tuple[nn.Module, ModelHook]] = [(decoder.mid_block, _TakeRows(rows))]
    for name, module in decoder.named_modules():
        if name.startswith(("conv_in", "mid_block")):
            continue
        if name == "conv_out":
            hooks.append((module, _RowConvolution(rows, gathers=True)))
        elif _is_one_of(module, convolutions) and _kernel_rows(module) > 1:
            hooks.append((module, _RowConvolution(rows, gathers=False)))
        elif isinstance(module, nn.GroupNorm):
            hooks.append((module, _RowGroupNorm(rows)))
    try:
        for module, hook in hooks:
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, _HOOK)
        yield
    finally:
        for module, _ in hooks:
            HookRegistry.check_if_exists_or_initialize(module).remove_hook(_HOOK, recurse=False)


def _is_one_of(module: nn.Module, classes: tuple[str, ...]) -> bool:
    return any(kind.__name__ in classes for kind in type(module).__mro__)


def _kernel_rows(convolution: Any) -> int:
    kernel = getattr(convolution, "conv", convolution).kernel_size[-2]
    if kernel not in (1, 3):
        raise ValueError(f"parallel decode: kernels of 1 or 3 rows can be sharded, got {kernel}")
    return kernel


class _Rows:
    """The rows of the frame in flight; one object for all hooks of a decoder."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.shards: TokenShards | None = None  # of the latents' rows; None: this frame is not sharded

    def take(self, values: torch.Tensor) -> torch.Tensor:
        num_rows = values.shape[-2]
        fits = num_rows >= self.axis.size
        self.shards = split_tokens(num_rows, self.axis.size, self.axis.index) if fits else None
        return values if self.shards is None else self.shards.own(values, -2).contiguous()

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        assert self.shards is not None
        scale = values.shape[-2] // self.shards.size  # the decoder's upsampling so far
        shards = TokenShards(tuple(size * scale for size in self.shards.sizes), self.shards.index)
        return gather_tokens(values, shards, self.axis.group, dim=-2)


class _RowHook(ModelHook):
    def __init__(self, rows: _Rows) -> None:
        super().__init__()
        self.rows = rows

    def original(self, *args: Any) -> Any:
        forward = self.fn_ref.original_forward
        assert forward is not None  # diffusers sets it when a hook that has new_forward is registered
        return forward(*args)


class _TakeRows(ModelHook):
    def __init__(self, rows: _Rows) -> None:
        super().__init__()
        self.rows = rows

    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:  # noqa: ARG002  # as the base has it
        return self.rows.take(output)


class _RowConvolution(_RowHook):
    """Runs on its rows and one of each neighbour; what the padding made of those is cut off again."""

    def __init__(self, rows: _Rows, gathers: bool) -> None:
        super().__init__(rows)
        self.gathers = gathers

    def new_forward(self, _module: nn.Module, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        extra = () if cache_x is None else (cache_x,)
        if self.rows.shards is None:
            return self.original(x, *extra)
        num_cached = 0 if cache_x is None else cache_x.shape[2]
        joined = x if cache_x is None else torch.cat([cache_x, x], dim=2)  # past frames need the same rows
        joined, above, below = with_neighbour_rows(joined, self.rows.axis)
        extra = () if cache_x is None else (joined[:, :, :num_cached],)
        out = self.original(joined[:, :, num_cached:] if num_cached else joined, *extra)
        out = out[..., above : out.shape[-2] - below, :]
        return self.rows.gather(out) if self.gathers else out


class _RowGroupNorm(_RowHook):
    def new_forward(self, module: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        return self.original(x) if self.rows.shards is None else group_norm_over_rows(module, x, self.rows.axis)
