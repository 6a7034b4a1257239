"""The parts of a FLUX.1 checkpoint: what each must say, and how they must fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cineray.pipeline.adapters.component import (
    AutoencoderKLConfig,
    Channels,
    CLIPTextConfig,
    Component,
    ComponentConfig,
    Dim,
    FlowMatchFields,
    Heads,
    Layers,
    diffusers_model,
    scheduler,
    sums_up,
    t5_encoder,
    tokenizer,
)

Even = Annotated[int, Field(ge=2, le=4096, multiple_of=2)]


class FluxTransformerConfig(ComponentConfig):
    """FluxTransformer2DModel."""

    patch_size: Literal[1] = 1  # the pipeline packs 2 x 2 latents into a token
    in_channels: Annotated[int, Field(ge=4, le=2**16, multiple_of=4)] = 64
    out_channels: Channels | None = None
    num_layers: Layers = 19
    num_single_layers: Layers = 38
    attention_head_dim: Annotated[int, Field(ge=6, le=4096)] = 128
    num_attention_heads: Heads = 24
    joint_attention_dim: Dim = 4096
    pooled_projection_dim: Dim = 768
    guidance_embeds: bool = False
    axes_dims_rope: Annotated[list[Even], Field(min_length=3, max_length=3)] = [16, 56, 56]  # noqa: RUF012 (frozen)

    @model_validator(mode="after")
    def _rotary(self) -> FluxTransformerConfig:
        sums_up("axes_dims_rope", self.axes_dims_rope, "attention_head_dim", self.attention_head_dim)
        return self


class FluxSchedulerConfig(FlowMatchFields):
    """FlowMatchEulerDiscreteScheduler: with the shift that follows the number of tokens (dev), or without (schnell)."""

    num_train_timesteps: Literal[1000] = 1000  # the pipeline divides by it
    use_dynamic_shifting: bool = False


COMPONENTS = (
    tokenizer("tokenizer"),
    Component(
        name="text_encoder",
        library="transformers",
        classes={"CLIPTextModel": CLIPTextConfig},
        weights="model",
        layers=(("num_hidden_layers", r"(?:text_model\.)?encoder\.layers\.(\d{1,9})\."),),
        nested="text_config",
    ),
    tokenizer("tokenizer_2"),
    t5_encoder("text_encoder_2"),
    diffusers_model("vae", "AutoencoderKL", AutoencoderKLConfig),
    diffusers_model(
        "transformer",
        "FluxTransformer2DModel",
        FluxTransformerConfig,
        (
            ("num_layers", r"transformer_blocks\.(\d{1,9})\."),
            ("num_single_layers", r"single_transformer_blocks\.(\d{1,9})\."),
        ),
    ),
    scheduler(FlowMatchEulerDiscreteScheduler=FluxSchedulerConfig),
)


def misfit(parts: Mapping[str, Any]) -> str | None:
    """Where two parts of a checkpoint do not fit, in one phrase; None if all do.

    Args:
        parts: name -> configuration.
    """
    transformer, vae = parts["transformer"], parts["vae"]
    packed = 4 * vae.latent_channels
    for name, got, wanted, because in (
        ("in_channels", transformer.in_channels, packed, "four times the VAE's latent_channels"),
        ("out_channels", transformer.out_channels or transformer.in_channels, packed, "as in_channels"),
        (
            "joint_attention_dim",
            transformer.joint_attention_dim,
            parts["text_encoder_2"].d_model,
            "as the second text encoder's d_model",
        ),
        (
            "pooled_projection_dim",
            transformer.pooled_projection_dim,
            parts["text_encoder"].hidden_size,
            "as the text encoder's hidden_size",
        ),
    ):
        if got != wanted:
            return f"transformer/config.json: {name} must be {wanted}, {because}, got {got}"
    if vae.shift_factor is None:
        return "vae/config.json: shift_factor must be a number, got null"
    return None
