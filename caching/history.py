"""What a branch remembers between steps: at most five token tensors, and a state per row."""

from dataclasses import dataclass, field

import torch

from cineray.caching.call import CallPlan
from cineray.caching.forecast import Forecasting, align_residual
from cineray.caching.policy import Signal
from cineray.caching.rows import RowState
from cineray.caching.token_sums import SignalValues, alignment_sums, change_sums


@dataclass(frozen=True, slots=True)
class ResidualPair:
    """The residuals of one computed step: what the probe blocks and what all blocks added.

    probe [B, S / keep_every, D], full [B, S, D].

    Where nobody asks for it, the probe's is [B, 0, D].
    """

    probe: torch.Tensor
    full: torch.Tensor


@dataclass(slots=True)
class BranchHistory:
    """The state of one branch of one clip; its owner is the clip's controller.

    Pairs are kept per row: a row that skips keeps its pairs while another row's are renewed, so tensors of all
    rows stand side by side and are written in place. A row with one pair has it in both places.
    """

    forecasting: Forecasting
    signal: Signal
    rows: list[RowState] = field(default_factory=list[RowState])
    probe: torch.Tensor | None = None  # probe output of the last step that was probed [B, S / keep_every, D]
    kept_from: int = 0  # the first of the tokens whose probe is kept
    kind: tuple[torch.Size, torch.dtype, torch.device] | None = None  # of the hidden states
    signal_values: torch.Tensor | None = None  # previous step's `SignalValues.values`, where the policy's signal is one
    newest: ResidualPair | None = None
    older: ResidualPair | None = None
    last_step: int | None = None

    def fits(self, hidden_states: torch.Tensor, step_index: int) -> bool:
        """Whether this history is that of the step before, for tensors of this shape, type and device."""
        if self.last_step is None or step_index != self.last_step + 1 or self.probe is None:
            return False
        return self.kind == (hidden_states.shape, hidden_states.dtype, hidden_states.device)

    def reset(self, hidden_states: torch.Tensor, kept_from: int) -> None:
        """Forgets everything; what comes next are tensors like this one."""
        self.kind = (hidden_states.shape, hidden_states.dtype, hidden_states.device)
        self.kept_from = kept_from
        self.probe = self.signal_values = self.newest = self.older = None
        self.rows = [RowState() for _ in range(hidden_states.shape[0])]

    def kept(self, values: torch.Tensor) -> torch.Tensor:
        """The tokens that are kept of a probe: every n-th of the whole sequence, however it is sharded."""
        every = self.forecasting.keep_every
        return values if every == 1 else values[:, self.kept_from :: every].clone()

    def change_sums(
        self, blocks_input: torch.Tensor, probe: torch.Tensor, signal_values: SignalValues | None, num_ranks: int
    ) -> torch.Tensor | None:
        """This rank's part of the signal's change [2, B]; None where there is no step before.

        Args:
            probe: the kept tokens.
            num_ranks: that add their parts up.
        """
        if self.signal == "probe" and self.probe is not None:
            return change_sums(probe, self.probe)
        if self.signal == "probe-residual" and self.newest is not None:
            return change_sums(probe - self.kept(blocks_input), self.newest.probe)
        if (
            signal_values is None
            or self.signal_values is None
            or self.signal_values.shape != signal_values.values.shape
        ):
            return None
        sums = change_sums(signal_values.values, self.signal_values)
        return sums if signal_values.is_sharded else sums / num_ranks  # every rank adds the same

    def alignment_sums(self, blocks_input: torch.Tensor, probe: torch.Tensor) -> torch.Tensor | None:
        """This rank's part of the sums that place the probe's residual [4, B]; None without two computed steps."""
        if not self.forecasting.follows_probe or self.newest is None or self.older is None:
            return None
        return alignment_sums(probe - self.kept(blocks_input), self.newest.probe, self.older.probe)

    def forecast(self, plan: CallPlan, blocks_input: torch.Tensor) -> torch.Tensor:
        """The blocks' output for the skipped rows [len(skip_rows), S, D], of their input for all rows [B, S, D]."""
        newest, older = self.newest, self.older
        assert newest is not None  # nothing is skipped before a step has been computed
        assert self.probe is not None
        from_probe = self.forecasting.base == "probe"

        def pick(values: torch.Tensor) -> torch.Tensor:
            return values if len(plan.skip_rows) == len(self.rows) else values[plan.skip_rows]

        def added(pair: ResidualPair) -> torch.Tensor:
            return pick(pair.full) - pick(pair.probe) if from_probe else pick(pair.full)

        base = pick(self.probe if from_probe else blocks_input)
        if older is None or self.forecasting.alignment == "none":
            return base + added(newest)
        return base + align_residual(added(newest), added(older), plan.gammas)

    def remember(self, rows: list[int], blocks_input: torch.Tensor, blocks_output: torch.Tensor) -> None:
        """Makes what the blocks added to these rows their newest pair; the newest becomes the older one.

        Args:
            blocks_input, blocks_output: [len(rows), S, D].
        """
        assert self.probe is not None
        probe = self.probe if len(rows) == len(self.rows) else self.probe[rows]
        keeps_probe = self.forecasting.keeps_probe_residual(self.signal)
        nothing = probe.new_empty(len(rows), 0, probe.shape[2])
        probe_residual = probe - self.kept(blocks_input) if keeps_probe else nothing
        pair = ResidualPair(probe_residual, blocks_output - blocks_input)
        if len(rows) == len(self.rows):
            self.older, self.newest = self.newest, pair
        else:
            self._remember_some(rows, pair)
        if self.forecasting.num_pairs == 1:
            self.older = None
        for row in rows:
            self.rows[row].num_pairs = min(2, self.rows[row].num_pairs + 1)

    def _remember_some(self, rows: list[int], pair: ResidualPair) -> None:
        assert self.newest is not None  # a row skips only when every row has been computed once
        if self.older is None:
            self.older = ResidualPair(self.newest.probe.clone(), self.newest.full.clone())
        for name in ("probe", "full"):
            newest, older = getattr(self.newest, name), getattr(self.older, name)
            older[rows] = newest[rows]
            newest[rows] = getattr(pair, name)

    @property
    def held_bytes(self) -> int:
        tensors = [self.probe, self.signal_values]
        for pair in (self.newest, self.older):
            tensors += [pair.probe, pair.full] if pair else []
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)
