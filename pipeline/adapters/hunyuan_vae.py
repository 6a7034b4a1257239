"""HunyuanVideo's VAE without its attention mask.

The middle blocks of AutoencoderKLHunyuanVideo attend causally over frames, by a mask of all tokens by all tokens: of a
720p tile of five latent frames [72000, 72000], 36 GB in three types. Here each frame's queries attend to the keys of
the frames up to theirs: the same sums, without a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_MASK = "prepare_causal_attention_mask"  # of diffusers 0.42, models/autoencoders/autoencoder_kl_hunyuan_video.py


@dataclass(frozen=True, slots=True)
class Frames:
    """Stands for the mask of tokens that lie frame after frame."""

    num_frames: int


def attend_by_frame(vae: Any) -> None:
    """Has the middle blocks of a VAE attend frame by frame from now on; its weights and state dict stay as they are.

    Only this VAE's own modules are changed: the forward of their class runs with another function in the place of the
    one that makes the mask.
    """
    for half in (vae.encoder, vae.decoder):
        block = half.mid_block
        forward = type(block).forward
        if _MASK not in forward.__code__.co_names:
            raise ValueError(f"{type(block).__name__} does not call {_MASK}: another version of diffusers?")
        ours = FunctionType(
            forward.__code__, {**forward.__globals__, _MASK: _frames}, forward.__name__, forward.__defaults__
        )
        block.forward = MethodType(ours, block)
        for attention in block.attentions:
            if attention is not None:
                attention.set_processor(FrameAttention())


def _frames(num_frames: int, *_: Any, **__: Any) -> Frames:
    return Frames(num_frames)


class FrameAttention:
    """Attention of a middle block, as diffusers' AttnProcessor2_0 for it, frame by frame."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        """Attends.

        Args:
            hidden_states: [B, F * H * W, C], frame after frame.
            attention_mask: `Frames`.
        """
        import torch
        from torch.nn import functional

        assert isinstance(attention_mask, Frames)
        assert encoder_hidden_states is None
        residual = hidden_states
        normed = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query, key, value = (
            layer(normed).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )  # [B, heads, F * H * W, D]
        per_frame = query.shape[2] // attention_mask.num_frames
        attended = []
        for frame in range(attention_mask.num_frames):
            begin, end = frame * per_frame, (frame + 1) * per_frame
            attended.append(
                functional.scaled_dot_product_attention(query[:, :, begin:end], key[:, :, :end], value[:, :, :end])
            )
        out = torch.cat(attended, dim=2).transpose(1, 2).flatten(2).to(query.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        return (out + residual) / attn.rescale_output_factor
