"""The loop over clips in one process."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cineray.jobs.output_folder import OutputError, OutputFolder
from cineray.jobs.progress import RenderProgress
from cineray.jobs.record import clip_record, clip_timings, policy_text, render_options
from cineray.pipeline.loading import LoadedModel
from cineray.pipeline.render import render_clip
from cineray.pipeline.request import ClipRequest, fingerprint
from cineray.pipeline.video import VideoError, write_video

Status = Literal["done", "existing", "failed", "quarantined"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipResult:
    """One clip of `render --json`; `cost` is the share of the uncached block evaluations that ran."""

    id: str
    status: Status
    video: str | None
    steps: int
    computed_steps: int
    skipped_steps: int
    wall_s: float
    cost: float
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What all clips of a run share."""

    model: LoadedModel
    folder: OutputFolder
    progress: RenderProgress
    lossless: bool


def render_batch(batch: Batch, requests: Iterable[ClipRequest]) -> list[ClipResult]:
    """Renders what is not there yet, one clip after the other; a clip that fails does not stop the others.

    Raises:
        OutputError: the output folder is full or gone.
    """
    options = render_options(batch.model, batch.lossless)
    return [_render_or_find(batch, request, options) for request in requests]


def _render_or_find(batch: Batch, request: ClipRequest, options: dict[str, object]) -> ClipResult:
    began = time.monotonic()
    mark = fingerprint(request, policy_text(request, batch.model), batch.model.digest, options)
    video = batch.folder.video_path(request, mark)
    status: Status = "existing"
    error, record = None, {}
    if video.exists():
        record = _read_sidecar(video)
    else:
        batch.progress.begin_clip(request.id, request.num_inference_steps)
        try:
            record, status = _render(batch, request, mark, video, options), "done"
        except OutputError:
            raise
        except (RuntimeError, ValueError, OSError) as reason:  # out of memory, a bad image, ffmpeg
            error, status = f"{type(reason).__name__}: {' '.join(str(reason).split())[:300]}", "failed"
    wall_s = round(time.monotonic() - began, 3)
    batch.folder.log_event(
        status, id=request.id, fingerprint=mark, wall_s=wall_s, **({"error": error} if error else {})
    )
    note = f": {record['warning']}" if "warning" in record else ""
    batch.progress.end_clip(
        f"{request.id}: {status} in {wall_s:.1f} s" + (f": {error}" if error else f" -> {video}{note}")
    )
    return _result(request, status, None if error else video, record.get("trace", {}), wall_s, error)


def _render(batch: Batch, request: ClipRequest, mark: str, video: Path, options: dict[str, object]) -> dict[str, Any]:
    """Renders, writes and commits one clip; returns its record."""
    clip = render_clip(batch.model, request, batch.progress.step)
    record = clip_record(request, mark, batch.model, options, clip)
    rendered = time.monotonic()
    try:
        with batch.folder.new_video(request, video) as temporary:
            write_video(clip.frames, temporary, request.fps, record, batch.lossless)
    except (VideoError, OSError):
        if batch.folder.is_full_for(clip.frames.nbytes):
            raise batch.folder.full(f"writing clip {request.id}") from None
        raise
    if clip.trace is not None:
        batch.folder.write_json(video.with_suffix(".trace.json").name, clip.trace.content(), indent=None)
    timings = clip_timings(clip, time.monotonic() - rendered)
    batch.folder.write_json(video.with_suffix(".json").name, record | {"timings": timings})
    return record


def _read_sidecar(video: Path) -> dict[str, Any]:
    """The record of a clip that an earlier run committed; empty where the sidecar is gone or broken."""
    try:
        return json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _result(
    request: ClipRequest,
    status: Status,
    video: Path | None,
    trace: dict[str, Any],
    wall_s: float,
    error: str | None,
) -> ClipResult:
    steps = 0 if error else request.num_inference_steps
    return ClipResult(
        id=request.id,
        status=status,
        video=None if video is None else str(video),
        steps=steps,
        computed_steps=trace.get("computed_steps", steps),
        skipped_steps=trace.get("skipped_steps", 0),
        wall_s=wall_s,
        cost=trace.get("cost", 1.0),
        error=error,
    )
