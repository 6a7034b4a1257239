"""Operations of a transformer's forward in closed form: multiplications and additions of matrix products.

What is left out (norms, activations, rotary embeddings) is below a hundredth. A test holds this to what PyTorch counts.

Letters: S image tokens here, N image tokens on all ranks, T text tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cineray.pipeline.adapters.flux import DEV_TOKENS, SCHNELL_TOKENS
from cineray.pipeline.adapters.hunyuan_image import INTERLEAVE
from cineray.pipeline.adapters.model import hidden_size, out_channels

WAN_TEXT_TOKENS = 512
WAN_IMAGE_TOKENS = 257  # CLIP ViT-H/14: 16 x 16 patches and the class token
HUNYUAN_TEXT_TOKENS = 256
# HunyuanVideoImageToVideoPipeline: of a picture its language model sees 576 tokens, of which one in INTERLEAVE is kept;
# the four of the assistant's header are cut out of the prompt's
HUNYUAN_PICTURE_TOKENS = 576
_HUNYUAN_ASSISTANT_TOKENS = 4
DIT_MLP_RATIO, DIT_SINUSOIDS = 4, 256  # of its feed-forward and of its timestep's embedding: its class's own
AUDIO_TEXT_TOKENS = 128  # max_length of the authors' conditioner (stable-audio-tools, stable_audio_open_1_0.json)
AUDIO_MLP_RATIO = 4  # StableAudioDiTBlock's feed-forward, whose first layer makes twice as many for its gates
FLUX_MLP_RATIO = 4  # its class's own, which no configuration says
# HunyuanVideo15Pipeline: tokenizer_max_length, tokenizer_2_max_length and vision_num_semantic_tokens
HUNYUAN15_TEXT_TOKENS, HUNYUAN15_GLYPH_TOKENS, HUNYUAN15_PICTURE_TOKENS = 1000, 256, 729
# HunyuanVideo15Transformer3DModel: of its refiner's feed-forward, and inside what projects ByT5's output
_HUNYUAN15_REFINER_MLP_RATIO, _HUNYUAN15_GLYPH_WIDTH = 4, 2048


def joint_text_tokens(config: Mapping[str, Any]) -> int:
    """Text tokens that attend beside the image's in a transformer's blocks; 0 where they have their own attention."""
    if config["_class_name"] == "FluxTransformer2DModel":
        return DEV_TOKENS if config.get("guidance_embeds") else SCHNELL_TOKENS
    if config["_class_name"] == "HunyuanVideo15Transformer3DModel":
        return HUNYUAN15_TEXT_TOKENS + HUNYUAN15_GLYPH_TOKENS + _hunyuan15_picture_tokens(config)
    if config["_class_name"] != "HunyuanVideoTransformer3DModel":
        return 0
    condition = config.get("image_condition_type")
    if condition is None:
        return HUNYUAN_TEXT_TOKENS
    return HUNYUAN_TEXT_TOKENS - _HUNYUAN_ASSISTANT_TOKENS + HUNYUAN_PICTURE_TOKENS // INTERLEAVE[condition]


@dataclass(frozen=True, slots=True)
class ForwardFlop:
    """Operations on one rank of one call of the transformer.

    Args:
        around: before and behind the blocks.
        blocks: of each block, in the order in which they run.
    """

    around: float
    blocks: tuple[float, ...]

    @property
    def total(self) -> float:
        return self.around + sum(self.blocks)

    def skipped(self, probe_depth: int) -> float:
        """Operations of a call that runs the first blocks alone."""
        return self.around + sum(self.blocks[:probe_depth])


def forward_flop(
    config: Mapping[str, Any],
    *,
    here: int,
    everywhere: int,
    sequence_ranks: int,
    is_per_token: bool = False,
    num_frames: int = 1,
) -> ForwardFlop:
    """Operations of one forward with a batch of one.

    Args:
        config: of the transformer.
        here, everywhere: image tokens of this rank, and of all ranks of the sequence.
        sequence_ranks: that share the attention.
        is_per_token: each token has a timestep of its own, which is embedded (Wan 2.2 TI2V).
        num_frames: latent frames, over which tokens of a place attend (Open-Sora).
    """
    if config["_class_name"] == "STDiT3":
        return _stdit3(config, here, everywhere, sequence_ranks, num_frames)
    if config["_class_name"] in ("WanTransformer3DModel", "WanVACETransformer3DModel"):
        return _wan(config, here, everywhere, sequence_ranks, here if is_per_token else 1)
    return _OTHERS[config["_class_name"]](config, here, everywhere, sequence_ranks)


def _wan(config: Mapping[str, Any], here: int, everywhere: int, sequence_ranks: int, num_timesteps: int) -> ForwardFlop:
    """VACE's blocks that make hints come last: a probe runs none."""
    d, text, s = config["num_attention_heads"] * config["attention_head_dim"], WAN_TEXT_TOKENS, here
    volume = config["patch_size"][0] * config["patch_size"][1] * config["patch_size"][2]
    block = 8 * s * d * d + 4 * everywhere * everywhere * d / sequence_ranks  # self-attention
    block += 4 * s * d * d + 4 * text * d * d + 4 * s * text * d  # cross-attention
    block += 4 * s * d * config["ffn_dim"]
    around = 2 * everywhere * volume * config["in_channels"] * d + 2 * s * d * volume * config["out_channels"]
    around += 2 * text * d * (config["text_dim"] + d) + 2 * num_timesteps * d * (config["freq_dim"] + 7 * d)
    if config["image_dim"] is not None:
        block += 4 * WAN_IMAGE_TOKENS * config["added_kv_proj_dim"] * d + 4 * s * WAN_IMAGE_TOKENS * d
        around += 2 * WAN_IMAGE_TOKENS * config["image_dim"] * (config["image_dim"] + d)
    blocks = (block,) * config["num_layers"]
    if "vace_layers" in config:
        around += 2 * everywhere * volume * config["vace_in_channels"] * d
        hints = num_hints(config)
        blocks += (block + 4 * s * d * d,) * min(hints, 1) + (block + 2 * s * d * d,) * max(hints - 1, 0)
    return ForwardFlop(around, blocks)


