"""The two tiny video transformers with their text encoders, and the loss that they are trained by: flow matching.

Each family is a small class that turns captions into the conditions its transformer takes, cheaply: only as
many text tokens as there are, where the pipelines pad to 512 and 256. The numbers that the transformer then
sees are the pipelines' own (tests/parity compares them).
"""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import nn

from tiny.shapes import all_captions, draw_clip
from tiny.text import TEXT_DIM, new_clip, new_llama, new_umt5
from tiny.vae import encode

FLOW_SHIFT = 3.0  # sigma = s u / (1 + (s - 1) u), as in the Wan 2.1 480p scheduler configuration
WAN_TEXT_LENGTH = 512  # WanPipeline pads the text with zeros to this length, and attends to all of it
HUNYUAN_CROP = DEFAULT_PROMPT_TEMPLATE["crop_start"]
CAPTION_DROP = 0.1
# HunyuanVideo's embedded guidance g stands for a classifier-free guidance scale of 1 + GUIDANCE_SLOPE (g - 1):
# the default g = 6 is a scale of 3.
GUIDANCE_SLOPE = 0.4


class _WeightedNullToken(WanAttnProcessor):
    """Cross-attention in which the last text token counts as often as `log_count` says."""

    def __init__(self) -> None:
        super().__init__()
        self.log_count: torch.Tensor | None = None  # [1, 1, 1, L]

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):  # noqa: ARG002
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.log_count, rotary_emb)


class WanDenoiser(nn.Module):
    """UMT5 and WanTransformer3DModel; velocity of noised latents for captions."""

    def __init__(self, num_layers: int = 16) -> None:
        super().__init__()
        self.tokenizer, self.text_encoder = new_umt5()
        self.transformer = WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            text_dim=TEXT_DIM,
            freq_dim=128,
            ffn_dim=512,
            num_layers=num_layers,
        )
        self._processor = _WeightedNullToken()

    def parts(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.text_encoder, "transformer": self.transformer}

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, captions: list[str], _guidance: torch.Tensor
    ) -> torch.Tensor:
        """Velocity [B, 16, F, H, W]; `timestep` [B] in 0..1000; guidance is not used (Wan has branches)."""
        unique = sorted(set(captions))
        tokens = self.tokenizer(unique, padding="longest", return_tensors="pt")
        text = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        text = text * tokens.attention_mask.unsqueeze(-1)
        text = torch.cat([text, text.new_zeros(len(unique), 1, TEXT_DIM)], dim=1)
        text = text[[unique.index(c) for c in captions]]  # [B, L + 1, D]
        log_count = text.new_zeros(1, 1, 1, text.shape[1])
        log_count[..., -1] = math.log(WAN_TEXT_LENGTH - (text.shape[1] - 1))
        self._processor.log_count = log_count
        blocks: Any = self.transformer.blocks
        for block in blocks:
            block.attn2.set_processor(self._processor)
        return self.transformer(latents, timestep, text, return_dict=False)[0]


