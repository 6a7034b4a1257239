"""Shards the image tokens of a diffusers transformer over a gang's ranks.

What a model does before its blocks runs on every rank, on all tokens. In front of the blocks each rank takes its
share, behind the output projection the shares are put together again. In between only attention sees other ranks:
the model's own attention processors run, with an attention that spans ranks where they would call diffusers' own, or
PyTorch's.

Letters: B batch, S image tokens, T text tokens, D channels.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import copy
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from cineray.distributed.attention import (
    JointSequence,
    Kernel,
    SequenceAttention,
    join_joint,
    split_joint,
    torch_kernel,
)
from cineray.distributed.mesh import Mesh
from cineray.distributed.tokens import TokenShards, gather_tokens, split_tokens
from cineray.pipeline.adapters import MODELS, Models, transformers_in
from cineray.pipeline.blocks import BlockArguments, BlockListProxy, ShardedBlockList, is_sharded

# the names under which processors call attention: diffusers' dispatcher, or PyTorch's own in a module called F
_DISPATCH, _FUNCTIONAL, _BY_HEADS = "dispatch_attention_fn", "F", "scaled_dot_product_attention"


class ShardedTransformer:
    """A transformer whose image tokens are sharded, within `with`. Attach a cache first: it must see shards.

    Raises:
        ValueError: a transformer that is not known, or is sharded already.
    """

    def __init__(
        self, transformer: nn.Module, mesh: Mesh, attention: SequenceAttention, models: Models = MODELS
    ) -> None:
        kind = type(transformer).__name__
        model = models.get(kind)
        if model is None:
            supported = ", ".join(transformers_in(models.values()))
            raise ValueError(f"sharding: {kind} is not supported; supported: {supported}")
        self._mesh = mesh
        self._attention = attention
        self._layout, self._sharded = model.layout, model.sharded
        self._transformer = transformer
        self._sequence: JointSequence | None = None
        self._inner: dict[str, Any] = {}  # the lists that run on shards
        self._attached = ExitStack()

    def attach(self) -> None:
        """Shards the transformer; on a failure it is as before."""
        transformer = self._transformer
        if is_sharded(transformer):
            raise ValueError(f"sharding: this {type(transformer).__name__} is sharded already; detach that first")
        lists = {name: getattr(transformer, name) for name in self._layout.all_lists}
        self._inner.update(lists)
        with ExitStack() as undo:
            for name, blocks in lists.items():
                for module in self._attentions(name):
                    undo.callback(setattr, module, "processor", module.processor)
                    module.processor = _calling(module.processor, self._attend, self._attend_by_heads)
                undo.callback(setattr, transformer, name, blocks)
                run = partial(self._for_forward, name)
                setattr(transformer, name, ShardedBlockList(blocks, transformer, self._inner, run))
            gather = transformer.get_submodule(self._sharded.gathered).register_forward_hook(self._gather_output)
            undo.callback(gather.remove)
            if self._sharded.timesteps:
                timesteps = transformer.get_submodule(self._sharded.timesteps)
                undo.callback(timesteps.register_forward_pre_hook(self._own_timesteps).remove)
            self._attached = undo.pop_all()

    def detach(self) -> None:
        """The transformer is as before."""
        self._attached.close()

    def __enter__(self) -> "ShardedTransformer":
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _attentions(self, name: str) -> list[Any]:
        """The modules of a list's blocks that attend to tokens of other ranks."""
        attribute = self._sharded.attention_of(name)
        return [] if attribute is None else [getattr(block, attribute) for block in self._inner[name].children()]

    def _for_forward(self, name: str) -> list[Callable[..., Any]]:
        """What a forward gets in the place of a list: one callable for all of its blocks, or, where hints or blocks of
        another list come between them, one for each."""
        blocks, is_first_list = self._inner[name], name == self._layout.lists[0]
        callables = blocks.yields if isinstance(blocks, BlockListProxy) else list(blocks)
        if self._layout.hints is None and not self._layout.interleaved:
            return [partial(self._run, callables, is_first_list)]
        if name == self._layout.hints:
            return [partial(self._run_hint, block, number == 0) for number, block in enumerate(callables)]
        return [partial(self._run, [block], is_first_list and number == 0) for number, block in enumerate(callables)]

    def _run(self, blocks: Sequence[Callable[..., Any]], is_first: bool, *args: Any, **kwargs: Any) -> Any:
        """Blocks one after the other.

        Args:
            is_first: they are called with all tokens; else with this rank's.
        """
        arguments = BlockArguments(self._layout, args, kwargs)
        if is_first:
            frames = self._sharded.frames
            num_frames = 1 if frames is None else len(arguments.at(frames)[0])
            arguments = arguments.with_hidden_states(self._begin(arguments.hidden_states, num_frames))
        return self._own(arguments).through(blocks).output()

    def _run_hint(
        self,
        block: Callable[..., Any],
        is_first: bool,
        hidden_states: torch.Tensor,
        text: torch.Tensor,
        control: torch.Tensor,
        temb: torch.Tensor,
        rotary: tuple[torch.Tensor, ...],
    ) -> Any:
        """One block that makes a hint (Wan VACE), which is called with all tokens of the hidden states [B, S, D].

        Args:
            is_first: the control's hidden states are of all tokens, too; else of this rank's.
        """
        own = self._begin(hidden_states)
        assert self._sequence is not None
        control = self._sequence.shards.own(control, 1).contiguous() if is_first else control
        return block(own, text, control, temb, self._own_rotary(rotary))

    def _begin(self, hidden_states: torch.Tensor, num_frames: int = 1) -> torch.Tensor:
        """This rank's tokens [B, S here, D] of all [B, S, D], which every rank has: the same places of every frame."""
        by_frame = hidden_states.unflatten(1, (num_frames, -1))
        shards = self._shards(by_frame.shape[2])
        self._sequence = JointSequence(shards=shards, text_first=self._sharded.text_first)
        return shards.own(by_frame, 2).flatten(1, 2).contiguous()

    def _shards(self, num_tokens: int) -> TokenShards:
        return split_tokens(num_tokens, self._mesh.sequence.size, self._mesh.sequence.index)

    def _own_timesteps(self, _module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        """Timesteps of this rank's tokens [B, S here, F]: all that is made of them then is of these tokens."""
        (timesteps,) = args
        return (self._shards(timesteps.shape[1]).own(timesteps, 1),) if timesteps.dim() == 3 else None

    def _own(self, arguments: BlockArguments) -> BlockArguments:
        """The arguments beside the hidden states, as they are for this rank's tokens."""
        assert self._sequence is not None  # the first list has run
        shards, sharded = self._sequence.shards, self._sharded
        if sharded.rotary is not None:
            arguments = arguments.with_value(sharded.rotary, self._own_rotary(arguments.at(sharded.rotary)))
        if sharded.first_frame is not None:
            num_first = arguments.at(sharded.first_frame)
            own_first = min(max(num_first - shards.begin, 0), shards.size)
            arguments = arguments.with_value(sharded.first_frame, own_first)
        return arguments

    def _own_rotary(self, rotary: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The rotary embedding of the text, where it has a part in it, and of this rank's tokens."""
        assert self._sequence is not None
        shards, dim = self._sequence.shards, self._sharded.rotary_dim
        num_image = sum(shards.sizes)

        def own(values: torch.Tensor) -> torch.Tensor:
            text, image = values.split([values.shape[dim] - num_image, num_image], dim)
            here = shards.own(image, dim)
            return torch.cat([text, here], dim) if text.numel() else here

        return tuple(own(values) for values in rotary)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> torch.Tensor:
        """Replaces diffusers' dispatch_attention_fn: [B, S here + T, H, D] in and out."""
        assert not dropout_p
        assert not is_causal
        assert parallel_config is None

        def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend)

        return self._attend_with(kernel, query, key, value, attn_mask)

    def _attend_by_heads(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Replaces PyTorch's scaled_dot_product_attention: [B, H, S here, D] in and out."""
        assert not dropout_p
        assert not is_causal
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return self._attend_with(torch_kernel, query, key, value, attn_mask).transpose(1, 2)

    def _attend_with(
        self,
        kernel: Kernel,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        assert self._sequence is not None
        if mask is not None and self._sharded.masks_tokens_here:
            mask = _mask_of_all(mask, self._sequence)
        return self._attention(query, key, value, mask, self._sequence, kernel)

    def _gather_output(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        """[..., S here, F] -> [..., S, F]."""
        assert self._sequence is not None
        return gather_tokens(output, self._sequence.shards, self._mesh.sequence.group, dim=-2)


def _mask_of_all(mask: torch.Tensor, sequence: JointSequence) -> torch.Tensor:
    """The mask of the whole sequence [B, 1, 1, N], of that of a rank's own tokens and the text [B, 1, queries, S + T].

    What padded text would attend to is left out of it: nothing looks at padded text.
    """
    _, text = split_joint(mask[:, :, :1], sequence, dim=3)  # the first query is an image token's
    image = text.new_ones((*text.shape[:3], sum(sequence.shards.sizes)))
    return join_joint(image, text, sequence, dim=3)


def _calling(processor: Any, attend: Any, attend_by_heads: Any) -> Any:
    """A processor like this one whose attention call goes to one of ours; this one is not changed.

    The same code runs with another global name. So no processor is copied, and neither module nor class is patched.

    Args:
        attend: in the place of diffusers' dispatch_attention_fn.
        attend_by_heads: in the place of PyTorch's scaled_dot_product_attention.

    Raises:
        ValueError: it calls neither.
    """
    kind = type(processor)
    call: Any = kind.__call__
    names = call.__code__.co_names
    if _DISPATCH in names:
        replaced = {_DISPATCH: attend}
    elif _FUNCTIONAL in names and _BY_HEADS in names:
        replaced = {_FUNCTIONAL: SimpleNamespace(**{_BY_HEADS: attend_by_heads})}
    else:
        raise ValueError(
            f"sharding: attention processor {kind.__name__} calls neither {_DISPATCH} nor {_FUNCTIONAL}.{_BY_HEADS}"
        )
    ours = FunctionType(
        call.__code__, {**call.__globals__, **replaced}, call.__name__, call.__defaults__, call.__closure__
    )
    ours.__kwdefaults__ = call.__kwdefaults__
    ours.__annotations__ = call.__annotations__
    changed = copy(processor)
    changed.__class__ = type(kind.__name__, (kind,), {"__call__": ours})
    return changed
