"""Who holds which tokens: contiguous shards of any length, in the order of the ranks."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class TokenShards:
    """The shards of one sequence.

    Args:
        sizes: tokens of each rank; they differ by one at most.
        index: the shard that is here.
    """

    sizes: tuple[int, ...]
    index: int

    @property
    def begin(self) -> int:
        return sum(self.sizes[: self.index])

    @property
    def size(self) -> int:
        return self.sizes[self.index]

    def own(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part of a replicated tensor; a view."""
        return values.narrow(dim, self.begin, self.size)


def split_tokens(num_tokens: int, num_ranks: int, index: int) -> TokenShards:
    """Shards that differ by one token at most, the longer ones first.

    Raises:
        ValueError: fewer tokens than ranks.
    """
    if num_tokens < num_ranks:
        raise ValueError(
            f"{num_tokens} tokens cannot be sharded over {num_ranks} ranks, each needs one; "
            f"use at most {num_tokens} ranks, or a larger clip"
        )
    each, more = divmod(num_tokens, num_ranks)
    return TokenShards(tuple(each + (i < more) for i in range(num_ranks)), index)


def gather_tokens(values: torch.Tensor, shards: TokenShards, group: dist.ProcessGroup | None, dim: int) -> torch.Tensor:
    """Every rank's part put together along `dim`; replicated.

    Shards are padded to the longest for the exchange: gloo's all_gather takes no uneven ones.

    Args:
        values: this rank's part; `shards.size` along `dim`.
    """
    if group is None:
        return values
    longest = max(shards.sizes)
    mine = values.movedim(dim, 0)
    padded = mine.new_empty((longest, *mine.shape[1:]))
    padded[: shards.size] = mine
    parts = list(mine.new_empty((len(shards.sizes), *padded.shape)))
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, shards.sizes, strict=True)]).movedim(0, dim)
