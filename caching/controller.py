"""The controller of one clip: gathers observations, asks the policy, keeps the histories and the trace.

It owns all state of the cache. Numbers that must agree between ranks pass through `add_over_ranks`, so that a
gang of ranks runs the same code as one process.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from cineray.caching.forecast import Forecasting, align_residual, gamma
from cineray.caching.history import BranchHistory, ResidualPair
from cineray.caching.observation import AlignmentSums, Observation, alignment_sums, change_sums
from cineray.caching.policy import Decision, Policy
from cineray.caching.trace import Trace, TraceEntry

BRANCH_ORDER = ("cond", "uncond")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepContext:
    """Where the denoising loop is: said by the loop, never counted."""

    branch: str
    step_index: int
    num_steps: int
    num_branches: int


@dataclass(slots=True)
class Verdict:
    """What happens to each row of the batch in this call."""

    context: StepContext
    compute_rows: list[int]
    skip_rows: list[int]
    gammas: list[float]  # of skip_rows


@dataclass(slots=True)
class CacheController:
    """Decides and forecasts for one clip (or one batch of clips), whatever its branches.

    Args:
        add_over_ranks: sums a float32 tensor over the ranks that share the clip's tokens; identity for one process.
    """

    policy: Policy
    forecasting: Forecasting
    trace: Trace
    add_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums
    histories: dict[str, BranchHistory] = field(default_factory=dict)
    _joint: tuple[int, list[Decision]] | None = None  # (step, what the first branch decided) for joint branches

    def begin_clip(self) -> None:
        """Forgets the clip before."""
        self.histories.clear()
        self.trace.clear()
        self._joint = None

    def decide(self, context: StepContext, entering: torch.Tensor, probe: torch.Tensor) -> Verdict:
        """Decides for each row.

        Args:
            entering: hidden states before the first block [B, S, D].
            probe: hidden states after the probe blocks [B, S, D].
        """
        history = self.histories.setdefault(context.branch, BranchHistory())
        num_rows = entering.shape[0]
        if not history.fits(entering, context.step_index):
            history.reset(num_rows)
        change, align = self._observe(history, entering, probe)
        decisions = self._decisions(context, history, change)
        gammas: list[float | None] = [None] * num_rows
        for row, decision in enumerate(decisions):
            if decision.compute or history.num_pairs[row] < 2 or self.forecasting.alignment == "none":
                continue
            gammas[row] = decision.gamma
            if decision.gamma is None:
                gammas[row] = gamma(align[row], self.forecasting.alignment, self.forecasting.gamma_clip)
            if gammas[row] is None:
                decisions[row] = Decision(compute=True, accumulated=0.0, reason="unknown")
        self._record(context, history, decisions, change, gammas)
        history.probe, history.last_step = probe, context.step_index
        skip_rows = [row for row, d in enumerate(decisions) if not d.compute]
        return Verdict(
            context=context,
            compute_rows=[row for row, d in enumerate(decisions) if d.compute],
            skip_rows=skip_rows,
            gammas=[g if (g := gammas[row]) is not None else 1.0 for row in skip_rows],
        )

    def forecast(self, verdict: Verdict, entering: torch.Tensor) -> torch.Tensor:
        """Hidden states after the last block for the skipped rows [len(skip_rows), S, D].

        Args:
            entering: hidden states before the first block [B, S, D], of all rows.
        """
        history, rows = self.histories[verdict.context.branch], verdict.skip_rows
        newest, older, probe = history.newest, history.older, history.probe
        assert newest is not None  # nothing is skipped before a step has been computed
        assert probe is not None
        from_probe = self.forecasting.base == "probe"

        def pick(values: torch.Tensor) -> torch.Tensor:
            return values if len(rows) == len(history.num_pairs) else values[rows]

        def added(pair: ResidualPair) -> torch.Tensor:
            return pick(pair.full) - pick(pair.probe) if from_probe else pick(pair.full)

        base = pick(probe if from_probe else entering)
        if older is None or self.forecasting.alignment == "none":
            return base + added(newest)
        return base + align_residual(added(newest), added(older), verdict.gammas)

    def remember(self, verdict: Verdict, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        """Stores the residuals of the rows that were computed.

        Args:
            entering, leaving: hidden states before the first and after the last block, of `compute_rows` only.
        """
        history, rows = self.histories[verdict.context.branch], verdict.compute_rows
        assert history.probe is not None
        probe = history.probe if len(rows) == len(history.num_pairs) else history.probe[rows]
        history.remember(rows, ResidualPair(probe - entering, leaving - entering))
        held = sum(h.held_bytes for h in self.histories.values())
        self.trace.held_bytes = max(self.trace.held_bytes, held)

    def _observe(
        self, history: BranchHistory, entering: torch.Tensor, probe: torch.Tensor
    ) -> tuple[list[tuple[float, float]] | None, list[AlignmentSums]]:
        """One fused sum over ranks of everything this step is judged by; a None change has no before."""
        newest, older = history.newest, history.older
        sums = []
        if self.policy.signal == "probe" and history.probe is not None:
            sums.append(change_sums(probe, history.probe))
        elif self.policy.signal == "probe-residual" and newest is not None:
            sums.append(change_sums(probe - entering, newest.probe))
        has_change = bool(sums)
        aligns = False
        if self.forecasting.alignment != "none" and newest is not None and older is not None:
            aligns = True
            sums.append(alignment_sums(probe - entering, newest.probe, older.probe))
        if not sums:
            return None, []
        rows = self.add_over_ranks(torch.cat(sums)).T.tolist()  # per sample: 2 and 4 numbers, where asked for
        align = [AlignmentSums(l1_now=r[-4], l1_span=r[-3], dot=r[-2], square_span=r[-1]) for r in rows if aligns]
        return ([(r[0], r[1]) for r in rows] if has_change else None), align

    def _decisions(
        self, context: StepContext, history: BranchHistory, change: list[tuple[float, float]] | None
    ) -> list[Decision]:
        num_rows = len(history.num_pairs)
        if self.forecasting.branches == "joint" and self._joint is not None and self._joint[0] == context.step_index:
            return [
                decision
                if decision.compute or history.num_pairs[row]
                else Decision(compute=True, accumulated=0.0, reason="empty")
                for row, decision in enumerate(self._joint[1])
            ]
        return [
            self.policy.decide(
                Observation(
                    step_index=context.step_index,
                    branch_index=BRANCH_ORDER.index(context.branch) if context.branch in BRANCH_ORDER else 0,
                    num_steps=context.num_steps,
                    num_branches=context.num_branches,
                    sample=row,
                    change_sum=change[row][0] if change else None,
                    previous_sum=change[row][1] if change else None,
                    accumulated=history.accumulated[row],
                    num_skips_in_a_row=history.num_skips_in_a_row[row],
                    num_pairs=history.num_pairs[row],
                )
            )
            for row in range(num_rows)
        ]

    def _record(
        self,
        context: StepContext,
        history: BranchHistory,
        decisions: list[Decision],
        change: list[tuple[float, float]] | None,
        gammas: list[float | None],
    ) -> None:
        if self.forecasting.branches == "joint" and (self._joint is None or self._joint[0] != context.step_index):
            self._joint = (context.step_index, list(decisions))
        cost_of_skip = self.trace.probe_depth / self.trace.num_blocks
        for row, decision in enumerate(decisions):
            history.accumulated[row] = decision.accumulated
            history.num_skips_in_a_row[row] = 0 if decision.compute else history.num_skips_in_a_row[row] + 1
            self.trace.entries.append(
                TraceEntry(
                    step=context.step_index,
                    branch=context.branch,
                    sample=row,
                    compute=decision.compute,
                    cost=1.0 if decision.compute else cost_of_skip,
                    reason=decision.reason,
                    statistic=change[row][0] / change[row][1] if change and change[row][1] else None,
                    gamma=gammas[row] if not decision.compute else None,
                )
            )
