"""Readers of signals that are neither a probe nor nothing: TeaCache's, from what the first block is called with.

Where a model's signals are read stands with the model (`Model.signals`); a signal that is read alike on every model is
one class and one line in `SIGNAL_READERS`, or in what a caller passes in its place.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from cineray.caching.policy import WITHOUT_READER, Signal
from cineray.caching.token_sums import SignalValues
from cineray.pipeline.adapters import Model
from cineray.pipeline.adapters.model import ModuleOutput, SignalSource, TimestepArgument


class SignalReader(Protocol):
    """Reads one signal of one transformer, between `attach` and `detach`, which leaves the transformer as it was."""

    def attach(self) -> None: ...

    def read(self, block: nn.Module, hidden_states: torch.Tensor, temb: torch.Tensor, /) -> SignalValues:
        """The signal of the forward in flight.

        Args:
            block: the first one.
            hidden_states: that enter it [B, S, D].
            temb: the timestep's conditioning, as the block receives it.
        """
        ...

    def detach(self) -> None: ...


class _TimestepReader:
    """Reads the timestep's conditioning."""

    def __init__(self, num_token_dims: int) -> None:
        self._num_token_dims = num_token_dims

    def read(self, _block: nn.Module, _hidden_states: torch.Tensor, temb: torch.Tensor, /) -> SignalValues:
        return SignalValues(temb, is_sharded=temb.ndim == self._num_token_dims)

    def attach(self) -> None:
        """The block's arguments tell all."""

    def detach(self) -> None:
        """Does nothing: nothing was attached."""


class _OutputReader:
    """Reads what a module gives, the same for all tokens or with a dimension of them."""

    def __init__(self, transformer: nn.Module, module: str) -> None:
        self._output: torch.Tensor | None = None
        self._transformer = transformer
        self._module = module
        self._hook: Any = None

    def attach(self) -> None:
        self._hook = self._transformer.get_submodule(self._module).register_forward_hook(self._see)

    def _see(self, _module: nn.Module, _arguments: Any, output: torch.Tensor) -> None:
        self._output = output

    def read(self, _block: nn.Module, _hidden_states: torch.Tensor, _temb: torch.Tensor, /) -> SignalValues:
        assert self._output is not None  # the module runs before the blocks
        return SignalValues(self._output, is_sharded=self._output.ndim == 3)

    def detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._output = None


class _NormReader:
    """Reads the image tokens as a norm of the first block modulates them, [B, S, D]."""

    def __init__(self, norm: str) -> None:
        self._norm = norm

    def read(self, block: nn.Module, hidden_states: torch.Tensor, temb: torch.Tensor) -> SignalValues:
        return SignalValues(block.get_submodule(self._norm)(hidden_states, emb=temb)[0], is_sharded=True)

    def attach(self) -> None:
        """The block's arguments tell all."""

    def detach(self) -> None:
        """Does nothing: nothing was attached."""


NewReader = Callable[[nn.Module], SignalReader]
# signal -> its reader on a transformer, for signals that need no model's names
SIGNAL_READERS: Mapping[Signal, NewReader] = {}


def signal_reader(
    transformer: nn.Module, model: Model, signal: Signal, readers: Mapping[Signal, NewReader] = SIGNAL_READERS
) -> SignalReader | None:
    """The reader of a policy's signal; None where the controller itself knows it.

    Raises:
        ValueError: nobody knows this signal.
    """
    if signal in WITHOUT_READER:
        return None
    if signal in readers:
        return readers[signal](transformer)
    if signal not in model.signals:
        known = ", ".join((*WITHOUT_READER, *model.signals, *readers))
        raise ValueError(f"enable_cache: the policy's signal {signal!r} has no reader; known signals: {known}")
    return _reader_at(model.signals[signal], transformer)


def _reader_at(source: SignalSource, transformer: nn.Module) -> SignalReader:
    if isinstance(source, ModuleOutput):
        return _OutputReader(transformer, source.module)
    if isinstance(source, TimestepArgument):
        return _TimestepReader(source.num_token_dims)
    return _NormReader(source.norm)
