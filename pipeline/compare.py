"""How far two clips are apart."""

import numpy as np

PEAK = 255.0


def psnr_db(frames: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of a whole clip, in dB, over all frames and channels; infinite for equal clips.

    Args:
        frames, reference: [F, H, W, 3] uint8 of the same shape.
    """
    error = np.square(frames.astype(np.float64) - reference.astype(np.float64)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(PEAK**2 / error))
