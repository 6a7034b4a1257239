"""tiny-wan2.2: two experts of half of tiny-wan's depth, each trained on from tiny-wan at the noise that it will see.

VAE and text encoder are tiny-wan's, and stay as they are.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline

from tiny.denoiser import WanDenoiser, flow_matching_loss, shifted
from tiny.training import Plan, say, train_denoiser
from tiny.videos import encoded

TINY_WAN = Path(__file__).resolve().parents[2] / "pipeline/checkpoints/tiny-wan"
# Wan2.2's wan/configs/wan_t2v_A14B.py: boundary 0.875, sample_shift 12; with them 26 of 40 steps are the first expert's
BOUNDARY, SHIFT = 0.875, 12.0
KEPT_BLOCKS = (0, 2, 4, 6, 9, 11, 13, 15)  # every second one of tiny-wan's 16, with the first and the last
CLIPS_PER_CAPTION = 8
PLAN = Plan(steps=1000, peak_rate=1e-3)
EXPERTS = {"transformer": (BOUNDARY, 1.0), "transformer_2": (0.0, BOUNDARY)}  # component -> its noise levels


def make_wan22(work: Path, seed: int) -> WanPipeline:
    wan: Any = WanPipeline.from_pretrained(TINY_WAN, torch_dtype=torch.float32)
    latents, captions = encoded(wan.vae.eval().requires_grad_(False), work, seed, CLIPS_PER_CAPTION)
    experts: dict[str, Any] = {}
    for number, (name, levels) in enumerate(EXPERTS.items()):
        denoiser: Any = halved(wan)
        loss_of = partial(flow_matching_loss, latents, captions, PLAN.batch, draw_sigma=partial(draw_sigma, *levels))
        train_denoiser(denoiser, loss_of, work, seed + 10 * number, PLAN, name)
        experts[name] = denoiser.transformer.eval().requires_grad_(False)
        say(work, name, noise_levels=levels)
    scheduler: Any = UniPCMultistepScheduler.from_config(wan.scheduler.config, flow_shift=SHIFT)
    parts = {name: getattr(wan, name) for name in ("tokenizer", "text_encoder", "vae")}
    return WanPipeline(**parts, **experts, scheduler=scheduler, boundary_ratio=BOUNDARY)


def halved(wan: Any) -> WanDenoiser:
    """tiny-wan's denoiser with KEPT_BLOCKS alone; its text encoder is frozen."""
    denoiser = WanDenoiser(num_layers=len(KEPT_BLOCKS))
    weights = wan.transformer.state_dict()
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("blocks.")}
    for new, old in enumerate(KEPT_BLOCKS):
        prefix = f"blocks.{old}."
        kept |= {f"blocks.{new}.{n.removeprefix(prefix)}": w for n, w in weights.items() if n.startswith(prefix)}
    denoiser.transformer.load_state_dict(kept)
    denoiser.text_encoder.load_state_dict(wan.text_encoder.state_dict())
    denoiser.text_encoder.requires_grad_(False)
    return denoiser


def draw_sigma(low: float, high: float, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels [batch] between `low` and `high`, as often as the steps of a clip come by them."""
    first, last = (level / (SHIFT - (SHIFT - 1) * level) for level in (low, high))  # the inverse of `shifted`
    return shifted(first + (last - first) * torch.rand(batch, generator=generator), SHIFT)
