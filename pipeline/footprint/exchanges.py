"""What ranks send each other in a computed step, in closed form; a test holds it to what the real code issues."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cineray.distributed.layout import Layout
from cineray.pipeline.adapters import MODELS
from cineray.pipeline.adapters.model import hidden_size, out_channels
from cineray.pipeline.footprint.operations import joint_text_tokens, num_hints
from cineray.pipeline.loading.checkpoint import Checkpoint

_BYTES = 2  # bfloat16


@dataclass(frozen=True, slots=True)
class Exchanges:
    """The exchanges of one rank in one computed step, the cache's own few numbers left out.

    Args:
        sent_bytes: to other ranks, an all-gather counted as a send to each of them.
        num_exchanges: collectives and batches of sends.
    """

    sent_bytes: float
    num_exchanges: int


def step_exchanges(
    checkpoint: Checkpoint,
    layout: Layout,
    num_tokens: int,
    num_blocks: int | None = None,
    num_frames: int = 1,
) -> Exchanges:
    """The exchanges of the fullest rank.

    Args:
        num_tokens: image tokens of the clip.
        num_blocks: that run, beside those that make hints for them; None for all. Of interleaved lists those of one:
            Open-Sora's temporal blocks attend to a rank's own tokens alone.
        num_frames: whose places ranks share (Open-Sora); 1 where they share all tokens alike.
    """
    config = checkpoint.configs.transformer
    model = MODELS[config["_class_name"]]
    ring, ulysses, ranks = layout.ring, layout.ulysses, layout.sequence_ranks
    channels = hidden_size(config)
    if num_blocks is None:
        num_blocks = sum(config[name] for name in model.layout.counts)
    num_blocks += num_hints({**config, "num_layers": num_blocks})
    text = joint_text_tokens(config)
    here = num_frames * -(-num_tokens // num_frames // ranks)
    group = min(num_tokens, here * ulysses)  # image tokens of a ulysses group
    sent, count = 0.0, 0
    if ulysses > 1:
        sent += 3 * here * channels * (ulysses - 1) / ulysses
        sent += (group - here + (ulysses - 1) * text) * channels / ulysses
        count += 2
    if ring > 1:
        sent += (ring - 1) * 2 * group * channels / ulysses
        count += ring - 1
        if text:
            sent += (ring - 1) * -(-text // ring) * channels / ulysses
            count += 1
    sent, count = num_blocks * sent, num_blocks * count
    if ranks > 1:  # the output's tokens
        sent += (ranks - 1) * here * _volume(config) * out_channels(config)
        count += 1
    sent, count = len(model.branches) // layout.cfg * sent, checkpoint.num_calls // layout.cfg * count
    if layout.cfg > 1:  # the other branch's velocity
        sent += config["out_channels"] * num_tokens * _volume(config)
        count += 1
    return Exchanges(sent * _BYTES, count)


def _volume(config: Mapping[str, Any]) -> int:
    """Latents of a channel that a token stands for."""
    patch = config.get("patch_size", 1)
    return patch**2 if isinstance(patch, int) else patch[0] * patch[1] * patch[2]
