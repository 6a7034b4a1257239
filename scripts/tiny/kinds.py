"""What the tiny checkpoints make, and how it is judged: clips, stills and sounds, each with its captions, its reader
and the ground truth that the reader is measured on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from tiny import tones
from tiny.reading import read_frames
from tiny.shapes import NUM_FRAMES, SIZE, Caption, all_captions, all_stills, draw_clip

PROPERTIES = ("colour", "shape", "direction", "background")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What a model makes, and what can be read off it.

    Args:
        captions: all that there are to say, each with the properties as attributes.
        prompt: a caption's words.
        limits: property -> the least share of hits, in percent.
        vae_limit_db: the least that the VAE restores: PSNR of frames, signal-to-noise ratio of sounds.
        draw: (caption, seed, strength of noise) -> the ground truth, as a model's frames.
        noise: the strength that the reader is measured at: worse than a VAE at its limit.
        read: frames -> an object with the properties as attributes, None where nothing was seen.
        side: width and height in pixels; 1 of sounds.
        shares: where in a clip the frames of the contact sheet stand; none of sounds.
    """

    captions: tuple[Any, ...]
    prompt: Callable[[Any], str] = str
    properties: tuple[str, ...]
    limits: Mapping[str, float]
    vae_limit_db: float
    draw: Callable[[Any, int, float], np.ndarray]
    noise: float
    read: Callable[[np.ndarray], Any]
    side: int = SIZE
    num_frames: int = 1
    shares: tuple[float, ...] = ()
    columns: int = 1


def drawn_frames(caption: Caption, seed: int, noise_sigma: float = 0.0, num_frames: int = NUM_FRAMES) -> np.ndarray:
    """The ground truth of a caption as frames [F, 64, 64, 3] uint8, with Gaussian noise of so many levels."""
    generator = torch.Generator().manual_seed(seed)
    levels = (draw_clip(caption, generator, num_frames) + 1) * 127.5
    levels = levels + noise_sigma * torch.randn(levels.shape, generator=generator)
    return levels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).numpy()


def drawn_sound(tone: tones.Tone, seed: int, noise: float = 0.0) -> np.ndarray:
    """The ground truth of a caption as samples [N, 1] int16, with white noise of so many times its amplitude."""
    generator = torch.Generator().manual_seed(seed)
    sound = tones.draw_tone(tone, generator)
    sound = sound + noise * sound.square().mean().sqrt() * torch.randn(sound.shape, generator=generator)
    return (sound * 32767).round().clamp(-32768, 32767).to(torch.int16).T.numpy()


CLIPS = Kind(
    captions=tuple(all_captions()),
    properties=PROPERTIES,
    limits={"colour": 95.0, "direction": 95.0},
    vae_limit_db=30.0,
    draw=drawn_frames,
    noise=12.0,  # levels of 256; a PSNR of 26.5 dB
    read=read_frames,
    num_frames=NUM_FRAMES,
    shares=(0, 1 / 3, 2 / 3, 1),
    columns=3,  # 48 clips make a sheet of about 1600 x 2400 px
)
STILLS = Kind(
    captions=tuple(all_stills()),
    prompt=lambda caption: caption.still,
    properties=("colour", "shape", "background"),
    limits={"colour": 95.0, "shape": 95.0},
    vae_limit_db=30.0,
    draw=partial(drawn_frames, num_frames=1),
    noise=12.0,
    read=read_frames,
    shares=(0,),
    columns=6,
)
SOUNDS = Kind(
    captions=tuple(tones.all_tones()),
    properties=tones.PROPERTIES,
    limits=dict.fromkeys(tones.PROPERTIES, 95.0),
    vae_limit_db=15.0,
    draw=drawn_sound,
    noise=10 ** (-10 / 20),  # a signal-to-noise ratio of 10 dB
    read=tones.read_tone,
    side=1,
)
