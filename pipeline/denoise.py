"""The denoising loop: latents of noise in, latents of a clip out."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch

from cineray.pipeline.adapters import Branch, Conditions
from cineray.pipeline.loading import LoadedModel

StepDone = Callable[[int, int], None]  # (steps done, steps in all)


@torch.no_grad()
def denoise(
    model: LoadedModel,
    latents: torch.Tensor,
    conditions: Conditions,
    num_inference_steps: int,
    on_step: StepDone,
) -> torch.Tensor:
    """Runs every step; equals the loop of diffusers' pipeline bit for bit.

    Args:
        latents: noise [B, C, F, H, W] float32; not changed.

    Returns:
        Latents of the clip, same shape and dtype.
    """
    scheduler = deepcopy(model.pipe.scheduler)  # its steps have state: one scheduler per clip
    timesteps = model.adapter.set_timesteps(scheduler, num_inference_steps, latents.device)
    scheduler.set_begin_index(0)
    for index, timestep in enumerate(timesteps):
        hidden_states = latents
        if conditions.channel_condition is not None:
            hidden_states = torch.cat([latents, conditions.channel_condition], dim=1)  # [B, C + C', F, H, W]
        cond, *uncond = (
            _velocity(model.pipe.transformer, branch, hidden_states, timestep, index, len(timesteps))
            for branch in conditions.branches
        )
        noise_pred = uncond[0] + conditions.guidance_scale * (cond - uncond[0]) if uncond else cond
        latents = scheduler.step(noise_pred, timestep, latents, return_dict=False)[0]
        on_step(index + 1, len(timesteps))
    return latents


def _velocity(
    transformer: Any, branch: Branch, hidden_states: torch.Tensor, timestep: torch.Tensor, index: int, num_steps: int
) -> torch.Tensor:
    """One branch's output [B, C, F, H, W] for step `index`; the cache context tells hooks where they are."""
    with transformer.cache_context(branch.name, step_index=index, num_inference_steps=num_steps):
        return transformer(
            hidden_states=hidden_states.to(transformer.dtype),
            timestep=timestep.expand(hidden_states.shape[0]),
            return_dict=False,
            **branch.transformer_kwargs,
        )[0]
