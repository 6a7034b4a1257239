"""What a branch remembers between steps: at most five token tensors."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class ResidualPair:
    """Of one computed step: what the probe blocks added [B, S / keep_every, D], what all blocks added [B, S, D].

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

    probe: torch.Tensor | None = None  # probe output of the last step that was looked at [B, S / keep_every, D]
    kept_from: int = 0  # the first of the tokens whose probe is kept
    kind: tuple[torch.Size, torch.dtype, torch.device] | None = None  # of the hidden states
    modulated: torch.Tensor | None = None  # previous step's `ModulatedInput.values`, where the policy looks at it
    newest: ResidualPair | None = None
    older: ResidualPair | None = None
    num_pairs: list[int] = field(default_factory=list)  # per row, 0 to 2
    accumulated: list[float] = field(default_factory=list)
    num_skips_in_a_row: list[int] = field(default_factory=list)
    num_planned: list[int] = field(default_factory=list)  # further steps that are skipped without looking
    run_step: list[int] = field(default_factory=list)  # steps since the last look
    gamma: list[float | None] = field(default_factory=list)  # of the run of skips in the works, before clipping
    last_step: int | None = None

    def fits(self, hidden_states: torch.Tensor, step_index: int) -> bool:
        """Whether this history is that of the step before, for tensors of this shape, type and device."""
        if self.last_step is None or step_index != self.last_step + 1 or self.probe is None:
            return False
        return self.kind == (hidden_states.shape, hidden_states.dtype, hidden_states.device)

    def reset(self, hidden_states: torch.Tensor) -> None:
        """Forgets everything; what comes next are tensors like this one."""
        num_rows = hidden_states.shape[0]
        self.kind = (hidden_states.shape, hidden_states.dtype, hidden_states.device)
        self.probe = self.modulated = self.newest = self.older = None
        self.num_pairs = [0] * num_rows
        self.accumulated = [0.0] * num_rows
        self.num_skips_in_a_row = [0] * num_rows
        self.num_planned = [0] * num_rows
        self.run_step = [0] * num_rows
        self.gamma = [None] * num_rows

    def remember(self, rows: list[int], pair: ResidualPair) -> None:
        """Makes `pair` [len(rows), S, D] the newest of these rows; the newest becomes the older one."""
        every_row = len(rows) == len(self.num_pairs)
        if every_row:
            self.older, self.newest = self.newest, pair
        else:
            self._remember_some(rows, pair)
        for row in rows:
            self.num_pairs[row] = min(2, self.num_pairs[row] + 1)

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
        tensors = [self.probe, self.modulated]
        for pair in (self.newest, self.older):
            tensors += [pair.probe, pair.full] if pair else []
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)
