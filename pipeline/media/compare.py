"""How far two clips are apart: in numbers, and for the eye."""

import os
import re
from dataclasses import dataclass

import numpy as np

from cineray.pipeline.media.ffmpeg import EXTRA, VideoError, last_lines, run_ffmpeg
from cineray.pipeline.media.video import TO_YUV

PEAK = 255.0
EQUAL_CLIPS_DB = 100.0  # stands for infinity in means; 8-bit frames that differ in one value are at about 90 dB

MIN_SIDE = 17  # libvmaf ends by a signal at 16; SSIM's window has 11
DIFFERENCE_GAIN = 8  # one level of 255 is not seen; at eight times as much a difference of 32 is white
_SCORE = r"(-?\d+(?:\.\d+)?|inf)"
_VMAF, _XPSNR = re.compile(f"VMAF score: {_SCORE}"), re.compile(rf"XPSNR .*\(minimum: {_SCORE}\)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """How near a clip is to its reference; dB of equal clips are infinite.

    Args:
        psnr: dB over all frames and channels, RGB.
        ssim: mean over frames, channels and windows, RGB.
        vmaf: 0 to about 100, model vmaf_v0.6.1, mean over frames; equal clips are not quite at 100.
        xpsnr: dB, the lowest of the means of Y, U and V, as its authors advise.
    """

    psnr: float
    ssim: float
    vmaf: float
    xpsnr: float

    @property
    def is_equal(self) -> bool:
        return self.psnr == float("inf")


def compare_frames(frames: np.ndarray, reference: np.ndarray) -> Scores:
    """All scores of a clip.

    Args:
        frames, reference: [F, H, W, 3] uint8 of the same shape, sides at least `MIN_SIDE`.

    Raises:
        VideoError: ffmpeg has no VMAF or XPSNR, or failed.
    """
    vmaf, xpsnr = vmaf_and_xpsnr(frames, reference)
    return Scores(psnr=psnr_db(frames, reference), ssim=ssim(frames, reference), vmaf=vmaf, xpsnr=xpsnr)


def vmaf_and_xpsnr(frames: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """(VMAF, XPSNR in dB) by ffmpeg's filters, of the frames as yuv420p in BT.709 with limited range.

    VMAF: Netflix's model vmaf_v0.6.1, which was trained on what is seen at 1080 lines. XPSNR: Helmrich et al. 2020,
    "XPSNR: A Low-Complexity Extension of The Perceptually Weighted Peak Signal-To-Noise Ratio For High-Resolution Video
    Quality Assessment"; infinite for equal clips.

    Args:
        frames, reference: [F, H, W, 3] uint8 of the same shape.

    Raises:
        VideoError: ffmpeg lacks a filter, or failed; or a side is below `MIN_SIDE`.
    """
    _, height, width, _ = frames.shape
    if min(height, width) < MIN_SIDE:
        raise VideoError(f"VMAF needs sides of at least {MIN_SIDE}, got {width}x{height}")
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{height}", "-framerate", "25")
    graph = (
        f"[0:v]{TO_YUV},format=yuv420p,split[a1][a2];[1:v]{TO_YUV},format=yuv420p,split[b1][b2];"
        f"[a1][b1]libvmaf=n_threads={os.cpu_count() or 1}[vmaf];[b2][a2]xpsnr[xpsnr]"  # which wants the reference first
    )
    outputs = [word for name in ("vmaf", "xpsnr") for word in ("-map", f"[{name}]", "-f", "null", "-")]
    said = run_ffmpeg(
        ["-v", "info", *raw, "-i", "pipe:0", *raw, "-i", EXTRA, "-filter_complex", graph, *outputs],
        stdin=(np.ascontiguousarray(frame).data for frame in frames),
        extra=np.ascontiguousarray(reference).tobytes(),
    )
    vmaf, xpsnr = _VMAF.search(said), _XPSNR.search(said)
    if vmaf is None or xpsnr is None:
        raise VideoError(f"ffmpeg told no VMAF or XPSNR: {last_lines(said)}")
    return float(vmaf[1]), float(xpsnr[1])


def side_by_side(frames: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """[F, H, 2 W, 3]: the reference on the left."""
    return np.concatenate([reference, frames], axis=2)


def difference(frames: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """[F, H, W, 3]: `DIFFERENCE_GAIN` times the distance of each channel; black where the clips are equal."""
    apart = np.abs(frames.astype(np.int16) - reference.astype(np.int16))
    return np.minimum(apart * DIFFERENCE_GAIN, 255).astype(np.uint8)


def psnr_db(frames: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of a whole clip, in dB, over all frames and channels; infinite for equal clips.

    Args:
        frames, reference: [F, H, W, 3] uint8 of the same shape.
    """
    # frame by frame and in whole numbers: exact, and without a copy of the clip in floats
    errors = (int(np.square(a.astype(np.int32) - b).sum()) for a, b in zip(frames, reference, strict=True))
    error = sum(errors) / frames.size
    return float("inf") if error == 0 else float(10 * np.log10(PEAK**2 / error))


def motion_psnr_db(frames: np.ndarray, reference: np.ndarray) -> float | None:
    """PSNR of what changes from each frame to the next, in dB: flicker lowers it, an error that stays does not.

    Args:
        frames, reference: [F, H, W, 3] uint8 of the same shape.

    Returns:
        Infinite where both change alike; None for a single frame.
    """
    if len(frames) < 2:
        return None
    changes, expected = (np.diff(clip.astype(np.int16), axis=0) for clip in (frames, reference))
    errors = (int(np.square(a.astype(np.int32) - b).sum()) for a, b in zip(changes, expected, strict=True))
    error = sum(errors) / changes.size
    return float("inf") if error == 0 else float(10 * np.log10(PEAK**2 / error))


def ssim(frames: np.ndarray, reference: np.ndarray) -> float:
    """Mean structural similarity over frames, channels and all windows inside the frame; 1 for equal clips.

    With the settings of Wang et al. 2004, "Image quality assessment", section III-C: a Gaussian window of 11 x 11 and
    1.5 pixels.

    Args:
        frames, reference: [F, H, W, 3] uint8 of the same shape, sides at least 11.
    """
    from skimage.metrics import structural_similarity  # scipy takes a second to import

    def of_frame(frame: np.ndarray, other: np.ndarray) -> float:
        return structural_similarity(  # type: ignore[return-value]  # a tuple only if asked for more
            frame,
            other,
            data_range=PEAK,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )

    return float(np.mean([of_frame(a, b) for a, b in zip(frames, reference, strict=True)]))
