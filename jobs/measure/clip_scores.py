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


class Scorer(Protocol):
    """Compares the clips of all policies with the uncached ones."""

    def score(self, clip: np.ndarray, original: np.ndarray, /) -> Any:
        """All scores of a clip, before any encoding."""
        ...

    def columns(self, clips: Sequence[Any], /) -> dict[str, Any]:
        """The fields of a `QualityRow` that the scores of a policy's clips are."""
        ...


@dataclass(frozen=True, slots=True)
class _OfFrames:
    """Of one clip; dB that would be infinite stand as `EQUAL_CLIPS_DB`."""

    psnr_db: float
    ssim: float
    motion_psnr_db: float | None
    vmaf: float | None
    xpsnr_db: float | None


@dataclass(slots=True)
class FrameScorer:
    """Of videos and pictures: [F, H, W, 3] uint8."""

    _has_vmaf: bool = True  # until ffmpeg says otherwise

    def score(self, clip: np.ndarray, original: np.ndarray) -> _OfFrames:
        motion = motion_psnr_db(clip, original)
        vmaf, xpsnr = self._vmaf_and_xpsnr(clip, original)
        return _OfFrames(
            psnr_db=min(psnr_db(clip, original), EQUAL_CLIPS_DB),
            ssim=ssim(clip, original),
            motion_psnr_db=None if motion is None else min(motion, EQUAL_CLIPS_DB),
            vmaf=vmaf,
            xpsnr_db=None if xpsnr is None else min(xpsnr, EQUAL_CLIPS_DB),
        )

    def columns(self, clips: Sequence[_OfFrames]) -> dict[str, Any]:
        return _kept("psnr", [clip.psnr_db for clip in clips]) | {
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


@dataclass(frozen=True, slots=True)
class SoundScorer:
    """Of sounds: [number of samples, channels] int16."""

    def score(self, clip: np.ndarray, original: np.ndarray) -> SoundScores:
        return compare_sounds(clip, original)

    def columns(self, clips: Sequence[SoundScores]) -> dict[str, Any]:
        return _kept("snr", [min(clip.snr, EQUAL_SOUNDS_DB) for clip in clips]) | {
            "log_stft_db": round(mean([clip.log_stft_db for clip in clips]), 3),
            "stft_convergence": round(mean([clip.stft_convergence for clip in clips]), 4),
        }


def scorer_of(output: Output) -> Scorer:
    """Who compares clips of this kind."""
    return SoundScorer() if isinstance(output, Sound) else FrameScorer()


def _kept(score: str, values: Sequence[float]) -> dict[str, Any]:
    """The columns of "psnr" or "snr": dB of each clip, their mean, the worst, the mean's interval."""
    return {
        f"{score}_db": round(mean(values), 2),
        f"worst_{score}_db": round(min(values), 2),
        f"{score}_ci95": interval_of_mean(values),
        f"clips_{score}_db": tuple(round(value, 2) for value in values),
    }


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
