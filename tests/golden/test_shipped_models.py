"""The shipped checkpoints render what they rendered when they were shipped.

Golden frames were made in float32 on a CPU (x86, AVX-512). Another CPU changes the last bits of a step; 40 dB over 8
steps leaves room for that and for nothing that an eye would see. To make them anew:

    python tests/golden/test_shipped_models.py
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadOptions, load_model
from cineray.pipeline.media.compare import psnr_db
from cineray.pipeline.render import render_clip
from cineray.pipeline.request import ClipRequest

MODELS = ("tiny-wan", "tiny-hunyuan")
FRAMES = (0, 8, 16)
MIN_PSNR_DB = 40.0


def stills(name: str, cache: str = "none") -> np.ndarray:
    """Three frames side by side [64, 192, 3] uint8."""
    checkpoint = open_checkpoint(name)
    sizes = checkpoint.defaults
    request = ClipRequest(
        id="golden",
        prompt="a yellow circle moving right on a navy background",
        seed=5,
        width=sizes.width,
        height=sizes.height,
        num_frames=sizes.num_frames,
        num_inference_steps=8,
        guidance_scale=sizes.guidance_scale,
        fps=sizes.fps,
        cache=cache,
    )
    frames = render_clip(load_model(checkpoint, LoadOptions()), request, lambda done, total: None).frames
    return np.concatenate([frames[i] for i in FRAMES], axis=1)


def golden(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.png")


@pytest.mark.parametrize("name", MODELS)
def test_frames_are_the_golden_ones(name):
    rendered = stills(name)
    assert psnr_db(rendered, np.asarray(Image.open(golden(name)))) >= MIN_PSNR_DB
    assert psnr_db(rendered, np.roll(rendered, 3, axis=1)) < MIN_PSNR_DB  # the frames show something


if __name__ == "__main__":
    for model in sys.argv[1:] or MODELS:
        Image.fromarray(stills(model)).save(golden(model))
        print(golden(model))
