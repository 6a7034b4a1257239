"""Frames to MP4 and back, through the ffmpeg that imageio-ffmpeg carries."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np

# CRF 14: 64x64 clips of flat shapes come back at 45 dB and more; at ffmpeg's default of 23 the colours bleed
CRF = 14


class VideoError(RuntimeError):
    """ffmpeg could not write or read a video."""


def write_video(frames: np.ndarray, path: Path, fps: int, metadata: Mapping[str, Any], lossless: bool = False) -> None:
    """Writes an H.264 MP4 that browsers play: yuv420p, index in front.

    Args:
        frames: [F, H, W, 3] uint8 RGB; sides even.
        metadata: goes as JSON into the comment tag; its "prompt" also into the title tag.
        lossless: RGB at crf 0 instead: decoded frames equal `frames` bit for bit, but browsers do not play it.

    Raises:
        VideoError: ffmpeg failed, with the end of its output.
        OSError: the disk is full or not writable.
    """
    num_frames, height, width, _ = frames.shape
    tags = [
        "-metadata",
        f"title={metadata.get('prompt', '')}",
        "-metadata",
        f"comment={json.dumps(dict(metadata), ensure_ascii=False)}",
    ]
    # one encoder thread: x264's output then does not depend on the machine's core count
    common = ["-movflags", "+faststart", "-threads", "1", "-bitexact", *tags]
    codec, pixel_format, quality = (
        ("libx264rgb", "rgb24", ["-crf", "0"])
        if lossless
        else (
            "libx264",
            "yuv420p",
            ["-crf", str(CRF), "-preset", "medium"],
        )
    )
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (width, height),
        fps=fps,
        codec=codec,
        pix_fmt_out=pixel_format,
        macro_block_size=1,
        ffmpeg_log_level="error",
        output_params=[*quality, *common],
        quality=None,  # type: ignore[arg-type]  # annotated int; None means that output_params say it
    )
    try:
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
    except OSError as error:  # imageio-ffmpeg reports ffmpeg's death this way, its log inside the message
        raise VideoError(f"ffmpeg could not write {path.name}: {_last_lines(str(error))}") from None
    finally:
        writer.close()
    _check_written(path, num_frames)


def _check_written(path: Path, num_frames: int) -> None:
    """imageio-ffmpeg does not say whether ffmpeg ended well: a full disk shows only here."""
    found = count_frames(path)
    if found != num_frames:
        raise VideoError(f"ffmpeg wrote {found} of {num_frames} frames of {path.name}; is the disk full?")


def count_frames(path: Path) -> int:
    """Decodes a video and counts its frames.

    Raises:
        VideoError: it cannot be read.
    """
    try:
        return imageio_ffmpeg.count_frames_and_secs(str(path))[0] or 0
    except (RuntimeError, OSError) as error:
        raise VideoError(f"{path.name} is not readable: {_last_lines(str(error))}") from None


def read_video(path: Path) -> np.ndarray:
    """All frames [F, H, W, 3] uint8 RGB."""
    reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24")
    try:
        width, height = next(reader)["size"]
        frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    except (OSError, RuntimeError, StopIteration) as error:
        raise VideoError(f"cannot read {path}: {_last_lines(str(error))}") from None
    return np.stack(frames)


def read_metadata(path: Path) -> dict[str, Any]:
    """The JSON that `write_video` put into the comment tag; empty where there is none."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "ffmetadata", "-"]
    text = subprocess.run(command, capture_output=True, check=False).stdout.decode("utf-8", "replace")
    # ffmetadata escapes = ; # \ and newlines with a backslash
    unescaped = text.replace("\\\n", "\n")
    for line in unescaped.splitlines():
        key, _, value = line.partition("=")
        if key == "comment":
            return json.loads(value.replace("\\=", "=").replace("\\;", ";").replace("\\#", "#").replace("\\\\", "\\"))
    return {}


def _last_lines(text: str, num_lines: int = 3) -> str:
    return " | ".join([line.strip() for line in text.strip().splitlines() if line.strip()][-num_lines:])
