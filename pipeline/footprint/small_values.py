"""Values of small fake tensors, so that code which reads a number of the GPU reads one.

A fake tensor has a shape and no values. Of those with few elements a twin on the CPU has them: every operation is done
to the twins as well. What comes from large tensors is not known, and is 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

_MAX_NUMBERS = 4096  # the longest schedule has 1,000 timesteps
# a clip's trace as text, which the halves of a gang exchange, has 130 a step; of a picture's tokens among a prompt's
# Llava makes a mask of all 4096 channels, in which it counts
_MAX_CHARACTERS = 2**22
_UNKNOWN = 1


class SmallValues:
    """The twins of the fake tensors that are alive."""

    def __init__(self) -> None:
        self._twins = WeakTensorKeyDictionary()

    def read(self, tensor: torch.Tensor) -> Any:
        """What `tensor.tolist()` would give."""
        with _disable_current_modes(), unset_fake_temporarily():
            return self._twin(tensor).tolist()

    def are_close(self, one: torch.Tensor, other: torch.Tensor, **within: Any) -> bool:
        """What `torch.allclose` would give; tensors whose values are not known are as close as equal ones."""
        with _disable_current_modes(), unset_fake_temporarily():
            a, b = (self._twins.get(t) if isinstance(t, FakeTensor) else t for t in (one, other))
            return a is None or b is None or torch.allclose(a, b, **within)

    def places(self, mask: torch.Tensor) -> list[torch.Tensor]:
        """What `mask.nonzero(as_tuple=True)` would give, as fake tensors of that many places."""
        with _disable_current_modes(), unset_fake_temporarily():
            found = self._twin(mask).nonzero(as_tuple=True)
        made = [mask.new_empty(len(places), dtype=torch.int64) for places in found]
        for tensor, places in zip(made, found, strict=True):
            self._twins[tensor] = places
        return made

    def follow(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Does to the twins what `func` has done to fake tensors.

        Args:
            out: what `func` returned.
        """
        made = [t for t in tree_iter(out) if isinstance(t, FakeTensor)]
        if not made or not any(map(_is_small, made)):
            return
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, FakeTensor)]
        with _disable_current_modes(), unset_fake_temporarily():
            if func._schema.name.startswith(("aten::empty", "aten::new_empty")):
                values = [torch.zeros(tuple(t.shape), dtype=t.dtype) for t in made]  # not whatever lies in memory
            elif all(t in self._twins for t in given):
                try:
                    values = [t for t in tree_iter(self._run(func, args, kwargs)) if isinstance(t, torch.Tensor)]
                except NotImplementedError:  # a kernel that CPUs do not have
                    values = self._unknown(func, args, made)
            else:
                values = self._unknown(func, args, made)
        for tensor, value in zip(made, values, strict=False):
            if tensor.shape == value.shape and _is_small(tensor):
                self._twins[tensor] = value

    def deliver(self, name: str, args: Any, num_ranks: int) -> None:
        """Values after an exchange, as if every rank had sent what this one did.

        Args:
            name, args: of the operation of torch.distributed.
        """
        with _disable_current_modes(), unset_fake_temporarily():
            if name == "allreduce_":
                for tensor in args[0]:
                    self._twin(tensor).mul_(num_ranks)
            elif name == "allgather_":
                for outputs, sent in zip(args[0], args[1], strict=True):
                    for output in outputs:
                        if output in self._twins:
                            self._twins[output].copy_(self._twin(sent))

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, FakeTensor):
            return tensor
        found = self._twins.get(tensor)
        return found if found is not None else torch.full(tuple(tensor.shape), _UNKNOWN, dtype=tensor.dtype)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        def here(value: Any) -> Any:
            if isinstance(value, FakeTensor):
                return self._twins[value]
            return torch.device("cpu") if isinstance(value, torch.device) else value

        return func(*tree_map(here, args), **tree_map(here, kwargs))

    def _unknown(self, func: Any, args: Any, made: list[FakeTensor]) -> list[torch.Tensor]:
        """What comes of values that are not known: 1, in place where `func` works in place; 1 equals no other number.

        (HunyuanVideo 1.5's transformer asks whether what it is told of a picture is all 0: then there is none.)
        """
        if func._schema.is_mutable and args and isinstance(args[0], FakeTensor) and args[0] in self._twins:
            return [self._twins[args[0]].fill_(_UNKNOWN)]
        value = args[1] == _UNKNOWN if func is torch.ops.aten.eq.Scalar else _UNKNOWN
        return [torch.full(tuple(t.shape) if _is_small(t) else (0,), value, dtype=t.dtype) for t in made]


def _is_small(tensor: torch.Tensor) -> bool:
    return tensor.numel() <= (_MAX_NUMBERS if tensor.is_floating_point() else _MAX_CHARACTERS)
