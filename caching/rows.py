"""What a cache knows of one row of the batch (a sample of a branch), and what follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cineray.caching.call import StepContext
from cineray.caching.forecast import Alignment, gamma, streak_gamma
from cineray.caching.observation import BRANCH_ORDER, AlignmentSums, Observation
from cineray.caching.policy import Decision, Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSums:
    """What one row is judged by at one step, over all tokens of all ranks; None where there is no step before.

    Args:
        change_sum, previous_sum: of an `Observation`.
    """

    change_sum: float | None = None
    previous_sum: float | None = None
    align: AlignmentSums | None = None

    @property
    def statistic(self) -> float | None:
        """The relative change, for the trace."""
        if self.change_sum is None or self.previous_sum is None or not self.previous_sum > 0:
            return None
        return self.change_sum / self.previous_sum


@dataclass(slots=True)
class RowState:
    """One row between two steps.

    Args:
        num_pairs: residual pairs at hand for a forecast, 0 to 2.
        num_planned: further steps that are skipped without a probe.
        streak_step: steps since the last probe.
        gamma: of the streak of skips that goes on, before clipping.
    """

    num_pairs: int = 0
    accumulated: float = 0.0
    num_skips_in_a_row: int = 0
    num_planned: int = 0
    streak_step: int = 0
    gamma: float | None = None

    @property
    def is_planned(self) -> bool:
        """Whether an earlier decision holds for the next step."""
        return self.num_planned > 0

    def planned(self) -> Decision:
        """What the earlier decision says of the next step."""
        if not self.num_pairs:
            return Decision.compute_because(Reason.EMPTY)
        return Decision(
            compute=False,
            accumulated=self.accumulated,
            reason=Reason.STREAK,
            gamma=self.gamma,
            num_steps=self.num_planned,
        )

    def observed(self, context: StepContext, row: int, sums: RowSums) -> Observation:
        """What a policy may know of this row, the batch's `row`-th."""
        branch, sample = context.origin(row)
        return Observation(
            step_index=context.step_index,
            branch_index=BRANCH_ORDER.index(branch) if branch in BRANCH_ORDER else 0,
            num_steps=context.num_steps,
            num_branches=context.num_branches,
            sample=sample,
            change_sum=sums.change_sum,
            previous_sum=sums.previous_sum,
            accumulated=self.accumulated,
            num_skips_in_a_row=self.num_skips_in_a_row,
            num_pairs=self.num_pairs,
        )

    def following(self, leader: Decision) -> Decision:
        """Another branch's decision, as far as this row can follow it; the gamma is its own."""
        if leader.compute or self.num_pairs:
            return replace(leader, gamma=None)
        return Decision.compute_because(Reason.EMPTY)

    def aligned(self, decision: Decision, sums: RowSums, alignment: Alignment) -> Decision:
        """The decision with the gamma that its forecast takes; without one where none is needed."""
        if decision.compute or self.num_pairs < 2 or alignment == "none":
            return replace(decision, gamma=None)
        if decision.gamma is not None:
            return decision
        found = gamma(sums.align, alignment) if sums.align is not None else None
        return replace(decision, gamma=found) if found is not None else Decision.compute_because(Reason.UNKNOWN)

    def commit(self, decision: Decision, gamma_clip: tuple[float, float]) -> float | None:
        """Takes the step that was decided; returns its gamma within the clip."""
        self.streak_step = self.streak_step + 1 if self.is_planned else 0
        self.accumulated = decision.accumulated
        self.num_skips_in_a_row = 0 if decision.compute else self.num_skips_in_a_row + 1
        self.num_planned = 0 if decision.compute else decision.num_steps - 1
        self.gamma = decision.gamma
        return None if self.gamma is None else streak_gamma(self.gamma, self.streak_step, gamma_clip)


def decide_rows(
    rows: Sequence[RowState],
    wanted: Sequence[Decision],
    sums: Sequence[RowSums],
    alignment: Alignment,
    leaders: Sequence[int],
) -> list[Decision]:
    """Each row's decision: what an earlier one says, else its leader's, else its own.

    Args:
        wanted: by the policy, for each row.
        leaders: the row that each row follows; itself if none.
    """

    def settled(row: int, decision: Decision) -> Decision:
        state = rows[row]
        return state.planned() if state.is_planned else state.aligned(decision, sums[row], alignment)

    decided = [settled(row, decision) for row, decision in enumerate(wanted)]
    return [
        decision if leader == row else settled(row, rows[row].following(decided[leader]))
        for row, (decision, leader) in enumerate(zip(decided, leaders, strict=True))
    ]
