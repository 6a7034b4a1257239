"""tiny-dit, from nothing: AutoencoderKL on drawn stills, then DiTTransformer2DModel by colour, shape and background.

As in DiT's paper (Peebles and Xie 2023) a tenth of the classes is dropped, on a linear schedule of noise; without the
learned variance, which DDIM's steps do not use. What is predicted is not the noise but v (Salimans and Ho 2022): after
1,600 steps of 32 stills a model of the noise drew the right colour in 32 of 54 stills and the right shape in 10.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiny import vae as tiny_vae
from tiny.shapes import DIRECTIONS, NUM_FRAMES, all_stills, draw_clip
from tiny.training import Plan, say, train_denoiser

CLASSES = all_stills()  # the number of a class is its place
NULL_CLASS = 1000  # DiTPipeline's
STILLS_PER_CLASS = 128
CLASS_DROP = 0.1
PLAN = Plan(steps=10_000, batch=64)


class DiTDenoiser(nn.Module):
    """DiTTransformer2DModel, started as the paper does: each block begins as the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,  # DiTPipeline wants it said
            num_layers=12,
            sample_size=16,
            patch_size=4,  # 16 tokens
            num_embeds_ada_norm=NULL_CLASS,
        )
        blocks: Any = self.transformer.transformer_blocks
        for block in blocks:
            labels = block.norm1.emb.class_embedder.embedding_table.weight
            nn.init.normal_(labels, std=0.5)  # from the start as far apart as timesteps are
            labels.data[len(CLASSES) : NULL_CLASS] = 0  # classes that no still has
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.zeros_(block.norm1.linear.bias)
        nn.init.zeros_(self.transformer.proj_out_2.weight)
        nn.init.zeros_(self.transformer.proj_out_2.bias)
        self.transformer.eval()  # or each block would drop classes by itself


def make_dit(work: Path, seed: int) -> DiTPipeline:
    vae = trained_picture_vae(work, seed)
    latents = _encoded(vae, work, seed)
    torch.manual_seed(seed)
    denoiser: Any = DiTDenoiser()
    # DiT's diffusion but for what is predicted: facebook/DiT-XL-2-256's scheduler_config.json
    scheduler: Any = DDIMScheduler(beta_schedule="linear", clip_sample=False, prediction_type="v_prediction")
    loss_of = partial(velocity_loss, latents, scheduler.alphas_cumprod, PLAN.batch)
    train_denoiser(denoiser, loss_of, work, seed, PLAN)
    denoiser.eval().requires_grad_(False)
    names = {number: caption.still for number, caption in enumerate(CLASSES)}
    return DiTPipeline(transformer=denoiser.transformer, vae=vae, scheduler=scheduler, id2label=names)


def trained_picture_vae(work: Path, seed: int) -> AutoencoderKL:
    """The VAE of stills, trained or from the work folder; Open-Sora's frames go through the same."""
    vae: Any = tiny_vae.new_picture_vae()
    tiny_vae.train_vae(vae, work, seed, tiny_vae.STAGES["stills"])
    vae.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    say(work, "vae", psnr_db=tiny_vae.reconstruction_psnr(vae, 16, seed=10_000 + seed))
    return vae


@torch.no_grad()
def _encoded(vae: AutoencoderKL, work: Path, seed: int) -> torch.Tensor:
    """Scaled latents [54 * STILLS_PER_CLASS, 4, 16, 16] in the order of the classes."""
    path = work / "latents.safetensors"
    if not path.exists():
        generator, latents = torch.Generator().manual_seed(1000 + seed), []
        for number in range(len(CLASSES)):
            stills = torch.stack([draw_still(number, generator) for _ in range(STILLS_PER_CLASS)])
            latents.append(tiny_vae.encode(vae, stills).squeeze(2) * tiny_vae.PICTURE_SCALE)
        save_file({"latents": torch.cat(latents).contiguous()}, path)
        say(work, "encoded", num_stills=len(latents) * STILLS_PER_CLASS, std=torch.cat(latents).std().item())
    return load_file(path)["latents"]


def draw_still(number: int, generator: torch.Generator) -> torch.Tensor:
    """A frame [3, 1, 64, 64] of a clip of the class, at a random time of a random movement."""
    way, frame = (int(torch.randint(n, (), generator=generator)) for n in (len(DIRECTIONS), NUM_FRAMES))
    return draw_clip(
        replace(CLASSES[number], direction=list(DIRECTIONS)[way]), generator, num_frames=1, first_frame=frame
    )


def velocity_loss(
    latents: torch.Tensor,
    alphas: torch.Tensor,
    batch: int,
    denoiser: Any,
    _teacher: nn.Module | None,
    seed: int,
) -> torch.Tensor:
    """Mean squared error of the predicted v: a half at uniform timesteps, a half where a shape begins.

    Args:
        latents: [54 * N, 4, 16, 16], N of each class in turn.
        alphas: share of the signal's variance at each timestep [1000].
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(latents), (batch,), generator=generator)
    clean = latents[rows]
    noise = torch.randn(clean.shape, generator=generator)
    share = torch.rand(batch, generator=generator)
    share[::2] = torch.sigmoid(torch.randn(share[::2].shape, generator=generator) - 0.5)
    timestep = (share * len(alphas)).long().clamp(max=len(alphas) - 1)
    signal = alphas[timestep].view(-1, 1, 1, 1)
    labels = rows // (len(latents) // len(CLASSES))
    labels[torch.rand(batch, generator=generator) < CLASS_DROP] = NULL_CLASS
    noised = signal.sqrt() * clean + (1 - signal).sqrt() * noise
    target = signal.sqrt() * noise - (1 - signal).sqrt() * clean
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # as of sounds: few tokens
        made = denoiser.transformer(noised, timestep, labels, return_dict=False)[0]
    return (made.float() - target).square().mean()
