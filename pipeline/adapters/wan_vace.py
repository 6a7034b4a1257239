"""Wan 2.1 VACE: text to video with reference images, and with a control video and its mask.

Follows diffusers 0.42 pipelines/wan/pipeline_wan_vace.py step by step, so that the same seed gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from cineray.pipeline.adapters import wan, wan_configs
from cineray.pipeline.adapters.component import Channels, diffusers_model
from cineray.pipeline.adapters.model import KnownCheckpoint
from cineray.pipeline.adapters.protocol import (
    Defaults,
    Denoising,
    ModelConfigs,
    draw_noise,
    new_schedule,
    without_gradients,
)
from cineray.pipeline.media.control import control_frames, mask_frames, reference_pictures
from cineray.pipeline.request import ClipRequest, SizeRule, control_inputs

if TYPE_CHECKING:
    import torch

FLOW_SHIFT = 16.0  # Wan2.1's generate.py, for tasks with "vace"


class VaceTransformerConfig(wan_configs.WanTransformerConfig):
    """WanVACETransformer3DModel."""

    vace_layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0, 5, 10, 15, 20, 25, 30, 35]  # noqa: RUF012
    vace_in_channels: Channels = 96

    @model_validator(mode="after")
    def _layers(self) -> VaceTransformerConfig:
        layers = self.vace_layers
        if layers != sorted(set(layers)) or layers[0] != 0 or layers[-1] >= self.num_layers:
            raise ValueError(f"vace_layers must rise from 0 to at most {self.num_layers - 1}, got {layers!r:.80}")
        return self


TRANSFORMER = diffusers_model(
    "transformer",
    "WanVACETransformer3DModel",
    VaceTransformerConfig,
    (("num_layers", r"blocks\.(\d{1,9})\."),),
)


def misfit(parts: Mapping[str, Any]) -> str | None:
    """As Wan 2.1's of text to video; and what the control has beside its latents is a mask."""
    transformer, vae = parts["transformer"], parts["vae"]
    # what is kept and what is made anew, and a mask of as many channels as a latent has pixels
    wanted = 2 * vae.z_dim + vae.scale_factor_spatial**2
    if transformer.vace_in_channels != wanted:
        return (
            f"transformer/config.json: vace_in_channels must be {wanted}, for a VAE with z_dim {vae.z_dim}, "
            f"got {transformer.vace_in_channels}"
        )
    return wan_configs.misfit(parts, takes_image=False)


def _unsupported(configs: ModelConfigs, /) -> str | None:
    if (
        configs.index.get("transformer_2") not in (None, [None, None])
        or configs.index.get("boundary_ratio") is not None
    ):
        return "it is a VACE of two experts (Wan 2.2), which is not rendered"
    return None


def _is_of_kind(_configs: ModelConfigs, /) -> bool:
    return True


def _settled(request: ClipRequest) -> ClipRequest:
    return replace(request, flow_shift=FLOW_SHIFT) if request.flow_shift is None else request


def _effective(request: ClipRequest) -> ClipRequest:
    """As Wan's, and a conditioning scale of 1 is the one that is not given."""
    scale = None if request.conditioning_scale == 1 else request.conditioning_scale
    return replace(wan.effective(_settled(request)), conditioning_scale=scale)


def _schedule(pipe: Any, request: ClipRequest) -> tuple[Any, torch.Tensor]:
    return new_schedule(pipe, request.num_inference_steps, _settled(request).flow_shift)


def _with_references(frame_step: int, request: ClipRequest) -> ClipRequest:
    """The request with the frames that the reference images stand for, in front of those that are shown."""
    return replace(request, num_frames=request.num_frames + frame_step * len(request.reference_images))


