"""How far two sounds are apart: by their spectra at three resolutions, and sample by sample.

Parallel WaveGAN (arXiv 1910.11480): the multi-resolution STFT distances, spectral convergence and log magnitude, with
the sizes of its table 1. Code after it (kan-bayashi/ParallelWaveGAN) floors the power of a bin at 1e-7, for samples in
[-1, 1].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

PEAK = 32768.0  # 16-bit samples are divided by it
EQUAL_SOUNDS_DB = 100.0  # stands for infinity in means, as for frames
RESOLUTIONS = ((1024, 600, 120), (2048, 1200, 240), (512, 240, 50))  # samples: (transform, window, hop)
_MIN_POWER = 1e-7
_BLOCK_FRAMES = 4096  # transformed at a time: 34 MB of the largest


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundScores:
    """How near a sound is to its reference.

    Args:
        log_stft_db: dB, the mean distance of the log magnitudes of all bins, mean over resolutions; 0 for equal sounds.
        stft_convergence: the norm of the magnitudes' difference over that of the reference's magnitudes, mean over
            resolutions; 0 for equal sounds.
        snr: dB, the reference's energy over that of the samples' difference; infinite for equal sounds.
    """

    log_stft_db: float
    stft_convergence: float
    snr: float

    @property
    def is_equal(self) -> bool:
        return self.snr == float("inf")


def compare_sounds(samples: np.ndarray, reference: np.ndarray) -> SoundScores:
    """All scores of a sound.

    Args:
        samples, reference: [number of samples, channels] int16 of the same shape.
    """
    found = [_distances(samples, reference, *sizes) for sizes in RESOLUTIONS]
    log_db, convergence = (float(np.mean(values)) for values in zip(*found, strict=True))
    return SoundScores(log_stft_db=log_db, stft_convergence=convergence, snr=snr_db(samples, reference))


def snr_db(samples: np.ndarray, reference: np.ndarray) -> float:
    """Signal-to-noise ratio over all samples and channels, in dB; infinite for equal sounds.

    Args:
        samples, reference: [number of samples, channels] int16 of the same shape.
    """
    apart = np.square(samples.astype(np.int64) - reference).sum()
    if apart == 0:
        return float("inf")
    energy = max(int(np.square(reference.astype(np.int64)).sum()), 1)  # of silence that of one step of one sample
    return float(10 * np.log10(energy / apart))


def _distances(
    samples: np.ndarray, reference: np.ndarray, transform: int, window: int, hop: int
) -> tuple[float, float]:
    """(distance of log magnitudes in dB, spectral convergence) at one resolution, over all channels."""
    log_sum = apart = whole = 0.0
    num_bins = 0
    for a, b in zip(samples.T, reference.T, strict=True):
        pairs = zip(_magnitudes(a, transform, window, hop), _magnitudes(b, transform, window, hop), strict=True)
        for ours, theirs in pairs:
            log_sum += float(np.abs(np.log10(ours / theirs)).sum())
            apart += float(np.square(ours - theirs).sum())
            whole += float(np.square(theirs).sum())
            num_bins += ours.size
    return 20 * log_sum / num_bins, float(np.sqrt(apart / whole))


def _magnitudes(samples: np.ndarray, transform: int, window: int, hop: int) -> Iterator[np.ndarray]:
    """[frames, bins] of a short-time Fourier transform, in blocks of frames; silence stands around the sound.

    Args:
        samples: [number of samples] int16.
        transform, window, hop: samples.
    """
    weights = np.hanning(window + 1)[:-1]  # periodic
    padded = np.pad(samples / PEAK, transform // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, transform)[::hop]
    before = (transform - window) // 2
    for begin in range(0, len(frames), _BLOCK_FRAMES):
        seen = frames[begin : begin + _BLOCK_FRAMES, before : before + window] * weights
        yield np.sqrt(np.maximum(np.square(np.abs(np.fft.rfft(seen, transform))), _MIN_POWER))
