"""Captioned tones, drawn by code and read back: the world that tiny-audio is trained on.

A sound is one tone of constant level, whose pitch holds, rises or falls by a fifth. The reader knows no caption and no
model. What cannot be heard is None, never a guess. Sounds have one channel, samples in [-1, 1].
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import pi

import numpy as np
import torch

RATE = 2048  # samples a second
NUM_SAMPLES = 1024  # of every sound: half a second

PITCHES = {"low": 100.0, "middle": 150.0, "high": 225.0}  # Hz, in the middle of a sound and of its class
PITCH_SPREAD = 1 / 12  # octaves to either side; a fifth of an octave lies between a class's edge and the border
# Amplitudes of harmonics 1, 2 and 3, of which the highest ends at 880 Hz, below half the rate. The first is the
# strongest, so that the strongest frequency is the pitch.
TIMBRES = {"pure": (1.0, 0.0, 0.0), "bright": (1.0, 0.7, 0.6), "hollow": (1.0, 0.0, 0.6)}
COURSES = {"holding": 0.0, "rising": 1.0, "falling": -1.0}  # times FIFTH, in octaves from beginning to end
FIFTH = float(np.log2(3 / 2))
LEVEL = (0.15, 0.25)  # root mean square; a bright tone peaks at 2.5 times that
FADE_SAMPLES = 40  # 20 ms, at both ends: a tone that is cut clicks

PROPERTIES = ("pitch", "timbre", "course")

SEGMENT = 128  # samples whose spectrum is taken: a Hann window's nulls lie 32 Hz to either side, a low pitch has 77 Hz
HEARD_HZ = (50.0, 400.0)  # where a pitch is looked for; drawn ones lie between 77 and 292
SILENCE = 0.02  # root mean square: a drawn tone has 0.15 or more
MAX_SCATTER = 0.1  # octaves, root mean square about a straight line: more is not one tone


@dataclass(frozen=True, kw_only=True, slots=True)
class Tone:
    """What a sentence of the grammar says."""

    pitch: str
    timbre: str
    course: str

    def __str__(self) -> str:
        return f"a {self.pitch} {self.timbre} tone {self.course}"


def all_tones() -> list[Tone]:
    """The 27 sentences of the grammar, in a fixed order."""
    return [Tone(pitch=p, timbre=t, course=c) for p, t, c in product(PITCHES, TIMBRES, COURSES)]


def draw_tone(tone: Tone, generator: torch.Generator) -> torch.Tensor:
    """One sound [1, NUM_SAMPLES] float32; what the caption leaves open (pitch in its class, phase, level) is random."""
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
    return wave.float().unsqueeze(0)


def draw_tones(num: int, generator: torch.Generator) -> torch.Tensor:
    """Sounds of random captions [num, 1, NUM_SAMPLES]."""
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
    """

    pitch: str | None = None
    timbre: str | None = None
    course: str | None = None
    pitch_hz: float | None = None
    bend: float | None = None
    scatter: float | None = None
    overtones: tuple[float, float] | None = None


def read_tone(samples: np.ndarray) -> Heard:
    """Reads a sound.

    Args:
        samples: [number of samples, 1], int16 or in [-1, 1].
    """
    wave = samples[:, 0] / 32768.0 if samples.dtype == np.int16 else samples[:, 0].astype(np.float64)
    if np.sqrt(np.square(wave).mean()) < SILENCE:
        return Heard()
    spectra = _spectra(wave)
    pitches = _pitches(spectra)
    places = np.linspace(-0.5, 0.5, len(pitches) + 1)
    places = (places[1:] + places[:-1]) / 2  # middles of the segments, in lengths of the sound
    slope, middle = (float(x) for x in np.polyfit(places, np.log2(pitches), 1))
    scatter = float(np.std(np.log2(pitches) - middle - slope * places))
    overtones = _overtones(spectra, pitches)
    measured = Heard(pitch_hz=2**middle, bend=slope, scatter=scatter, overtones=overtones)
    if scatter > MAX_SCATTER:
        return measured
    return replace(
        measured,
        pitch=_nearest((middle,), {name: (float(np.log2(hz)),) for name, hz in PITCHES.items()}, 0.5),
        timbre=_nearest(overtones, {name: amplitudes[1:] for name, amplitudes in TIMBRES.items()}, 0.35),
        course=_nearest((slope,), {name: (way * FIFTH,) for name, way in COURSES.items()}, FIFTH / 2),
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
