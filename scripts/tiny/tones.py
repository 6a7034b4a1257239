"""Captioned tones, drawn by code and read back: the world that tiny-audio is trained on.

A sound is one tone of constant level on one or both sides, whose pitch holds, rises or falls by a fifth. The reader
knows no caption and no model. What cannot be heard is None, never a guess. Sounds are stereo, samples in [-1, 1].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import pi

import numpy as np
import torch

RATE = 4096  # samples a second
NUM_SAMPLES = 2048  # of every sound: half a second

PITCHES = {"low": 100.0, "middle": 200.0, "high": 400.0}  # Hz, in the middle of a sound and of its class
PITCH_SPREAD = 1 / 6  # octaves to either side; a third of an octave lies between a class's edge and the border
# Amplitudes of harmonics 1, 2 and 3, of which the highest ends at 1.7 kHz, below half the rate. The first is the
# strongest, so that the strongest frequency is the pitch.
TIMBRES = {"pure": (1.0, 0.0, 0.0), "bright": (1.0, 0.7, 0.6), "hollow": (1.0, 0.0, 0.6)}
COURSES = {"holding": 0.0, "rising": 1.0, "falling": -1.0}  # times FIFTH, in octaves from beginning to end
FIFTH = float(np.log2(3 / 2))
SIDES = {"left": (1.0, 0.0), "right": (0.0, 1.0), "both": (1.0, 1.0)}  # (left channel, right channel)
LEVEL = (0.15, 0.25)  # root mean square of a channel that sounds; a bright tone peaks at 2.5 times that
FADE_SAMPLES = 80  # 20 ms, at both ends: a tone that is cut clicks

PROPERTIES = ("pitch", "timbre", "course", "side")

SEGMENT = 256  # samples whose spectrum is taken: a Hann window's nulls lie 32 Hz to either side, a low pitch has 72 Hz
HEARD_HZ = (60.0, 700.0)  # where a pitch is looked for; drawn ones lie between 72 and 550
SILENCE = 0.02  # root mean square of the louder channel: a fifth of this is 16-bit noise, a drawn tone has 0.15
ONE_SIDE = 0.5  # of the quieter channel's amplitude to the louder one's: half way
MAX_SCATTER = 0.1  # octaves, root mean square about a straight line: more is not one tone


@dataclass(frozen=True, kw_only=True, slots=True)
class Tone:
    """What a sentence of the grammar says."""

    pitch: str
    timbre: str
    course: str
    side: str

    def __str__(self) -> str:
        place = "both sides" if self.side == "both" else f"the {self.side}"
        return f"a {self.pitch} {self.timbre} tone {self.course} on {place}"


def all_tones() -> list[Tone]:
    """The 81 sentences of the grammar, in a fixed order."""
    return [Tone(pitch=p, timbre=t, course=c, side=s) for p, t, c, s in product(PITCHES, TIMBRES, COURSES, SIDES)]


def draw_tone(tone: Tone, generator: torch.Generator) -> torch.Tensor:
    """One sound [2, NUM_SAMPLES] float32; what the caption leaves open (pitch in its class, phase, level) is random."""
    spread, phase, level = torch.rand(3, generator=generator).tolist()
    middle = PITCHES[tone.pitch] * 2 ** (PITCH_SPREAD * (2 * spread - 1))
    place = torch.arange(NUM_SAMPLES, dtype=torch.float64) / NUM_SAMPLES - 0.5
    frequency = middle * 2 ** (COURSES[tone.course] * FIFTH * place)
    angle = 2 * pi * (frequency.cumsum(0) / RATE + phase)
    amplitudes = TIMBRES[tone.timbre]
    wave = torch.stack([a * torch.sin(k * angle) for k, a in enumerate(amplitudes, start=1)]).sum(0)
    wave *= (LEVEL[0] + (LEVEL[1] - LEVEL[0]) * level) / (sum(a * a for a in amplitudes) / 2) ** 0.5
    fade = torch.sin(torch.linspace(0, pi / 2, FADE_SAMPLES, dtype=torch.float64)) ** 2
    wave[:FADE_SAMPLES] *= fade
    wave[-FADE_SAMPLES:] *= fade.flip(0)
    return (torch.tensor(SIDES[tone.side]).unsqueeze(1) * wave).float()


def draw_tones(num: int, generator: torch.Generator) -> torch.Tensor:
    """Sounds of random captions [num, 2, NUM_SAMPLES]."""
    tones = all_tones()
    return torch.stack([draw_tone(tones[i], generator) for i in torch.randint(len(tones), (num,), generator=generator)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """What was heard in a sound; None where nothing could be.

    Args:
        pitch_hz: geometric mean over the sound.
        bend: octaves from beginning to end.
        scatter: octaves, of the pitch about its straight line.
        overtones: amplitudes of harmonics 2 and 3 as shares of the first.
        quieter: amplitude of the quieter channel as a share of the louder one's.
    """

    pitch: str | None = None
    timbre: str | None = None
    course: str | None = None
    side: str | None = None
    pitch_hz: float | None = None
    bend: float | None = None
    scatter: float | None = None
    overtones: tuple[float, float] | None = None
    quieter: float | None = None


def read_tone(samples: np.ndarray) -> Heard:
    """Reads a sound.

    Args:
        samples: [number of samples, 2], int16 or in [-1, 1].
    """
    wave = samples / 32768.0 if samples.dtype == np.int16 else samples.astype(np.float64)
    levels = np.sqrt(np.square(wave).mean(axis=0))
    if levels.max() < SILENCE:
        return Heard()
    quieter = float(levels.min() / levels.max())
    side = "both" if quieter > ONE_SIDE else ("left", "right")[int(levels.argmax())]
    spectra = _spectra(wave[:, levels.argmax()])
    pitches = _pitches(spectra)
    places = np.linspace(-0.5, 0.5, len(pitches) + 1)
    places = (places[1:] + places[:-1]) / 2  # middles of the segments, in lengths of the sound
    slope, middle = (float(x) for x in np.polyfit(places, np.log2(pitches), 1))
    scatter = float(np.std(np.log2(pitches) - middle - slope * places))
    overtones = _overtones(spectra, pitches)
    named = (
        {}
        if scatter > MAX_SCATTER
        else {
            "pitch": _nearest((middle,), {name: (float(np.log2(hz)),) for name, hz in PITCHES.items()}, 0.5),
            "timbre": _nearest(overtones, {name: amplitudes[1:] for name, amplitudes in TIMBRES.items()}, 0.35),
            "course": _nearest((slope,), {name: (way * FIFTH,) for name, way in COURSES.items()}, FIFTH / 2),
        }
    )
    return Heard(
        side=side,
        pitch_hz=2**middle,
        bend=slope,
        scatter=scatter,
        overtones=overtones,
        quieter=quieter,
        **named,
    )


def _spectra(wave: np.ndarray) -> np.ndarray:
    """Power [segments, RATE // 2 + 1] at each whole Hz."""
    segments = wave[: len(wave) // SEGMENT * SEGMENT].reshape(-1, SEGMENT) * np.hanning(SEGMENT)
    return np.square(np.abs(np.fft.rfft(segments, RATE)))


def _pitches(spectra: np.ndarray) -> np.ndarray:
    """The strongest frequency of each segment, in Hz."""
    low, high = (int(hz) for hz in HEARD_HZ)
    return low + spectra[:, low:high].argmax(axis=1).astype(np.float64)


def _overtones(spectra: np.ndarray, pitches: np.ndarray) -> tuple[float, float]:
    """Amplitudes of harmonics 2 and 3 over that of the first, from the power within half a pitch around each: a pitch
    that moves within a segment widens the harmonics and takes no power from them."""
    hz = np.arange(spectra.shape[1])
    power = np.zeros(3)
    for spectrum, pitch in zip(spectra, pitches, strict=True):
        power += [spectrum[np.abs(hz - k * pitch) < pitch / 2].sum() for k in (1, 2, 3)]
    second, third = np.sqrt(power[1:] / power[0])
    return float(second), float(third)


def _nearest(point: tuple[float, ...], names: Mapping[str, tuple[float, ...]], within: float) -> str | None:
    """The name whose place is nearest to a point, if it is no farther than `within`."""
    distances = {name: float(np.linalg.norm(np.subtract(point, place))) for name, place in names.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= within else None
