"""Lets a controller stand between the probe blocks and the deep blocks of a diffusers transformer.

A transformer's forward iterates over its list of blocks. While a cache is attached, that list (of this one
instance) yields a single callable that runs the blocks under the controller's eye; the list's modules, their
names and their weights stay what they are. Nothing of the forward is copied, so all that a model does before and
after its blocks is the model's own.

Letters: B batch, S image tokens, D channels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import nn

from cineray.caching.controller import StepContext, Verdict
from cineray.caching.history import BranchHistory
from cineray.caching.token_sums import ModulatedInput
from cineray.pipeline.adapters import BlockLayout
from cineray.pipeline.modulated_input import SignalReader


class BlockListStandIn(nn.ModuleList):
    """The blocks of a transformer; iteration yields one callable in their place. Its modules are the blocks."""

    def __init__(self, blocks: nn.ModuleList, run: Callable[..., Any]) -> None:
        super().__init__()
        self._modules = blocks._modules  # the same dict: LoRA, compilation and offloading reach the blocks
        self._run = run

    def __iter__(self) -> Iterator[Any]:
        return iter((self._run,))


@dataclass(slots=True)
class _Call:
    """One forward of the transformer, between its block lists."""

    verdict: Verdict
    entering: torch.Tensor  # [B, S, D], of all rows


class Controller(Protocol):
    """Who decides: a `CacheController`, or a recorder that computes every step."""

    histories: dict[str, BranchHistory]

    def begin_clip(self) -> None: ...

    def rows_to_probe(self, context: StepContext, entering: torch.Tensor) -> list[int]: ...

    def decide(
        self,
        context: StepContext,
        entering: torch.Tensor,
        probe: torch.Tensor,
        modulated: ModulatedInput | None = None,
    ) -> Verdict: ...

    def forecast(self, verdict: Verdict, entering: torch.Tensor) -> torch.Tensor: ...

    def remember(self, verdict: Verdict, entering: torch.Tensor, leaving: torch.Tensor) -> None: ...


class BlockRunner:
    """Runs a transformer's blocks for a controller.

    Args:
        probe_depth: blocks that run on every step; 0 if the policy looks at no probe.
        signal: reads what the policy looks at, where that is neither a probe nor nothing.
        where: says where the denoising loop is in this call.
    """

    def __init__(
        self,
        transformer: nn.Module,
        layout: BlockLayout,
        controller: Controller,
        probe_depth: int,
        signal: SignalReader | None,
        where: Callable[[], StepContext],
    ) -> None:
        self._layout = layout
        self._controller = controller
        self._probe_depth = probe_depth
        self._where = where
        self._call: _Call | None = None
        self._transformer = transformer
        self._signal = signal
        self._original: dict[str, nn.ModuleList] = {name: getattr(transformer, name) for name in layout.lists}
        first, last = layout.lists[0], layout.lists[-1]
        for name, blocks in self._original.items():
            run = partial(self._run_list, name, name == first, layout.interleaved or name == last)
            if layout.interleaved and name != first:
                run = _hand_on  # the first list's callable ran these blocks too
            setattr(transformer, name, BlockListStandIn(blocks, run))

    def begin_clip(self) -> None:
        self._controller.begin_clip()

    def end_forward(self, context: StepContext) -> None:
        """The controller has recorded it."""

    def free(self) -> None:
        """Drops the tensors; the trace stays."""
        self._controller.histories.clear()

    def detach(self) -> None:
        if self._signal is not None:
            self._signal.detach()
        for name, blocks in self._original.items():
            setattr(self._transformer, name, blocks)

    def _blocks(self, name: str) -> list[list[nn.Module]]:
        """What the list holds now (a block may have been exchanged), in groups that count as one block."""
        if self._layout.interleaved:
            return [list(group) for group in zip(*self._original.values(), strict=True)]
        return [[block] for block in self._original[name]]

    def _run_list(self, name: str, is_first: bool, is_last: bool, *args: Any, **kwargs: Any) -> Any:
        state, blocks = BlockArguments(self._layout, args, kwargs), self._blocks(name)
        if is_first:
            # blocks may work in place: what is compared later is kept as a copy
            entering = state.hidden_states.clone()
            modulated = self._signal.read(blocks[0][0], entering, state.temb) if self._signal is not None else None
            rows = self._controller.rows_to_probe(self._where(), entering)
            state = state.through_rows(blocks[: self._probe_depth], rows)
            probe = state.hidden_states.clone() if self._probe_depth and rows else entering
            verdict = self._controller.decide(self._where(), entering, probe, modulated)
            self._call = _Call(verdict, entering)
            blocks = blocks[self._probe_depth :]
        call = self._call
        assert call is not None  # the first list has run
        state = state.through_rows(blocks, call.verdict.compute_rows)
        if is_last:
            state = state.with_hidden_states(self._finish(call, state.hidden_states))
            self._call = None
        return state.output()

    def _finish(self, call: _Call, hidden_states: torch.Tensor) -> torch.Tensor:
        verdict = call.verdict
        if not verdict.skip_rows:
            self._controller.remember(verdict, call.entering, hidden_states)
            return hidden_states
        forecast = self._controller.forecast(verdict, call.entering)
        if not verdict.compute_rows:
            return forecast
        leaving, computed, skipped = call.entering.clone(), verdict.compute_rows, verdict.skip_rows
        leaving[computed] = hidden_states[computed]
        leaving[skipped] = forecast
        self._controller.remember(verdict, call.entering[computed], hidden_states[computed])
        return leaving


def _hand_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


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

    def through(self, blocks: list[list[nn.Module]]) -> "BlockArguments":
        """The arguments after these groups of blocks."""
        state = self
        for block in chain.from_iterable(blocks):
            out = block(*state.args, **state.kwargs)
            if self.layout.output == "hidden":
                state = state._replaced(out, None)
            else:
                hidden_states, text = out if self.layout.output == "hidden, text" else (out[1], out[0])
                state = state._replaced(hidden_states, text)
        return state

    def through_rows(self, blocks: list[list[nn.Module]], rows: list[int]) -> "BlockArguments":
        """The arguments after these groups of blocks for some rows of the batch; the other rows stay as they are."""
        if not rows or not blocks:
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
