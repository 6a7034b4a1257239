"""One call of the transformer: where the denoising loop is, and what happens to each row of the batch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StepContext:
    """Where the denoising loop is: said by the loop, never counted.

    Args:
        branch: the guidance branch of this call; of its conditional rows if it stacks several branches in the batch.
        num_branches: branches per step, in calls of their own or stacked.
        rows: (branch, sample) of each row of the batch; empty: every row is a sample of `branch`.
    """

    branch: str
    step_index: int
    num_steps: int
    num_branches: int
    rows: tuple[tuple[str, int], ...] = ()

    def origin(self, row: int) -> tuple[str, int]:
        """(branch, sample) of a row of the batch."""
        return self.rows[row] if self.rows else (self.branch, row)

    def leader(self, row: int) -> int:
        """The row of the same sample whose decision joint branches follow: `branch` comes first."""
        leader = (self.branch, self.origin(row)[1])
        return self.rows.index(leader) if leader in self.rows else row


@dataclass(frozen=True, kw_only=True, slots=True)
class CallPlan:
    """Rows of the batch that a call computes, and rows that it forecasts.

    Args:
        gammas: of the forecasts, one for each of `skip_rows`.
    """

    context: StepContext
    compute_rows: list[int]
    skip_rows: list[int]
    gammas: list[float]
