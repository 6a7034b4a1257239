"""Lets a controller stand between the probe blocks and the deep blocks of a diffusers transformer.

A transformer's forward iterates over its list of blocks. While such a forward runs, the list of this one instance
yields a gate for each block, to that forward alone: it runs its block or hands on what it is given, as the controller
says. Whoever else looks at the list sees the blocks, and between two forwards nothing stands in their place. Nothing
of the forward is copied, so all that a model does before, between and after its blocks is the model's own.

Letters: B batch, S image tokens, D channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from cineray.caching.call import CallPlan, StepContext
from cineray.caching.token_sums import SignalValues
from cineray.pipeline.adapters import BlockLayout
from cineray.pipeline.blocks import BlockArguments, BlockListProxy, ShardedBlockList
from cineray.pipeline.caches.hints import Hints
from cineray.pipeline.caches.signals import SignalReader
from cineray.pipeline.caches.unread import UnreadModules

_Kind = tuple[torch.Size, torch.dtype, torch.device]


@dataclass(slots=True)
class _Call:
    """One forward of the transformer, from its first block to its last."""

    blocks_input: torch.Tensor  # [B, S, D], of all rows
    signal_values: SignalValues | None
    probe_rows: list[int]
    plan: CallPlan | None = None

    @property
    def runs_all(self) -> bool:
        """Whether the blocks that are still to come run for every row."""
        return self.plan is not None and not self.plan.skip_rows


@dataclass(frozen=True, slots=True)
class _Place:
    """The place of a block among those that a forward runs."""

    is_first: bool
    is_last: bool
    is_probe: bool
    ends_probe: bool


class Controller(Protocol):
    """Who decides: a `CacheController`, or a recorder that computes every step."""

    def begin_clip(self) -> None: ...

    def free(self) -> None: ...

    def is_planned(self, context: StepContext, /) -> bool:
        """Whether no block will run in this call, as is known before it begins."""
        ...

    def looks_away(self, context: StepContext, /) -> bool:
        """Whether every block will run in this call, and nothing that they take or give is looked at or kept."""
        ...

    def begin_call(self, context: StepContext, blocks_input: torch.Tensor, /) -> list[int]: ...

    def decide(
        self,
        context: StepContext,
        blocks_input: torch.Tensor,
        probe: torch.Tensor,
        signal_values: SignalValues | None = None,
        /,
    ) -> CallPlan: ...

    def forecast(self, plan: CallPlan, blocks_input: torch.Tensor, /) -> torch.Tensor: ...

    def remember(self, plan: CallPlan, blocks_input: torch.Tensor, blocks_output: torch.Tensor) -> None: ...


class BlockRunner:
    """Runs a transformer's blocks for a controller.

    Args:
        probe_depth: blocks that run on every step; 0 if the policy looks at no probe.
        signal: reads the policy's signal, where that is neither a probe nor nothing.
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
        self._hints = Hints()
        self._unread = UnreadModules(transformer, layout.unread)
        self._kinds: dict[str, _Kind] = {}  # of the latents of each branch's last call
        self._replaced: list[tuple[dict[str, Any], str, nn.ModuleList]] = []  # (where the list belongs, its name, it)
        self._known: tuple[list[nn.Module], dict[str, list[Callable[..., Any]]]] = [], {}  # (blocks, their gates)
        self._proxies: dict[str, BlockListProxy] = {}  # that stood in the place of the lists last
        self._has_ended = False

    def begin_clip(self) -> None:
        self._forget()
        self._controller.begin_clip()

    def begin_forward(self, latents: torch.Tensor, /) -> None:
        """Lets the forward that comes now run the blocks through gates."""
        self._put_back()
        self._call, self._has_ended = None, False
        if self._signal is not None:
            self._signal.attach()
        runs_none = self._runs_none(latents)
        if not runs_none and self._controller.looks_away(self._where()):
            self._call, self._has_ended = _Call(latents, None, []), True
            self._controller.decide(self._where(), latents, latents)
            return
        if runs_none:
            self._unread.leave_out(self._where().branch)
        for name, gates in (self._one_gate() if runs_none else self._gates()).items():
            outer: Any = getattr(self._transformer, name)
            # in a sharded list, so that the gates see shards
            holder: dict[str, Any] = outer.inner if isinstance(outer, ShardedBlockList) else self._transformer._modules
            blocks: nn.ModuleList = holder[name]
            self._replaced.append((holder, name, blocks))
            holder[name] = self._proxy(name, blocks, gates)

    def _proxy(self, name: str, blocks: nn.ModuleList, gates: list[Callable[..., Any]]) -> BlockListProxy:
        known = self._proxies.get(name)
        if known is None or known._modules is not blocks._modules:
            known = self._proxies[name] = BlockListProxy(blocks, self._transformer, gates)
        known.yields = gates
        return known

    def end_forward(self, _context: StepContext, /) -> None:
        """
        Raises:
            ValueError: the blocks did not run through the gates.
        """
        self._put_back()
        self._call = None
        if not self._has_ended:
            self._controller.free()
            raise ValueError(
                f"a cache is enabled, and the forward of this {type(self._transformer).__name__} did not run its "
                "blocks through it: it has been replaced, by another cache or by hand; undo that, or disable the cache"
            )

    def cancel_forward(self) -> None:
        self._put_back()
        if self._call is not None:  # decided, but not done
            self._controller.free()
        self._call = None

    def free(self) -> None:
        """Drops the tensors; the trace stays."""
        self._forget()
        self._controller.free()

    def _forget(self) -> None:
        self._kinds.clear()
        self._unread.forget()

    def _runs_none(self, latents: torch.Tensor) -> bool:
        """Whether no block runs in the forward that comes now; notes what kind of latents it gets."""
        context, kind = self._where(), (latents.shape, latents.dtype, latents.device)
        is_like_before = self._kinds.get(context.branch) == kind
        self._kinds[context.branch] = kind
        knows = self._signal is None and not self._layout.interleaved
        return knows and is_like_before and self._controller.is_planned(context)

    def _one_gate(self) -> dict[str, list[Callable[..., Any]]]:
        """For a forward that runs no block: all of them at once."""
        first, *others = self._layout.lists
        gates: dict[str, list[Callable[..., Any]]] = {first: [self._pass_over_all], **{name: [] for name in others}}
        if self._layout.hints is not None:
            gates[self._layout.hints] = self._hints.none(len(getattr(self._transformer, self._layout.hints)))
        return gates

    def _pass_over_all(self, *args: Any, **kwargs: Any) -> Any:
        """All blocks, none of which runs."""
        try:
            state = BlockArguments(self._layout, args, kwargs)
            blocks_input = state.hidden_states
            self._controller.begin_call(self._where(), blocks_input)
            plan = self._controller.decide(self._where(), blocks_input, blocks_input)
            if plan.compute_rows:
                raise ValueError(
                    f"a cache is enabled, and this {type(self._transformer).__name__} was changed within a clip: its "
                    "hidden states are of another kind than at the step before; change it between two clips"
                )
            self._has_ended = True  # the other lists are still to be asked for, so nothing is put back yet
            return state.with_hidden_states(self._controller.forecast(plan, blocks_input)).output()
        except BaseException:
            self._controller.free()
            self.cancel_forward()
            raise

    def _put_back(self) -> None:
        self._hints.drop()
        self._unread.put_back()
        if self._signal is not None:
            self._signal.detach()
        for holder, name, blocks in self._replaced:
            if isinstance(holder.get(name), BlockListProxy):  # else someone has put another list there
                holder[name] = blocks
        self._replaced.clear()

    def _gates(self) -> dict[str, list[Callable[..., Any]]]:
        """A gate for each block that the lists hold now; the last call's, unless a block has been exchanged."""
        lists = {name: list(getattr(self._transformer, name).children()) for name in self._layout.lists}
        blocks = [block for of_list in lists.values() for block in of_list]
        if blocks != self._known[0]:
            self._known = blocks, self._new_gates(lists)
        gates = dict(self._known[1])
        if self._layout.hints is not None:
            hinting = list(getattr(self._transformer, self._layout.hints).children())
            gates[self._layout.hints] = self._hints.gates(hinting)
        return gates

    def _new_gates(self, lists: Mapping[str, list[nn.Module]]) -> dict[str, list[Callable[..., Any]]]:
        names = list(lists)
        order = [(name, number) for name in names for number in range(len(lists[name]))]
        if self._layout.interleaved:  # a group of one block of each list counts as one block
            order.sort(key=lambda place: (place[1], names.index(place[0])))
        gates: dict[str, list[Callable[..., Any]]] = {name: [] for name in names}
        for name, number in order:
            is_probe = number < self._probe_depth and (self._layout.interleaved or name == names[0])
            ends_group = name == names[-1] if self._layout.interleaved else True
            place = _Place(
                is_first=(name, number) == order[0],
                is_last=(name, number) == order[-1],
                is_probe=is_probe,
                ends_probe=is_probe and number == self._probe_depth - 1 and ends_group,
            )
            gates[name].append(partial(self._pass, lists[name][number], place))
        return gates

    def _pass(self, block: nn.Module, place: _Place, /, *args: Any, **kwargs: Any) -> Any:
        """One block: runs it for the rows for which it is to run."""
        try:
            if self._call is not None and self._call.runs_all and not place.is_last:
                return block(*args, **kwargs)
            state = BlockArguments(self._layout, args, kwargs)
            if place.is_first:
                self._call = self._begin(block, state)
            call = self._call
            assert call is not None  # the first block has been passed
            if place.is_probe:
                state = state.through_rows([block], call.probe_rows)
                if place.ends_probe:
                    probe = state.hidden_states.clone() if call.probe_rows else call.blocks_input
                    call.plan = self._controller.decide(self._where(), call.blocks_input, probe, call.signal_values)
            else:
                assert call.plan is not None
                state = state.through_rows([block], call.plan.compute_rows)
            if call.plan is not None and call.plan.compute_rows:
                self._hints.fill(call.blocks_input)
            if place.is_last:
                assert call.plan is not None
                state = state.with_hidden_states(self._finish(call, call.plan, state.hidden_states))
                self._call, self._has_ended = None, True
                self._put_back()
            return state.output()
        except BaseException:  # PyTorch tells of exceptions, not of interrupts
            self.cancel_forward()
            raise

    def _begin(self, block: nn.Module, state: "BlockArguments") -> _Call:
        # blocks may work in place: what is compared later is kept as a copy
        blocks_input = state.hidden_states.clone()
        signal_values = self._signal.read(block, blocks_input, state.temb) if self._signal is not None else None
        call = _Call(blocks_input, signal_values, self._controller.begin_call(self._where(), blocks_input))
        if not self._probe_depth:
            call.plan = self._controller.decide(self._where(), blocks_input, blocks_input, signal_values)
        return call

    def _finish(self, call: _Call, plan: CallPlan, hidden_states: torch.Tensor) -> torch.Tensor:
        if not plan.skip_rows:
            self._controller.remember(plan, call.blocks_input, hidden_states)
            return hidden_states
        forecast = self._controller.forecast(plan, call.blocks_input)
        if not plan.compute_rows:
            return forecast
        blocks_output, computed, skipped = call.blocks_input.clone(), plan.compute_rows, plan.skip_rows
        blocks_output[computed] = hidden_states[computed]
        blocks_output[skipped] = forecast
        self._controller.remember(plan, call.blocks_input[computed], hidden_states[computed])
        return blocks_output
