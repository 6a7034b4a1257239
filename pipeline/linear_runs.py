"""Steps of a scheduler that are taken again, several at once.

A step of UniPC is half a millisecond of small arithmetic on numbers, whatever the latents' size; a corrector that takes
skipped steps again pays for it two or three times, of a model that computes a step in 40 ms. But all that these
steps do to latents is to add up multiples of them, and the multiples follow from the schedule alone. They are found
once, by the scheduler itself, which takes the steps with unit vectors in the place of latents; for all later clips a
run of steps is one sum of a few tensors.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch

_LINEAR = ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
_NOT_LINEAR = ("thresholding", "stochastic_sampling")  # options of theirs by which latents do more than add up
Slot = tuple[str, int | None]  # an attribute of a scheduler that holds latents; the place in it, where it is a list


def is_linear(scheduler: Any) -> bool:
    """Whether what it makes of latents are sums of their multiples, with no noise of its own."""
    config = scheduler.config
    is_plain = not any(getattr(config, option, False) for option in _NOT_LINEAR)
    return (
        type(scheduler).__name__ in _LINEAR and is_plain and not getattr(config, "algorithm_type", "").startswith("sde")
    )


@dataclass(frozen=True, slots=True)
class _Map:
    """What a run of steps makes: multiples of what there was before, by what there is after.

    Args:
        latents: after the run; one number for each of the latents before it, the scheduler's slots and the terms.
        slots: the same of what the scheduler holds.
        state: its other attributes that the run changes.
    """

    latents: list[float]
    slots: dict[Slot, list[float]]
    state: dict[str, Any]


@dataclass(slots=True)
class LinearRuns:
    """The runs of one schedule that were found; it belongs to a loaded model, or to a cache on a pipeline, whose clips
    mostly have the same one."""

    _schedule: object = None
    _sigmas: torch.Tensor | None = None  # of the schedule, as it was last seen
    _known: dict[object, _Map] = field(default_factory=dict[object, _Map])

    def take(
        self,
        scheduler: Any,
        sample: torch.Tensor,
        timesteps: Sequence[Any],
        weights: Sequence[Sequence[float]],
        terms: Sequence[torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Steps along a flow whose clean latents at each step are the terms' sum by the step's weights.

        Args:
            scheduler: `is_linear`; it is left as after these steps.
            sample: latents before them [1, ...] in float32 or more, as the terms are.
            args, kwargs: of its `step`.

        Returns:
            Latents after them.
        """
        state = vars(scheduler)
        slots = _slots(state, sample.shape)
        self._look_at(scheduler)
        counts = tuple((name, value) for name, value in state.items() if isinstance(value, int | str | None))
        key = (counts, tuple(slots), tuple(map(tuple, weights)), sample.dtype)
        if key not in self._known:
            self._known[key] = _found(scheduler, slots, sample, timesteps, weights, *args, **kwargs)
        found = self._known[key]
        before = [sample, *(_held(state, slot) for slot in slots), *terms]
        after = {slot: weighted_sum(multiples, before) for slot, multiples in found.slots.items()}
        made = weighted_sum(found.latents, before)
        state.update(with_own_lists(found.state))
        for slot, latents in after.items():
            _put(state, slot, latents)
        return made

    def _look_at(self, scheduler: Any) -> None:
        """Forgets the runs of another schedule. Its numbers are read once per clip: a GPU is waited for."""
        if scheduler.sigmas is self._sigmas:
            return
        self._sigmas = scheduler.sigmas
        schedule = (type(scheduler), repr(scheduler.config), scheduler.sigmas.tolist(), scheduler.timesteps.tolist())
        if schedule != self._schedule:
            self._schedule, self._known = schedule, {}


def _slots(state: dict[str, Any], shape: torch.Size) -> list[Slot]:
    """Where a scheduler holds tensors of the latents' shape."""
    found: list[Slot] = []
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape == shape:
            found.append((name, None))
        elif isinstance(value, list):
            found += [(name, i) for i, v in enumerate(value) if isinstance(v, torch.Tensor) and v.shape == shape]
    return found


def _held(state: dict[str, Any], slot: Slot) -> torch.Tensor:
    name, place = slot
    return state[name] if place is None else state[name][place]


def _put(state: dict[str, Any], slot: Slot, latents: torch.Tensor | None) -> None:
    name, place = slot
    if place is None:
        state[name] = latents
    else:
        state[name][place] = latents


def with_own_lists(state: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's attributes as they are now: its steps change lists in place, and put new tensors for old ones."""
    return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}


def weighted_sum(multiples: Sequence[float], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of tensors of one shape; what counts for nothing is not read."""
    made = torch.zeros_like(tensors[0])
    for multiple, tensor in zip(multiples, tensors, strict=True):
        if multiple != 0:
            made.add_(tensor, alpha=multiple)
    return made


def _found(
    scheduler: Any,
    slots: Sequence[Slot],
    sample: torch.Tensor,
    timesteps: Sequence[Any],
    weights: Sequence[Sequence[float]],
    *args: Any,
    **kwargs: Any,
) -> _Map:
    """Takes the steps with unit vectors: of the latents before, of what the scheduler holds, and of the terms."""
    first_term = 1 + len(slots)
    num = first_term + len(weights[0])
    shape = (1, num, *[1] * (sample.ndim - 2))
    units = torch.eye(num, dtype=sample.dtype, device=sample.device).view(num, *shape)
    stand_in = copy(scheduler)
    state = vars(stand_in)
    state.update(with_own_lists(state))
    for slot, unit in zip(slots, units[1:], strict=False):
        _put(state, slot, unit)
    before, latents = dict(state), units[0]
    for timestep, of_terms in zip(timesteps, weights, strict=True):
        clean = sum((weight * unit for weight, unit in zip(of_terms, units[first_term:], strict=True)), 0 * units[0])
        sigma = stand_in.sigmas[stand_in.step_index].to(latents.dtype)
        latents = stand_in.step((latents - clean) / sigma, timestep, latents, *args, **kwargs)[0]
    held = {slot: _held(state, slot).flatten().tolist() for slot in _slots(state, torch.Size(shape))}
    for slot in held:
        _put(state, slot, None)  # no unit vector stays
    changed = {name: value for name, value in state.items() if value is not before.get(name)}
    # lists are changed in place
    changed |= {name: value for name, value in state.items() if isinstance(value, list)}
    return _Map(latents=latents.flatten().tolist(), slots=held, state=changed)
