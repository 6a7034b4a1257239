"""tiny-wan and tiny-hunyuan, from nothing: the VAE, the latents of drawn clips, the denoiser, the pipeline."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, UniPCMultistepScheduler, WanPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from tiny import vae as tiny_vae
from tiny.denoiser import FLOW_SHIFT, HunyuanDenoiser, WanDenoiser, encode_clips, flow_matching_loss
from tiny.shapes import all_captions
from tiny.training import Plan, say, train_denoiser

CLIPS_PER_CAPTION = 16


def make_wan(work: Path, seed: int) -> WanPipeline:
    vae: Any = tiny_vae.new_wan_vae()
    denoiser: Any = _trained(vae, WanDenoiser, Plan(steps=5000), work, seed, tiny_vae.STAGES["wan"])
    vae.register_to_config(latents_mean=[0.0] * 16, latents_std=[1.0] * 16)  # see vae.normalize_latents
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
    )  # as in Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    parts: dict[str, Any] = {"tokenizer": denoiser.tokenizer, "scheduler": scheduler}
    return WanPipeline(**parts, text_encoder=denoiser.text_encoder, transformer=denoiser.transformer, vae=vae)


def make_hunyuan(work: Path, seed: int) -> HunyuanVideoPipeline:
    vae: Any = tiny_vae.new_hunyuan_vae()
    plan = Plan(steps=3600, refine_steps=1300, guided_from=2800)
    denoiser: Any = _trained(vae, HunyuanDenoiser, plan, work, seed, tiny_vae.STAGES["hunyuan"])
    vae.register_to_config(scaling_factor=1.0)
    tokenizers: dict[str, Any] = {"tokenizer": denoiser.tokenizer, "tokenizer_2": denoiser.tokenizer_2}
    return HunyuanVideoPipeline(
        **tokenizers,
        text_encoder=denoiser.text_encoder,
        text_encoder_2=denoiser.text_encoder_2,
        transformer=denoiser.transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
    )


def _trained(
    vae: nn.Module, new_denoiser: Any, plan: Plan, work: Path, seed: int, stages: tuple[tiny_vae.Stage, ...]
) -> nn.Module:
    """Trains the VAE in place, then a new denoiser on its latents."""
    tiny_vae.train_vae(vae, work, seed, stages)
    vae.eval().requires_grad_(False)
    say(work, "vae", psnr_db=tiny_vae.reconstruction_psnr(vae, 32, seed=10_000 + seed))
    latents, captions = encoded(vae, work, seed, CLIPS_PER_CAPTION)
    torch.manual_seed(seed)
    denoiser = new_denoiser()
    train_denoiser(denoiser, partial(flow_matching_loss, latents, captions, plan.batch), work, seed, plan)
    return denoiser.eval().requires_grad_(False)


def encoded(vae: nn.Module, work: Path, seed: int, clips_per_caption: int) -> tuple[torch.Tensor, list[str]]:
    """The training latents, from the work folder where they are there already, and their captions."""
    path = work / "latents.safetensors"
    if not path.exists():
        latents, _ = encode_clips(vae, clips_per_caption, seed=1000 + seed)
        save_file({"latents": latents.contiguous()}, path)
        say(work, "encoded", num_clips=len(latents), std=latents.std().item())
    return load_file(path)["latents"], [str(c) for c in all_captions() for _ in range(clips_per_caption)]
