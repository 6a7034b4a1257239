"""The parts of a HunyuanVideo checkpoint: what each must say, and how they must fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cineray.pipeline.adapters.component import (
    MAX_LAYERS,
    Channels,
    CLIPTextConfig,
    CLIPVisionConfig,
    Component,
    ComponentConfig,
    Dim,
    Epsilon,
    FlowMatchEulerConfig,
    Heads,
    Layers,
    Positive,
    Rate,
    Small,
    Vocabulary,
    diffusers_model,
    divides,
    scheduler,
    sums_up,
    tokenizer,
)

IMAGE_PATCHES = 24  # along a side; image_emb_len 576 in pipeline_hunyuan_video_image2video.py
Even = Annotated[int, Field(ge=2, le=4096, multiple_of=2)]


class HunyuanTransformerFields(ComponentConfig):
    """HunyuanVideoTransformer3DModel, whatever it is conditioned on."""

    in_channels: Channels = 16
    out_channels: Channels = 16
    num_attention_heads: Heads = 24
    attention_head_dim: Annotated[int, Field(ge=6, le=4096)] = 128
    num_layers: Layers = 20
    num_single_layers: Layers = 40
    num_refiner_layers: Layers = 2
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    patch_size: Small = 2
    patch_size_t: Literal[1] = 1
    qk_norm: str | None = "rms_norm"
    guidance_embeds: bool = True
    text_embed_dim: Dim = 4096
    pooled_projection_dim: Dim = 768
    rope_theta: Positive = 256.0
    rope_axes_dim: Annotated[list[Even], Field(min_length=3, max_length=3)] = [16, 56, 56]  # noqa: RUF012 (frozen)

    @model_validator(mode="after")
    def _rotary(self) -> HunyuanTransformerFields:
        sums_up("rope_axes_dim", self.rope_axes_dim, "attention_head_dim", self.attention_head_dim)
        return self


class HunyuanTransformerConfig(HunyuanTransformerFields):
    """The one of text to video."""

    image_condition_type: None = None  # text in image-to-video checkpoints, which another pipeline renders


class HunyuanImageTransformerConfig(HunyuanTransformerFields):
    """The one of image to video."""

    image_condition_type: Literal["latent_concat", "token_replace"]


class HunyuanVAEConfig(ComponentConfig):
    """AutoencoderKLHunyuanVideo."""

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: Channels = 16
    down_block_types: list[Literal["HunyuanVideoDownBlock3D"]] = ["HunyuanVideoDownBlock3D"] * 4
    up_block_types: list[Literal["HunyuanVideoUpBlock3D"]] = ["HunyuanVideoUpBlock3D"] * 4
    block_out_channels: Annotated[list[Dim], Field(min_length=1, max_length=10)] = [128, 256, 512, 512]  # noqa: RUF012
    layers_per_block: Small = 2
    act_fn: str = "silu"
    norm_num_groups: Dim = 32
    scaling_factor: Positive = 0.476986
    spatial_compression_ratio: Literal[2, 4, 8, 16, 32] = 8
    temporal_compression_ratio: Literal[4, 8] = 4  # diffusers knows these two
    mid_block_add_attention: bool = True

    @model_validator(mode="after")
    def _blocks(self) -> HunyuanVAEConfig:
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != len(self.block_out_channels):
                raise ValueError(f"{name} must have one entry for each of block_out_channels")
        for channels in self.block_out_channels:
            divides("block_out_channels", channels, "norm_num_groups", self.norm_num_groups)
        halvings = len(self.block_out_channels) - 1
        for name in ("spatial_compression_ratio", "temporal_compression_ratio"):
            if getattr(self, name) > 2**halvings:
                raise ValueError(
                    f"{name} must be at most {2**halvings} with {halvings + 1} blocks, got {getattr(self, name)}"
                )
        return self


class LlamaFields(ComponentConfig):
    """What a Llama model and those that are built alike say."""

    hidden_size: Dim = 4096
    intermediate_size: Dim = 11008
    # the pipeline takes the last layer but two
    num_hidden_layers: Annotated[int, Field(ge=2, le=MAX_LAYERS)] = 32
    num_attention_heads: Heads = 32
    num_key_value_heads: Heads | None = None
    head_dim: Annotated[int, Field(ge=2, le=4096, multiple_of=2)] | None = None
    vocab_size: Vocabulary = 32000
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**24)] = 2048
    rms_norm_eps: Epsilon = 1e-6
    hidden_act: str = "silu"
    rope_theta: Positive | None = None
    attention_dropout: Rate = 0.0
    attention_bias: bool = False
    mlp_bias: bool = False

    @model_validator(mode="after")
    def _heads(self) -> LlamaFields:
        heads = self.num_attention_heads
        if self.head_dim is None:
            divides("hidden_size", self.hidden_size, "num_attention_heads", heads)
        divides("num_attention_heads", heads, "num_key_value_heads", self.num_key_value_heads or heads)
        return self


class LlamaConfig(LlamaFields):
    """Configuration of a LlamaModel."""

    model_type: Literal["llama"] = "llama"


class LlavaVisionConfig(CLIPVisionConfig):
    """The vision tower's: the pipeline counts on 24 x 24 of its patches."""

    @model_validator(mode="after")
    def _patches(self) -> LlavaVisionConfig:
        if self.image_size // self.patch_size != IMAGE_PATCHES:
            raise ValueError(
                f"image_size must be {IMAGE_PATCHES} times patch_size {self.patch_size}, got {self.image_size}"
            )
        return self


