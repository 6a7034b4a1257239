"""The denoising loop: latents of noise in, latents of a clip out. It knows no model."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Protocol

import torch
from diffusers.models.cache_utils import CacheMixin

from cineray.pipeline.adapters import Branch, Denoising, Expert
from cineray.pipeline.resume.step_state import Beginning, Keeper, StepState, restore_scheduler, scheduler_state

StepDone = Callable[[int, int], None]  # (steps done, steps in all)
RunBranch = Callable[[Branch], torch.Tensor]
RunBranches = Callable[[Sequence[Branch], RunBranch], list[torch.Tensor]]


class LoopCache(Protocol):
    """What a cache has to say in the loop; the rest it does within the transformers."""

    def corrected(self, scheduler: Any, /) -> Any:
        """A stepper to step with in the place of the clip's own scheduler."""
        ...

    def skips_step(self, transformer: Any, step_index: int, num_steps: int, /) -> bool:
        """Whether the stepper needs no output of this transformer for the step to come."""
        ...


def run_here(branches: Sequence[Branch], run: RunBranch) -> list[torch.Tensor]:
    """Every branch, one after the other, in this process."""
    return [run(branch) for branch in branches]


@torch.no_grad()
def denoise(
    clip: Denoising,
    on_step: StepDone,
    run_branches: RunBranches = run_here,
    keeper: Keeper | None = None,
    cache: LoopCache | None = None,
) -> torch.Tensor:
    """Runs every step; equals the loop of diffusers' pipeline bit for bit, also where it resumes from a state.

    Args:
        clip: before its first step; not changed.
        run_branches: runs each branch somewhere and returns all their outputs here.
        keeper: says where to begin, and is offered the state after each step but the last.
        cache: attached to the clip's transformers.

    Returns:
        Latents of the clip, float32, in the shape of its noise.
    """
    latents, num_steps = clip.latents, clip.num_steps
    start = None if keeper is None else keeper.begin(_beginning(clip))
    scheduler = deepcopy(clip.scheduler)
    if start is not None:
        restore_scheduler(scheduler, start.scheduler, latents.device)
        latents = start.latents.to(latents.device)
    stepper = scheduler if cache is None else cache.corrected(scheduler)
    # diffusers goes through all modules to say it: 2 to 3 ms of the 60 that a call of a tiny model takes
    dtypes = {expert.first_step: expert.transformer.dtype for expert in clip.experts}
    output: torch.Tensor | None = None
    for index in range(0 if start is None else start.step, num_steps):
        timestep = clip.timesteps[index]
        expert = clip.expert_at(index)
        # of a skipped step the stepper takes the last output's type and shape alone
        if output is None or cache is None or not cache.skips_step(expert.transformer, index, num_steps):
            output = _step_output(clip, expert, dtypes[expert.first_step], index, latents, scheduler, run_branches)
        latents = clip.advance(stepper, output, timestep, latents)
        on_step(index + 1, num_steps)
        if keeper is not None and index + 1 < num_steps:
            keeper.after_step(partial(_state, index + 1, num_steps, latents, scheduler, clip.scheduler))
    return latents if clip.finish is None else clip.finish(latents)


def _step_output(
    clip: Denoising,
    expert: Expert,
    dtype: torch.dtype,
    index: int,
    latents: torch.Tensor,
    scheduler: Any,
    run_branches: RunBranches,
) -> torch.Tensor:
    """What the branches' outputs for step `index` combine to, as `latents`.

    Args:
        dtype: of what the expert is given.
    """
    timestep = clip.timesteps[index]
    if clip.model_input is not None:
        hidden_states, model_timestep = clip.model_input(latents, timestep, scheduler)
    else:
        hidden_states, model_timestep = latents, timestep.expand(latents.shape[0])
    if clip.channel_condition is not None:
        hidden_states = torch.cat([hidden_states, clip.channel_condition], dim=1)  # [B, C + C', F, H, W]
    run = partial(
        _output,
        transformer=expert.transformer,
        hidden_states=hidden_states.to(dtype),
        timestep=model_timestep,
        index=index,
        num_steps=clip.num_steps,
        more={} if clip.step_arguments is None else clip.step_arguments(index),
    )
    return clip.combine(run_branches(clip.branches, run), expert.guidance_scale)


def _beginning(clip: Denoising) -> Beginning:
    return Beginning(
        latents=clip.latents,
        scheduler=clip.scheduler,
        timesteps=clip.timesteps,
        output_dtype=clip.experts[0].transformer.dtype,
    )


def _state(step: int, num_steps: int, latents: torch.Tensor, scheduler: Any, fresh: Any) -> StepState:
    state = scheduler_state(scheduler, fresh)
    return StepState(step=step, num_steps=num_steps, latents=latents, scheduler=state)


def _output(
    branch: Branch,
    transformer: Any,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    index: int,
    num_steps: int,
    more: Mapping[str, Any],
) -> torch.Tensor:
    """One branch's output for step `index`; the cache context tells hooks where they are."""
    # of the mixin: some of diffusers' transformers (DiT, Stable Audio) have hooks and lack the method
    with CacheMixin.cache_context(transformer, branch.name, step_index=index, num_inference_steps=num_steps):
        return transformer(
            hidden_states=hidden_states,
            timestep=timestep,
            return_dict=False,
            **branch.transformer_kwargs,
            **more,
        )[0]
