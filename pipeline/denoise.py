"""The denoising loop: latents of noise in, latents of a clip out."""

from collections.abc import Callable
from copy import deepcopy

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
    transformer = model.pipe.transformer
    scheduler = deepcopy(model.pipe.scheduler)  # UniPC keeps past outputs: one scheduler per clip
    timesteps = model.adapter.set_timesteps(scheduler, num_inference_steps, latents.device)
    scheduler.set_begin_index(0)
    for index, timestep in enumerate(timesteps):
        parts = [latents] if conditions.channel_condition is None else [latents, conditions.channel_condition]
        hidden_states = torch.cat(parts, dim=1).to(transformer.dtype)  # [B, C + C', F, H, W]

        def velocity(branch: Branch, hidden_states=hidden_states, timestep=timestep, index=index) -> torch.Tensor:
            with transformer.cache_context(branch.name, step_index=index, num_inference_steps=len(timesteps)):
                return transformer(
                    hidden_states=hidden_states,
                    timestep=timestep.expand(hidden_states.shape[0]),
                    return_dict=False,
                    **branch.transformer_kwargs,
                )[0]

        cond, *uncond = (velocity(branch) for branch in conditions.branches)
        noise_pred = uncond[0] + conditions.guidance_scale * (cond - uncond[0]) if uncond else cond
        latents = scheduler.step(noise_pred, timestep, latents, return_dict=False)[0]
        on_step(index + 1, len(timesteps))
    return latents
