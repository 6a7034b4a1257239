"""A clip's frames as its ranks decoded them: written by the first rank, read by whoever makes the video of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cineray.pipeline.resume.tensor_file import TensorFileError, read_tensors, write_tensors

FORMAT = "cineray frames 1"
MAX_HEADER_BYTES = 2**16


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedFrames:
    """Frames [F, H, W, 3] uint8 RGB, and the seconds that they took."""

    frames: np.ndarray
    decode_s: float


def write_frames(decoded: DecodedFrames, clip: str, path: Path) -> None:
    """Writes the frames in one step.

    Args:
        clip: its fingerprint.

    Raises:
        OSError: not writable, or full.
    """
    about = {"format": FORMAT, "clip": clip, "decode_s": repr(decoded.decode_s)}
    write_tensors({"frames": torch.from_numpy(decoded.frames)}, about, path)


def read_frames(path: Path, clip: str, shape: tuple[int, int, int]) -> DecodedFrames:
    """Reads what `write_frames` wrote.

    Args:
        shape: frames, height and width of the clip.

    Raises:
        FileNotFoundError: there is none.
        TensorFileError: not what was written, or of another clip.
    """
    wanted = (*shape, 3)
    file = read_tensors(path, int(np.prod(wanted)) + MAX_HEADER_BYTES)
    if file.metadata.get("format") != FORMAT or file.metadata.get("clip") != clip:
        raise TensorFileError("it is another clip's, or another version's")
    frames = file.tensors.get("frames")
    if frames is None or tuple(frames.shape) != wanted or frames.dtype != torch.uint8:
        raise TensorFileError(f"its frames must be uint8 {list(wanted)}")
    return DecodedFrames(frames=frames.numpy(), decode_s=float(file.metadata["decode_s"]))
