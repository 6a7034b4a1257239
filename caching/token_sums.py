"""The sums of an `Observation`, from tensors."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch


@dataclass(frozen=True, slots=True)
class SignalValues:
    """What a policy's signal is at one step, where a reader reads it: see `policy.Signal`.

    Args:
        values: [B, ...] of any shape.
        is_sharded: values are of this rank's tokens, so that their sums add up over ranks; else every rank holds the
            same values (a timestep's embedding) and their sums must be taken once.
    """

    values: torch.Tensor
    is_sharded: bool


TOKENS_AT_ONCE = 4096  # 80 MB of float32 at Wan 14B's 5120 channels, where a whole clip at 720p has 1.5 GB


def _parts(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same few tokens of each tensor [B, ..., D], as float32 [B, T, D]."""
    rows = [t.reshape(t.shape[0], -1, t.shape[-1]) for t in tensors]
    num_tokens = rows[0].shape[1]
    if num_tokens <= TOKENS_AT_ONCE:
        yield tuple(r.float() for r in rows)
        return
    for start in range(0, num_tokens, TOKENS_AT_ONCE):
        yield tuple(r[:, start : start + TOKENS_AT_ONCE].float() for r in rows)


def _sample_sums(*values: torch.Tensor) -> torch.Tensor:
    """n tensors [B, T, D] -> [n, B] float64.

    A token is summed in float32, tokens are added in float64. A token stands whole on one rank, so all that sharding
    changes is the order of the float64 additions; `rounded` takes their last bits off.
    """
    # a shard may lie otherwise in memory than the whole sequence, and torch adds in the order of memory
    return torch.stack([v.contiguous().sum(dim=2) for v in values]).sum(dim=2, dtype=torch.float64)


def rounded(sums: torch.Tensor) -> torch.Tensor:
    """Sums as float32, in which every order of the float64 additions comes out the same.

    Two orders differ by about 1e-16 of a sum; they are rounded apart only if a boundary of float32 (6e-8 of it) lies
    between them, about once in a billion sums. Even then all ranks act alike: one of them decides.
    """
    return sums.to(torch.float32)


def change_sums(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """(sum |now - before|, sum |before|) of each sample: [2, B] float64."""
    return _added(_sample_sums((n - b).abs(), b.abs()) for n, b in _parts(now, before))


def alignment_sums(now: torch.Tensor, newest: torch.Tensor, older: torch.Tensor) -> torch.Tensor:
    """The four sums of `AlignmentSums` of each sample: [4, B] float64."""

    def of_part(p: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        moved, span = p - b, a - b
        return _sample_sums(moved.abs(), span.abs(), moved * span, span * span)

    return _added(of_part(*part) for part in _parts(now, newest, older))


def _added(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    return reduce(torch.Tensor.add_, parts)
