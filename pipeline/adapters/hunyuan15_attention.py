"""Joint attention of HunyuanVideo 1.5 that makes no mask of all tokens by all tokens.

diffusers' processor makes one even where nothing is padded: of a 720p clip of 121 frames 12 GB, and flash kernels take
none at all.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch.nn import functional


class JointAttention:
    """As diffusers' HunyuanVideo15AttnProcessor2_0, but that padded text attends too, which nothing then looks at."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attends.

        Args:
            hidden_states: image tokens [B, S, D].
            encoder_hidden_states: text tokens [B, T, D].
            attention_mask: [B, T], False or 0 for padding among the text tokens; None: there is none.
            image_rotary_emb: cosines and sines [S, D of a head].

        Returns:
            (image tokens, text tokens).
        """
        text = encoder_hidden_states
        image_query, image_key, image_value = (
            layer(hidden_states).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        image_query, image_key = attn.norm_q(image_query), attn.norm_k(image_key)
        if image_rotary_emb is not None:
            turn: Any = partial(apply_rotary_emb, freqs_cis=image_rotary_emb, sequence_dim=1)
            image_query, image_key = turn(image_query), turn(image_key)
        query, key, value = (
            layer(text).unflatten(2, (attn.heads, -1)) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        query, key = attn.norm_added_q(query), attn.norm_added_k(key)
        mask = attention_mask
        if mask is not None:
            mask = functional.pad(mask.bool(), (hidden_states.shape[1], 0), value=True)[:, None, None]  # [B, 1, 1, S+T]
        out = dispatch_attention_fn(
            torch.cat([image_query, query], dim=1),
            torch.cat([image_key, key], dim=1),
            torch.cat([image_value, value], dim=1),
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        image, text = out.flatten(2, 3).to(query.dtype).split([hidden_states.shape[1], text.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def attend_without_mask(transformer: Any) -> None:
    """Has the blocks of a transformer attend by `JointAttention` from now on, each with the kernel that it had."""
    for block in transformer.transformer_blocks:
        ours = JointAttention()
        ours._attention_backend = block.attn.processor._attention_backend
        ours._parallel_config = block.attn.processor._parallel_config
        block.attn.set_processor(ours)