class HunyuanDenoiser(nn.Module):
    """Llama, CLIP and HunyuanVideoTransformer3DModel with embedded guidance."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer, self.text_encoder = new_llama()
        self.tokenizer_2, self.text_encoder_2 = new_clip()
        self.transformer = HunyuanVideoTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            num_layers=4,
            num_single_layers=10,
            num_refiner_layers=1,
            text_embed_dim=TEXT_DIM,
            pooled_projection_dim=TEXT_DIM,
            rope_axes_dim=(8, 12, 12),
        )

    def parts(self) -> dict[str, nn.Module]:
        return {
            "text_encoder": self.text_encoder,
            "text_encoder_2": self.text_encoder_2,
            "transformer": self.transformer,
        }

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, captions: list[str], guidance: torch.Tensor
    ) -> torch.Tensor:
        """Velocity [B, 16, F, H, W]; `timestep` [B] in 0..1000; `guidance` [B], 1 for none."""
        unique = sorted(set(captions))
        prompts = [DEFAULT_PROMPT_TEMPLATE["template"].format(c) for c in unique]
        tokens = self.tokenizer(prompts, padding="longest", return_tensors="pt")
        text = self.text_encoder(tokens.input_ids, tokens.attention_mask, output_hidden_states=True).hidden_states[-3]
        pooled = self.text_encoder_2(self.tokenizer_2(unique, padding="max_length", return_tensors="pt").input_ids)
        rows = [unique.index(c) for c in captions]
        return self.transformer(
            latents,
            timestep,
            text[rows, HUNYUAN_CROP:],
            tokens.attention_mask[rows, HUNYUAN_CROP:],
            pooled.pooler_output[rows],
            guidance * 1000.0,
            return_dict=False,
        )[0]


@torch.no_grad()
def encode_clips(vae: nn.Module, num_per_caption: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Latents [216 * num_per_caption, 16, 5, 8, 8] of drawn clips, in the order of the captions."""
    generator = torch.Generator().manual_seed(seed)
    latents, captions = [], []
    for caption in all_captions():
        clips = torch.stack([draw_clip(caption, generator) for _ in range(num_per_caption)])
        clips = clips.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents.append(encode(vae, clips).float())
        captions += [str(caption)] * num_per_caption
    return torch.cat(latents), captions


def shifted(u: torch.Tensor, shift: float) -> torch.Tensor:
    """Noise levels of times `u` in 0..1, as the schedulers shift them."""
    return shift * u / (1 + (shift - 1) * u)


def logit_normal(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels [batch]: logit-normal times (Esser et al. 2024), shifted by FLOW_SHIFT."""
    return shifted(torch.sigmoid(torch.randn(batch, generator=generator)), FLOW_SHIFT)


def flow_matching_loss(
    latents: torch.Tensor,
    captions: list[str],
    batch: int,
    denoiser: nn.Module,
    teacher: nn.Module | None,
    seed: int,
    *,
    draw_sigma: Callable[[int, torch.Generator], torch.Tensor] = logit_normal,
) -> torch.Tensor:
    """Mean squared error of the velocity.

    With a teacher (the moving average), four in five samples draw an embedded guidance g in [1, 8] and learn the
    velocity of the data plus GUIDANCE_SLOPE (g - 1) times the teacher's conditional minus unconditional
    velocity (Tang et al. 2025, "Diffusion models without classifier-free guidance", equation 8, with the scale
    as an input). The others stay at g = 1, from which the teacher's two velocities come.
    """
    generator, dice = torch.Generator().manual_seed(seed), random.Random(seed)
    rows = torch.randint(len(latents), (batch,), generator=generator)
    clean = latents[rows]
    noise = torch.randn(clean.shape, generator=generator)
    sigma = draw_sigma(batch, generator)
    mixed = sigma.view(-1, 1, 1, 1, 1)
    noised, target = (1 - mixed) * clean + mixed * noise, noise - clean
    timestep = sigma * 1000.0
    texts = [captions[r] for r in rows.tolist()]
    guidance = torch.ones(batch)
    if teacher is not None:
        guided = torch.rand(batch, generator=generator) < 0.8
        guidance = torch.where(guided, 1 + 7 * torch.rand(batch, generator=generator), guidance)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            ones = torch.ones(batch)
            difference = teacher(noised, timestep, texts, ones) - teacher(noised, timestep, [""] * batch, ones)
        target = target + (GUIDANCE_SLOPE * (guidance - 1)).view(-1, 1, 1, 1, 1) * difference.float()
    dropped = [g == 1 and dice.random() < CAPTION_DROP for g in guidance.tolist()]
    texts = ["" if drop else t for drop, t in zip(dropped, texts, strict=True)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = denoiser(noised, timestep, texts, guidance)
    return (velocity.float() - target).square().mean()
