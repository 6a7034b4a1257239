"""The shipped checkpoints render what they rendered when they were shipped.

Golden frames and the golden sound were made in float32 on a CPU (x86, AVX-512). Another CPU changes the last bits of a
step; 40 dB over 8 steps leaves room for that and for nothing that an eye would see, or an ear hear. To make them anew:

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
from cineray.pipeline.media.sound import read_wav, write_wav
from cineray.pipeline.media.spectra import snr_db
from cineray.pipeline.render import render_clip
from cineray.pipeline.request import ClipRequest

MODELS = ("tiny-wan", "tiny-hunyuan", "tiny-open-sora")
SOUND_MODEL = "tiny-audio"
FRAMES = (0, 8, 16)
RATE = 2048  # samples a second
MIN_DB = 40.0


def rendered(name: str, prompt: str) -> np.ndarray:
    """Frames [F, 64, 64, 3] uint8, or samples [N, 1] int16."""
    checkpoint = open_checkpoint(name)
    sizes = checkpoint.defaults
    request = ClipRequest(
        id="golden",
        prompt=prompt,
        seed=5,
        width=sizes.width,
        height=sizes.height,
        num_frames=sizes.num_frames,
        num_inference_steps=8,
        guidance_scale=sizes.guidance_scale,
        fps=sizes.fps,
        seconds=sizes.seconds,
    )
    return render_clip(load_model(checkpoint, LoadOptions()), request, lambda done, total: None).frames


def stills(name: str) -> np.ndarray:
    """Three frames side by side [64, 192, 3] uint8."""
    frames = rendered(name, "a yellow circle moving right on a navy background")
    return np.concatenate([frames[i] for i in FRAMES], axis=1)


def sound() -> np.ndarray:
    return rendered(SOUND_MODEL, "a middle bright tone rising")


def golden(name: str, suffix: str = ".png") -> Path:
    return Path(__file__).with_name(f"{name}{suffix}")


@pytest.mark.parametrize("name", MODELS)
def test_frames_are_the_golden_ones(name):
    frames = stills(name)
    assert psnr_db(frames, np.asarray(Image.open(golden(name)))) >= MIN_DB
    assert psnr_db(frames, np.roll(frames, 3, axis=1)) < MIN_DB  # the frames show something


def test_a_sound_is_the_golden_one():
    samples, (reference, _) = sound(), read_wav(golden(SOUND_MODEL, ".wav"))
    assert snr_db(samples, reference) >= MIN_DB
    assert snr_db(samples, np.roll(samples, 3, axis=0)) < MIN_DB  # it is not silent


if __name__ == "__main__":
    for model in sys.argv[1:] or (*MODELS, SOUND_MODEL):
        if model == SOUND_MODEL:
            path = golden(model, ".wav")
            write_wav(sound(), path, RATE, {})
        else:
            path = golden(model)
            Image.fromarray(stills(model)).save(path)
        print(path)