class WanVace(wan.WanTextToVideo):
    # as Wan 2.1's text to video, in 480p
    defaults = Defaults(width=832, height=480, num_frames=81, fps=16, guidance_scale=5.0, flow_shift=FLOW_SHIFT)
    components = tuple(TRANSFORMER if c.name == "transformer" else c for c in wan_configs.TEXT_TO_VIDEO)

    misfit = staticmethod(misfit)
    is_of_kind = staticmethod(_is_of_kind)
    unsupported = staticmethod(_unsupported)
    effective = staticmethod(_effective)
    schedule = staticmethod(_schedule)

    def size_rule(self, configs: ModelConfigs) -> SizeRule:
        return replace(super().size_rule(configs), takes_control=True)

    def num_tokens(self, configs: ModelConfigs, request: ClipRequest) -> int:
        frame_step = configs.vae.get("scale_factor_temporal", 4)
        return wan.WanTextToVideo.num_tokens(configs, _with_references(frame_step, request))

    def encode_inputs(self, request: ClipRequest) -> dict[str, Any]:
        """What the control is made of, and its size, beside the prompts."""
        return {
            **super().encode_inputs(request),
            **control_inputs(request),
            "size": [request.width, request.height, request.num_frames],
        }

    @without_gradients
    def encode(self, pipe: Any, request: ClipRequest) -> dict[str, torch.Tensor]:
        """Text embeddings by branch, and "control" [1, C', R + F, H, W]: reference images, then frames."""
        return {**super().encode(pipe, request), "control": encode_control(pipe, request)}

    @without_gradients
    def start(
        self, pipe: Any, request: ClipRequest, encoded: Mapping[str, torch.Tensor], generator: torch.Generator
    ) -> Denoising:
        import torch

        transformer = pipe.transformer
        whole = _with_references(pipe.vae_scale_factor_temporal, request)
        latents = draw_noise(pipe, whole, transformer.config.in_channels, generator)
        extra = {
            "control_hidden_states": encoded["control"].to(latents.device, transformer.dtype),
            "control_hidden_states_scale": torch.full(
                (len(transformer.config.vace_layers),),
                1.0 if request.conditioning_scale is None else request.conditioning_scale,
                dtype=transformer.dtype,
                device=latents.device,
            ),
        }
        return wan.denoising(pipe, _settled(request), encoded, latents, extra)

    @without_gradients
    def decode(
        self, pipe: Any, request: ClipRequest, latents: torch.Tensor, generator: torch.Generator, /
    ) -> torch.Tensor:
        return wan.WanTextToVideo.decode(pipe, request, latents[:, :, len(request.reference_images) :], generator)


def encode_control(pipe: Any, request: ClipRequest) -> torch.Tensor:
    """What the transformer is given of the control [1, C', R + F, H, W]: reference images, then frames.

    Without a control video it is one of zeros, which goes through the VAE as well.
    """
    import torch

    device, size = pipe._execution_device, (request.height, request.width)
    video, mask, references = pipe.preprocess_conditions(
        None,
        mask_frames(request),
        reference_pictures(request) or None,
        1,
        *size,
        request.num_frames,
        torch.float32,
        device,
    )
    frames = control_frames(request)
    if frames is not None:
        video = pipe.video_processor.preprocess_video(frames, *size).to(device, torch.float32)
    latents = pipe.prepare_video_latents(video, mask, references, None, device)
    return torch.cat([latents, _mask_channels(pipe, mask, len(references[0]))], dim=1)


def _mask_channels(pipe: Any, mask: torch.Tensor, num_references: int) -> torch.Tensor:
    """The mask as channels of latents, as `WanVACEPipeline.prepare_masks` makes it, which asks the transformer.

    Args:
        mask: [1, 3, number of frames, height, width], from 0 to 1.

    Returns:
        [1, pixels of a latent, R + F, H, W]; 0 for reference images.
    """
    import torch
    from torch.nn import functional

    _, _, num_frames, height, width = mask.shape
    space = pipe.vae_scale_factor_spatial
    num_latents = (num_frames + pipe.vae_scale_factor_temporal - 1) // pipe.vae_scale_factor_temporal
    pixels = mask[0, 0].view(num_frames, height // space, space, width // space, space)
    pixels = pixels.permute(2, 4, 0, 1, 3).flatten(0, 1)[None]
    made = functional.interpolate(pixels, size=(num_latents, height // space, width // space), mode="nearest-exact")
    return torch.cat([torch.zeros_like(made[:, :, :num_references]), made], dim=2)


MODEL = replace(
    wan.MODEL,
    transformer="WanVACETransformer3DModel",
    family="wan-vace",
    layout=replace(
        wan.MODEL.layout,
        hints="vace_blocks",
        hinted="vace_layers",
        unread=(*wan.MODEL.layout.unread, "vace_patch_embedding"),
    ),
    pipelines={"WanVACEPipeline": WanVace()},
    encoder_parts=("text_encoder",),
    presets={},
    takes_lora=True,
    checkpoints={
        "wan2.1-vace-1.3b": KnownCheckpoint(
            source="Wan-AI/Wan2.1-VACE-1.3B-diffusers", note="text to video by references and control, 480p"
        ),
        "wan2.1-vace-14b": KnownCheckpoint(
            source="Wan-AI/Wan2.1-VACE-14B-diffusers", note="text to video by references and control, 480p and 720p"
        ),
    },
)
