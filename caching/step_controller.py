"""The controller of one clip whose steps are skipped whole: it looks at no block, keeps no tensor, asks no other rank.

What a skipped step's clean latents are is the affair of whoever steps the loop (`pipeline/caches/step_forecaster.py`).
All that a decision rests on, the steps that were computed, is the same on every rank of a gang.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch

from cineray.caching.call import CallPlan, StepContext
from cineray.caching.forecast import Forecasting, damped_gamma, places_of
from cineray.caching.observation import BRANCH_ORDER, Observation
from cineray.caching.policy import Decision, Policy, Reason
from cineray.caching.trace import Trace, TraceEntry


@dataclass(slots=True)
class StepController:
    """Decides for one clip (or one batch of clips), each time for all rows and branches of a step.

    Args:
        last_stepped: the number of the last step that the loop took with a stepper that forecasts; None before.
        sigmas: noise level of each step of the clip, where the scheduler steps along a flow.
        on_free: called when what was computed is forgotten.
    """

    policy: Policy
    forecasting: Forecasting
    trace: Trace
    last_stepped: Callable[[], int | None]
    sigmas: Callable[[], tuple[float, ...] | None]
    on_free: Callable[[], None]
    _computed: list[int] = field(init=False, default_factory=list[int])  # the newest three steps that were
    _answered: tuple[object, list[Decision]] | None = field(init=False, default=None)  # (what was asked last, answer)

    def begin_clip(self) -> None:
        """Forgets the clip before."""
        self.free()
        self.trace.clear()

    def free(self) -> None:
        """Forgets what was computed: what comes next is another clip, or another transformer's step."""
        self._computed.clear()
        self.on_free()

    def skips_step(self, step_index: int, num_steps: int) -> bool:
        """Whether the step to come needs no call of the transformer; if so, it is taken down as skipped."""
        before = list(takewhile(lambda entry: entry.step == step_index - 1, reversed(self.trace.entries)))[::-1]
        rows = [(entry.branch, entry.sample) for entry in before]
        decisions = self._decisions(step_index, num_steps, rows)
        if not rows or any(decision.compute for decision in decisions):
            return False
        for row, decision in zip(rows, decisions, strict=True):
            self._note(step_index, row, decision)
        return True

    def is_planned(self, context: StepContext) -> bool:
        """Whether no block runs in the call to come."""
        return not any(decision.compute for decision in self._decisions_at(context))

    def looks_away(self, context: StepContext) -> bool:
        """At blocks that run it never looks."""
        return not self.is_planned(context)

    def begin_call(self, _context: StepContext, _blocks_input: torch.Tensor) -> list[int]:
        """No row is probed."""
        return []

    def decide(self, context: StepContext, *_tensors: Any) -> CallPlan:
        """
        Raises:
            ValueError: a step is to be skipped, and the loop does not step with a stepper that forecasts.
        """
        decisions = self._decisions_at(context)
        compute = any(decision.compute for decision in decisions)
        if compute:
            decisions = [d if d.compute else Decision.compute_because(Reason.UNKNOWN) for d in decisions]
        elif self.last_stepped() != context.step_index - 1:
            raise ValueError(
                f"cache {self.trace.policy} forecasts whole steps, and this loop's scheduler knows nothing of it: step "
                "with handle.corrected(scheduler), or exchange a pipeline's scheduler before enable_cache"
            )
        for row, decision in enumerate(decisions):
            self._note(context.step_index, context.origin(row), decision)
        rows = list(range(len(context.rows)))
        return CallPlan(
            context=context,
            compute_rows=rows if compute else [],
            skip_rows=[] if compute else rows,
            gammas=[] if compute else [1.0] * len(rows),
        )

    def forecast(self, _plan: CallPlan, blocks_input: torch.Tensor) -> torch.Tensor:
        """Nobody reads what comes of a skipped step's call."""
        return blocks_input

    def remember(self, plan: CallPlan, blocks_input: torch.Tensor, blocks_output: torch.Tensor) -> None:
        """Nothing: what is kept are latents."""

    def _decisions_at(self, context: StepContext) -> list[Decision]:
        rows = [context.origin(row) for row in range(len(context.rows))]
        return self._decisions(context.step_index, context.num_steps, rows)

    def _decisions(self, step_index: int, num_steps: int, rows: list[tuple[str, int]]) -> list[Decision]:
        """What the policy wants of each (branch, sample)."""
        asked = (step_index, num_steps, self.sigmas(), *self._computed, *rows)
        if self._answered is None or self._answered[0] != asked:  # the loop and its calls ask of a step in turn
            num_branches = len({branch for branch, _ in rows})
            self._answered = asked, [self._decide(step_index, num_steps, row, num_branches) for row in rows]
        return self._answered[1]

    def _decide(self, step_index: int, num_steps: int, row: tuple[str, int], num_branches: int) -> Decision:
        known = [step for step in self._computed if step < step_index][-2:]
        branch, sample = row
        sigmas = self.sigmas()
        decision = self.policy.decide(
            Observation(
                step_index=step_index,
                num_steps=num_steps,
                branch_index=BRANCH_ORDER.index(branch),
                num_branches=num_branches,
                sample=sample,
                change_sum=None,
                previous_sum=None,
                accumulated=0.0,
                num_skips_in_a_row=step_index - 1 - known[-1] if known else 0,
                num_pairs=len(known),
                sigmas=sigmas,
            )
        )
        if decision.compute or decision.gamma is not None:
            return decision
        if len(known) < 2:
            return Decision.compute_because(Reason.EMPTY)
        places = places_of(num_steps, sigmas)
        older, newest, now = (places[step] / self.forecasting.length for step in (*known, step_index))
        return replace(decision, gamma=damped_gamma(now - newest, newest - older))

    def _note(self, step_index: int, row: tuple[str, int], decision: Decision) -> None:
        if decision.compute and step_index not in self._computed:
            self._computed = [*self._computed[-2:], step_index]
        entry = TraceEntry(
            step=step_index,
            branch=row[0],
            sample=row[1],
            compute=decision.compute,
            cost=1.0 if decision.compute else 0.0,
            reason=decision.reason.value,
            statistic=None,
            gamma=decision.gamma,
        )
        self.trace.entries.append(entry)
