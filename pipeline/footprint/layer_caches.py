"""Bytes that the policies within blocks hold, in closed form: outputs of layers, and their differences over steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cineray.caching.policies.smoothcache import LayerPlan
from cineray.caching.policies.taylorseer import SeriesPlan
from cineray.pipeline.adapters import MODELS
from cineray.pipeline.adapters.model import hidden_size
from cineray.pipeline.footprint.operations import FLUX_MLP_RATIO, joint_text_tokens, num_hints

_BY_TOKEN = (
    "DiTTransformer2DModel",
    "STDiT3",
    "StableAudioDiTModel",
)  # each layer gives as many numbers as it was given


def layer_cache_bytes(
    plan: LayerPlan | SeriesPlan, config: Mapping[str, Any], here: int, num_branches: int, element_bytes: int = 2
) -> int:
    """Bytes on a rank.

    Args:
        config: of the transformer.
        here: image tokens of the rank.
        num_branches: whose histories the rank keeps.
    """
    if isinstance(plan, SeriesPlan):
        copies, sizes = plan.config.order + 1, [size for _, _, size in _outputs(config, here, is_series=True)]
    else:
        named = plan.schedule.rows.keys()
        outputs = _outputs(config, here, is_series=False)
        copies, sizes = 1, [size for block, name, size in outputs if {name, f"{name}-{block}"} & named]
    return num_branches * copies * sum(sizes) * element_bytes


def _outputs(config: Mapping[str, Any], here: int, is_series: bool) -> list[tuple[int, str, int]]:
    """(block, layer type, elements of its output) of every layer whose output may be kept.

    Args:
        is_series: of a single-stream block the output projection alone, as `pipeline.caches.taylorseer` has it.
    """
    channels, layout = hidden_size(config), MODELS[config["_class_name"]].layout
    if config["_class_name"] in _BY_TOKEN:
        return [(number, name, here * channels) for number in range(config[layout.counts[0]]) for name in layout.layers]
    if MODELS[config["_class_name"]].family in ("wan", "wan-vace"):
        num_blocks = config["num_layers"] + num_hints(config)
        blocks = [[(name, here * channels) for name in ("attn1", "attn2", "ffn")]] * num_blocks
    else:
        num_text = joint_text_tokens(config)
        text, joint = num_text * channels, (here + num_text) * channels
        double = [("attn", joint), ("ff", here * channels), ("ff_context", text)]
        single = [("attn", joint), ("proj_mlp", round(config.get("mlp_ratio", FLUX_MLP_RATIO) * joint))]
        single = [("proj_out", joint)] if is_series else single
        blocks = [double] * config["num_layers"] + [single] * config.get("num_single_layers", 0)
    return [(number, name, size) for number, block in enumerate(blocks) for name, size in block]
