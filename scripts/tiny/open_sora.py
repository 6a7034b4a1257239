"""tiny-open-sora, from nothing but tiny-dit's VAE for each frame: a VAE over time behind it, T5 and STDiT3.

Caption grammar and clips are tiny-wan's; prompts get Open-Sora's score and cleaning before they are encoded.
"""

import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cineray.pipeline.adapters.open_sora import SCORE, prompt_text
from cineray.pipeline.adapters.open_sora_configs import CHANNELS
from cineray.pipeline.adapters.open_sora_pipeline import OpenSoraPipeline
from cineray.pipeline.adapters.open_sora_transformer import STDiT3
from cineray.pipeline.adapters.open_sora_vae import OpenSoraVAE
from tiny import vae as tiny_vae
from tiny.denoiser import flow_matching_loss, shifted
from tiny.shapes import NUM_FRAMES, SIZE, all_captions, draw_clip
from tiny.text import TEXT_DIM, new_t5
from tiny.training import Plan, say, train_denoiser

TINY_DIT = Path(__file__).resolve().parents[2] / "pipeline/checkpoints/tiny-dit"
TEXT_TOKENS = 24  # a caption with its score has 17 and an end
FPS = 8.0
CLIPS_PER_CAPTION = 16
VAE_STEPS, VAE_BATCH, VAE_RATE = 1250, 4, 2e-3
LATENT_NOISE = 0.05  # added to latents of std about 1 in training, as in tiny.vae
PLAN = Plan(steps=6000, batch=24)


class OpenSoraDenoiser(nn.Module):
    """T5 and STDiT3, whose latents have patches of 4 x 4: 80 tokens for a clip."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer, self.text_encoder = new_t5(SCORE, TEXT_TOKENS)
        self.transformer = STDiT3(
            patch_size=(1, 4, 4),
            hidden_size=128,
            depth=8,
            num_heads=4,
            caption_channels=TEXT_DIM,
            model_max_length=TEXT_TOKENS,
            input_sq_size=SIZE,
        )
        nn.init.zeros_(self.transformer.final_layer.linear.weight)
        nn.init.zeros_(self.transformer.final_layer.linear.bias)
        self._prompts = {str(c): prompt_text(str(c)) for c in all_captions()}

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, captions: list[str], _guidance: torch.Tensor
    ) -> torch.Tensor:
        """Velocity from data to noise [B, 4, T, H, W]; "" is the empty caption behind the mask of a prompt."""
        # every caption has as many tokens, and so the empty one may hide the same places as any of them
        tokens = self.tokenizer(
            [self._prompts[c or str(all_captions()[0])] for c in captions], padding="longest", return_tensors="pt"
        )
        text = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        is_empty = torch.tensor([not c for c in captions]).view(-1, 1, 1)
        text = torch.where(is_empty, self.transformer.null_embeds[: text.shape[1]], text)
        fps = torch.tensor([FPS])
        sample = self.transformer(latents, timestep, text, fps=fps, height=SIZE, width=SIZE).sample
        return -sample[:, :CHANNELS]  # upstream's points from noise to data; a variance, not trained, is behind it


def make_open_sora(work: Path, seed: int) -> OpenSoraPipeline:
    vae = _trained_vae(work, seed)
    say(work, "vae", psnr_db=tiny_vae.reconstruction_psnr(vae, 16, seed=10_000 + seed))
    frames, captions = _frame_latents(vae, work, seed)
    latents = torch.cat([_coded(vae, some) for some in frames.split(32)])
    torch.manual_seed(seed)
    denoiser: Any = OpenSoraDenoiser()
    loss_of = partial(flow_matching_loss, latents, captions, PLAN.batch, draw_sigma=draw_sigma)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention's backward takes two fifths of a step on so few tokens
        train_denoiser(denoiser, loss_of, work, seed, PLAN)
    denoiser.eval().requires_grad_(False)
    return OpenSoraPipeline(
        tokenizer=denoiser.tokenizer,
        text_encoder=denoiser.text_encoder,
        vae=vae,
        transformer=denoiser.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def draw_sigma(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels [batch]: even times, shifted so that one in six lies above 0.9.

    Upstream draws them with the shift of inference, here 0.28, by which one in 30 would lie there: too few for a
    training as short as this to learn where a shape starts.
    """
    return shifted(torch.rand(batch, generator=generator), 2.0)


def new_vae() -> OpenSoraVAE:
    return OpenSoraVAE(
        block_out_channels=tiny_vae.PICTURE_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        filters=32,
        num_res_blocks=1,
        channel_multipliers=(1, 1, 2, 2),
        temporal_norm_num_groups=8,
        micro_batch_size=NUM_FRAMES,
        latents_shift=(0.0,) * CHANNELS,
        latents_scale=(1.0,) * CHANNELS,
    )


