"""Makes good, at a computed step, what the skipped steps before it were wrong by.

A skipped step can only look ahead: its output is a forecast from earlier steps. Once the next step is computed, the
skipped ones lie between two that are known, and what lies between is known better than what lies ahead: on the tiny
models the clean latents that a step predicts are interpolated over five steps to within 1.1 % where a forecast is off
by 3 %. So the scheduler goes back to where the skipping began, takes the skipped steps again with interpolated outputs,
and goes on from there with the computed one. It costs some arithmetic on latents, no call of the transformer.

This is the corrector of a predictor-corrector method, evaluated once per computed step (UniPC, arXiv 2302.04867,
section 3.2, corrects one step back; this corrects a run of skipped ones, whatever the scheduler).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from cineray.caching.trace import StepOutcome


def can_correct(scheduler: Any) -> bool:
    """Whether it steps along a flow: the clean latents are `sample - sigma * output` at each step."""
    is_flow = "FlowMatch" in type(scheduler).__name__
    return is_flow or getattr(scheduler.config, "prediction_type", None) == "flow_prediction"


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that was taken. `clean` are the latents that its output says lie at the end [B, ...]."""

    index: int
    timestep: Any
    clean: torch.Tensor | None = None


@dataclass(slots=True)
class CorrectedScheduler:
    """A scheduler whose `step` corrects; everything else is the inner scheduler's.

    What every rank sees of a step is the same, latents and outcome, so that every rank corrects alike.

    Args:
        inner: steps; its state is put back when steps are taken again.
        outcome: what the cache did at the step that is now taken.
    """

    inner: Any
    outcome: Callable[[], StepOutcome]
    _count: int = 0  # of steps taken
    _computed: _Step | None = None  # the newest computed step
    _skipped: list[_Step] = field(default_factory=list)  # those since
    _before: tuple[dict[str, Any], torch.Tensor] | None = None  # state and latents before the first of these
    _made: torch.Tensor | None = None  # latents that the last step led to

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
        """Begins a clip."""
        self._forget()
        return self.inner.set_timesteps(*args, **kwargs)

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The inner scheduler's step, from corrected latents where the steps before were skipped."""
        outcome = self.outcome()
        follows = self._made is not None and sample.shape == self._made.shape and torch.equal(sample, self._made)
        if not follows or outcome not in ("skipped", "computed"):
            self._forget()
        if outcome == "skipped" and self._computed is not None:
            if not self._skipped:
                self._before = _state_of(self.inner), sample
            self._skipped.append(_Step(self._count, timestep))
        elif outcome != "skipped":
            sigma = self._sigma(timestep, sample)
            here = _Step(self._count, timestep, sample.float() - sigma * model_output.float())
            if self._skipped:
                sample = self._take_again(here, model_output.dtype, *args, **kwargs)
                model_output = ((sample.float() - here.clean) / sigma).to(model_output.dtype)
            self._computed, self._skipped, self._before = here, [], None
        result = self.inner.step(model_output, timestep, sample, *args, **kwargs)
        self._made = result[0]
        self._count += 1
        return result

    def _take_again(self, end: _Step, dtype: torch.dtype, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Latents before the step `end`, after the skipped ones with interpolated outputs."""
        assert self._before is not None
        state, sample = self._before
        vars(self.inner).update(state)
        begin = self._computed
        for step in self._skipped:
            place = (step.index - begin.index) / (end.index - begin.index)
            clean = torch.lerp(begin.clean, end.clean, place)
            output = ((sample.float() - clean) / self._sigma(step.timestep, sample)).to(dtype)
            sample = self.inner.step(output, step.timestep, sample, *args, **kwargs)[0]
        return sample

    def _sigma(self, timestep: Any, sample: torch.Tensor) -> torch.Tensor:
        """Of the step that comes now []."""
        index = self.inner.step_index
        if index is None:
            index = self.inner.index_for_timestep(timestep)
        return self.inner.sigmas[index].to(sample.device, torch.float32)

    def _forget(self) -> None:
        self._computed = self._before = self._made = None
        self._skipped = []


def _state_of(scheduler: Any) -> dict[str, Any]:
    """All of a scheduler's attributes; its steps put new tensors in the place of old ones and change none."""
    return {name: list(value) if isinstance(value, list) else value for name, value in vars(scheduler).items()}
