"""Writes a rendered clip and commits it: the video first, which counts, then what can be made anew from it."""

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cineray.jobs.output_folder import OutputFolder
from cineray.jobs.record import checked_record, clip_timings, read_record
from cineray.pipeline.request import ClipRequest
from cineray.pipeline.video import VideoError, read_metadata, write_video

if TYPE_CHECKING:  # a driver on Ray reads records, and does without torch
    from cineray.pipeline.render import RenderedClip


def commit_clip(
    folder: OutputFolder, request: ClipRequest, mark: str, clip: "RenderedClip", record: dict[str, Any], lossless: bool
) -> Path:
    """Returns the committed video: this one, or the one that another process had committed before.

    Raises:
        OutputError: the disk is full, or the folder cannot be written any more.
        VideoError: ffmpeg failed for another reason.
    """
    video = folder.video_path(request, mark)
    rendered = time.monotonic()
    try:
        with folder.new_video(request, video) as temporary:
            write_video(clip.frames, temporary, request.fps, record, lossless)
    except (VideoError, OSError):
        if not folder.path.is_dir():
            raise folder.gone(f"writing clip {request.id}") from None
        if folder.is_full_for(clip.frames.nbytes):
            raise folder.full(f"writing clip {request.id}") from None
        raise
    if clip.trace is not None:
        folder.write_json(video.with_suffix(".trace.json").name, clip.trace.content(), indent=None)
    timings = clip_timings(clip, time.monotonic() - rendered)
    folder.write_json(video.with_suffix(".json").name, record | {"timings": timings})
    return video


def read_or_rebuild_record(folder: OutputFolder, video: Path) -> dict[str, Any]:
    """The record of a committed clip; a sidecar that is gone or broken is written again from the video's own tag.

    One that is of another clip counts as broken. Empty where the tag is no record of this clip's either.
    """
    sidecar = video.with_suffix(".json")
    with suppress(OSError, ValueError):
        return read_record(sidecar)
    try:
        record = checked_record(read_metadata(video), sidecar)
    except (OSError, ValueError, RecursionError):
        return {}
    if not sidecar.is_dir():  # nothing can take a folder's place
        folder.write_json(sidecar.name, record)
    return record
