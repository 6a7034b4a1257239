"""The parts of a Stable Audio Open checkpoint: what each must say, and how they must fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cineray.pipeline.adapters.component import (
    Channels,
    Component,
    ComponentConfig,
    Dim,
    Heads,
    Layers,
    Positive,
    Small,
    diffusers_model,
    divides,
    scheduler,
    t5_encoder,
    tokenizer,
)

DOWNSAMPLING = (2, 4, 4, 8, 8)  # AutoencoderOobleck's default


class StableAudioTransformerConfig(ComponentConfig):
    """StableAudioDiTModel."""

    sample_size: Annotated[float, Field(ge=1, le=2**20)] = 1024  # 1024.0 in the published file
    in_channels: Channels = 64
    out_channels: Channels = 64
    num_layers: Layers = 24
    attention_head_dim: Annotated[int, Field(ge=4, le=4096, multiple_of=4)] = 64  # half of it is rotated, in pairs
    num_attention_heads: Heads = 24
    num_key_value_attention_heads: Heads = 12
    cross_attention_dim: Dim = 768
    time_proj_dim: Annotated[int, Field(ge=2, le=65536, multiple_of=2)] = 256
    global_states_input_dim: Dim = 1536
    cross_attention_input_dim: Dim = 768

    @model_validator(mode="after")
    def _heads(self) -> StableAudioTransformerConfig:
        divides(
            "num_attention_heads",
            self.num_attention_heads,
            "num_key_value_attention_heads",
            self.num_key_value_attention_heads,
        )
        return self


class OobleckConfig(ComponentConfig):
    """AutoencoderOobleck."""

    encoder_hidden_size: Dim = 128
    downsampling_ratios: Annotated[list[Small], Field(min_length=1, max_length=10)] = [*DOWNSAMPLING]  # noqa: RUF012
    channel_multiples: Annotated[list[Small], Field(min_length=1, max_length=10)] = [1, 2, 4, 8, 16]  # noqa: RUF012
    decoder_channels: Dim = 128
    decoder_input_channels: Channels = 64
    audio_channels: Literal[1, 2] = 2
    sampling_rate: Annotated[int, Field(ge=1, le=192_000)] = 44100

    @model_validator(mode="after")
    def _lengths(self) -> OobleckConfig:
        if len(self.channel_multiples) != len(self.downsampling_ratios):
            raise ValueError("channel_multiples must have one entry for each of downsampling_ratios")
        return self


class ProjectionConfig(ComponentConfig):
    """StableAudioProjectionModel."""

    text_encoder_dim: Dim
    conditioning_dim: Dim
    min_value: Annotated[float, Field(ge=0)]
    max_value: Positive


class EDMFields(ComponentConfig):
    """What both of its schedulers have: sigmas between two bounds."""

    sigma_min: Positive
    sigma_max: Positive
    num_train_timesteps: Annotated[int, Field(ge=1, le=100_000)] = 1000
    rho: Positive = 7.0
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    @model_validator(mode="after")
    def _sigmas(self) -> EDMFields:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min must be below sigma_max {self.sigma_max:g}, got {self.sigma_min:g}")
        return self


class EDMConfig(EDMFields):
    """EDMDPMSolverMultistepScheduler."""

    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    sigma_data: Positive = 0.5
    sigma_schedule: Literal["karras", "exponential"] = "karras"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    solver_order: Annotated[int, Field(ge=1, le=3)] = 2
    thresholding: bool = False
    dynamic_thresholding_ratio: Annotated[float, Field(gt=0, le=1)] = 0.995
    sample_max_value: Positive = 1.0
    algorithm_type: Literal["dpmsolver++"] = "dpmsolver++"  # the other kind draws noise that no resumed clip could


class CosineConfig(EDMFields):
    """CosineDPMSolverMultistepScheduler: its noise follows from the seed and two sigmas, whatever came before."""

    sigma_min: Positive = 0.3
    sigma_max: Positive = 500.0
    sigma_data: Positive = 1.0
    sigma_schedule: Literal["karras", "exponential"] = "exponential"
    prediction_type: Literal["epsilon", "v_prediction"] = "v_prediction"
    solver_order: Annotated[int, Field(ge=1, le=2)] = 2


COMPONENTS = (
    tokenizer("tokenizer"),
    t5_encoder("text_encoder"),
    Component(
        name="projection_model",
        library="diffusers",
        index_library="stable_audio",  # the pipeline's own module
        classes={"StableAudioProjectionModel": ProjectionConfig},
        weights="diffusion_pytorch_model",
    ),
    diffusers_model("vae", "AutoencoderOobleck", OobleckConfig),
    diffusers_model(
        "transformer",
        "StableAudioDiTModel",
        StableAudioTransformerConfig,
        (("num_layers", r"transformer_blocks\.(\d{1,9})\."),),
    ),
    scheduler(
        EDMDPMSolverMultistepScheduler=EDMConfig,
        CosineDPMSolverMultistepScheduler=CosineConfig,
    ),
)


def misfit(parts: Mapping[str, Any]) -> str | None:
    """Where two parts of a checkpoint do not fit, in one phrase; None if all do.

    Args:
        parts: name -> configuration.
    """
    transformer, channels = parts["transformer"], parts["vae"].decoder_input_channels
    projection, width = parts["projection_model"], parts["text_encoder"].d_model
    if projection.text_encoder_dim != width:
        return (
            f"projection_model/config.json: text_encoder_dim must be {width}, as the text encoder's d_model, "
            f"got {projection.text_encoder_dim}"
        )
    for name, wanted, because in (
        ("in_channels", channels, "as the VAE's decoder_input_channels"),
        ("out_channels", channels, "as the VAE's decoder_input_channels"),
        ("cross_attention_input_dim", projection.conditioning_dim, "as the projection's conditioning_dim"),
        ("global_states_input_dim", 2 * projection.conditioning_dim, "twice the projection's conditioning_dim"),
    ):
        got = getattr(transformer, name)
        if got != wanted:
            return f"transformer/config.json: {name} must be {wanted}, {because}, got {got}"
    return None
