"""Wan 2.2, text and image to video: A14B, whose two experts share the steps; TI2V-5B, with a timestep for each token.

Follows diffusers 0.42 pipelines/wan/pipeline_wan.py and pipeline_wan_i2v.py step by step, so that the same seed gives
the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cineray.pipeline.adapters import wan, wan_configs
from cineray.pipeline.adapters.model import SHIPPED, TINY_CLIP, KnownCheckpoint
from cineray.pipeline.adapters.protocol import (
    Defaults,
    Denoising,
    Expert,
    ModelConfigs,
    new_schedule,
    without_gradients,
)
from cineray.pipeline.request import ClipRequest, SizeRule

if TYPE_CHECKING:
    import torch

# Wan2.2's wan/configs/wan_t2v_A14B.py, wan_i2v_A14B.py and wan_ti2v_5B.py: steps, shift, guidance (the low-noise
# expert's stands first there, and last here); sizes from SUPPORTED_SIZES in wan/configs/__init__.py
_A14B = Defaults(width=1280, height=720, num_frames=81, fps=16, num_inference_steps=40, guidance_scale=4.0)
_TEXT_A14B = replace(_A14B, guidance_scale_2=3.0, flow_shift=12.0)
_IMAGE_A14B = replace(_A14B, guidance_scale=3.5, guidance_scale_2=3.5, flow_shift=5.0)
_TI2V_5B = Defaults(width=1280, height=704, num_frames=121, fps=24, guidance_scale=5.0, flow_shift=5.0)


def _boundary(configs: ModelConfigs) -> Any:
    return configs.index.get("boundary_ratio")


def _experts_unsupported(configs: ModelConfigs, /) -> str | None:
    boundary = _boundary(configs)
    if type(boundary) not in (int, float) or not 0 < boundary < 1:
        return f"model_index.json: boundary_ratio must be above 0 and below 1, got {boundary!r:.40}"
    if configs.index.get("transformer_2") in (None, [None, None]):
        return (
            f"model_index.json: boundary_ratio is {boundary}, so it is of two experts, and transformer_2 is missing; "
            "get the whole checkpoint"
        )
    if configs.index.get("expand_timesteps"):
        return "model_index.json: boundary_ratio and expand_timesteps cannot both be set"
    return None


def _per_token_unsupported(configs: ModelConfigs, /) -> str | None:
    patch = configs.transformer.get("patch_size", [1, 2, 2])
    if list(patch) != [1, 2, 2]:  # the pipeline counts on it
        return f"transformer/config.json: patch_size must be [1, 2, 2] with expand_timesteps, got {patch!r:.40}"
    return None


def _has_experts(configs: ModelConfigs, /) -> bool:
    return _boundary(configs) is not None


def _is_per_token(configs: ModelConfigs, /) -> bool:
    return bool(configs.index.get("expand_timesteps")) and not _has_experts(configs)


def _settled(defaults: Defaults, request: ClipRequest) -> ClipRequest:
    """The request with the shift that it gets."""
    return replace(request, flow_shift=defaults.flow_shift) if request.flow_shift is None else request


def _effective(defaults: Defaults, request: ClipRequest) -> ClipRequest:
    """As Wan 2.1's; the second expert's guidance is the first one's where none is given."""
    request = wan.effective(_settled(defaults, request))
    if request.guidance_scale <= 1.0 or request.guidance_scale_2 == request.guidance_scale:
        return replace(request, guidance_scale_2=None)
    return request


def _schedule(defaults: Defaults, pipe: Any, request: ClipRequest) -> tuple[Any, torch.Tensor]:
    return new_schedule(pipe, request.num_inference_steps, _settled(defaults, request).flow_shift)


def _with_experts(pipe: Any, request: ClipRequest, clip: Denoising) -> Denoising:
    """The clip with the expert that takes over from the first timestep below the boundary on."""
    boundary = pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
    second = request.guidance_scale if request.guidance_scale_2 is None else request.guidance_scale_2
    low = Expert(
        transformer=pipe.transformer_2,
        first_step=int((clip.timesteps >= boundary).sum()),
        guidance_scale=second,
    )
    return replace(clip, experts=(*clip.experts, low))


class TextToVideoExperts(wan.WanTextToVideo):
    """WanPipeline with two experts."""

    defaults = _TEXT_A14B
    components = (*wan_configs.TEXT_TO_VIDEO, wan_configs.SECOND_EXPERT)
    misfit = staticmethod(partial(wan_configs.experts_misfit, takes_image=False))
    is_of_kind = staticmethod(_has_experts)
    unsupported = staticmethod(_experts_unsupported)
    effective = staticmethod(partial(_effective, _TEXT_A14B))
    schedule = staticmethod(partial(_schedule, _TEXT_A14B))

    def size_rule(self, configs: ModelConfigs) -> SizeRule:
        return replace(super().size_rule(configs), takes_second_guidance=True)

    @without_gradients
    def start(
        self, pipe: Any, request: ClipRequest, encoded: Mapping[str, torch.Tensor], generator: torch.Generator
    ) -> Denoising:
        clip = super().start(pipe, _settled(self.defaults, request), encoded, generator)
        return _with_experts(pipe, request, clip)


