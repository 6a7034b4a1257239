"""How far two clips are apart."""

import numpy as np

PEAK = 255.0
EQUAL_CLIPS_DB = 100.0  # stands for infinity in means; 8-bit frames that differ in one value are at about 90 dB


def psnr_db(frames: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of a whole clip, in dB, over all frames and channels; infinite for equal clips.

    Args:
        frames, reference: [F, H, W, 3] uint8 of the same shape.
    """
    error = np.square(frames.astype(np.float64) - reference.astype(np.float64)).mean()
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
