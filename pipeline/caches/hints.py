"""Blocks that make hints for other blocks (Wan VACE) run once it is known that a hint is needed, and not before.

The forward runs them first, and adds their hints behind some of its blocks. Under a cache it gets tensors of zeros in
their place, which are filled in as soon as blocks behind the probe are to run; where none do, nothing reads them.

Letters: B batch, S image tokens, D channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class _Asked:
    block: nn.Module
    text: torch.Tensor
    others: tuple[Any, ...]  # arguments behind the control's hidden states
    hint: torch.Tensor  # [B, S, D]


class Hints:
    """The hints of one forward."""

    def __init__(self) -> None:
        self._asked: list[_Asked] = []
        self._control: torch.Tensor | None = None  # [B, S, D], that the first of the blocks was called with

    def gates(self, blocks: list[nn.Module]) -> list[Callable[..., Any]]:
        """What the forward calls in the place of the blocks."""
        return [partial(self._ask, block) for block in blocks]

    def none(self, num_blocks: int) -> list[Callable[..., Any]]:
        """The same for a forward that runs no block at all."""
        return [_no_hint] * num_blocks

    def fill(self, hidden_states: torch.Tensor) -> None:
        """Runs the blocks, once.

        Args:
            hidden_states: [B, S, D] that the forward called each of them with, before a block has changed them.
        """
        control = self._control
        for asked in self._asked:
            hint, control = asked.block(hidden_states, asked.text, control, *asked.others)
            asked.hint.copy_(hint)
        self.drop()

    def drop(self) -> None:
        self._asked, self._control = [], None

    def _ask(
        self, block: nn.Module, hidden_states: torch.Tensor, text: torch.Tensor, control: torch.Tensor, *others: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._asked:
            self._control = control
        self._asked.append(_Asked(block, text, others, torch.zeros_like(hidden_states)))
        return self._asked[-1].hint, control


def _no_hint(
    hidden_states: torch.Tensor, _text: torch.Tensor, control: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden_states.new_zeros(()).expand(hidden_states.shape), control
