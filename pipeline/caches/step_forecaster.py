"""Forecasts skipped steps whole: where their clean latents lie follows from two computed steps.

It stands where a loop's latents change, around the scheduler, and so it works in cineray's loop, which does not call
the transformer on a skipped step, and in diffusers' pipelines, whose transformer then runs no block and whose output
for the step is exchanged here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from cineray.caching.trace import TraceEntry
from cineray.pipeline.caches.corrector import Stepper, sigma_now, wide


@dataclass(slots=True)
class CleanHistory:
    """Clean latents of the newest two computed steps of a clip [B, ...] float32, the newest last.

    Where the scheduler steps along no flow, the model's outputs themselves. It belongs to a cache; the clip's stepper
    adds to it.
    """

    steps: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    last_stepped: int | None = None
    flow: Any = None  # the scheduler that the loop steps with, if it steps along a flow
    _levels: tuple[Any, tuple[float, ...]] | None = None  # (the scheduler's tensor, its numbers)

    def sigmas(self) -> tuple[float, ...] | None:
        """Noise level of each step of the clip; None without a flow. Read once per schedule: a GPU is waited for."""
        found = getattr(self.flow, "sigmas", None)
        if found is None or len(found) < 2:
            return None
        if self._levels is None or self._levels[0] is not found:
            self._levels = found, tuple(wide(torch.as_tensor(found)).tolist()[:-1])  # the last is where the clip ends
        return self._levels[1]

    def clear(self) -> None:
        self.steps.clear()
        self.last_stepped = None

    @property
    def held_bytes(self) -> int:
        return sum(step.numel() * step.element_size() for step in self.steps)


@dataclass(slots=True)
class ForecastingScheduler(Stepper):
    """A scheduler whose `step` forecasts the output of skipped steps.

    What it is given is the same on every rank of a gang, so that all forecast alike.

    Args:
        inner: steps, and may correct.
        is_flow: it steps along a flow; else outputs are forecast as they are.
        newest: the trace's newest entry, that of the step that is now taken.
        told: called with the bytes that are held.
    """

    is_flow: bool
    history: CleanHistory
    newest: Callable[[], TraceEntry]
    told: Callable[[int], None]

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The inner scheduler's step; where it was skipped, `model_output` is exchanged for the forecast.

        Args:
            model_output, sample: [B, ...] of the same shape.
        """
        entry = self.newest()
        if entry.compute:
            self._add(self._clean(model_output, timestep, sample))
        else:
            assert entry.gamma is not None  # a step is skipped after two computed ones
            older, newest = self.history.steps
            clean = torch.lerp(older, newest, entry.gamma)
            model_output = self._leading_to(clean, timestep, sample).to(model_output.dtype)
        self.history.last_stepped = entry.step
        return self.inner.step(model_output, timestep, sample, *args, **kwargs)

    def _add(self, clean: torch.Tensor) -> None:
        self.history.steps[:] = [*self.history.steps[-1:], clean]
        self.told(self.history.held_bytes)

    def _clean(self, output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> torch.Tensor:
        if not self.is_flow:
            return wide(output).clone()
        return wide(sample) - sigma_now(self.inner, timestep) * wide(output)

    def _leading_to(self, clean: torch.Tensor, timestep: Any, sample: torch.Tensor) -> torch.Tensor:
        if not self.is_flow:
            return clean
        return (wide(sample) - clean) / sigma_now(self.inner, timestep)
