"""What the parts of a checkpoint must say of themselves, so that they can be judged before one of them is loaded.

Every class here is read without PyTorch. Values that a configuration leaves out are diffusers' and transformers' own
defaults; keys that are not named here do not change what is rendered, or are checked against the weights.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Far beyond what exists (HunyuanVideo: 60 blocks; UMT5: 256,384 tokens), and small enough to be built in seconds.
MAX_LAYERS = 1000
MAX_HEADS = 1024
MAX_DIM = 2**20
MAX_VOCABULARY = 2**24

Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
Heads = Annotated[int, Field(ge=1, le=MAX_HEADS)]
Dim = Annotated[int, Field(ge=1, le=MAX_DIM)]
Channels = Annotated[int, Field(ge=1, le=2**16)]
Small = Annotated[int, Field(ge=1, le=64)]
Vocabulary = Annotated[int, Field(ge=1, le=MAX_VOCABULARY)]
Positive = Annotated[float, Field(gt=0)]
Epsilon = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]


class ComponentConfig(BaseModel):
    """Strict: no text for numbers, no booleans for whole numbers, nothing infinite."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, extra="ignore")


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """One part of a pipeline.

    Args:
        name: in model_index.json, and of its folder.
        library: that its class is taken from, or whose kind its class is; nothing else is imported for a checkpoint.
        module: of cineray, that has the class where the library has not.
        index_library: what model_index.json calls the library, where that is another name.
        classes: class name -> what its configuration must be like; None where no file is looked at.
        is_optional: it may be null.
        file: its configuration.
        weights: name of its safetensors file without the ending, or None if it has none.
        layers: entry of the configuration -> the names of the layers that it counts, a pattern with one group.
        nested: the entry of a larger model's configuration that holds the part's own.
    """

    name: str
    library: Literal["diffusers", "transformers"]
    classes: dict[str, type[ComponentConfig] | None]
    index_library: str | None = None
    module: str | None = None
    is_optional: bool = False
    file: str = "config.json"
    weights: str | None = None
    layers: tuple[tuple[str, str], ...] = ()
    nested: str | None = None

    @property
    def named_library(self) -> str:
        """The library by its name in model_index.json."""
        return self.index_library or self.library

    def class_named(self, kind: str) -> Any:
        """One of `classes`; imports what has it."""
        return getattr(importlib.import_module(self.module or self.library), kind)


def diffusers_model(
    name: str, kind: str, config: type[ComponentConfig], layers: tuple[tuple[str, str], ...] = ()
) -> Component:
    return Component(
        name=name, library="diffusers", classes={kind: config}, weights="diffusion_pytorch_model", layers=layers
    )


# transformers saves a tokenizer under the name of whatever class it had
_TOKENIZERS = (
    *("PreTrainedTokenizerFast", "TokenizersBackend", "SentencePieceBackend"),
    *("T5TokenizerFast", "T5Tokenizer", "LlamaTokenizerFast", "LlamaTokenizer", "CLIPTokenizer", "CLIPTokenizerFast"),
    *("Qwen2Tokenizer", "Qwen2TokenizerFast", "ByT5Tokenizer"),
)


def tokenizer(name: str) -> Component:
    return Component(name=name, library="transformers", classes=dict.fromkeys(_TOKENIZERS))


class T5Fields(ComponentConfig):
    """What a T5 encoder and its descendants say alike."""

    d_model: Dim = 512
    d_kv: Dim = 64
    d_ff: Dim = 1024
    num_layers: Layers = 8
    num_heads: Heads = 6
    vocab_size: Vocabulary = 250112
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=65536, multiple_of=2)] = 32
    relative_attention_max_distance: Annotated[int, Field(ge=1, le=2**20)] = 128
    dropout_rate: Rate = 0.1
    layer_norm_epsilon: Epsilon = 1e-6
    feed_forward_proj: str = "gated-gelu"

    @model_validator(mode="after")
    def _buckets(self) -> T5Fields:
        least = self.relative_attention_num_buckets // 4
        if self.relative_attention_max_distance <= least:
            raise ValueError(
                f"relative_attention_max_distance must be above {least}, a quarter of its buckets, "
                f"got {self.relative_attention_max_distance}"
            )
        return self


class T5Config(T5Fields):
    """Configuration of a T5EncoderModel."""

    model_type: Literal["t5"] = "t5"
    d_ff: Dim = 2048
    num_layers: Layers = 6
    num_heads: Heads = 8
    vocab_size: Vocabulary = 32128
    feed_forward_proj: str = "relu"


def t5_encoder(name: str, kind: str = "T5EncoderModel", config: type[ComponentConfig] = T5Config) -> Component:
    return Component(
        name=name,
        library="transformers",
        classes={kind: config},
        weights="model",
        layers=(("num_layers", r"encoder\.block\.(\d{1,9})\."),),
    )


def scheduler(**classes: type[ComponentConfig] | None) -> Component:
    """The scheduler: class name -> what its configuration must be like."""
    return Component(name="scheduler", library="diffusers", classes={**classes}, file="scheduler_config.json")