class ImageToVideoExperts(TextToVideoExperts, wan.WanImageToVideo):
    """WanImageToVideoPipeline with two experts: what they add comes first, the picture's part is Wan 2.1's."""

    defaults = _IMAGE_A14B
    components = (*wan_configs.IMAGE_TO_VIDEO, wan_configs.SECOND_EXPERT)
    misfit = staticmethod(partial(wan_configs.experts_misfit, takes_image=True))
    effective = staticmethod(partial(_effective, _IMAGE_A14B))
    schedule = staticmethod(partial(_schedule, _IMAGE_A14B))


class TextToVideoPerToken(wan.WanTextToVideo):
    """WanPipeline with a timestep for each token, here the same for all."""

    defaults = _TI2V_5B
    is_of_kind = staticmethod(_is_per_token)
    unsupported = staticmethod(_per_token_unsupported)
    effective = staticmethod(partial(_effective, _TI2V_5B))
    schedule = staticmethod(partial(_schedule, _TI2V_5B))

    @without_gradients
    def start(
        self, pipe: Any, request: ClipRequest, encoded: Mapping[str, torch.Tensor], generator: torch.Generator
    ) -> Denoising:
        import torch

        clip = super().start(pipe, _settled(self.defaults, request), encoded, generator)
        is_noise = torch.ones_like(clip.latents[:, :1])
        return replace(clip, model_input=partial(_per_token, is_noise, None))


class ImageToVideoPerToken(wan.WanImageToVideo):
    """WanImageToVideoPipeline with a timestep for each token: those of the first frame are done."""

    defaults = _TI2V_5B
    misfit = staticmethod(partial(wan_configs.misfit, takes_image=False))
    is_of_kind = staticmethod(_is_per_token)
    unsupported = staticmethod(_per_token_unsupported)
    effective = staticmethod(partial(_effective, _TI2V_5B))
    schedule = staticmethod(partial(_schedule, _TI2V_5B))

    @without_gradients
    def start(
        self, pipe: Any, request: ClipRequest, encoded: Mapping[str, torch.Tensor], generator: torch.Generator
    ) -> Denoising:
        import torch

        clip = super().start(pipe, _settled(self.defaults, request), encoded, generator)
        is_noise, condition = torch.ones_like(clip.latents[:, :1]), clip.channel_condition
        is_noise[:, :, 0] = 0
        return replace(
            clip,
            channel_condition=None,
            model_input=partial(_per_token, is_noise, condition),
            finish=partial(_with_condition, is_noise, condition),
        )


def _per_token(
    is_noise: torch.Tensor, condition: torch.Tensor | None, latents: torch.Tensor, timestep: torch.Tensor, _: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents with the given frame, and a timestep for each token [B, S]: 0 for a token of that frame.

    Args:
        is_noise: [1, 1, F, H, W] of ones, and zeros where the latents are given.
        condition: [1, C, 1, H, W], or None.
    """
    per_token = (is_noise[0][0][:, ::2, ::2] * timestep).flatten().unsqueeze(0)
    hidden_states = latents if condition is None else _with_condition(is_noise, condition, latents)
    return hidden_states, per_token.expand(latents.shape[0], -1)


def _with_condition(is_noise: torch.Tensor, condition: Any, latents: torch.Tensor) -> torch.Tensor:
    return (1 - is_noise) * condition + is_noise * latents


EXPERTS = replace(
    wan.MODEL,
    family="wan2.2",
    pipelines={"WanPipeline": TextToVideoExperts(), "WanImageToVideoPipeline": ImageToVideoExperts()},
    denoiser_parts=("transformer", "transformer_2"),
    checkpoints={
        "tiny-wan2.2": KnownCheckpoint(
            source=str(SHIPPED / "tiny-wan2.2"),
            note="shipped; moving shapes, two experts, runs on a CPU",
            defaults=TINY_CLIP,
        ),
        "wan2.2-t2v-a14b": KnownCheckpoint(
            source="Wan-AI/Wan2.2-T2V-A14B-Diffusers", note="text to video, 480p and 720p, two experts"
        ),
        "wan2.2-i2v-a14b": KnownCheckpoint(
            source="Wan-AI/Wan2.2-I2V-A14B-Diffusers", note="image to video, 480p and 720p, two experts"
        ),
    },
)
PER_TOKEN = replace(
    wan.MODEL,
    family="wan2.2-ti2v",
    pipelines={"WanPipeline": TextToVideoPerToken(), "WanImageToVideoPipeline": ImageToVideoPerToken()},
    checkpoints={
        "wan2.2-ti2v-5b": KnownCheckpoint(source="Wan-AI/Wan2.2-TI2V-5B-Diffusers", note="text to video, 720p, 24 fps")
    },
)
