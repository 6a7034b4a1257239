"""When a clip is there: a rendered one is written and committed, one that stands there already is looked at.

The video counts. Its trace and its sidecar are written before it gets its final name, so that a disk that fills up
between them leaves a clip that is not there rather than one without a trace. The sidecar remembers the video: size,
time and SHA-256. A video that is not the one that was written (empty, cut, changed, of something else) is doubted:
its clip is rendered again, and replaces it in one step.
"""

import hashlib
import os
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cineray.jobs.output.folder import OutputFolder
from cineray.jobs.output.own_files import kind_of
from cineray.jobs.output.record import checked_record, clip_timings, read_record
from cineray.pipeline.media.video import VideoError
from cineray.pipeline.request import ClipRequest, InputError

if TYPE_CHECKING:  # a driver on Ray reads records, and does without torch
    from cineray.pipeline.render import RenderedClip


class EntryError(InputError):
    """Something that cineray did not make stands under a clip's name: that clip cannot be written."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why a file under a clip's final name is not its whole video."""

    reason: str


def find_clip(folder: OutputFolder, request: ClipRequest, fingerprint: str) -> dict[str, Any] | Doubt | None:
    """What stands under a clip's final name.

    Cheap where the sidecar knows the file by its size and time; otherwise the file is read once, and remembered.

    Returns:
        The record of a clip that is there, None of one that is not.

    Raises:
        EntryError: a link, a folder or the like stands under a name of the clip, or its video cannot be read.
        OutputError: the folder is gone or cannot be written.
    """
    video = folder.video_path(request, fingerprint)
    with folder.translated_os_errors(f"looking for clip {request.id}"):
        _refuse_entries(video)
        try:
            about = os.lstat(video)
        except FileNotFoundError:
            return None
    if about.st_size == 0:
        return Doubt("it is empty")
    sidecar = video.with_suffix(".json")
    record = None
    with suppress(OSError, ValueError):  # gone, broken, or of another clip
        record = read_record(sidecar)
    proof = (record or {}).get("video")  # those of earlier versions have none
    if proof:
        if proof["bytes"] != about.st_size:
            return Doubt(f"it has {about.st_size} bytes, {proof['bytes']} were written")
        if record is not None and proof["mtime_ns"] == about.st_mtime_ns:
            return record
    found = _proof_of(video)
    if proof and found["sha256"] != proof["sha256"]:
        return Doubt("its bytes are not those that were written")
    if not proof:
        tag = folder.output.metadata(video)
        fault = _fault(folder, video, tag, request)
        if fault is not None:
            return Doubt(fault)
        record = record or tag
    record = (record or {}) | {"video": found}
    folder.write_json(sidecar.name, record)
    return record


def commit_clip(
    folder: OutputFolder,
    request: ClipRequest,
    fingerprint: str,
    clip: "RenderedClip",
    record: dict[str, Any],
    lossless: bool,
    hardware: Mapping[str, Any] | None = None,
) -> Path:
    """Returns the committed video: this one, or the one that another process had committed before.

    Args:
        hardware: stands in the sidecar, not in the video's tag: the same clip has the same bytes.

    Raises:
        EntryError: something that is not cineray's has appeared under the clip's name.
        OutputError: the disk is full, or the folder cannot be written any more.
        VideoError: ffmpeg failed for another reason.
    """
    doing, is_first = f"writing clip {request.id}", True
    while True:
        try:
            return _write_and_commit(folder, request, fingerprint, clip, record, lossless, hardware)
        except (VideoError, OSError):
            has_vanished = not os.path.lexists(folder.path / ".tmp")
            folder.check(doing)  # a fault of the folder is not the clip's
            if folder.is_full_for(clip.frames.nbytes):
                raise folder.disk_full_error(doing) from None
            if not (has_vanished and is_first):
                raise
            is_first = False


def _write_and_commit(
    folder: OutputFolder,
    request: ClipRequest,
    fingerprint: str,
    clip: "RenderedClip",
    record: dict[str, Any],
    lossless: bool,
    hardware: Mapping[str, Any] | None = None,
) -> Path:
    video = folder.video_path(request, fingerprint)
    stands = find_clip(folder, request, fingerprint)
    if isinstance(stands, dict):
        return video  # another process was faster
    rendered = time.monotonic()
    sidecar, trace = video.with_suffix(".json"), video.with_suffix(".trace.json")
    is_committed = False
    with folder.new_video(request) as temporary:
        folder.output.write(clip.frames, temporary, request, record, lossless)
        proof = _proof_of(temporary, is_flushed=True)
        try:
            if clip.trace is not None:
                folder.write_json(trace.name, clip.trace.to_dict(), indent=None)
            about = {} if hardware is None else {"hardware": dict(hardware)}
            about |= {"timings": clip_timings(clip, time.monotonic() - rendered), "video": proof}
            folder.write_json(sidecar.name, record | about)
            is_committed = folder.commit(temporary, video, replace=isinstance(stands, Doubt))
            if not is_committed:  # one has appeared in the meantime, and the sidecar is of ours
                folder.delete(sidecar)
                if not isinstance(find_clip(folder, request, fingerprint), dict):
                    folder.write_json(sidecar.name, record | about)
                    folder.commit(temporary, video, replace=True)
                is_committed = True
        finally:
            if not is_committed and stands is None:
                folder.delete(trace)
                folder.delete(sidecar)
    return video


def _refuse_entries(video: Path) -> None:
    for path, is_replaced in (
        (video, False),
        (video.with_suffix(".json"), True),
        (video.with_suffix(".trace.json"), True),
    ):
        kind = kind_of(path)
        if kind not in (None, "a file") and not (is_replaced and kind != "a folder"):
            raise EntryError(f"{path} is {kind}, which cineray does not make; remove it and run the same command again")


def _proof_of(video: Path, is_flushed: bool = False) -> dict[str, Any]:
    """Size in bytes, time of the last change in nanoseconds, and SHA-256 of a regular file.

    Args:
        is_flushed: to the disk, before its time is read: some file systems set it then.

    Raises:
        EntryError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        descriptor = os.open(video, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if is_flushed:
                os.fsync(descriptor)
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise EntryError(f"{video} is not a file any more")
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        if is_flushed:
            raise
        raise EntryError(f"{video} cannot be read: {error.strerror}; change its rights, or remove it") from None
    return {"bytes": about.st_size, "mtime_ns": about.st_mtime_ns, "sha256": digest.hexdigest()}


def _fault(folder: OutputFolder, video: Path, tag: dict[str, Any], request: ClipRequest) -> str | None:
    """Why a file is not the clip's whole one, going by what it shows and what its comment tag says."""
    try:
        checked_record(tag, video.with_suffix(".json"))
    except ValueError:
        return "it does not say that it is this clip"
    return folder.output.fault(video, request)
