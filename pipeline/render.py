"""One clip from prompt to frames, in one process or on a gang of ranks."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from cineray.caching.plan import CachePlan
from cineray.caching.trace import Trace
from cineray.pipeline.adapters import Denoising
from cineray.pipeline.denoise import StepDone
from cineray.pipeline.finite import check_finite
from cineray.pipeline.gang import SOLO, Gang
from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.request import ClipRequest
from cineray.pipeline.resume.step_state import Keeper


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoisedClip:
    """Latents [1, ...] float32, what the cache did, and where the time went, in seconds."""

    latents: torch.Tensor
    trace: Trace | None
    encode_s: float
    denoise_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedClip:
    """Frames as the model's output has them, what the cache did, and where the time went, in seconds.

    Args:
        frames: [num_frames, height, width, 3] uint8 RGB of a video, with one frame of a picture; of a sound
            [number of samples, channels] int16.
        latents: float32 on the CPU, what the frames were decoded from.
    """

    frames: np.ndarray
    latents: torch.Tensor
    trace: Trace | None
    encode_s: float
    denoise_s: float
    decode_s: float


def render_clip(
    model: LoadedModel, request: ClipRequest, on_step: StepDone, keeper: Keeper | None = None
) -> RenderedClip:
    """Renders one clip in this process; the same request gives the same frames on the same kind of device.

    The noise is drawn on the CPU from the clip's seed, wherever the model runs.

    Args:
        keeper: keeps step states, so that the clip can resume where an earlier process left it.

    Raises:
        NotFiniteError: its latents or frames are not finite.
    """
    return decode_clip(model, denoise_clip(model, request, on_step, keeper=keeper), request)


def render_clip_on_gang(gang: Gang, model: LoadedModel, request: ClipRequest, on_step: StepDone) -> RenderedClip | None:
    """Renders one clip together; every rank of the gang calls it with the same model and request.

    Returns:
        The clip on the gang's first rank, None on the others.

    Raises:
        NotFiniteError: its latents are not finite, on every rank; or its frames, on the first.
        ValueError: the gang's layout does not fit the model or the request.
        RuntimeError: another rank failed or was not heard of in time; the gang cannot be used any more.
    """
    return decode_clip_on_gang(gang, model, denoise_clip(model, request, on_step, gang=gang), request)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedClip:
    """A clip before its first step, and the seconds that it took to encode it."""

    denoising: Denoising
    encode_s: float


def denoise_clip(
    model: LoadedModel,
    request: ClipRequest,
    on_step: StepDone,
    *,
    gang: Gang = SOLO,
    keeper: Keeper | None = None,
    encoded: Mapping[str, torch.Tensor] | None = None,
) -> DenoisedClip:
    """Denoises a clip from its prompt to its latents, the same on every rank of a gang.

    Args:
        encoded: what another process has encoded, as `prepare_clip`.

    Raises:
        NotFiniteError: the latents are not finite, on every rank alike.
    """
    return denoise_prepared(model, request, prepare_clip(model, request, encoded), on_step, gang=gang, keeper=keeper)


def prepare_clip(
    model: LoadedModel, request: ClipRequest, encoded: Mapping[str, torch.Tensor] | None = None
) -> PreparedClip:
    """Encodes the prompt and draws the noise; on a gang every rank does it by itself.

    Args:
        encoded: the table of the adapter's `encode`, where another process has made it; then neither encoders nor VAE
            need be in memory.
    """
    began = time.monotonic()
    if encoded is None:
        encoded = model.adapter.encode(model.pipe, request)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    denoising = model.adapter.start(model.pipe, request, encoded, generator)
    return PreparedClip(denoising=denoising, encode_s=time.monotonic() - began)


def denoise_prepared(
    model: LoadedModel,
    request: ClipRequest,
    prepared: PreparedClip,
    on_step: StepDone,
    *,
    gang: Gang = SOLO,
    keeper: Keeper | None = None,
    plan: CachePlan | None = None,
) -> DenoisedClip:
    """The loop over steps, the same on every rank of a gang.

    Args:
        plan: of the cache, in the place of the one that the request names.
    """
    began = time.monotonic()
    latents, trace = gang.denoise(model, request, prepared.denoising, on_step, keeper, plan)
    check_finite(latents, "latents", "denoising", request.id, request.cache)
    return DenoisedClip(latents=latents, trace=trace, encode_s=prepared.encode_s, denoise_s=time.monotonic() - began)


def decode_clip(model: LoadedModel, clip: DenoisedClip, request: ClipRequest) -> RenderedClip:
    """Decodes latents to frames in this process.

    Raises:
        NotFiniteError: the video is not finite.
    """
    rendered = decode_clip_on_gang(SOLO, model, clip, request)
    assert rendered is not None  # a gang of one is its first rank
    return rendered


def decode_clip_on_gang(
    gang: Gang, model: LoadedModel, clip: DenoisedClip, request: ClipRequest
) -> RenderedClip | None:
    """Decodes latents to frames; every rank of the gang calls it and its first rank gets the frames.

    Raises:
        NotFiniteError: the video is not finite.
    """
    began = time.monotonic()
    video = gang.decode(model, request, clip.latents)
    model.pipe.maybe_free_model_hooks()
    if video is None:
        return None
    check_finite(video, "frames", "decoding", request.id)
    return RenderedClip(
        frames=to_frames(video) if video.ndim == 5 else to_samples(video),
        latents=clip.latents.float().cpu(),
        trace=clip.trace,
        encode_s=clip.encode_s,
        denoise_s=clip.denoise_s,
        decode_s=time.monotonic() - began,
    )


def to_frames(video: torch.Tensor) -> np.ndarray:
    """[1, 3, F, H, W] in [-1, 1] -> [F, H, W, 3] uint8, rounded to the nearest of 256 levels."""
    pixels = (video[0].float() / 2 + 0.5).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()


def to_samples(sound: torch.Tensor) -> np.ndarray:
    """[1, channels, N] in [-1, 1] -> [N, channels] int16, rounded to the nearest of 65,535 levels."""
    levels = (sound[0].float().clamp(-1, 1) * 32767).round()
    return levels.to(torch.int16).T.contiguous().cpu().numpy()
