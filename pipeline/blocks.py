"""What stands in the place of a transformer's block list, and a block's arguments: shared by caches and sharding.

Letters: B batch, S image tokens, D channels.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cineray.pipeline.adapters import BlockLayout


class BlockListProxy(nn.ModuleList):
    """The blocks of a transformer; iteration by its forward yields something else. Its modules are the blocks.

    Args:
        blocks: the list in whose place it stands.
        transformer: whose forward it is: a function whose first argument is this.
        yields: what the forward gets.
    """

    def __init__(self, blocks: nn.ModuleList, transformer: nn.Module, yields: Sequence[Callable[..., Any]]) -> None:
        super().__init__()
        self._modules = blocks._modules  # the same dict: LoRA, compilation and offloading reach the blocks
        self._transformer = (transformer,)  # in a tuple: not one of its modules
        self.yields = yields

    def __iter__(self) -> Iterator[Any]:
        caller = sys._getframe(1)
        is_forward = caller.f_code.co_argcount and (
            caller.f_locals.get(caller.f_code.co_varnames[0]) is self._transformer[0]
        )
        return iter(self.for_forward() if is_forward else self._modules.values())

    def for_forward(self) -> Sequence[Callable[..., Any]]:
        """What the forward that asks now gets."""
        return self.yields

    def __getitem__(self, idx: Any) -> Any:
        return nn.ModuleList(list(self._modules.values())[idx]) if isinstance(idx, slice) else super().__getitem__(idx)

    def __reduce__(self) -> tuple[Any, ...]:
        return nn.ModuleList, (list(self._modules.values()),)


class ShardedBlockList(BlockListProxy):
    """The blocks of a transformer whose tokens are sharded.

    Args:
        inner: the lists that run on shards, by their names; a cache replaces them for a forward.
        run: gives what the transformer's forward gets, each time that it asks.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        transformer: nn.Module,
        inner: dict[str, Any],
        run: Callable[[], Sequence[Callable[..., Any]]],
    ) -> None:
        super().__init__(blocks, transformer, ())
        self.inner = inner
        self._run = run

    def for_forward(self) -> Sequence[Callable[..., Any]]:
        return self._run()


@contextmanager
def calling_without_mask(transformer: nn.Module, layout: BlockLayout) -> Iterator[None]:
    """Within it, the transformer's blocks are called without an attention mask: for text that has no padding.

    diffusers' forward makes one that is true everywhere even then, and flash kernels take none.
    """
    if layout.mask is None:
        yield
        return
    place = layout.mask

    def drop_mask(_block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*args[:place], None, *args[place + 1 :])

    blocks = [block for name in layout.lists for block in getattr(transformer, name)._modules.values()]
    hooks = [block.register_forward_pre_hook(drop_mask) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def is_sharded(transformer: nn.Module) -> bool:
    """Whether its tokens are shared by ranks."""
    return any(isinstance(child, ShardedBlockList) for child in transformer.children())


@dataclass(frozen=True, slots=True)
class BlockArguments:
    """The arguments of a block, in the form in which the transformer passed them.

    Places are positions that count from the hidden states, or names.
    """

    layout: BlockLayout
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden_states(self) -> torch.Tensor:
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    @property
    def _text(self) -> torch.Tensor:
        return self.args[1] if len(self.args) > 1 else self.kwargs["encoder_hidden_states"]

    @property
    def temb(self) -> torch.Tensor:
        return self.args[2] if len(self.args) > 2 else self.kwargs["temb"]

    def _replaced(self, hidden_states: torch.Tensor, text: torch.Tensor | None) -> "BlockArguments":
        args, kwargs = self.args, dict(self.kwargs)
        if args:
            args = (hidden_states, *args[1:])
        else:
            kwargs["hidden_states"] = hidden_states
        if text is not None:
            if len(args) > 1:
                args = (args[0], text, *args[2:])
            else:
                kwargs["encoder_hidden_states"] = text
        return BlockArguments(self.layout, args, kwargs)

    def at(self, place: int | str) -> Any:
        return self.args[place] if isinstance(place, int) else self.kwargs[place]

    def with_value(self, place: int | str, value: Any) -> "BlockArguments":
        if isinstance(place, str):
            return BlockArguments(self.layout, self.args, {**self.kwargs, place: value})
        args = (*self.args[:place], value, *self.args[place + 1 :])
        return BlockArguments(self.layout, args, self.kwargs)

    def with_hidden_states(self, hidden_states: torch.Tensor) -> "BlockArguments":
        return self._replaced(hidden_states, None)

    def through(self, blocks: Sequence[Callable[..., Any]]) -> "BlockArguments":
        """The arguments after these blocks."""
        state = self
        for block in blocks:
            out = block(*state.args, **state.kwargs)
            if self.layout.output == "hidden":
                state = state._replaced(out, None)
            else:
                hidden_states, text = out if self.layout.output == "hidden, text" else (out[1], out[0])
                state = state._replaced(hidden_states, text)
        return state

    def through_rows(self, blocks: Sequence[Callable[..., Any]], rows: list[int]) -> "BlockArguments":
        """The arguments after these blocks for some rows of the batch; the other rows stay as they are."""
        if not rows:
            return self
        if len(rows) == len(self.hidden_states):
            return self.through(blocks)
        done = self._only(rows).through(blocks)
        hidden_states = self.hidden_states.clone()
        hidden_states[rows] = done.hidden_states
        if self.layout.output == "hidden":
            return self._replaced(hidden_states, None)
        text = self._text.clone()
        text[rows] = done._text
        return self._replaced(hidden_states, text)

    def _only(self, rows: list[int]) -> "BlockArguments":
        num_rows = self.hidden_states.shape[0]

        def pick(place: int | str, value: Any) -> Any:
            # a batch of one beside a larger one is broadcast over it
            batched = isinstance(value, torch.Tensor) and place not in self.layout.shared and len(value) == num_rows
            return value[rows] if batched else value

        args = tuple(pick(place, value) for place, value in enumerate(self.args))
        return BlockArguments(self.layout, args, {name: pick(name, value) for name, value in self.kwargs.items()})

    def output(self) -> Any:
        if self.layout.output == "hidden":
            return self.hidden_states
        pair = (self.hidden_states, self._text)
        return pair if self.layout.output == "hidden, text" else pair[::-1]
