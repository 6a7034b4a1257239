"""What a clip is given beside a prompt and a first frame: pictures of what it is to show, a video that it follows and a
mask of that (VACE), or one that it goes on from (Open-Sora)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cineray.pipeline.media.ffmpeg import VideoError
from cineray.pipeline.media.picture import PictureError, fitted, shown_picture
from cineray.pipeline.media.video import count_frames, read_video
from cineray.pipeline.request import MAX_FRAMES, ClipRequest
from cineray.text import shorten

# by the ends of their names, what `picture.FORMATS` lists; all else is taken for a video
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a file held when its clip was taken in hand; a picture has no number of frames.

    Args:
        sha256: of the file, in hex.
        num_frames: at most MAX_FRAMES are counted.
    """

    sha256: str
    num_frames: int | None = None


def is_picture(path: str) -> bool:
    return path.lower().endswith(PICTURE_SUFFIXES)


def video_facts(path: str) -> FileFacts:
    """Decodes a video as far as a clip can need it.

    Raises:
        PictureError: it cannot be used.
    """
    try:
        num_frames = count_frames(path, MAX_FRAMES)
        return FileFacts(_digest(path), num_frames)
    except (OSError, VideoError) as error:
        raise PictureError(f"video {shorten(path)} cannot be used: {_reason(error)}") from None


def reference_pictures(request: ClipRequest) -> list[Image.Image]:
    """The reference images, RGB, each as it is.

    Raises:
        PictureError: one cannot be used, or is not what it was when the clip was taken in hand.
    """
    return [_picture(path, digest) for path, digest in _named_digests(request)[: len(request.reference_images)]]


def control_frames(request: ClipRequest) -> list[Image.Image] | None:
    """The first frames of the control video, RGB in the clip's size, as many as the clip has; None without one.

    Raises:
        PictureError: it cannot be used, has fewer, or is not what it was when the clip was taken in hand.
    """
    return None if request.control_video is None else _frames(request, request.control_video)


def mask_frames(request: ClipRequest) -> list[Image.Image] | None:
    """The mask's frames likewise, grey as RGB; None without one. A picture is the mask of each frame."""
    path = request.control_mask
    if path is None:
        return None
    if is_picture(path):
        digest = dict(_named_digests(request)).get(path)
        return [_in_size(_picture(path, digest).convert("L").convert("RGB"), request)] * request.num_frames
    return [frame.convert("L").convert("RGB") for frame in _frames(request, path)]


def last_frames(request: ClipRequest, num_frames: int) -> list[Image.Image]:
    """The last frames of the control video, RGB in the clip's size.

    Raises:
        PictureError: as `control_frames`.
    """
    assert request.control_video is not None
    return _read(request, request.control_video, num_frames, at_end=True)


def too_few_frames(path: str, num_frames: int, num_needed: int) -> str | None:
    """What to say of a video that is too short for its clip."""
    if num_frames >= num_needed:
        return None
    return f"video {shorten(path)} has {num_frames} frames, {num_needed} are needed"


def _named_digests(request: ClipRequest) -> list[tuple[str, str | None]]:
    digests = request.control_digests or (None,) * len(request.control_files)
    return list(zip(request.control_files, digests, strict=True))


def _picture(path: str, digest: str | None) -> Image.Image:
    shown, facts = shown_picture(path)
    _check_unchanged(path, digest, lambda: facts.sha256)
    return shown


def _frames(request: ClipRequest, path: str) -> list[Image.Image]:
    return _read(request, path, request.num_frames, at_end=False)


def _read(request: ClipRequest, path: str, num_frames: int, *, at_end: bool) -> list[Image.Image]:
    try:
        _check_unchanged(path, dict(_named_digests(request)).get(path), lambda: _digest(path))
        skip = max(0, count_frames(path, MAX_FRAMES) - num_frames) if at_end else 0
        frames: np.ndarray = read_video(path, num_frames, skip)
    except (OSError, VideoError) as error:
        raise PictureError(f"video {shorten(path)} cannot be used: {_reason(error)}") from None
    if problem := too_few_frames(path, len(frames), num_frames):
        raise PictureError(problem)
    return [_in_size(Image.fromarray(frame), request) for frame in frames]


def _in_size(frame: Image.Image, request: ClipRequest) -> Image.Image:
    size = (request.width, request.height)
    return fitted(frame, *size, request.image_fit).resize(size, Image.Resampling.LANCZOS)


def _check_unchanged(path: str, digest: str | None, now: Callable[[], str]) -> None:
    if digest is not None and now() != digest:
        raise PictureError(f"{shorten(path)} was changed after it was checked; run the same command again")


def _digest(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())