class CLIPTextConfig(ComponentConfig):
    model_type: Literal["clip_text_model", "clip"] = "clip_text_model"
    hidden_size: Dim = 512
    intermediate_size: Dim = 2048
    num_hidden_layers: Layers = 12
    num_attention_heads: Heads = 8
    # the pipelines pad to 77 tokens
    max_position_embeddings: Annotated[int, Field(ge=77, le=2**20)] = 77
    vocab_size: Vocabulary = 49408
    layer_norm_eps: Epsilon = 1e-5
    attention_dropout: Rate = 0.0
    hidden_act: str = "quick_gelu"

    @model_validator(mode="after")
    def _heads_share_it(self) -> CLIPTextConfig:
        divides("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        return self


class VisionFields(ComponentConfig):
    """What CLIP's vision model and SigLIP's say alike."""

    hidden_size: Dim = 768
    intermediate_size: Dim = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Heads = 12
    num_channels: Literal[3] = 3
    image_size: Annotated[int, Field(ge=1, le=4096)] = 224
    patch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    layer_norm_eps: Epsilon = 1e-5
    attention_dropout: Rate = 0.0
    hidden_act: str = "quick_gelu"

    @model_validator(mode="after")
    def _heads_share_it(self) -> VisionFields:
        divides("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size must be at most image_size {self.image_size}, got {self.patch_size}")
        return self


class CLIPVisionConfig(VisionFields):
    model_type: Literal["clip_vision_model", "clip"] = "clip_vision_model"
    # the pipelines take the last layer but one
    num_hidden_layers: Annotated[int, Field(ge=2, le=MAX_LAYERS)] = 12


def divides(whole_name: str, whole: int, part_name: str, part: int) -> None:
    """Raises ValueError unless `part` divides `whole`."""
    if whole % part:
        raise ValueError(f"{whole_name} must be a multiple of {part_name} {part}, got {whole}")


def sums_up(axes_name: str, axes: list[int], whole_name: str, whole: int) -> None:
    """Raises ValueError unless the axes sum up to the whole."""
    if sum(axes) != whole:
        raise ValueError(f"{axes_name} must sum up to {whole_name} {whole}, got {axes}")


class AutoencoderKLConfig(ComponentConfig):
    """AutoencoderKL: the VAE of a picture."""

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: Channels = 4
    down_block_types: list[Literal["DownEncoderBlock2D"]] = ["DownEncoderBlock2D"]
    up_block_types: list[Literal["UpDecoderBlock2D"]] = ["UpDecoderBlock2D"]
    block_out_channels: Annotated[list[Dim], Field(min_length=1, max_length=10)] = [64]
    layers_per_block: Small = 1
    act_fn: str = "silu"
    norm_num_groups: Dim = 32
    scaling_factor: Positive = 0.18215
    shift_factor: float | None = None
    latents_mean: None = None
    latents_std: None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @model_validator(mode="after")
    def _blocks(self) -> AutoencoderKLConfig:
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != len(self.block_out_channels):
                raise ValueError(f"{name} must have one entry for each of block_out_channels")
        for channels in self.block_out_channels:
            divides("block_out_channels", channels, "norm_num_groups", self.norm_num_groups)
        return self

    @property
    def scale_factor(self) -> int:
        """Pixels along a side of a latent."""
        return 2 ** (len(self.block_out_channels) - 1)


class FlowMatchFields(ComponentConfig):
    """FlowMatchEulerDiscreteScheduler, whatever shifts its steps; noise would need a seed."""

    shift: Positive = 1.0
    stochastic_sampling: Literal[False, None] = False
    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: int | None = 256
    max_image_seq_len: int | None = 4096
    invert_sigmas: bool = False
    shift_terminal: Annotated[float, Field(gt=0, lt=1)] | None = None
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"

    @model_validator(mode="after")
    def _one_kind_of_sigmas(self) -> FlowMatchFields:
        one_kind_of_sigmas(self)
        return self


class FlowMatchEulerConfig(FlowMatchFields):
    """The same for a pipeline that does not say the `mu` of a dynamic shift."""

    num_train_timesteps: Annotated[int, Field(ge=1, le=100_000)] = 1000
    use_dynamic_shifting: Literal[False] = False


class MultistepFlowConfig(ComponentConfig):
    """UniPCMultistepScheduler and DPMSolverMultistepScheduler, set up for a model that predicts the flow."""

    num_train_timesteps: Annotated[int, Field(ge=1, le=100_000)] = 1000
    prediction_type: Literal["flow_prediction"]
    use_flow_sigmas: Literal[True]
    flow_shift: Positive = 1.0
    solver_order: Annotated[int, Field(ge=1, le=3)] = 2
    solver_type: Literal["bh1", "bh2", "midpoint", "heun"] | None = None
    algorithm_type: Literal["dpmsolver", "dpmsolver++"] = "dpmsolver++"  # the sde kinds draw noise from no seed
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.0001
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    thresholding: bool = False
    dynamic_thresholding_ratio: Annotated[float, Field(gt=0, le=1)] = 0.995
    sample_max_value: Positive = 1.0
    predict_x0: bool = True
    lower_order_final: bool = True
    euler_at_final: bool = False
    disable_corrector: list[Annotated[int, Field(ge=0)]] = []
    solver_p: None = None
    trained_betas: None = None
    use_dynamic_shifting: Literal[False] = False
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    steps_offset: Annotated[int, Field(ge=0, le=1000)] = 0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    rescale_betas_zero_snr: bool = False
    shift_terminal: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _one_kind_of_sigmas(self) -> MultistepFlowConfig:
        one_kind_of_sigmas(self)
        return self


def one_kind_of_sigmas(config: Any) -> None:
    """Raises ValueError where a scheduler's configuration names two."""
    named = [
        name for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas") if getattr(config, name)
    ]
    if len(named) > 1:
        raise ValueError(f"only one of {', '.join(named)} can be true")
