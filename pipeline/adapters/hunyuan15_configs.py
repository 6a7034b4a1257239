"""The parts of a HunyuanVideo 1.5 checkpoint: what each must say, and how they must fit together."""

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
    VisionFields,
    diffusers_model,
    divides,
    scheduler,
    sums_up,
    t5_encoder,
    tokenizer,
)
from cineray.pipeline.adapters.hunyuan_configs import Even, LlamaFields


class Hunyuan15TransformerConfig(ComponentConfig):
    """HunyuanVideo15Transformer3DModel, of text and of image to video alike."""

    in_channels: Channels = 65
    out_channels: Channels = 32
    num_attention_heads: Heads = 16
    attention_head_dim: Annotated[int, Field(ge=6, le=4096)] = 128
    num_layers: Layers = 54
    num_refiner_layers: Layers = 2
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    patch_size: Small = 1
    patch_size_t: Literal[1] = 1
    qk_norm: Literal["rms_norm"] = "rms_norm"
    text_embed_dim: Dim = 3584
    text_embed_2_dim: Dim = 1472
    image_embed_dim: Dim = 1152
    rope_theta: Positive = 256.0
    rope_axes_dim: Annotated[list[Even], Field(min_length=3, max_length=3)] = [16, 56, 56]  # noqa: RUF012 (frozen)
    target_size: Annotated[int, Field(ge=1, le=8192)] = 640
    use_meanflow: bool = False

    @model_validator(mode="after")
    def _rotary(self) -> Hunyuan15TransformerConfig:
        sums_up("rope_axes_dim", self.rope_axes_dim, "attention_head_dim", self.attention_head_dim)
        return self


class Hunyuan15VAEConfig(ComponentConfig):
    """AutoencoderKLHunyuanVideo15."""

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: Channels = 32
    block_out_channels: Annotated[list[Dim], Field(min_length=2, max_length=10)] = [128, 256, 512, 1024, 1024]  # noqa: RUF012
    layers_per_block: Small = 2
    spatial_compression_ratio: Literal[2, 4, 8, 16, 32] = 16
    temporal_compression_ratio: Literal[1, 2, 4, 8] = 4
    downsample_match_channel: Literal[True] = True
    upsample_match_channel: Literal[True] = True
    scaling_factor: Positive = 1.03682

    @model_validator(mode="after")
    def _blocks(self) -> Hunyuan15VAEConfig:
        """Pixels go into channels and back in its up- and downsamplers, which must come out even."""
        halvings = self.spatial_compression_ratio.bit_length() - 1
        if len(self.block_out_channels) <= halvings:
            raise ValueError(
                f"block_out_channels must have more than {halvings} entries for spatial_compression_ratio "
                f"{self.spatial_compression_ratio}, got {len(self.block_out_channels)}"
            )
        if self.temporal_compression_ratio > self.spatial_compression_ratio:
            raise ValueError(
                f"temporal_compression_ratio must be at most spatial_compression_ratio "
                f"{self.spatial_compression_ratio}, got {self.temporal_compression_ratio}"
            )
        divides("block_out_channels", self.block_out_channels[-1], "twice latent_channels", 2 * self.latent_channels)
        for fewer, more in zip(self.block_out_channels, self.block_out_channels[1:], strict=False):
            if more not in (fewer, 2 * fewer, 4 * fewer) or more % 8:
                raise ValueError(
                    f"block_out_channels must be multiples of 8, each 1, 2 or 4 times the one before, got {fewer}, "
                    f"then {more}"
                )
        return self


class QwenTextConfig(LlamaFields):
    """Qwen2_5_VLTextModel, whose layers are built as Llama's."""

    model_type: Literal["qwen2_5_vl_text"] = "qwen2_5_vl_text"
    hidden_size: Dim = 8192
    intermediate_size: Dim = 29568
    num_hidden_layers: Annotated[int, Field(ge=2, le=1000)] = 80  # the pipeline takes the last one but two
    num_attention_heads: Heads = 64
    num_key_value_heads: Heads | None = 8
    vocab_size: Annotated[int, Field(ge=1, le=2**24)] = 152064
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**24)] = 32768


class SiglipVisionConfig(VisionFields):
    """SiglipVisionModel."""

    model_type: Literal["siglip_vision_model", "siglip"] = "siglip_vision_model"
    num_hidden_layers: Layers = 12
    patch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    hidden_act: str = "gelu_pytorch_tanh"


_Zero = Annotated[float, Field(ge=0, le=0)]


class GuiderConfig(ComponentConfig):
    """ClassifierFreeGuidance as the loop has it: at every step, by the usual formula, without rescaling."""

    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 7.5
    guidance_rescale: _Zero = 0.0
    use_original_formulation: Literal[False] = False
    start: _Zero = 0.0
    stop: Annotated[float, Field(ge=1, le=1)] = 1.0
    enabled: Literal[True] = True


def _components(*more: Component) -> tuple[Component, ...]:
    return (
        tokenizer("tokenizer"),
        Component(
            name="text_encoder",
            library="transformers",
            classes={"Qwen2_5_VLTextModel": QwenTextConfig},
            weights="model",
            layers=(("num_hidden_layers", r"(?:model\.)?(?:language_model\.)?layers\.(\d{1,9})\."),),
            nested="text_config",
        ),
        tokenizer("tokenizer_2"),
        t5_encoder("text_encoder_2"),
        diffusers_model("vae", "AutoencoderKLHunyuanVideo15", Hunyuan15VAEConfig),
        diffusers_model(
            "transformer",
            "HunyuanVideo15Transformer3DModel",
            Hunyuan15TransformerConfig,
            (
                ("num_layers", r"transformer_blocks\.(\d{1,9})\."),
                ("num_refiner_layers", r"context_embedder\.token_refiner\.refiner_blocks\.(\d{1,9})\."),
            ),
        ),
        scheduler(FlowMatchEulerDiscreteScheduler=FlowMatchEulerConfig),
        Component(
            name="guider",
            library="diffusers",
            classes={"ClassifierFreeGuidance": GuiderConfig},
            file="guider_config.json",
        ),
        *more,
    )


TEXT_TO_VIDEO = _components()
IMAGE_TO_VIDEO = _components(
    Component(
        name="image_encoder",
        library="transformers",
        classes={"SiglipVisionModel": SiglipVisionConfig},
        weights="model",
        layers=(("num_hidden_layers", r"(?:vision_model\.)?encoder\.layers\.(\d{1,9})\."),),
        nested="vision_config",
    ),
    Component(
        name="feature_extractor",
        library="transformers",
        classes=dict.fromkeys(("SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil")),
    ),
)


def misfit(parts: Mapping[str, Any]) -> str | None:
    """Where two parts of a checkpoint do not fit, in one phrase; None if all do.

    Args:
        parts: name -> configuration, of the components that are there.
    """
    transformer, channels = parts["transformer"], parts["vae"].latent_channels
    wanted = [
        ("in_channels", 2 * channels + 1, "twice the VAE's latent_channels and one"),
        ("out_channels", channels, "as the VAE's latent_channels"),
        ("text_embed_dim", parts["text_encoder"].hidden_size, "as the text encoder's hidden_size"),
        ("text_embed_2_dim", parts["text_encoder_2"].d_model, "as the second text encoder's d_model"),
    ]
    if "image_encoder" in parts:
        wanted.append(("image_embed_dim", parts["image_encoder"].hidden_size, "as the image encoder's hidden_size"))
    for name, value, because in wanted:
        got = getattr(transformer, name)
        if got != value:
            return f"transformer/config.json: {name} must be {value}, {because}, got {got}"
    return None