class LlavaConfig(ComponentConfig):
    """Configuration of a LlavaForConditionalGeneration."""

    model_type: Literal["llava"] = "llava"
    text_config: LlamaConfig
    vision_config: LlavaVisionConfig
    image_token_index: Annotated[int, Field(ge=0, le=2**24)]
    pad_token_id: Annotated[int, Field(ge=0, le=2**24)]
    vision_feature_select_strategy: Literal["default"] = "default"  # all patches, without the class token

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size


def _components(text_encoder: Component, transformer: type[ComponentConfig], *more: Component) -> tuple[Component, ...]:
    return (
        tokenizer("tokenizer"),
        text_encoder,
        tokenizer("tokenizer_2"),
        Component(
            name="text_encoder_2",
            library="transformers",
            classes={"CLIPTextModel": CLIPTextConfig},
            weights="model",
            layers=(("num_hidden_layers", r"(?:text_model\.)?encoder\.layers\.(\d{1,9})\."),),
            nested="text_config",
        ),
        diffusers_model("vae", "AutoencoderKLHunyuanVideo", HunyuanVAEConfig),
        diffusers_model(
            "transformer",
            "HunyuanVideoTransformer3DModel",
            transformer,
            (
                ("num_layers", r"transformer_blocks\.(\d{1,9})\."),
                ("num_single_layers", r"single_transformer_blocks\.(\d{1,9})\."),
                ("num_refiner_layers", r"context_embedder\.token_refiner\.refiner_blocks\.(\d{1,9})\."),
            ),
        ),
        scheduler(FlowMatchEulerDiscreteScheduler=FlowMatchEulerConfig),
        *more,
    )


COMPONENTS = _components(
    Component(
        name="text_encoder",
        library="transformers",
        classes={"LlamaModel": LlamaConfig},
        weights="model",
        layers=(("num_hidden_layers", r"(?:model\.)?layers\.(\d{1,9})\."),),
    ),
    HunyuanTransformerConfig,
)
IMAGE_TO_VIDEO = _components(
    Component(
        name="text_encoder",
        library="transformers",
        classes={"LlavaForConditionalGeneration": LlavaConfig},
        weights="model",
    ),
    HunyuanImageTransformerConfig,
    Component(
        name="image_processor",
        library="transformers",
        classes=dict.fromkeys(("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")),
    ),
)


def misfit(parts: Mapping[str, Any]) -> str | None:
    """Where two parts of a text-to-video checkpoint do not fit, in one phrase; None if all do.

    Args:
        parts: name -> configuration.
    """
    return _misfit(parts, parts["vae"].latent_channels, "as the VAE's latent_channels")


def image_misfit(parts: Mapping[str, Any]) -> str | None:
    """The same of an image-to-video checkpoint."""
    if parts["transformer"].image_condition_type == "token_replace":
        return misfit(parts)
    # the picture's latents and a mask stand beside the noise
    return _misfit(parts, 2 * parts["vae"].latent_channels + 1, "twice the VAE's latent_channels and one")


def _misfit(parts: Mapping[str, Any], in_channels: int, why: str) -> str | None:
    transformer, channels = parts["transformer"], parts["vae"].latent_channels
    pooled = parts["text_encoder_2"].hidden_size
    for name, wanted, because in (
        ("in_channels", in_channels, why),
        ("out_channels", channels, "as the VAE's latent_channels"),
        ("text_embed_dim", parts["text_encoder"].hidden_size, "as the text encoder's hidden_size"),
        ("pooled_projection_dim", pooled, "as the second text encoder's hidden_size"),
    ):
        got = getattr(transformer, name)
        if got != wanted:
            return f"transformer/config.json: {name} must be {wanted}, {because}, got {got}"
    return None
