"""One gang's try at a clip in closed form: which steps are done, and which are saved, after how many seconds."""

import math
from dataclasses import dataclass

_ROUNDING = 1e-9  # of a step: a division that should give 3 may give 2.9999999999


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """Steps one after the other, with a save behind each `steps_per_save`-th; the last step needs none.

    As `StepKeeper.after_step` does it. Steps count from the first one of this attempt.

    Args:
        num_steps: that are left to do.
        begin_s: before the first step.
        save_s: that a save of the step state takes.
    """

    num_steps: int
    begin_s: float
    step_s: float
    save_s: float
    steps_per_save: int

    @property
    def num_saves(self) -> int:
        return (self.num_steps - 1) // self.steps_per_save

    @property
    def total_s(self) -> float:
        return self.begin_s + self.num_steps * self.step_s + self.num_saves * self.save_s

    def step_ends_s(self, step: int) -> float:
        """Seconds until step 1, 2, ... is done, before it is saved."""
        return self.begin_s + step * self.step_s + (step - 1) // self.steps_per_save * self.save_s

    def num_done(self, after_s: float) -> int:
        """Steps that are done."""
        in_steps_s = after_s - self.begin_s
        if in_steps_s < 0:
            return 0
        cycle_s = self.steps_per_save * self.step_s + self.save_s
        cycles, rest_s = divmod(in_steps_s, cycle_s)
        in_cycle = min(self.steps_per_save, int(rest_s / self.step_s + _ROUNDING))
        return min(self.num_steps, int(cycles) * self.steps_per_save + in_cycle)

    def num_saved(self, after_s: float) -> int:
        """Steps that another gang need not do again: a multiple of `steps_per_save`."""
        cycle_s = self.steps_per_save * self.step_s + self.save_s
        cycles = int(max(0.0, after_s - self.begin_s) / cycle_s + _ROUNDING)
        return min(cycles, self.num_saves) * self.steps_per_save


def steps_per_save(step_s: float, every_s: float) -> int:
    """Saves come behind the first step that ends so many seconds after the last save; infinity for never."""
    if math.isinf(every_s):
        return 2**31  # more than any clip has
    return max(1, math.ceil(every_s / step_s - _ROUNDING))
