"""Open-Sora 1.2 at toy size with random weights, as it is published, and the folder that cineray makes of it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from cineray.jobs.cli.main import main
from cineray.pipeline.adapters.open_sora_transformer import STDiT3
from cineray.pipeline.adapters.open_sora_vae import OpenSoraVAE


def publish(folder: Path) -> Path:
    """Writes the folders of a transformer, a VAE, a text encoder and a tokenizer into a folder, which it returns."""
    from tiny.text import TEXT_DIM, new_umt5
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "depth": 3, "num_heads": 4, "caption_channels": TEXT_DIM, "model_max_length": 12}
    vae_sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "filters": 8}
    vae_sizes |= {"num_res_blocks": 1, "channel_multipliers": (1, 1, 1), "temporal_downsample": (True, True)}
    vae_sizes |= {"temporal_norm_num_groups": 4}
    for name, model, config in (
        ("transformer", STDiT3(**sizes, input_sq_size=64), {**sizes, "input_sq_size": 64, "model_type": "STDiT3"}),
        ("vae", OpenSoraVAE(**vae_sizes), {**vae_sizes, "model_type": "VideoAutoencoderPipeline"}),
    ):
        (folder / name).mkdir()
        save_file(model.state_dict(), folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(config))
    tokenizer, _ = new_umt5()
    tokenizer.save_pretrained(folder / "tokenizer")
    t5 = T5Config(vocab_size=len(tokenizer), d_model=TEXT_DIM, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
    T5EncoderModel(t5).eval().save_pretrained(folder / "text_encoder")
    return folder


def convert(published: Path, out: Path, **changes: Path) -> int:
    """`cineray models convert open-sora` of what `publish` wrote: its exit code."""
    folders = {name: published / name for name in ("transformer", "vae", "text_encoder", "tokenizer")} | changes
    named = [word for name, at in folders.items() for word in (f"--{name.replace('_', '-')}", str(at))]
    return main(["models", "convert", "open-sora", *named, "--out", str(out)])