def _trained_vae(work: Path, seed: int) -> OpenSoraVAE:
    """tiny-dit's VAE for the frames; the one over time learns to restore the frames' latents."""
    vae: Any = new_vae()
    picture: Any = AutoencoderKL.from_pretrained(TINY_DIT / "vae", dtype=torch.float32)
    vae.spatial_vae.module.load_state_dict(picture.state_dict())
    vae.spatial_vae.requires_grad_(False)
    frames, _ = _frame_latents(vae, work, seed)
    saved, time_vae = work / "time_vae.pt", vae.temporal_vae
    tiny_vae.channels_last(time_vae)
    optimizer = torch.optim.AdamW(time_vae.parameters(), lr=VAE_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate(i / VAE_STEPS, i))
    parts, step, began = {"vae": time_vae, "optimizer": optimizer, "rate": rate}, 0, time.monotonic()
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        step = state.pop("step")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    with (work / "vae.log.jsonl").open("a") as log:
        while step < VAE_STEPS:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            rows = torch.randint(len(frames), (VAE_BATCH,), generator=generator)
            error = _vae_step(time_vae, optimizer, frames[rows], generator)
            rate.step()
            step += 1
            if step % 50 == 0:
                row: dict[str, float] = {"step": step, "mean_squared_error": error}
                if step % 500 == 0:
                    row["clip_psnr_db"] = tiny_vae.reconstruction_psnr(vae, 4, seed=seed + 1)
                print(json.dumps(row | {"wall_s": time.monotonic() - began}), file=log, flush=True)
            if step % 250 == 0:
                torch.save({n: p.state_dict() for n, p in parts.items()} | {"step": step}, saved)
    vae.eval().requires_grad_(False)
    return _normalized(vae, frames)


def _rate(share: float, step: int) -> float:
    return min((step + 1) / 100, 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * share)))


def _vae_step(vae: Any, optimizer: torch.optim.Optimizer, frames: torch.Tensor, generator: torch.Generator) -> float:
    """One step on latents [B, 4, 17, 16, 16] of frames; returns the mean squared error, where their variance is 1."""
    frames = frames.contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = vae.encode(frames).chunk(2, dim=1)[0].float()
        made = vae.decode(latents + LATENT_NOISE * torch.randn(latents.shape, generator=generator), NUM_FRAMES)
    difference = made.float() - frames
    error = difference.square().mean()
    optimizer.zero_grad(set_to_none=True)
    (error + 0.1 * difference.abs().mean() + tiny_vae.LATENT_PENALTY * latents.square().mean()).backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    return error.item()


@torch.no_grad()
def _normalized(vae: Any, frames: torch.Tensor) -> OpenSoraVAE:
    """With the latents' mean and std in the configuration, where the published one has them."""
    latents = torch.cat([_coded(vae, some) for some in frames[::8].split(16)])
    shift, scale = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.shift.copy_(shift.view(1, -1, 1, 1, 1))
    vae.scale.copy_(scale.view(1, -1, 1, 1, 1))
    vae.register_to_config(latents_shift=shift.tolist(), latents_scale=scale.tolist())
    return vae


@torch.no_grad()
def _coded(vae: Any, frames: torch.Tensor) -> torch.Tensor:
    """Normalized latents [N, 4, 5, 16, 16] of frames' latents [N, 4, 17, 16, 16]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = vae.temporal_vae.encode(frames).chunk(2, dim=1)[0].float()
    return (latents - vae.shift) / vae.scale


@torch.no_grad()
def _frame_latents(vae: Any, work: Path, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Latents [216 * CLIPS_PER_CAPTION, 4, 17, 16, 16] of the frames of drawn clips, and the captions."""
    path = work / "latents.safetensors"
    if not path.exists():
        generator, latents = torch.Generator().manual_seed(1000 + seed), []
        for caption in all_captions():
            clips = torch.stack([draw_clip(caption, generator) for _ in range(CLIPS_PER_CAPTION)])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                latents.append(vae.spatial_vae.encode(clips, NUM_FRAMES, None).float())
        save_file({"latents": torch.cat(latents).contiguous()}, path)
        say(work, "encoded", num_clips=len(latents) * CLIPS_PER_CAPTION, std=torch.cat(latents).std().item())
    return load_file(path)["latents"], [str(c) for c in all_captions() for _ in range(CLIPS_PER_CAPTION)]
