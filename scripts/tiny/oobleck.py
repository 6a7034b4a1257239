"""Trains the tiny autoencoder of sounds: AutoencoderOobleck on drawn tones.

Stable Audio's pipeline neither scales nor shifts latents. In training they are divided by their root mean square over
the batch; what that comes to over many sounds is folded into the encoder at the end, so that the latents fit a
scheduler whose `sigma_data` is 1.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderOobleck
from torch import nn

from tiny.tones import RATE, draw_tones
from tiny.training import Plan, say, train_denoiser

CHANNELS = 16  # of the latents, 64 of them a second: HOP samples each
HOP = 32
LATENT_NOISE = 0.1  # std added in training, as for clips: the decoder must forgive a denoiser's small errors
WINDOWS = (32, 128, 256)  # samples, of the spectra that a restored sound is compared by
SPECTRA_WEIGHT = 0.5
PLAN = Plan(steps=1600, batch=8, peak_rate=2e-3, ema_decay=0.98)  # at 0.998 the average restored 4 dB less


def new_oobleck() -> AutoencoderOobleck:
    """An encoder of width 2 CHANNELS, whose last layer makes as many channels: means and spreads."""
    vae = AutoencoderOobleck(
        encoder_hidden_size=2 * CHANNELS,
        downsampling_ratios=[4, HOP // 4],
        channel_multiples=[1, 2],
        decoder_channels=24,
        decoder_input_channels=CHANNELS,
        audio_channels=1,
        sampling_rate=RATE,
    )
    layer: Any
    for layer in vae.modules():
        if hasattr(layer, "weight_g"):  # weight_norm left a product behind that no moving average could copy
            layer.weight = layer.weight.detach()
    return vae


def trained_oobleck(work: Path, seed: int) -> AutoencoderOobleck:
    """The VAE of tones, trained or from the work folder; its latents have a root mean square of 1."""
    torch.manual_seed(seed)
    vae: Any = new_oobleck()
    train_denoiser(vae, partial(restoring_loss, PLAN.batch), work, seed, PLAN, name="vae")
    vae.eval().requires_grad_(False)
    fold_scale(vae, seed + 1)
    say(work, "vae", snr_db=restoring_snr_db(vae, 16, seed=10_000 + seed))
    return vae


def restoring_loss(batch: int, vae: Any, _teacher: nn.Module | None, seed: int) -> torch.Tensor:
    """Energy of the error over the sounds' energy, and their spectra's distance, on freshly drawn tones."""
    generator = torch.Generator().manual_seed(seed)
    tones = draw_tones(batch, generator)
    latents = means(vae, tones)
    latents = latents / latents.square().mean().sqrt()
    restored = vae.decoder(latents + LATENT_NOISE * torch.randn(latents.shape, generator=generator))
    error = (restored - tones).square().sum() / tones.square().sum()
    return error + SPECTRA_WEIGHT * spectral_distance(restored, tones)


def means(vae: Any, tones: torch.Tensor) -> torch.Tensor:
    """Latents [B, CHANNELS, N / HOP] of sounds [B, 1, N]."""
    return vae.encoder(tones).chunk(2, dim=1)[0]


def spectral_distance(restored: torch.Tensor, tones: torch.Tensor) -> torch.Tensor:
    """Spectral convergence (Arik et al. 2018), mean over WINDOWS. No logarithms: most bins of a tone are silent."""
    found = []
    for window in WINDOWS:
        ours, theirs = (
            torch.stft(
                sounds.flatten(0, 1), window, window // 4, window=torch.hann_window(window), return_complex=True
            ).abs()
            for sounds in (restored, tones)
        )
        found.append((ours - theirs).norm() / theirs.norm())
    return torch.stack(found).mean()


@torch.no_grad()
def fold_scale(vae: Any, seed: int, num_sounds: int = 96) -> None:
    """Divides the latents of drawn tones by their root mean square, in the weights of the encoder's last convolution
    (the decoder has learned from such), and fixes the posterior's spread at LATENT_NOISE."""
    tones = draw_tones(num_sounds, torch.Generator().manual_seed(seed))
    scale = torch.cat([means(vae, t) for t in tones.split(8)]).square().mean().sqrt()
    last = vae.encoder.conv2
    last.weight_g[:CHANNELS] /= scale
    last.bias[:CHANNELS] /= scale
    last.weight_g[CHANNELS:] = 0
    last.bias[CHANNELS:] = math.log(math.expm1(LATENT_NOISE))  # softplus makes LATENT_NOISE of it


@torch.no_grad()
def restoring_snr_db(vae: Any, num_sounds: int, seed: int) -> float:
    """Mean signal-to-noise ratio in dB of fresh whole sounds, through the model's own public encode and decode."""
    tones = draw_tones(num_sounds, torch.Generator().manual_seed(seed))
    ratios = []
    for tone in tones.split(1):
        restored = vae.decode(vae.encode(tone).latent_dist.mode()).sample
        ratios.append(10 * math.log10((tone.square().sum() / (restored - tone).square().sum()).item()))
    return sum(ratios) / len(ratios)
