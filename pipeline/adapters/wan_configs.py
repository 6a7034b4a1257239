"""The parts of a Wan 2.1 checkpoint: what each must say, and how they must fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cineray.pipeline.adapters.component import (
    Channels,
    CLIPVisionConfig,
    Component,
    ComponentConfig,
    Dim,
    Epsilon,
    FlowMatchEulerConfig,
    Heads,
    Layers,
    MultistepFlowConfig,
    Positive,
    Rate,
    Small,
    T5Fields,
    diffusers_model,
    scheduler,
    t5_encoder,
    tokenizer,
)


class WanTransformerConfig(ComponentConfig):
    """WanTransformer3DModel."""

    patch_size: Annotated[list[Small], Field(min_length=3, max_length=3)] = [1, 2, 2]  # noqa: RUF012 (frozen)
    num_attention_heads: Heads = 40
    attention_head_dim: Annotated[int, Field(ge=6, le=4096, multiple_of=2)] = 128  # a rotary pair for each of 3 axes
    in_channels: Channels = 16
    out_channels: Channels | None = 16
    text_dim: Dim = 4096
    freq_dim: Annotated[int, Field(ge=2, le=65536, multiple_of=2)] = 256
    ffn_dim: Dim = 13824
    num_layers: Layers = 40
    cross_attn_norm: bool = True
    qk_norm: Literal["rms_norm_across_heads"] | None = "rms_norm_across_heads"
    eps: Epsilon = 1e-6
    image_dim: Dim | None = None
    added_kv_proj_dim: Dim | None = None
    rope_max_seq_len: Annotated[int, Field(ge=1, le=65536)] = 1024
    pos_embed_seq_len: None = None  # a number in checkpoints that take a first and a last frame: not rendered

    @model_validator(mode="after")
    def _patches(self) -> WanTransformerConfig:
        frames, height, width = self.patch_size
        if frames != 1 or height != width:
            raise ValueError(f"patch_size must be [1, P, P], got {self.patch_size}")
        if (self.image_dim is None) != (self.added_kv_proj_dim is None):
            raise ValueError("image_dim and added_kv_proj_dim must both be numbers or both be null")
        return self


class WanVAEConfig(ComponentConfig):
    """Configuration of an AutoencoderKLWan."""

    base_dim: Dim = 96
    decoder_base_dim: Dim | None = None
    z_dim: Channels = 16
    dim_mult: Annotated[list[Small], Field(min_length=1, max_length=10)] = [1, 2, 4, 4]  # noqa: RUF012 (frozen)
    num_res_blocks: Annotated[int, Field(ge=1, le=64)] = 2
    attn_scales: list[float] = []  # noqa: RUF012 (frozen)
    temperal_downsample: list[bool] = [False, True, True]  # noqa: RUF012 (frozen)
    dropout: Rate = 0.0
    latents_mean: list[float] | None = None
    latents_std: list[Positive] | None = None
    is_residual: bool = False
    in_channels: Channels = 3
    out_channels: Channels = 3
    patch_size: Small | None = None
    scale_factor_temporal: Small = 4
    scale_factor_spatial: Small = 8

    @model_validator(mode="after")
    def _fits_together(self) -> WanVAEConfig:
        for name in ("latents_mean", "latents_std"):
            numbers = getattr(self, name)
            length = 16 if numbers is None else len(numbers)  # diffusers' default has 16
            if length != self.z_dim:
                raise ValueError(f"{name} must have z_dim {self.z_dim} numbers, got {length}")
        halvings = len(self.dim_mult) - 1
        if len(self.temperal_downsample) != halvings:
            raise ValueError(f"temperal_downsample must have {halvings} values, got {len(self.temperal_downsample)}")
        patch = self.patch_size or 1
        for name, wanted in (
            ("scale_factor_temporal", 2 ** sum(self.temperal_downsample)),
            ("scale_factor_spatial", 2**halvings * patch),
            ("in_channels", 3 * patch**2),
            ("out_channels", 3 * patch**2),
        ):
            if getattr(self, name) != wanted:
                raise ValueError(f"{name} must be {wanted}, as its layers make it, got {getattr(self, name)}")
        return self


class UMT5Config(T5Fields):
    """Configuration of a UMT5EncoderModel."""

    model_type: Literal["umt5"] = "umt5"


def _components(*more: Component) -> tuple[Component, ...]:
    return (
        tokenizer("tokenizer"),
        t5_encoder("text_encoder", "UMT5EncoderModel", UMT5Config),
        diffusers_model("vae", "AutoencoderKLWan", WanVAEConfig),
        diffusers_model(
            "transformer", "WanTransformer3DModel", WanTransformerConfig, (("num_layers", r"blocks\.(\d{1,9})\."),)
        ),
        scheduler(
            UniPCMultistepScheduler=MultistepFlowConfig,
            FlowMatchEulerDiscreteScheduler=FlowMatchEulerConfig,
            DPMSolverMultistepScheduler=MultistepFlowConfig,
        ),
        *more,
    )


TEXT_TO_VIDEO = _components()
IMAGE_TO_VIDEO = _components(
    Component(
        name="image_encoder",
        library="transformers",
        classes=dict.fromkeys(("CLIPVisionModel", "CLIPVisionModelWithProjection"), CLIPVisionConfig),
        is_optional=True,
        weights="model",
        layers=(("num_hidden_layers", r"(?:vision_model\.)?encoder\.layers\.(\d{1,9})\."),),
        nested="vision_config",
    ),
    Component(
        name="image_processor",
        library="transformers",
        classes=dict.fromkeys(("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")),
        is_optional=True,
    ),
)


SECOND_EXPERT = diffusers_model(
    "transformer_2", "WanTransformer3DModel", WanTransformerConfig, (("num_layers", r"blocks\.(\d{1,9})\."),)
)


def experts_misfit(parts: Mapping[str, Any], takes_image: bool) -> str | None:
    """As `misfit`, of a checkpoint with two experts, which are built alike."""
    if parts["transformer_2"] != parts["transformer"]:
        return "transformer_2/config.json: it must say what transformer/config.json says: one plan serves both experts"
    return misfit(parts, takes_image)


def misfit(parts: Mapping[str, Any], takes_image: bool) -> str | None:
    """Where two parts of a checkpoint do not fit, in one phrase; None if all do.

    Args:
        parts: name -> configuration, of the components that are there.
    """
    transformer, vae, text_encoder = parts["transformer"], parts["vae"], parts["text_encoder"]
    # the image's latents and a mask of as many channels as a latent frame has frames stand beside the noise
    latents = 2 * vae.z_dim + vae.scale_factor_temporal if takes_image else vae.z_dim
    for name, got, wanted, because in (
        ("in_channels", transformer.in_channels, latents, f"for a VAE with z_dim {vae.z_dim}"),
        ("out_channels", transformer.out_channels or transformer.in_channels, vae.z_dim, "as the VAE's z_dim"),
        ("text_dim", transformer.text_dim, text_encoder.d_model, "as the text encoder's d_model"),
    ):
        if got != wanted:
            return f"transformer/config.json: {name} must be {wanted}, {because}, got {got}"
    if not takes_image and transformer.image_dim is not None:
        return f"transformer/config.json: image_dim must be null in a text-to-video model, got {transformer.image_dim}"
    if takes_image and transformer.image_dim is not None:
        if "image_encoder" not in parts or "image_processor" not in parts:
            return "model_index.json: image_encoder and image_processor must be there: the transformer has an image_dim"
        if transformer.image_dim != parts["image_encoder"].hidden_size:
            return (
                f"transformer/config.json: image_dim must be {parts['image_encoder'].hidden_size}, as the image "
                f"encoder's hidden_size, got {transformer.image_dim}"
            )
    return None
