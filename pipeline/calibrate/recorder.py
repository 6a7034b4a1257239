"""What stands in a controller's place while a model is measured: every step is computed, and looked at."""

import torch

from cineray.caching.call import CallPlan, StepContext
from cineray.caching.token_sums import SignalValues


class Recorder:
    """Computes every step; what a calibration keeps of it, its own kind says in `remember`."""

    def begin_clip(self) -> None:
        """A clip begins: what was kept of the one before has nothing to do with it."""

    def free(self) -> None:
        """What is measured outlives the clip."""

    def is_planned(self, _context: StepContext, /) -> bool:
        return False

    def looks_away(self, _context: StepContext, /) -> bool:
        return False

    def begin_call(self, _context: StepContext, _blocks_input: torch.Tensor, /) -> list[int]:
        return []

    def decide(
        self,
        context: StepContext,
        blocks_input: torch.Tensor,
        _probe: torch.Tensor,
        _signal_values: SignalValues | None = None,
        /,
    ) -> CallPlan:
        return CallPlan(context=context, compute_rows=list(range(blocks_input.shape[0])), skip_rows=[], gammas=[])

    def remember(self, plan: CallPlan, blocks_input: torch.Tensor, blocks_output: torch.Tensor) -> None:
        """Looks at a computed step's blocks, [B, S, C] on the model's device."""
        raise NotImplementedError

    def forecast(self, _plan: CallPlan, _blocks_input: torch.Tensor, /) -> torch.Tensor:
        raise AssertionError("the recorder skips nothing")
