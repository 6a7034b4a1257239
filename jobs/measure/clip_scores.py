"""How near cached clips are to the uncached ones: videos and pictures by pixels, sounds by samples and spectra."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cineray.pipeline.media.compare import EQUAL_CLIPS_DB, motion_psnr_db, psnr_db, ssim, vmaf_and_xpsnr
from cineray.pipeline.media.ffmpeg import VideoError
from cineray.pipeline.media.output import Output, Sound
from cineray.pipeline.media.spectra import EQUAL_SOUNDS_DB, SoundScores, compare_sounds

NUM_RESAMPLES = 2000  # of the bootstrap


class ClipScores(Protocol):
    """The scores of a policy's clips, one clip after the other."""

    def add(self, clip: np.ndarray, original: np.ndarray, /) -> None:
        """Compares a clip with the uncached one, before any encoding."""
        ...

    def columns(self) -> dict[str, Any]:
        """The fields of a `QualityRow` that these scores are."""
        ...


@dataclass(frozen=True, slots=True)
class _OfFrames:
    """Of one clip; dB that would be infinite stand as `EQUAL_CLIPS_DB`."""

    psnr_db: float
    ssim: float
    motion_psnr_db: float | None
    vmaf: float | None
    xpsnr_db: float | None


class FrameClips:
    """Of videos and pictures: [F, H, W, 3] uint8."""

    def __init__(self) -> None:
        self._clips: list[_OfFrames] = []
        self._has_vmaf = True

    def add(self, clip: np.ndarray, original: np.ndarray) -> None:
        motion = motion_psnr_db(clip, original)
        vmaf, xpsnr = self._vmaf_and_xpsnr(clip, original)
        self._clips.append(
            _OfFrames(
                psnr_db=min(psnr_db(clip, original), EQUAL_CLIPS_DB),
                ssim=ssim(clip, original),
                motion_psnr_db=None if motion is None else min(motion, EQUAL_CLIPS_DB),
                vmaf=vmaf,
                xpsnr_db=None if xpsnr is None else min(xpsnr, EQUAL_CLIPS_DB),
            )
        )

    def columns(self) -> dict[str, Any]:
        clips = self._clips
        psnr = [clip.psnr_db for clip in clips]
        return {
            "psnr_db": round(mean(psnr), 2),
            "worst_psnr_db": round(min(psnr), 2),
            "psnr_ci95": interval_of_mean(psnr),
            "clips_psnr_db": tuple(round(value, 2) for value in psnr),
            "ssim": round(mean([clip.ssim for clip in clips]), 4),
            "vmaf": _mean_of_all([clip.vmaf for clip in clips]),
            "xpsnr_db": _mean_of_all([clip.xpsnr_db for clip in clips]),
            "motion_psnr_db": _mean_of_all([clip.motion_psnr_db for clip in clips]),
            "clips_vmaf": tuple(round(clip.vmaf, 2) for clip in clips if clip.vmaf is not None),
        }

    def _vmaf_and_xpsnr(self, clip: np.ndarray, original: np.ndarray) -> tuple[float, float] | tuple[None, None]:
        if self._has_vmaf:
            try:
                return vmaf_and_xpsnr(clip, original)
            except VideoError:  # of another ffmpeg than the one that imageio-ffmpeg ships
                self._has_vmaf = False
        return None, None


class SoundClips:
    """Of sounds: [number of samples, channels] int16."""

    def __init__(self) -> None:
        self._clips: list[SoundScores] = []

    def add(self, clip: np.ndarray, original: np.ndarray) -> None:
        self._clips.append(compare_sounds(clip, original))

    def columns(self) -> dict[str, Any]:
        clips = self._clips
        snr = [min(clip.snr, EQUAL_SOUNDS_DB) for clip in clips]
        return {
            "snr_db": round(mean(snr), 2),
            "worst_snr_db": round(min(snr), 2),
            "snr_ci95": interval_of_mean(snr),
            "clips_snr_db": tuple(round(value, 2) for value in snr),
            "log_stft_db": round(mean([clip.log_stft_db for clip in clips]), 3),
            "stft_convergence": round(mean([clip.stft_convergence for clip in clips]), 4),
        }


def scores_of(output: Output) -> ClipScores:
    """Where clips of this kind are compared."""
    return SoundClips() if isinstance(output, Sound) else FrameClips()


def interval_of_mean(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean, percentile bootstrap; None for fewer than two values."""
    from scipy.stats import bootstrap  # takes a second to import

    if len(values) < 2:
        return None
    found = bootstrap(
        (np.asarray(values),), np.mean, n_resamples=NUM_RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return round(float(found.low), 2), round(float(found.high), 2)


def mean(values: Sequence[float]) -> float:
    """Exact sum over count."""
    return math.fsum(values) / len(values)


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    """None where one is missing."""
    known = [value for value in values if value is not None]
    return round(mean(known), 2) if known and len(known) == len(values) else None
