"""The parts of a converted Open-Sora 1.2 checkpoint: what each must say, and how they must fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cineray.pipeline.adapters.component import (
    Channels,
    Component,
    ComponentConfig,
    Dim,
    FlowMatchEulerConfig,
    Heads,
    Layers,
    Positive,
    Small,
    divides,
    scheduler,
    t5_encoder,
    tokenizer,
)

PIPELINE, LIBRARY = "OpenSoraPipeline", "cineray"  # of model_index.json; no class of them is in diffusers
MODULES = "cineray.pipeline.adapters"
# the VAE codes groups of 17 frames as 5 latent frames; timestep_transform in rectified_flow.py writes both out
GROUP_FRAMES, GROUP_LATENTS, FRAMES_PER_LATENT = 17, 5, 4
CHANNELS = 4  # of the latents


def published_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A published configuration by the names that are used here, less what it leaves open."""
    names = {"shift": "latents_shift", "scale": "latents_scale"}  # of the VAE; diffusers' models have no other `scale`
    return {names.get(name, name): value for name, value in config.items() if value is not None}


def num_latent_frames(num_frames: int) -> int:
    """Latent frames of a clip."""
    rest = num_frames % GROUP_FRAMES
    return num_frames // GROUP_FRAMES * GROUP_LATENTS + -(-rest // FRAMES_PER_LATENT)


class STDiT3Config(ComponentConfig):
    """STDiT3."""

    in_channels: Channels = CHANNELS
    patch_size: Annotated[list[Small], Field(min_length=3, max_length=3)] = [1, 2, 2]  # noqa: RUF012
    hidden_size: Dim = 1152
    depth: Layers = 28
    num_heads: Heads = 16
    mlp_ratio: Positive = 4.0
    caption_channels: Dim = 4096
    model_max_length: Annotated[int, Field(ge=1, le=2**16)] = 300
    input_sq_size: Dim = 512
    pred_sigma: bool = True
    qk_norm: bool = True

    @model_validator(mode="after")
    def _sizes(self) -> STDiT3Config:
        divides("hidden_size", self.hidden_size, "twice num_heads", 2 * self.num_heads)  # channels turn in pairs
        divides("hidden_size", self.hidden_size, "4, two sinusoids of two places,", 4)
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size must be of one frame, got {self.patch_size}")
        return self


class OpenSoraVAEConfig(ComponentConfig):
    """OpenSoraVAE."""

    block_out_channels: Annotated[list[Dim], Field(min_length=1, max_length=10)] = [128, 256, 512, 512]  # noqa: RUF012
    layers_per_block: Small = 2
    norm_num_groups: Dim = 32
    latent_channels: Literal[4] = CHANNELS
    filters: Dim = 128
    num_res_blocks: Small = 4
    channel_multipliers: Annotated[list[Small], Field(min_length=3, max_length=10)] = [1, 2, 2, 4]  # noqa: RUF012
    temporal_downsample: list[bool] = [False, True, True]  # noqa: RUF012
    temporal_norm_num_groups: Dim = 32
    micro_frame_size: Literal[17] = GROUP_FRAMES
    micro_batch_size: Annotated[int, Field(ge=1, le=1024)] = 4
    latents_shift: Annotated[list[float], Field(min_length=CHANNELS, max_length=CHANNELS)] = [-0.10, 0.34, 0.27, 0.98]  # noqa: RUF012
    latents_scale: Annotated[list[Positive], Field(min_length=CHANNELS, max_length=CHANNELS)] = [3.85, 2.32, 2.33, 3.06]  # noqa: RUF012

    @model_validator(mode="after")
    def _sizes(self) -> OpenSoraVAEConfig:
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1 or sum(self.temporal_downsample) != 2:
            raise ValueError("temporal_downsample must have one entry less than channel_multipliers, two of them true")
        for channels in self.block_out_channels:
            divides("block_out_channels", channels, "norm_num_groups", self.norm_num_groups)
        divides("filters", self.filters, "temporal_norm_num_groups", self.temporal_norm_num_groups)
        return self


COMPONENTS = (
    tokenizer("tokenizer"),
    t5_encoder("text_encoder"),
    Component(
        name="vae",
        library="diffusers",
        index_library=LIBRARY,
        module=f"{MODULES}.open_sora_vae",
        classes={"OpenSoraVAE": OpenSoraVAEConfig},
        weights="diffusion_pytorch_model",
    ),
    Component(
        name="transformer",
        library="diffusers",
        index_library=LIBRARY,
        module=f"{MODULES}.open_sora_transformer",
        classes={"STDiT3": STDiT3Config},
        weights="diffusion_pytorch_model",
        layers=(("depth", r"spatial_blocks\.(\d{1,9})\."), ("depth", r"temporal_blocks\.(\d{1,9})\.")),
    ),
    scheduler(FlowMatchEulerDiscreteScheduler=FlowMatchEulerConfig),
)


def misfit(parts: Mapping[str, Any]) -> str | None:
    """Where two parts of a checkpoint do not fit, in one phrase; None if all do."""
    transformer, width = parts["transformer"], parts["text_encoder"].d_model
    if transformer.in_channels != CHANNELS:
        return (
            f"transformer/config.json: in_channels must be {CHANNELS}, as the VAE's latents have, "
            f"got {transformer.in_channels}"
        )
    if transformer.caption_channels != width:
        return (
            f"transformer/config.json: caption_channels must be {width}, as the text encoder's d_model, "
            f"got {transformer.caption_channels}"
        )
    return None
