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
from typing import Any

import torch
from torch import nn

from cineray.caching.controller import CacheController, StepContext, Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockLayout:
    """How a transformer class passes hidden states through its blocks.

    Args:
        family: whose presets fit.
        num_branches: calls per step of the family's pipeline.
        lists: names of the block lists, in order; the probe lies in the first.
        counts: where the configuration says how many blocks each list has.
        output: what a block returns: "hidden", "hidden, text" or "text, hidden".
        shared: arguments, by position or keyword, that have no batch dimension.
    """

    family: str
    num_branches: int
    lists: tuple[str, ...]
    counts: tuple[str, ...]
    output: str = "hidden"
    shared: tuple[int | str, ...] = ()


# transformer class -> layout. Positions count from the hidden states.
LAYOUTS: dict[str, BlockLayout] = {
    "WanTransformer3DModel": BlockLayout(
        family="wan", num_branches=2, lists=("blocks",), counts=("num_layers",), shared=(3,)
    ),
    "HunyuanVideoTransformer3DModel": BlockLayout(
        family="hunyuan-video",
        num_branches=1,
        lists=("transformer_blocks", "single_transformer_blocks"),
        counts=("num_layers", "num_single_layers"),
        output="hidden, text",
        shared=(4, 6),
    ),
    "FluxTransformer2DModel": BlockLayout(
        family="flux",
        num_branches=1,
        lists=("transformer_blocks", "single_transformer_blocks"),
        counts=("num_layers", "num_single_layers"),
        output="text, hidden",
        shared=("image_rotary_emb", "joint_attention_kwargs"),
    ),
}


class CachedBlockList(nn.ModuleList):
    """The blocks of a transformer; iteration yields one callable in their place."""

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


class BlockRunner:
    """Runs a transformer's blocks for a controller.

    Args:
        where: says where the denoising loop is in this call.
    """

    def __init__(
        self,
        transformer: nn.Module,
        layout: BlockLayout,
        controller: CacheController,
        probe_depth: int,
        where: Callable[[], StepContext],
    ) -> None:
        self._layout = layout
        self._controller = controller
        self._probe_depth = probe_depth
        self._where = where
        self._call: _Call | None = None
        self._transformer = transformer
        self._original = {name: getattr(transformer, name) for name in layout.lists}
        first, last = layout.lists[0], layout.lists[-1]
        for name, blocks in self._original.items():
            run = partial(self._run_list, list(blocks), name == first, name == last)
            setattr(transformer, name, CachedBlockList(blocks, run))

    def begin_clip(self) -> None:
        self._controller.begin_clip()

    def end_forward(self, context: StepContext) -> None:
        """The controller has recorded it."""

    def free(self) -> None:
        """Drops the tensors; the trace stays."""
        self._controller.histories.clear()

    def detach(self) -> None:
        for name, blocks in self._original.items():
            setattr(self._transformer, name, blocks)

    def _run_list(self, blocks: list[nn.Module], is_first: bool, is_last: bool, *args: Any, **kwargs: Any) -> Any:
        state = _Arguments(self._layout, args, kwargs)
        if is_first:
            # blocks may work in place: what is compared later is kept as a copy
            entering = state.hidden_states.clone()
            state = state.through(blocks[: self._probe_depth])
            probe = state.hidden_states.clone()
            verdict = self._controller.decide(self._where(), entering, probe)
            self._call = _Call(verdict, entering)
            blocks = blocks[self._probe_depth :]
        call = self._call
        assert call is not None  # the first list has run
        if not call.verdict.skip_rows:
            state = state.through(blocks)
        elif call.verdict.compute_rows:
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


@dataclass(frozen=True, slots=True)
class _Arguments:
    """The arguments of a block, in the form in which the transformer passed them."""

    layout: BlockLayout
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden_states(self) -> torch.Tensor:
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    @property
    def _text(self) -> torch.Tensor:
        return self.args[1] if len(self.args) > 1 else self.kwargs["encoder_hidden_states"]

    def _replaced(self, hidden_states: torch.Tensor, text: torch.Tensor | None) -> "_Arguments":
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
        return _Arguments(self.layout, args, kwargs)

    def with_hidden_states(self, hidden_states: torch.Tensor) -> "_Arguments":
        return self._replaced(hidden_states, None)

    def through(self, blocks: list[nn.Module]) -> "_Arguments":
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

    def through_rows(self, blocks: list[nn.Module], rows: list[int]) -> "_Arguments":
        """The arguments after these blocks for some rows of the batch; the other rows stay as they are."""
        done = self._only(rows).through(blocks)
        hidden_states = self.hidden_states.clone()
        hidden_states[rows] = done.hidden_states
        if self.layout.output == "hidden":
            return self._replaced(hidden_states, None)
        text = self._text.clone()
        text[rows] = done._text
        return self._replaced(hidden_states, text)

    def _only(self, rows: list[int]) -> "_Arguments":
        def pick(place: int | str, value: Any) -> Any:
            batched = isinstance(value, torch.Tensor) and place not in self.layout.shared
            return value[rows] if batched else value

        args = tuple(pick(place, value) for place, value in enumerate(self.args))
        return _Arguments(self.layout, args, {name: pick(name, value) for name, value in self.kwargs.items()})

    def output(self) -> Any:
        if self.layout.output == "hidden":
            return self.hidden_states
        pair = (self.hidden_states, self._text)
        return pair if self.layout.output == "hidden, text" else pair[::-1]
