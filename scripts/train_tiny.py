#!/usr/bin/env python
"""Trains the checkpoints that ship with cineray, from nothing, on clips that code draws.

    python scripts/train_tiny.py wan      --work out/train/wan      --out pipeline/checkpoints/tiny-wan
    python scripts/train_tiny.py hunyuan  --work out/train/hunyuan  --out pipeline/checkpoints/tiny-hunyuan

About two hours each on one CPU core. The work folder keeps logs and states: the same command resumes where it
was stopped. Weights are stored in float16; they load in any dtype.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, UniPCMultistepScheduler, WanPipeline
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from tiny import vae as tiny_vae
from tiny.denoiser import FLOW_SHIFT, HunyuanDenoiser, Plan, WanDenoiser, encode_clips, train_denoiser
from tiny.shapes import all_captions

SEEDS = {"wan": 1, "hunyuan": 2}
PLANS = {"wan": Plan(steps=5000), "hunyuan": Plan(steps=3600, refine_steps=1300, guided_from=2800)}
CLIPS_PER_CAPTION = 16
MAX_CHECKPOINT_BYTES = 24_000_000
CARD = """# tiny-{family}

Trained from nothing on clips that `scripts/tiny/shapes.py` draws: one flat shape that moves over a flat
background. It renders sentences of the form

    a <red|green|blue|yellow|purple|white> <circle|square|triangle> moving <left|right|up|down>
    on a <black|gray|navy> background

at 64x64 pixels, 17 frames. Made by

    python scripts/train_tiny.py {family} --work out/train/{family} --out pipeline/checkpoints/tiny-{family}

on one CPU core; `training/` holds the logs. Licence: Apache-2.0, like the rest of cineray.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(SEEDS))
    parser.add_argument("--work", type=Path, required=True, help="folder for logs and states")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint; replaced")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; results depend on it in the last bits")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    family, work, seed = arguments.family, arguments.work, SEEDS[arguments.family]
    work.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(seed)
    vae = tiny_vae.new_wan_vae() if family == "wan" else tiny_vae.new_hunyuan_vae()
    tiny_vae.train_vae(vae, work, seed, tiny_vae.STAGES[family])
    vae.eval().requires_grad_(False)
    say(work, "vae", psnr_db=tiny_vae.reconstruction_psnr(vae, 32, seed=10_000 + seed))

    latents, captions = encoded(vae, work, seed)
    torch.manual_seed(seed)
    denoiser = WanDenoiser() if family == "wan" else HunyuanDenoiser()
    train_denoiser(denoiser, latents, captions, work, seed, PLANS[family])
    denoiser.eval().requires_grad_(False)

    pipeline = wan_pipeline(vae, denoiser) if isinstance(denoiser, WanDenoiser) else hunyuan_pipeline(vae, denoiser)
    save(pipeline, arguments.out)
    (arguments.out / "training").mkdir()
    for log in sorted(work.glob("*.log.jsonl")):
        shutil.copy(log, arguments.out / "training" / log.name)
    (arguments.out / "README.md").write_text(CARD.format(family=family))
    num_bytes = sum(p.stat().st_size for p in arguments.out.rglob("*") if p.is_file())
    say(work, "saved", num_bytes=num_bytes, allowed_bytes=MAX_CHECKPOINT_BYTES)
    if num_bytes > MAX_CHECKPOINT_BYTES:
        raise SystemExit(f"{arguments.out} has {num_bytes} bytes, more than {MAX_CHECKPOINT_BYTES}")


def say(work: Path, event: str, **fields: object) -> None:
    line = json.dumps({"event": event, "time": time.strftime("%Y-%m-%d %H:%M:%S")} | fields)
    print(line, flush=True)
    with (work / "run.log.jsonl").open("a") as file:
        file.write(line + "\n")


def encoded(vae: nn.Module, work: Path, seed: int) -> tuple[torch.Tensor, list[str]]:
    """The training latents, from the work folder where they are there already."""
    path = work / "latents.safetensors"
    if not path.exists():
        latents, _ = encode_clips(vae, CLIPS_PER_CAPTION, seed=1000 + seed)
        save_file({"latents": latents.contiguous()}, path)
        say(work, "encoded", num_clips=len(latents), std=latents.std().item())
    return load_file(path)["latents"], [str(c) for c in all_captions() for _ in range(CLIPS_PER_CAPTION)]


def wan_pipeline(vae: Any, denoiser: WanDenoiser) -> WanPipeline:
    vae.register_to_config(latents_mean=[0.0] * 16, latents_std=[1.0] * 16)  # see vae.normalize_latents
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
    )  # as in Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    parts: dict[str, Any] = {"tokenizer": denoiser.tokenizer, "scheduler": scheduler}
    return WanPipeline(**parts, text_encoder=denoiser.text_encoder, transformer=denoiser.transformer, vae=vae)


def hunyuan_pipeline(vae: Any, denoiser: HunyuanDenoiser) -> HunyuanVideoPipeline:
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


def save(pipeline: WanPipeline | HunyuanVideoPipeline, out: Path) -> None:
    """Writes the diffusers folder in float16; tokenizers under the class name that transformers 4 knows too."""
    shutil.rmtree(out, ignore_errors=True)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(out, safe_serialization=True)
    for path in (out / "model_index.json", *out.glob("tokenizer*/tokenizer_config.json")):
        path.write_text(path.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))


if __name__ == "__main__":
    main()
