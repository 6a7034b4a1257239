"""The rival of every cache: fewer steps, evenly spread or at the times that were found best for a model."""

import re
from copy import deepcopy
from dataclasses import dataclass, replace

import torch

from cineray.caching.forecast import places_of
from cineray.caching.policies.fitted import FittedConfig, curve_at, place_steps
from cineray.caching.profile import FittedProfile
from cineray.pipeline.adapters import Denoising, Expert
from cineray.pipeline.caches.corrector import is_flow
from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.request import ClipRequest, InputError

_TEXT = re.compile(r"fewer-steps\((?P<steps>\d+)(?:,profile=(?P<profile>[^(),]+))?\)")


@dataclass(frozen=True, slots=True)
class FewerSteps:
    """So many uncached steps.

    Args:
        profile: of `fitted`: the steps are those of the whole schedule that it would compute, and the scheduler knows
            of no others; None: the scheduler's own times for so many steps.
    """

    steps: int
    profile: str | None = None

    def request(self, request: ClipRequest) -> ClipRequest:
        """What is prepared: the whole schedule, where some of its steps are then taken."""
        steps = request.num_inference_steps if self.profile else self.steps
        return replace(request, cache="none", num_inference_steps=steps)

    def clip(self, clip: Denoising, model: LoadedModel) -> Denoising:
        """The clip with these steps alone.

        Raises:
            InputError: the scheduler steps along no flow, whose times could be chosen.
        """
        if self.profile is None or self.steps >= clip.num_steps:
            return clip
        if not is_flow(clip.scheduler):
            raise InputError(f"fewer-steps: {type(clip.scheduler).__name__} has no times to choose from")
        sigmas = clip.scheduler.sigmas
        places = places_of(clip.num_steps, sigmas[:-1].tolist())
        kept = place_steps(curve_at(self._found(model), clip.num_steps / self.steps), self.steps, places)
        scheduler = deepcopy(clip.scheduler)
        scheduler.timesteps = clip.timesteps[kept]
        scheduler.sigmas = torch.cat([sigmas[kept], sigmas[-1:]])
        scheduler.num_inference_steps = len(kept)
        return replace(
            clip,
            scheduler=scheduler,
            timesteps=scheduler.timesteps,
            experts=tuple(_from_step(expert, kept) for expert in clip.experts),
        )

    def text(self, model: LoadedModel) -> str:
        """All that its numbers depend on.

        Raises:
            InputError: the profile is not there, or of another model.
        """
        profile = "" if self.profile is None else f",profile={self._found(model).digest}"
        return f"fewer-steps({self.steps}{profile})"

    def _found(self, model: LoadedModel) -> FittedProfile:
        checkpoint = model.checkpoint
        try:
            config = FittedConfig(profile=self.profile or "auto")
            return config.find(checkpoint.model.family, checkpoint.configs.transformer)
        except ValueError as error:
            raise InputError(f"fewer-steps: {error}") from None


def parse_fewer_steps(policy: str) -> FewerSteps | None:
    """`fewer-steps(N)` or `fewer-steps(N,profile=NAME|FILE)`; None for another policy."""
    match = _TEXT.fullmatch(policy)
    return FewerSteps(int(match["steps"]), match["profile"]) if match else None


def _from_step(expert: Expert, kept: list[int]) -> Expert:
    return replace(expert, first_step=sum(step < expert.first_step for step in kept))
