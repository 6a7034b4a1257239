"""The seam between a controller and other processes: numbers are added up, one rank's decision is obeyed by all.

A gang of ranks brings its own object of this form; one process agrees with itself.
"""

from dataclasses import dataclass
from typing import Protocol

import torch


class Consensus(Protocol):
    """Every method is called by all ranks of its group at the same point of the same step."""

    @property
    def num_ranks(self) -> int:
        """Ranks that share the tokens of this branch."""
        ...

    @property
    def branches_are_split(self) -> bool:
        """Other ranks run the clip's other guidance branch at the same time."""
        ...

    def count_tokens_before(self, num_tokens: int, /) -> int:
        """Tokens of the whole sequence before the `num_tokens` that are here; every rank tells how many it has."""
        ...

    def sum_over_ranks(self, change: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the ranks that share this branch's tokens, in one exchange.

        Args:
            change: [2, B] float64, the sums that a policy judges by.
            rest: [R, B] float64, the sums of the alignment and what else all ranks must add.
        """
        ...

    def leader_value(self, numbers: list[float]) -> list[float]:
        """The numbers of the first of this branch's ranks, on all of them."""
        ...

    def leader_value_across_branches(self, numbers: list[float]) -> list[float]:
        """The numbers of the first rank of the first branch, on the ranks of all branches."""
        ...

    def gather(self, numbers: list[float]) -> list[list[float]]:
        """The numbers of each of this branch's ranks."""
        ...


@dataclass(frozen=True, slots=True)
class SingleProcess:
    """One process that has all tokens and runs all branches."""

    num_ranks: int = 1
    branches_are_split: bool = False

    def count_tokens_before(self, _num_tokens: int, /) -> int:
        return 0

    def sum_over_ranks(self, change: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return change, rest

    def leader_value(self, numbers: list[float]) -> list[float]:
        return numbers

    def leader_value_across_branches(self, numbers: list[float]) -> list[float]:
        return numbers

    def gather(self, numbers: list[float]) -> list[list[float]]:
        return [numbers]
