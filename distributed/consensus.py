"""How the ranks of a gang agree on a number that each of them sees only a part of."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist

from cineray.distributed.exchange import broadcast_numbers, gather_numbers
from cineray.distributed.mesh import Mesh

Mode = Literal["all", "rank0"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GangConsensus:
    """Agreement over a mesh's own groups; the protocol is `caching.consensus.Consensus`.

    Args:
        mode: "all" adds every rank's statistics up; "rank0" judges by the first rank's shard.
        device: where the groups' backend wants tensors.
    """

    mesh: Mesh
    device: torch.device
    mode: Mode = "all"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"consensus must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")

    @property
    def num_ranks(self) -> int:
        return self.mesh.sequence.size

    @property
    def branches_are_split(self) -> bool:
        return self.mesh.cfg.size > 1

    def count_tokens_before(self, num_tokens: int) -> int:
        counts = gather_numbers([num_tokens], self.mesh.sequence, self.device)
        return int(sum(count for (count,) in counts[: self.mesh.sequence.index]))

    def sum_over_ranks(self, change: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        group = self.mesh.sequence.group
        if group is None:
            return change, rest
        if self.mode == "rank0":
            dist.all_reduce(rest, group=group)
            return change, rest
        sums = torch.cat([change, rest])
        dist.all_reduce(sums, group=group)
        return sums[: len(change)], sums[len(change) :]

    def leader_value(self, numbers: list[float]) -> list[float]:
        return broadcast_numbers(numbers, self.mesh.sequence, self.device)

    def leader_value_across_branches(self, numbers: list[float]) -> list[float]:
        return broadcast_numbers(numbers, self.mesh.gang, self.device)

    def gather(self, numbers: list[float]) -> list[list[float]]:
        return gather_numbers(numbers, self.mesh.sequence, self.device)
