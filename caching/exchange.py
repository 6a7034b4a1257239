"""What a clip's controllers on several ranks tell each other: sums, plans, decisions, and what they have done."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cineray.caching.call import StepContext
from cineray.caching.consensus import Consensus
from cineray.caching.observation import BRANCH_ORDER, AlignmentSums
from cineray.caching.policy import Decision
from cineray.caching.rows import RowState, RowSums
from cineray.caching.token_sums import rounded
from cineray.caching.trace import TraceEntry
from cineray.caching.wire import NUMBERS_PER_ROW, digest, pack, unpack

_log = logging.getLogger(__name__)
GUARD_INTERVAL = 8  # steps between two comparisons of what the ranks did


@dataclass(frozen=True, slots=True)
class Exchange:
    """Every method is called by all ranks that share this branch's tokens, and gives all of them the same answer.

    Args:
        is_joint: the first branch decides for all.
    """

    consensus: Consensus
    is_joint: bool

    def agree_on_planned(self, rows: Sequence[RowState], device: torch.device) -> bool:
        """Whether all ranks plan to skip the same rows without a probe."""
        num_ranks = self.consensus.num_ranks
        if num_ranks == 1:
            return True
        planned = torch.tensor([[float(row.is_planned) for row in rows]], dtype=torch.float64, device=device)
        _, added = self.consensus.sum_over_ranks(planned.new_zeros(2, len(rows)), planned)
        return all(number in (0, num_ranks) for number in added[0].tolist())

    def planned_by_first_branch(self, rows: Sequence[RowState]) -> list[bool]:
        """The rows that are planned to be skipped; where branches decide jointly, by the first one."""
        planned = [float(row.is_planned) for row in rows]
        if self._crosses_branches:
            planned = self.consensus.leader_value_across_branches(planned)
        return [number > 0 for number in planned]

    def sum_rows(
        self, change: torch.Tensor | None, align: torch.Tensor | None, has_probe: bool, blocks_input: torch.Tensor
    ) -> list[RowSums] | None:
        """One fused sum over ranks of everything that a step is judged by; None if not all ranks know the same.

        The exchange has the same shape at every step, whatever this rank has to say, so that a rank that lost its
        history cannot leave the others waiting.

        Args:
            change: [2, B], or None if there is no step before.
            align: [4, B], or None.
        """
        num_rows, device, num_ranks = blocks_input.shape[0], blocks_input.device, self.consensus.num_ranks

        def or_zeros(sums: torch.Tensor | None, num_sums: int) -> torch.Tensor:
            return sums if sums is not None else torch.zeros(num_sums, num_rows, dtype=torch.float64, device=device)

        parts = or_zeros(change, 2), or_zeros(align, 4)
        if num_ranks > 1:
            known = torch.tensor([has_probe, change is not None, align is not None], device=device)
            rest = torch.cat([parts[1], known.to(torch.float64).unsqueeze(1).expand(3, num_rows)])
            parts = self.consensus.sum_over_ranks(parts[0], rest)
        rows = rounded(torch.cat(parts)).T.tolist()
        if any(number not in (0, num_ranks) for number in rows[0][6:]):
            return None
        return [
            RowSums(
                change_sum=r[0] if change is not None else None,
                previous_sum=r[1] if change is not None else None,
                align=AlignmentSums(l1_now=r[2], l1_span=r[3], dot=r[4], square_span=r[5])
                if align is not None
                else None,
            )
            for r in rows
        ]

    def hears_first_branch(self, branch: str) -> bool:
        """Whether other ranks run the branch that decides for this one at the same time."""
        return self._crosses_branches and branch != BRANCH_ORDER[0]

    def hear_first_branch(self, num_rows: int) -> list[Decision]:
        """What the first branch decides at this step, of ranks that `hears_first_branch`."""
        return unpack(self.consensus.leader_value_across_branches([0.0] * (NUMBERS_PER_ROW * num_rows)))

    def agree(self, branch: str, wanted: Sequence[Decision]) -> list[Decision]:
        """The first rank's decisions, which every rank obeys."""
        if self.consensus.num_ranks == 1 and not self._crosses_branches:
            return list(wanted)
        numbers = pack(wanted)
        if self._crosses_branches and branch == BRANCH_ORDER[0]:
            return unpack(self.consensus.leader_value_across_branches(numbers))
        return unpack(self.consensus.leader_value(numbers))

    def have_diverged(self, context: StepContext, entries: Sequence[TraceEntry], rows: Sequence[RowState]) -> bool:
        """Compares what the ranks did, now and then; logs a warning if they differ."""
        if self.consensus.num_ranks == 1 or context.step_index % GUARD_INTERVAL or context.step_index == 0:
            return False
        done = [entry for entry in entries if entry.branch == context.branch]
        mine = [digest(done, rows), len(done), sum(entry.compute for entry in done), context.step_index]
        every = self.consensus.gather(mine)
        if all(numbers == every[0] for numbers in every):
            return False
        ranks = "; ".join(
            f"rank {rank}: step {step:.0f}, {computed:.0f} of {calls:.0f} computed, digest {int(digest_):08x}"
            for rank, (digest_, calls, computed, step) in enumerate(every)
        )
        _log.warning(
            "cache: ranks differ in what they did before step %d of branch %s (%s); all forget what they cached and "
            "compute this step",
            context.step_index,
            context.branch,
            ranks,
        )
        return True

    @property
    def _crosses_branches(self) -> bool:
        return self.is_joint and self.consensus.branches_are_split