def num_hints(config: Mapping[str, Any]) -> int:
    """Blocks of VACE that make hints for as many as the transformer's first blocks: its `num_layers`."""
    return sum(layer < config["num_layers"] for layer in config.get("vace_layers", ()))


def _hunyuan(config: Mapping[str, Any], here: int, everywhere: int, sequence_ranks: int) -> ForwardFlop:
    d, text = config["num_attention_heads"] * config["attention_head_dim"], joint_text_tokens(config)
    s, joint, mlp = here, here + text, config["mlp_ratio"]
    attention = 4 * (everywhere + text) ** 2 * d / sequence_ranks
    double = 8 * joint * d * d + 4 * mlp * joint * d * d + attention + 24 * d * d
    single = (6 + 2 * mlp + 2 * (1 + mlp)) * joint * d * d + attention + 6 * d * d
    refiner = config["num_refiner_layers"] * (
        8 * text * d * d + 4 * mlp * text * d * d + 4 * text * text * d + 4 * d * d
    )
    patch = config["patch_size"] ** 2 * config["patch_size_t"]
    around = 2 * everywhere * patch * config["in_channels"] * d + 2 * s * d * patch * config["out_channels"]
    around += refiner + 2 * text * config["text_embed_dim"] * d
    return ForwardFlop(around, (double,) * config["num_layers"] + (single,) * config["num_single_layers"])


def _hunyuan15_picture_tokens(config: Mapping[str, Any]) -> int:
    """Those of text to video are trimmed, padding that they are."""
    return HUNYUAN15_PICTURE_TOKENS if config.get("task_type") == "i2v" else 0


def _hunyuan15(config: Mapping[str, Any], here: int, everywhere: int, sequence_ranks: int) -> ForwardFlop:
    d, text, seen = hidden_size(config), joint_text_tokens(config), _hunyuan15_picture_tokens(config)
    s, joint, mlp, read = here, here + text, config["mlp_ratio"], HUNYUAN15_TEXT_TOKENS
    block = 8 * joint * d * d + 4 * mlp * joint * d * d + 24 * d * d
    block += 4 * (everywhere + text) ** 2 * d / sequence_ranks
    refiner = 8 * read * d * d + 4 * _HUNYUAN15_REFINER_MLP_RATIO * read * d * d + 4 * read * read * d + 4 * d * d
    patch = config["patch_size"] ** 2 * config["patch_size_t"]
    around = 2 * everywhere * patch * config["in_channels"] * d + 2 * s * d * patch * config["out_channels"]
    around += config["num_refiner_layers"] * refiner + 2 * read * config["text_embed_dim"] * d
    width, dim = _HUNYUAN15_GLYPH_WIDTH, config["image_embed_dim"]
    around += 2 * HUNYUAN15_GLYPH_TOKENS * width * (config["text_embed_2_dim"] + width + d)
    around += 2 * seen * dim * (dim + d)
    return ForwardFlop(around, (block,) * config["num_layers"])


