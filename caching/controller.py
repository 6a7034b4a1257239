"""The controller of one clip: gathers observations, asks the policy, keeps the histories and the trace.

It owns all state of the cache. All that must agree between ranks passes through an `Exchange`, so that a gang of ranks
runs the same code as one process.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from cineray.caching.call import CallPlan, StepContext
from cineray.caching.consensus import Consensus, SingleProcess
from cineray.caching.exchange import Exchange
from cineray.caching.forecast import Forecasting
from cineray.caching.history import BranchHistory
from cineray.caching.policy import Decision, Policy
from cineray.caching.rows import RowState, RowSums, decide_rows
from cineray.caching.token_sums import SignalValues
from cineray.caching.trace import Trace, TraceEntry

_NONE_YET: tuple[int | None, list[Decision]] = (None, [])


@dataclass(slots=True)
class CacheController:
    """Decides and forecasts for one clip (or one batch of clips), whatever its branches.

    A call of the transformer is `begin_call`, the probe blocks, `decide`, the deep blocks of the rows that are
    computed, `forecast` of those that are not, `remember`.

    Args:
        consensus: how the ranks of a gang come to one decision.
    """

    policy: Policy
    forecasting: Forecasting
    trace: Trace
    consensus: Consensus = field(default_factory=SingleProcess)
    _exchange: Exchange = field(init=False)
    _histories: dict[str, BranchHistory] = field(init=False, default_factory=dict[str, BranchHistory])
    _joint: tuple[int | None, list[Decision]] = field(init=False, default=_NONE_YET)  # (step, by the first branch)

    def __post_init__(self) -> None:
        self._exchange = Exchange(self.consensus, is_joint=self.forecasting.branches == "joint")

    def begin_clip(self) -> None:
        """Forgets the clip before."""
        self.free()
        self.trace.clear()
        self._joint = _NONE_YET

    def free(self) -> None:
        """Drops the tensors; the trace stays."""
        self._histories.clear()

    def is_planned(self, context: StepContext) -> bool:
        """Whether every row of the call to come is skipped unseen, without a probe, and no other rank need be asked."""
        history = self._histories.get(context.branch)
        if history is None or history.last_step != context.step_index - 1:
            return False
        if self.consensus.num_ranks > 1 or self.consensus.branches_are_split:
            return False
        if not history.rows or not all(row.num_pairs for row in history.rows):
            return False
        if self.policy.plans_ahead:
            return all(row.is_planned for row in history.rows)
        if self.policy.signal != "none" or self.trace.probe_depth or self._exchange.is_joint:
            return False
        seen = [row.observed(context, index, RowSums()) for index, row in enumerate(history.rows)]
        return not any(self.policy.decide(observation).compute for observation in seen)

    def looks_away(self, _context: StepContext) -> bool:
        """What blocks make is kept, for the forecasts to come."""
        return False

    def begin_call(self, context: StepContext, blocks_input: torch.Tensor) -> list[int]:
        """Begins a call. The probe blocks must run for the rows that it returns: those no earlier decision holds for.

        Ranks compare what they did and what they plan first, so that none waits for the others inside a probe block.

        Args:
            blocks_input: hidden states before the first block [B, S, D].
        """
        new = BranchHistory(self.forecasting, self.policy.signal)
        history = self._histories.setdefault(context.branch, new)
        have_diverged = self._exchange.have_diverged(context, self.trace.entries, history.rows)
        if have_diverged or not history.fits(blocks_input, context.step_index):
            self._reset(history, blocks_input)
        if self.policy.plans_ahead:
            if not self._exchange.agree_on_planned(history.rows, blocks_input.device):
                self._reset(history, blocks_input)
            planned = self._exchange.planned_by_first_branch(history.rows)
            for row, is_planned in zip(history.rows, planned, strict=True):
                row.num_planned = max(1, row.num_planned) if is_planned else 0
        return [index for index, row in enumerate(history.rows) if not row.is_planned or not row.num_pairs]

    def decide(
        self,
        context: StepContext,
        blocks_input: torch.Tensor,
        probe: torch.Tensor,
        signal_values: SignalValues | None = None,
    ) -> CallPlan:
        """Decides for each row, after `begin_call`.

        Args:
            blocks_input: hidden states before the first block [B, S, D].
            probe: hidden states after the probe blocks [B, S, D]; of other rows than `begin_call` names, anything.
            signal_values: of the policies whose signal has a reader.
        """
        history = self._histories[context.branch]
        if all(row.is_planned for row in history.rows):
            sums = [RowSums()] * len(history.rows)
            agreed = [row.planned() for row in history.rows]
        else:
            kept = history.kept(probe)
            sums, agreed = self._decide_anew(context, history, blocks_input, kept, signal_values)
            history.probe = kept
        history.last_step = context.step_index
        history.signal_values = signal_values.values if signal_values is not None else None
        return self._commit(context, history, sums, agreed)

    def _decide_anew(
        self,
        context: StepContext,
        history: BranchHistory,
        blocks_input: torch.Tensor,
        probe: torch.Tensor,
        signal_values: SignalValues | None,
    ) -> tuple[list[RowSums], list[Decision]]:
        """What each row is judged by, and what is decided, where no earlier decision holds for all.

        Args:
            probe: the kept tokens.
        """
        leader = self._hear_first_branch(context, len(history.rows))
        is_planned = any(row.is_planned for row in history.rows)  # such a row has not been probed
        if leader is not None and not is_planned and all(decision.compute for decision in leader):
            # that is agreed on already, and can be followed unseen: nothing is summed up or exchanged
            unseen = [RowSums()] * len(history.rows)
            return unseen, self._want(context, history.rows, unseen, leader)
        if leader is None:
            change = history.change_sums(blocks_input, probe, signal_values, self.consensus.num_ranks)
        else:
            change = None  # the first branch has judged
        align = history.alignment_sums(blocks_input, probe)
        sums = self._reduce(history, change, align, blocks_input)
        wanted = self._want(context, history.rows, sums, leader)
        leaders = self._leaders(context, len(history.rows))
        decided = decide_rows(history.rows, wanted, sums, self.forecasting.alignment, leaders)
        return sums, self._exchange.agree(context.branch, decided)

    def forecast(self, plan: CallPlan, blocks_input: torch.Tensor) -> torch.Tensor:
        """Hidden states after the last block for the skipped rows [len(skip_rows), S, D].

        Args:
            blocks_input: hidden states before the first block [B, S, D], of all rows.
        """
        return self._histories[plan.context.branch].forecast(plan, blocks_input)

    def remember(self, plan: CallPlan, blocks_input: torch.Tensor, blocks_output: torch.Tensor) -> None:
        """Stores the residuals of the rows that were computed.

        Args:
            blocks_input, blocks_output: hidden states before the first and after the last block, of `compute_rows`.
        """
        self._histories[plan.context.branch].remember(plan.compute_rows, blocks_input, blocks_output)
        held = sum(history.held_bytes for history in self._histories.values())
        self.trace.held_bytes = max(self.trace.held_bytes, held)

    def _reset(self, history: BranchHistory, blocks_input: torch.Tensor) -> None:
        every, num_tokens = self.forecasting.keep_every, blocks_input.shape[1]
        history.reset(blocks_input, -self.consensus.count_tokens_before(num_tokens) % every if every > 1 else 0)

    def _reduce(
        self,
        history: BranchHistory,
        change: torch.Tensor | None,
        align: torch.Tensor | None,
        blocks_input: torch.Tensor,
    ) -> list[RowSums]:
        """What each row is judged by, summed over ranks. If they do not know the same, all forget, and compute."""
        sums = self._exchange.sum_rows(change, align, history.probe is not None, blocks_input)
        if sums is None:
            self._reset(history, blocks_input)
            sums = [RowSums()] * len(history.rows)
        return sums

    def _hear_first_branch(self, context: StepContext, num_rows: int) -> list[Decision] | None:
        """What the branch that decides for this one has decided at this step; None if this one decides itself."""
        if self._exchange.hears_first_branch(context.branch):
            return self._exchange.hear_first_branch(num_rows)
        step, decisions = self._joint
        return decisions if step == context.step_index else None

    def _want(
        self, context: StepContext, rows: Sequence[RowState], sums: Sequence[RowSums], leader: list[Decision] | None
    ) -> list[Decision]:
        """What the policy, or the branch that decides for this one, wants of each row."""
        if leader is not None:
            return [row.following(decision) for row, decision in zip(rows, leader, strict=True)]
        seen = [row.observed(context, index, sums[index]) for index, row in enumerate(rows)]
        return [self.policy.decide(observation) for observation in seen]

    def _leaders(self, context: StepContext, num_rows: int) -> list[int]:
        """The row that each row follows; itself if none."""
        return [context.leader(row) if self._exchange.is_joint else row for row in range(num_rows)]

    def _commit(
        self, context: StepContext, history: BranchHistory, sums: Sequence[RowSums], agreed: list[Decision]
    ) -> CallPlan:
        """Takes the step: into the rows, the trace and the plan."""
        if self._exchange.is_joint and self._joint[0] != context.step_index:
            self._joint = (context.step_index, agreed)
        cost_of_skip = self.trace.probe_depth / self.trace.num_blocks
        gammas: dict[int, float] = {}  # of the skipped rows
        for index, (row, decision) in enumerate(zip(history.rows, agreed, strict=True)):
            was_planned = row.is_planned
            gamma = row.commit(decision, self.forecasting.gamma_clip)
            if not decision.compute:
                gammas[index] = 1.0 if gamma is None else gamma
            branch, sample = context.origin(index)
            self.trace.entries.append(
                TraceEntry(
                    step=context.step_index,
                    branch=branch,
                    sample=sample,
                    compute=decision.compute,
                    cost=1.0 if decision.compute else 0.0 if was_planned else cost_of_skip,
                    reason=decision.reason.value,
                    statistic=None if was_planned else sums[index].statistic,
                    gamma=None if decision.compute else gamma,
                )
            )
        return CallPlan(
            context=context,
            compute_rows=[index for index, decision in enumerate(agreed) if decision.compute],
            skip_rows=list(gammas),
            gammas=list(gammas.values()),
        )
