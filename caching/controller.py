"""The controller of one clip: gathers observations, asks the policy, keeps the histories and the trace.

It owns all state of the cache. All that must agree between ranks passes through a `Consensus`, so that a gang of
ranks runs the same code as one process.
"""

import warnings
from dataclasses import dataclass, field

import torch

from cineray.caching.consensus import Alone, Consensus
from cineray.caching.forecast import Forecasting, align_residual, gamma, run_gamma
from cineray.caching.history import BranchHistory, ResidualPair
from cineray.caching.observation import BRANCH_ORDER, AlignmentSums, Observation
from cineray.caching.policy import Decision, Policy
from cineray.caching.token_sums import ModulatedInput, alignment_sums, change_sums, rounded
from cineray.caching.trace import Trace, TraceEntry
from cineray.caching.verdict import NUMBERS_PER_ROW, digest, pack, unpack

GUARD_INTERVAL = 8  # steps between two comparisons of what the ranks did


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

    def place(self, row: int) -> tuple[str, int]:
        """(branch, sample) of a row of the batch."""
        return self.rows[row] if self.rows else (self.branch, row)

    def leader(self, row: int) -> int:
        """The row of the same sample whose decision joint branches follow: `branch` comes first."""
        leader = (self.branch, self.place(row)[1])
        return self.rows.index(leader) if leader in self.rows else row


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
        consensus: how the ranks of a gang come to one decision.
    """

    policy: Policy
    forecasting: Forecasting
    trace: Trace
    consensus: Consensus = field(default_factory=Alone)
    histories: dict[str, BranchHistory] = field(default_factory=dict)
    _joint: tuple[int, list[Decision]] | None = None  # (step, what the first branch decided) for joint branches

    def begin_clip(self) -> None:
        """Forgets the clip before."""
        self.histories.clear()
        self.trace.clear()
        self._joint = None

    def rows_to_probe(self, context: StepContext, entering: torch.Tensor) -> list[int]:
        """Rows of this call whose probe blocks must run: all but those that an earlier decision holds for.

        Ranks compare their plans first, so that none waits for the others inside a probe block.

        Args:
            entering: hidden states before the first block [B, S, D].
        """
        history = self.histories.setdefault(context.branch, BranchHistory())
        num_rows, num_ranks = entering.shape[0], self.consensus.num_ranks
        if self._have_diverged(context, history) or not history.fits(entering, context.step_index):
            self._reset(history, entering)
        if not self.policy.plans_ahead:
            return list(range(num_rows))
        planned = [float(steps > 0) for steps in history.num_planned]
        if num_ranks > 1:
            said = torch.tensor([planned], dtype=torch.float64, device=entering.device)
            added = self.consensus.add(torch.zeros(2, num_rows, dtype=said.dtype, device=said.device), said)[1]
            if any(number not in (0, num_ranks) for number in added[0].tolist()):
                self._reset(history, entering)
                planned = [0.0] * num_rows
        if self._is_joint_across_ranks:
            planned = self.consensus.agree_across_branches(planned)
        for row, is_planned in enumerate(planned):
            history.num_planned[row] = max(1, history.num_planned[row]) if is_planned else 0
        return [row for row in range(num_rows) if not planned[row] or not history.num_pairs[row]]

    def decide(
        self,
        context: StepContext,
        entering: torch.Tensor,
        probe: torch.Tensor,
        modulated: ModulatedInput | None = None,
    ) -> Verdict:
        """Decides for each row, after `rows_to_probe`.

        Args:
            entering: hidden states before the first block [B, S, D].
            probe: hidden states after the probe blocks [B, S, D]; of other rows than `rows_to_probe`, anything.
            modulated: for the policies whose signal it is.
        """
        history = self.histories[context.branch]
        num_rows = entering.shape[0]
        planned = [steps > 0 for steps in history.num_planned]
        change = None
        if all(planned):
            decisions = [_planned(history, row) for row in range(num_rows)]
            gammas = list(history.gamma)
        else:
            kept = self._kept(history, probe)
            change, align = self._observe(history, entering, kept, modulated)
            decisions, gammas = self._look(context, history, planned, change, align)
            history.probe = kept
        for row, is_planned in enumerate(planned):
            history.run_step[row] = history.run_step[row] + 1 if is_planned else 0
        history.gamma = gammas
        clip = self.forecasting.gamma_clip
        gammas = [None if g is None else run_gamma(g, history.run_step[row], clip) for row, g in enumerate(gammas)]
        self._record(context, history, decisions, planned, change, gammas)
        history.last_step = context.step_index
        history.modulated = modulated.values if modulated is not None else None
        skip_rows = [row for row, d in enumerate(decisions) if not d.compute]
        return Verdict(
            context=context,
            compute_rows=[row for row, d in enumerate(decisions) if d.compute],
            skip_rows=skip_rows,
            gammas=[g if (g := gammas[row]) is not None else 1.0 for row in skip_rows],
        )

    def _look(
        self,
        context: StepContext,
        history: BranchHistory,
        planned: list[bool],
        change: list[tuple[float, float]] | None,
        align: list[AlignmentSums],
    ) -> tuple[list[Decision], list[float | None]]:
        """What the policy says of each row, and each row's gamma before it is clipped; the same on all ranks."""
        num_rows = len(planned)
        decisions = self._decisions(context, history, change)
        gammas: list[float | None] = [None] * num_rows
        leaders = [context.leader(row) if self.forecasting.branches == "joint" else row for row in range(num_rows)]
        for row in sorted(range(num_rows), key=lambda row: leaders[row] != row):  # who follows comes after
            if planned[row]:
                decisions[row], gammas[row] = _planned(history, row), history.gamma[row]
                continue
            if leaders[row] != row:
                decisions[row] = _followed(decisions[leaders[row]], history.num_pairs[row])
            decision = decisions[row]
            if decision.compute or history.num_pairs[row] < 2 or self.forecasting.alignment == "none":
                continue
            gammas[row] = decision.gamma
            if decision.gamma is None:
                gammas[row] = gamma(align[row], self.forecasting.alignment)
            if gammas[row] is None:
                decisions[row] = Decision(compute=True, accumulated=0.0, reason="unknown")
        return self._agreed(context, decisions, gammas)

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
        keeps_probe = self.forecasting.keeps_probe_residual(self.policy.signal)
        nothing = probe.new_empty(len(rows), 0, probe.shape[2])
        probe_residual = probe - self._kept(history, entering) if keeps_probe else nothing
        history.remember(rows, ResidualPair(probe_residual, leaving - entering))
        if self.forecasting.num_pairs == 1:
            history.older = None
        held = sum(h.held_bytes for h in self.histories.values())
        self.trace.held_bytes = max(self.trace.held_bytes, held)

    def _reset(self, history: BranchHistory, entering: torch.Tensor) -> None:
        history.reset(entering)
        every = self.forecasting.keep_every
        history.kept_from = -self.consensus.first_token(entering.shape[1]) % every if every > 1 else 0

    def _kept(self, history: BranchHistory, values: torch.Tensor) -> torch.Tensor:
        """The tokens that are kept of a probe: every n-th of the whole sequence, however it is sharded."""
        every = self.forecasting.keep_every
        return values if every == 1 else values[:, history.kept_from :: every].clone()

    def _observe(
        self, history: BranchHistory, entering: torch.Tensor, probe: torch.Tensor, modulated: ModulatedInput | None
    ) -> tuple[list[tuple[float, float]] | None, list[AlignmentSums]]:
        """One fused sum over ranks of everything this step is judged by; a None change has no before.

        The exchange has the same shape at every step, whatever this rank has to say, so that a rank that lost its
        history cannot leave the others waiting; then all forget theirs, and compute.
        """
        newest, older, num_rows = history.newest, history.older, entering.shape[0]
        change = align = None
        if modulated is not None:
            change = self._modulated_change(history, modulated)
        if self.policy.signal == "probe" and history.probe is not None:
            change = change_sums(probe, history.probe)
        elif self.policy.signal == "probe-residual" and newest is not None:
            change = change_sums(probe - self._kept(history, entering), newest.probe)
        if self.forecasting.alignment != "none" and newest is not None and older is not None:
            align = alignment_sums(probe - self._kept(history, entering), newest.probe, older.probe)

        def or_zeros(sums: torch.Tensor | None, num_sums: int) -> torch.Tensor:
            shape = (num_sums, num_rows)
            return sums if sums is not None else torch.zeros(shape, dtype=torch.float64, device=entering.device)

        known = torch.tensor([history.probe is not None, change is not None, align is not None], device=entering.device)
        rest = torch.cat([or_zeros(align, 4), known.to(torch.float64).unsqueeze(1).expand(3, num_rows)])
        added_change, added_rest = self.consensus.add(or_zeros(change, 2), rest)
        rows = rounded(torch.cat([added_change, added_rest])).T.tolist()
        if any(number not in (0, self.consensus.num_ranks) for number in rows[0][6:]):
            self._reset(history, entering)
            return None, []
        aligns = [AlignmentSums(l1_now=r[2], l1_span=r[3], dot=r[4], square_span=r[5]) for r in rows]
        return ([(r[0], r[1]) for r in rows] if change is not None else None), (aligns if align is not None else [])

    def _agreed(
        self, context: StepContext, decisions: list[Decision], gammas: list[float | None]
    ) -> tuple[list[Decision], list[float | None]]:
        """The first rank's verdict, which every rank obeys."""
        numbers = pack(decisions, gammas)
        if self._is_joint_across_ranks and context.branch == BRANCH_ORDER[0]:
            return unpack(self.consensus.agree_across_branches(numbers))
        return unpack(self.consensus.agree(numbers))

    @property
    def _is_joint_across_ranks(self) -> bool:
        return self.forecasting.branches == "joint" and self.consensus.branches_elsewhere

    def _have_diverged(self, context: StepContext, history: BranchHistory) -> bool:
        """Compares what the ranks did, now and then; says so if they differ. All ranks get the same answer."""
        if self.consensus.num_ranks == 1 or context.step_index % GUARD_INTERVAL or context.step_index == 0:
            return False
        done = [entry for entry in self.trace.entries if entry.branch == context.branch]
        mark = digest(done, history.accumulated, history.num_pairs)
        said = self.consensus.compare([mark, len(done), sum(entry.compute for entry in done), context.step_index])
        if all(numbers == said[0] for numbers in said):
            return False
        ranks = "; ".join(
            f"rank {rank}: step {step:.0f}, {computed:.0f} of {calls:.0f} computed, digest {int(mark):08x}"
            for rank, (mark, calls, computed, step) in enumerate(said)
        )
        warnings.warn(
            f"cache: ranks differ in what they did before step {context.step_index} of branch {context.branch} "
            f"({ranks}); all forget what they cached and compute this step",
            RuntimeWarning,
            stacklevel=2,
        )
        return True

    def _modulated_change(self, history: BranchHistory, modulated: ModulatedInput) -> torch.Tensor | None:
        if history.modulated is None or history.modulated.shape != modulated.values.shape:
            return None
        sums = change_sums(modulated.values, history.modulated)
        return sums if modulated.is_sharded else sums / self.consensus.num_ranks  # every rank adds the same

    def _decisions(
        self, context: StepContext, history: BranchHistory, change: list[tuple[float, float]] | None
    ) -> list[Decision]:
        num_rows = len(history.num_pairs)
        if self._is_joint_across_ranks and context.branch != BRANCH_ORDER[0]:
            heard = self.consensus.agree_across_branches([0.0] * (NUMBERS_PER_ROW * num_rows))
            self._joint = (context.step_index, unpack(heard)[0])
        if self.forecasting.branches == "joint" and self._joint is not None and self._joint[0] == context.step_index:
            return [_followed(decision, history.num_pairs[row]) for row, decision in enumerate(self._joint[1])]
        places = [context.place(row) for row in range(num_rows)]
        return [
            self.policy.decide(
                Observation(
                    step_index=context.step_index,
                    branch_index=BRANCH_ORDER.index(branch) if branch in BRANCH_ORDER else 0,
                    num_steps=context.num_steps,
                    num_branches=context.num_branches,
                    sample=sample,
                    change_sum=change[row][0] if change else None,
                    previous_sum=change[row][1] if change else None,
                    accumulated=history.accumulated[row],
                    num_skips_in_a_row=history.num_skips_in_a_row[row],
                    num_pairs=history.num_pairs[row],
                )
            )
            for row, (branch, sample) in enumerate(places)
        ]

    def _record(
        self,
        context: StepContext,
        history: BranchHistory,
        decisions: list[Decision],
        planned: list[bool],
        change: list[tuple[float, float]] | None,
        gammas: list[float | None],
    ) -> None:
        if self.forecasting.branches == "joint" and (self._joint is None or self._joint[0] != context.step_index):
            self._joint = (context.step_index, list(decisions))
        cost_of_skip = self.trace.probe_depth / self.trace.num_blocks
        for row, decision in enumerate(decisions):
            branch, sample = context.place(row)
            history.accumulated[row] = decision.accumulated
            history.num_skips_in_a_row[row] = 0 if decision.compute else history.num_skips_in_a_row[row] + 1
            history.num_planned[row] = 0 if decision.compute else decision.num_steps - 1
            seen = change is not None and not planned[row] and change[row][1] > 0
            self.trace.entries.append(
                TraceEntry(
                    step=context.step_index,
                    branch=branch,
                    sample=sample,
                    compute=decision.compute,
                    cost=1.0 if decision.compute else 0.0 if planned[row] else cost_of_skip,
                    reason=decision.reason,
                    statistic=change[row][0] / change[row][1] if change and seen else None,
                    gamma=gammas[row] if not decision.compute else None,
                )
            )


def _planned(history: BranchHistory, row: int) -> Decision:
    """What an earlier decision says of this step."""
    if not history.num_pairs[row]:
        return Decision(compute=True, accumulated=0.0, reason="empty")
    left = history.num_planned[row]
    return Decision(compute=False, accumulated=history.accumulated[row], reason="run", num_steps=left)


def _followed(decision: Decision, num_pairs: int) -> Decision:
    """Another branch's decision for a row with so many residual pairs."""
    if decision.compute or num_pairs:
        return decision
    return Decision(compute=True, accumulated=0.0, reason="empty")