def _flux(config: Mapping[str, Any], here: int, everywhere: int, sequence_ranks: int) -> ForwardFlop:
    d, text = config["num_attention_heads"] * config["attention_head_dim"], joint_text_tokens(config)
    joint, mlp = here + text, FLUX_MLP_RATIO
    attention = 4 * (everywhere + text) ** 2 * d / sequence_ranks
    double = 8 * joint * d * d + 4 * mlp * joint * d * d + attention + 24 * d * d
    single = (6 + 2 * mlp + 2 * (1 + mlp)) * joint * d * d + attention + 6 * d * d
    around = 2 * (everywhere + here) * config["in_channels"] * d + 2 * text * config["joint_attention_dim"] * d
    return ForwardFlop(around, (double,) * config["num_layers"] + (single,) * config["num_single_layers"])


def _dit(config: Mapping[str, Any], here: int, everywhere: int, sequence_ranks: int) -> ForwardFlop:
    d, s, n = config["num_attention_heads"] * config["attention_head_dim"], here, everywhere
    block = 8 * s * d * d + 4 * n * n * d / sequence_ranks + 4 * DIT_MLP_RATIO * s * d * d
    block += 2 * d * (DIT_SINUSOIDS + d) + 12 * d * d  # each block embeds the timestep for itself
    around = 2 * config["patch_size"] ** 2 * (n * config["in_channels"] + s * config["out_channels"]) * d
    around += 2 * d * (DIT_SINUSOIDS + d) + 4 * d * d
    return ForwardFlop(around, (block,) * config["num_layers"])


def _stable_audio(config: Mapping[str, Any], here: int, everywhere: int, sequence_ranks: int) -> ForwardFlop:
    """Of one row of its batch; keys and values of the cross-attention have fewer heads."""
    d, s, n, text = hidden_size(config), here, everywhere, AUDIO_TEXT_TOKENS + 2
    few, width = config["num_key_value_attention_heads"] * config["attention_head_dim"], config["cross_attention_dim"]
    block = 8 * s * d * d + 4 * n * n * d / sequence_ranks
    block += 4 * s * d * d + 4 * text * width * few + 4 * s * text * d
    block += 6 * AUDIO_MLP_RATIO * s * d * d
    around = 2 * (n * config["in_channels"] + s * config["out_channels"]) * d
    around += 2 * n * (config["in_channels"] ** 2 + config["out_channels"] ** 2)
    around += 2 * text * width * (config["cross_attention_input_dim"] + width)
    around += 2 * d * (config["global_states_input_dim"] + config["time_proj_dim"] + 2 * d)
    return ForwardFlop(around, (block,) * config["num_layers"])


def _stdit3(config: Mapping[str, Any], here: int, everywhere: int, sequence_ranks: int, num_frames: int) -> ForwardFlop:
    """A block is a spatial one, whose attention ranks share, and the temporal one behind it."""
    d, s, n, text = config["hidden_size"], here, everywhere, config["model_max_length"]
    volume = config["patch_size"][0] * config["patch_size"][1] * config["patch_size"][2]
    each = 8 * s * d * d + 4 * config["mlp_ratio"] * s * d * d
    each += 4 * s * d * d + 4 * text * d * d + 4 * s * text * d  # cross-attention
    block = 2 * each + 4 * n * (n / num_frames) * d / sequence_ranks + 4 * s * num_frames * d
    around = 2 * volume * (n * config["in_channels"] + s * out_channels(config)) * d
    around += 2 * text * (config["caption_channels"] + d) * d
    return ForwardFlop(around, (block,) * config["depth"])


_OTHERS = {
    "DiTTransformer2DModel": _dit,
    "StableAudioDiTModel": _stable_audio,
    "FluxTransformer2DModel": _flux,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "HunyuanVideo15Transformer3DModel": _hunyuan15,
}
