"""One clip from prompt to frames."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from cineray.caching.trace import Trace
from cineray.pipeline.adapters import Conditions
from cineray.pipeline.denoise import StepDone, denoise
from cineray.pipeline.enable_cache import attach_cache
from cineray.pipeline.loading import LoadedModel
from cineray.pipeline.request import ClipRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedClip:
    """Frames [num_frames, height, width, 3] uint8 RGB, what the cache did, and where the time went, in seconds."""

    frames: np.ndarray
    trace: Trace | None
    encode_s: float
    denoise_s: float
    decode_s: float


def render_clip(model: LoadedModel, request: ClipRequest, on_step: StepDone) -> RenderedClip:
    """Renders one clip; the same request gives the same frames on the same kind of device.

    The noise is drawn on the CPU from the clip's seed, wherever the model runs.
    """
    began = time.monotonic()
    generator = torch.Generator("cpu").manual_seed(request.seed)
    latents, conditions = model.adapter.prepare(model.pipe, request, generator)
    encoded = time.monotonic()
    latents, trace = _denoise_with_cache(model, request, latents, conditions, on_step)
    denoised = time.monotonic()
    video = model.adapter.decode(model.pipe, latents)
    frames = to_frames(video)
    model.pipe.maybe_free_model_hooks()
    return RenderedClip(
        frames=frames,
        trace=trace,
        encode_s=encoded - began,
        denoise_s=denoised - encoded,
        decode_s=time.monotonic() - denoised,
    )


def _denoise_with_cache(
    model: LoadedModel, request: ClipRequest, latents: torch.Tensor, conditions: Conditions, on_step: StepDone
) -> tuple[torch.Tensor, Trace | None]:
    steps = request.num_inference_steps
    plan = model.checkpoint.plan_cache(request.cache)
    if plan is None:
        return denoise(model, latents, conditions, steps, on_step), None
    with attach_cache(model.pipe.transformer, plan, num_branches=len(conditions.branches)) as cache:
        return denoise(model, latents, conditions, steps, on_step), cache.trace


def to_frames(video: torch.Tensor) -> np.ndarray:
    """[1, 3, F, H, W] in [-1, 1] -> [F, H, W, 3] uint8, rounded to the nearest of 256 levels."""
    pixels = (video[0].float() / 2 + 0.5).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()
