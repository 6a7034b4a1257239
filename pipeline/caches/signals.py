"""Readers of signals that are neither a probe nor nothing: TeaCache's, from what the first block is called with.

A signal is one class here and one line in `SIGNAL_READERS`.

Wan's block arguments hold the modulations made from the timestep's embedding, not the embedding; that one is seen by a
forward hook on the module that makes it.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from cineray.caching.policy import WITHOUT_READER, Signal
from cineray.caching.token_sums import ModulatedInput


class SignalReader(Protocol):
    """Reads one signal of one transformer, between `attach` and `detach`, which leaves the transformer as it was."""

    def attach(self) -> None: ...

    def read(self, block: nn.Module, hidden_states: torch.Tensor, temb: torch.Tensor) -> ModulatedInput:
        """The signal of the forward in flight.

        Args:
            block: the first one.
            hidden_states: that enter it [B, S, D].
            temb: the timestep's conditioning, as the block receives it.
        """
        ...

    def detach(self) -> None: ...


class _TimestepProjection:
    """Wan's e0, [B, 6, D] for all tokens; [B, S, 6, D] where each token has its own timestep."""

    def read(self, block: nn.Module, hidden_states: torch.Tensor, temb: torch.Tensor) -> ModulatedInput:
        return ModulatedInput(temb, is_sharded=temb.ndim == 4)

    def attach(self) -> None:
        """The block's arguments tell all."""

    def detach(self) -> None:
        """Does nothing: nothing was attached."""


class _TimestepEmbedding:
    """Wan's e, [B, D]: the output of the embedder, before it is projected to modulations."""

    def __init__(self, transformer: Any) -> None:
        self._embedding: torch.Tensor | None = None
        self._transformer = transformer
        self._hook: Any = None

    def attach(self) -> None:
        self._hook = self._transformer.condition_embedder.time_embedder.register_forward_hook(self._see)

    def _see(self, module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
        self._embedding = output

    def read(self, block: nn.Module, hidden_states: torch.Tensor, temb: torch.Tensor) -> ModulatedInput:
        assert self._embedding is not None  # the embedder runs before the blocks
        return ModulatedInput(self._embedding, is_sharded=False)

    def detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._embedding = None


class _FirstNorm:
    """HunyuanVideo and FLUX: the image tokens as the first block's norm1 modulates them, [B, S, D]."""

    def read(self, block: Any, hidden_states: torch.Tensor, temb: torch.Tensor) -> ModulatedInput:
        return ModulatedInput(block.norm1(hidden_states, emb=temb)[0], is_sharded=True)

    def attach(self) -> None:
        """The block's arguments tell all."""

    def detach(self) -> None:
        """Does nothing: nothing was attached."""


NewReader = Callable[[nn.Module], SignalReader]
# signal -> its reader on a transformer
SIGNAL_READERS: Mapping[Signal, NewReader] = {
    "timestep-projection": lambda transformer: _TimestepProjection(),
    "timestep-embedding": _TimestepEmbedding,
    "modulated-input": lambda transformer: _FirstNorm(),
}


def signal_reader(
    transformer: nn.Module, signal: Signal, readers: Mapping[Signal, NewReader] = SIGNAL_READERS
) -> SignalReader | None:
    """The reader of a policy's signal; None where the controller itself knows it.

    Raises:
        ValueError: nobody knows this signal.
    """
    if signal in WITHOUT_READER:
        return None
    if signal not in readers:
        known = ", ".join((*WITHOUT_READER, *readers))
        raise ValueError(f"enable_cache: the policy's signal {signal!r} has no reader; known signals: {known}")
    return readers[signal](transformer)
