"""tiny-audio, from nothing: AutoencoderOobleck on drawn tones, then StableAudioDiTModel with a T5 and its projections.

Steps, and what is predicted, are those of the published checkpoint's scheduler: v, `sigma_data` 1, exponential from
500 to 0.3. The class is EDMDPMSolverMultistepScheduler, which StableAudioPipeline declares; the published one draws
noise with torchsde. A tenth of the captions is dropped, which leaves no text and no seconds there, but zeros.
"""

import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiny.oobleck import CHANNELS, HOP, means, trained_oobleck
from tiny.text import TEXT_DIM, new_t5
from tiny.tones import NUM_SAMPLES, RATE, all_tones, draw_tone
from tiny.training import Plan, say, train_denoiser

SECONDS = NUM_SAMPLES / RATE
NUM_LATENTS = NUM_SAMPLES // HOP
TEXT_LENGTH = 8  # tokens; a sentence has 6. All are attended to, the padding as zeros
SOUNDS_PER_CAPTION = 96
CAPTION_DROP = 0.1
# Noise is drawn log-normally about 2.7, wider than EDM's (Karras et al. 2022): a tone is in all latents at once and
# shows through noise of ten times its strength.
LOG_SIGMA = (1.0, 1.6)  # (mean, standard deviation)
PLAN = Plan(steps=3200, batch=24)


class AudioDenoiser(nn.Module):
    """T5, StableAudioProjectionModel and StableAudioDiTModel; what the transformer makes of noised latents."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer, self.text_encoder = new_t5(" ".join(map(str, all_tones())), TEXT_LENGTH)
        self.projection_model = StableAudioProjectionModel(TEXT_DIM, TEXT_DIM, min_value=0, max_value=1)
        self.transformer = StableAudioDiTModel(
            sample_size=NUM_LATENTS,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=8,
            attention_head_dim=32,
            num_attention_heads=4,
            num_key_value_attention_heads=2,  # half as many, as published
            cross_attention_dim=TEXT_DIM,
            time_proj_dim=128,
            global_states_input_dim=2 * TEXT_DIM,
            cross_attention_input_dim=TEXT_DIM,
        )
        nn.init.zeros_(self.transformer.proj_out.weight)
        head_dim = self.transformer.config["attention_head_dim"]
        self._rotary: Any = get_1d_rotary_pos_embed(
            head_dim // 2, NUM_LATENTS + 1, use_real=True, repeat_interleave_real=False
        )

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, captions: list[str], seconds: torch.Tensor
    ) -> torch.Tensor:
        """Output [B, CHANNELS, NUM_LATENTS]; `seconds` [B]; an empty caption is that of the unconditional branch."""
        unique = sorted(set(captions))
        tokens = self.tokenizer(unique, padding="max_length", return_tensors="pt")
        text = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        projected = self.projection_model(text, torch.zeros_like(seconds), seconds)
        text = projected.text_hidden_states * tokens.attention_mask.unsqueeze(-1)
        start, end = projected.seconds_start_hidden_states, projected.seconds_end_hidden_states
        known = torch.tensor([bool(c) for c in captions]).view(-1, 1, 1)
        return self.transformer(
            latents,
            timestep,
            torch.cat([text[[unique.index(c) for c in captions]], start, end], dim=1) * known,
            torch.cat([start, end], dim=2),
            self._rotary,
            return_dict=False,
        )[0]


def make_audio(work: Path, seed: int) -> StableAudioPipeline:
    vae = trained_oobleck(work, seed)
    latents, captions = _encoded(vae, work, seed)
    torch.manual_seed(seed)
    denoiser: Any = AudioDenoiser()
    scheduler = new_scheduler()
    train_denoiser(denoiser, partial(denoising_loss, latents, captions, scheduler, PLAN.batch), work, seed, PLAN)
    denoiser.eval().requires_grad_(False)
    return StableAudioPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        projection_model=denoiser.projection_model,
        tokenizer=denoiser.tokenizer,
        transformer=denoiser.transformer,
        scheduler=scheduler,
    )


def new_scheduler() -> EDMDPMSolverMultistepScheduler:
    return EDMDPMSolverMultistepScheduler(
        sigma_min=0.3,
        sigma_max=500.0,
        sigma_data=1.0,
        sigma_schedule="exponential",
        prediction_type="v_prediction",
    )


@torch.no_grad()
def _encoded(vae: AutoencoderOobleck, work: Path, seed: int) -> tuple[torch.Tensor, list[str]]:
    """(latents [27 * SOUNDS_PER_CAPTION, CHANNELS, NUM_LATENTS], their captions)."""
    path = work / "latents.safetensors"
    captions = [str(tone) for tone in all_tones() for _ in range(SOUNDS_PER_CAPTION)]
    if not path.exists():
        generator, latents = torch.Generator().manual_seed(1000 + seed), []
        for tone in all_tones():
            sounds = torch.stack([draw_tone(tone, generator) for _ in range(SOUNDS_PER_CAPTION)])
            latents += [means(vae, part) for part in sounds.split(8)]
        save_file({"latents": torch.cat(latents).contiguous()}, path)
        say(work, "encoded", num_sounds=len(captions), std=torch.cat(latents).std().item())
    return load_file(path)["latents"], captions


def denoising_loss(
    latents: torch.Tensor,
    captions: list[str],
    scheduler: Any,
    batch: int,
    denoiser: Any,
    _teacher: nn.Module | None,
    seed: int,
) -> torch.Tensor:
    """Mean squared error of the predicted v, by the scheduler's own preconditioning.

    What the model is told of the seconds is random and changes nothing: a shorter sound is the beginning of a whole
    one.

    Args:
        latents: [N, CHANNELS, NUM_LATENTS].
    """
    generator, dice = torch.Generator().manual_seed(seed), random.Random(seed)
    rows = torch.randint(len(latents), (batch,), generator=generator)
    clean = latents[rows]
    noise = torch.randn(clean.shape, generator=generator)
    mean, std = LOG_SIGMA
    sigma = torch.exp(mean + std * torch.randn(batch, generator=generator))
    sigma = sigma.clamp(scheduler.config.sigma_min, scheduler.config.sigma_max).view(-1, 1, 1)
    noised = clean + sigma * noise
    texts = ["" if dice.random() < CAPTION_DROP else captions[r] for r in rows.tolist()]
    seconds = SECONDS * (0.1 + 0.9 * torch.rand(batch, generator=generator))
    timestep = scheduler.precondition_noise(sigma.flatten())
    # the fused attention's backward takes half of a step on 65 tokens
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        output = denoiser(scheduler.precondition_inputs(noised, sigma), timestep, texts, seconds)
    error = scheduler.precondition_outputs(noised, output.float(), sigma) - clean
    return (error.square() * (1 + sigma**-2)).mean()  # over the square of the output's factor
