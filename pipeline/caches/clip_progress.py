"""Finds out which clip and guidance branch a call of a transformer belongs to, where the loop does not say all of it.

Knows calls alone: no tensors are kept but the latents of one call, and no model is known.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cineray.caching.observation import BRANCH_ORDER

_ADVICE = (
    'say it with transformer.cache_context(NAME, step_index=i, num_inference_steps=n), another NAME ("cond", "uncond" '
    "or your own) for each call of a step"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of a transformer.

    Args:
        name: the branch that the loop said; None if it said nothing.
        hidden_states: the latents that it was given.
        stacks: the batch holds all branches.
        timesteps: the scheduler's list, which each pipeline call makes anew; None without a scheduler.
    """

    step_index: int
    num_steps: int
    name: str | None
    hidden_states: torch.Tensor
    stacks: bool
    timesteps: Any


class ClipProgress:
    """The clip in flight, of one transformer or of several that share the steps.

    A clip begins when the one before was ended, when the scheduler's list is a new one, and when the step goes back.
    Of calls that say nothing, the first of a step is "cond" and a second one with the same latents is "uncond", as
    diffusers' own loops call them.
    """

    def __init__(self) -> None:
        self._on_begin: dict[str, Callable[[], None]] = {}
        self._on_doubt: dict[str, Callable[[], None]] = {}
        self._caller = ""
        self._first: Call | None = None  # of the step in flight; None: the next call begins a clip
        self._latents: torch.Tensor | None = None  # of that call, if it said no name
        self._is_first_step = True
        self._branches: list[str] = []  # done at this step
        self._thread = 0

    def listen(self, begin_clip: Callable[[], None], forget: Callable[[], None]) -> str:
        """Calls `begin_clip` when a clip begins; `forget` when what was cached may be of another clip, or when another
        transformer has taken its place. Returns a name for `enter`."""
        name = f"transformer {len(self._on_begin)}"
        self._on_begin[name] = begin_clip
        self._on_doubt[name] = forget
        return name

    def enter(self, call: Call, caller: str) -> str:
        """Notes a call, and returns its branch.

        Args:
            caller: the transformer, as `listen` named it.

        Raises:
            ValueError: it cannot be known.
        """
        first = self._first
        if (
            first is None
            or call.step_index < first.step_index
            or call.num_steps != first.num_steps
            or (call.timesteps is not None and call.timesteps is not first.timesteps)
        ):
            self._begin(call)
        elif call.step_index > first.step_index:
            self._is_first_step = False
            self._begin_step(call)
        if threading.get_ident() != self._thread:
            self._thread = threading.get_ident()
            for forget in self._on_doubt.values():
                forget()
        if caller != self._caller:
            if self._caller in self._on_doubt:  # its steps are done
                self._on_doubt[self._caller]()
            self._caller = caller
        branch = self._branch(call)
        if branch is None and self._is_first_step:  # as if another clip of one step, or the same step tried again
            self._begin(call)
            branch = self._branch(call)
        if branch is None:
            self.end()
            said = f"branch {call.name!r} is called twice at step {call.step_index} of one clip"
            if call.name is None:
                which = "they stand in the batch" if call.stacks else "their latents differ, or there are more than two"
                said = f"step {call.step_index} is called again without a name, and not as guidance branches: {which}"
            raise ValueError(f"a cache is enabled, and {said}; {_ADVICE}")
        return branch

    def done(self, branch: str) -> None:
        """The call that entered was not broken off."""
        self._branches.append(branch)

    def end(self) -> None:
        """The clip is over; the next call begins one."""
        self._first = self._latents = None
        self._branches = []

    def _begin(self, call: Call) -> None:
        self.end()
        for begin_clip in self._on_begin.values():
            begin_clip()
        self._is_first_step = True
        self._thread = threading.get_ident()
        self._begin_step(call)

    def _begin_step(self, call: Call) -> None:
        self._latents = None if call.name else call.hidden_states.detach().clone()  # loops may step in place
        self._first = call
        self._branches = []

    def _branch(self, call: Call) -> str | None:
        if call.name is not None:
            return None if call.name in self._branches else call.name
        num_done = len(self._branches)
        if not num_done:
            return BRANCH_ORDER[0]
        if call.stacks or num_done >= len(BRANCH_ORDER) or not _same(call.hidden_states, self._latents):
            return None
        return next((branch for branch in BRANCH_ORDER if branch not in self._branches), None)


def _same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    if other is None or (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
