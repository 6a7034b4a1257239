"""What a policy may know: additive sums over a sample's tokens, never means. `token_sums` makes them of tensors.

Sums add up over ranks whatever the sizes of their shards; the caller adds them, and divides last.
"""

from dataclasses import dataclass

BRANCH_ORDER = ("cond", "uncond")


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What is known about one sample of one branch before the deep blocks of a step.

    Args:
        step_index: from 0.
        branch_index: 0 for the conditional branch, 1 for the unconditional one.
        sample: row of the batch.
        change_sum: sum |now - before| of the policy's signal, over all tokens and channels; None if there is no
            before.
        previous_sum: sum |before|.
        accumulated: relative change since the last computed step, as the policy left it.
        num_skips_in_a_row: skipped steps since the last computed one.
        num_pairs: residual pairs at hand for a forecast, 0 to 2.
        sigmas: noise level of each step of the clip; None where the scheduler has none that fall from 1, or the policy
            decides between the blocks.
    """

    step_index: int
    num_steps: int
    branch_index: int
    num_branches: int
    sample: int
    change_sum: float | None
    previous_sum: float | None
    accumulated: float
    num_skips_in_a_row: int
    num_pairs: int
    sigmas: tuple[float, ...] | None = None

    @property
    def call_index(self) -> int:
        """Calls of the transformer before this one, one for each branch of a step, as official codes count them."""
        return self.step_index * self.num_branches + self.branch_index

    @property
    def relative_change(self) -> float | None:
        """sum |now - before| / sum |before|; None if unknown, NaN or infinite if the signal is."""
        if self.change_sum is None or self.previous_sum is None:
            return None
        return self.change_sum / self.previous_sum if self.previous_sum > 0 else float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentSums:
    """Sums that place the probe residual p now between those of the two computed steps, a (newest) and b (older).

    l1_now = sum |p - b|, l1_span = sum |a - b|, dot = sum (p - b)(a - b), square_span = sum (a - b)^2.
    """

    l1_now: float
    l1_span: float
    dot: float
    square_span: float
