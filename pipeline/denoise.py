"""The denoising loop: latents of noise in, latents of a clip out."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch

from cineray.pipeline.adapters import Branch, Conditions
from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.resume.step_state import Beginning, Keeper, StepState, restore_scheduler, scheduler_state

StepDone = Callable[[int, int], None]  # (steps done, steps in all)
RunBranch = Callable[[Branch], torch.Tensor]


def run_here(branches: Sequence[Branch], run: RunBranch) -> list[torch.Tensor]:
    """Every branch, one after the other, in this process."""
    return [run(branch) for branch in branches]


@torch.no_grad()
def denoise(
    model: LoadedModel,
    latents: torch.Tensor,
    conditions: Conditions,
    num_inference_steps: int,
    on_step: StepDone,
    run_branches: Callable[[Sequence[Branch], RunBranch], list[torch.Tensor]] = run_here,
    keeper: Keeper | None = None,
) -> torch.Tensor:
    """Runs every step; equals the loop of diffusers' pipeline bit for bit, also where it resumes from a state.

    Args:
        latents: noise [B, C, F, H, W] float32; not changed.
        run_branches: runs each branch somewhere and returns all their outputs here.
        keeper: says where to begin, and is offered the state after each step but the last.

    Returns:
        Latents of the clip, same shape and dtype.
    """
    scheduler = deepcopy(model.pipe.scheduler)  # its steps have state: one scheduler per clip
    timesteps = model.adapter.set_timesteps(scheduler, num_inference_steps, latents.device)
    scheduler.set_begin_index(0)
    fresh = deepcopy(scheduler)
    start = None
    if keeper is not None:
        dtype = model.pipe.transformer.dtype
        start = keeper.begin(Beginning(latents=latents, scheduler=fresh, timesteps=timesteps, output_dtype=dtype))
    if start is not None:
        restore_scheduler(scheduler, start.scheduler, latents.device)
        latents = start.latents.to(latents.device)
    for index in range(0 if start is None else start.step, len(timesteps)):
        timestep = timesteps[index]
        hidden_states = latents
        if conditions.channel_condition is not None:
            hidden_states = torch.cat([latents, conditions.channel_condition], dim=1)  # [B, C + C', F, H, W]
        velocity = partial(
            _velocity,
            transformer=model.pipe.transformer,
            hidden_states=hidden_states,
            timestep=timestep,
            index=index,
            num_steps=len(timesteps),
        )
        cond, *uncond = run_branches(conditions.branches, velocity)
        noise_pred = uncond[0] + conditions.guidance_scale * (cond - uncond[0]) if uncond else cond
        latents = scheduler.step(noise_pred, timestep, latents, return_dict=False)[0]
        on_step(index + 1, len(timesteps))
        if keeper is not None and index + 1 < len(timesteps):
            keeper.after_step(partial(_state, index + 1, len(timesteps), latents, scheduler, fresh))
    return latents


def _state(step: int, num_steps: int, latents: torch.Tensor, scheduler: Any, fresh: Any) -> StepState:
    state = scheduler_state(scheduler, fresh)
    return StepState(step=step, num_steps=num_steps, latents=latents, scheduler=state)


def _velocity(
    branch: Branch, transformer: Any, hidden_states: torch.Tensor, timestep: torch.Tensor, index: int, num_steps: int
) -> torch.Tensor:
    """One branch's output [B, C, F, H, W] for step `index`; the cache context tells hooks where they are."""
    with transformer.cache_context(branch.name, step_index=index, num_inference_steps=num_steps):
        return transformer(
            hidden_states=hidden_states.to(transformer.dtype),
            timestep=timestep.expand(hidden_states.shape[0]),
            return_dict=False,
            **branch.transformer_kwargs,
        )[0]
