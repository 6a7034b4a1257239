"""The loop over clips in one process."""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cineray.jobs.console.progress import RenderProgress
from cineray.jobs.output.commit import Doubt, commit_clip, find_clip
from cineray.jobs.output.folder import OutputError, OutputFolder
from cineray.jobs.output.hardware import begin_peak, hardware
from cineray.jobs.output.lease import Lease, LeasedError
from cineray.jobs.output.record import clip_record, clip_warnings, fingerprint_of, render_options
from cineray.jobs.output.results import ClipResult, ResultLog, Status
from cineray.jobs.output.step_keeper import ClipPreempted, StepKeeper
from cineray.pipeline.gang import SOLO
from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.media.inputs import Pictures
from cineray.pipeline.render import render_clip
from cineray.pipeline.request import ClipRequest, explain


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What all clips of a run share."""

    model: LoadedModel
    folder: OutputFolder
    lease: Lease
    progress: RenderProgress
    lossless: bool
    checkpoint_s: float
    is_stop_requested: Callable[[], bool]
    pictures: Pictures = field(default_factory=Pictures)


def render_batch(batch: Batch, requests: Iterable[ClipRequest], results: ResultLog) -> None:
    """Renders what is not there yet, one clip after the other; whatever one raises, the others continue.

    When it is asked to stop, it preempts the clip in flight after its step.

    Raises:
        OutputError: the output folder is full or gone.
        LeasedError: another driver has taken the folder over.
    """
    options = render_options(batch.model.options, batch.lossless)
    for request in requests:
        batch.lease.check()
        if batch.is_stop_requested():
            return
        try:
            results.add(_render_or_find(batch, request, options))
        except ClipPreempted as preempted:
            batch.folder.log_event("yielded", id=request.id, step=preempted.step, kept=preempted.kept)
            return


def _render_or_find(batch: Batch, request: ClipRequest, options: dict[str, object]) -> ClipResult:
    began = time.monotonic()
    status: Status = "existing"
    fingerprint, video, error, record = None, None, None, {}
    try:
        request = batch.pictures.pinned(request)
        fingerprint = fingerprint_of(request, batch.model.checkpoint, batch.model.digest, options)
        video = batch.folder.video_path(request, fingerprint)
        stands = find_clip(batch.folder, request, fingerprint)
        if isinstance(stands, dict):
            record = stands
        else:
            if isinstance(stands, Doubt):
                batch.progress.say(f"{request.id}: {video} is rendered again: {stands.reason}")
            batch.folder.check(f"clip {request.id} was to be rendered")
            batch.progress.begin_clip(request.id, request.num_inference_steps)
            record, status = _render(batch, request, fingerprint, options), "done"
    except (OutputError, LeasedError, ClipPreempted):
        raise
    except Exception as reason:  # noqa: BLE001  # out of memory, a bad image, ffmpeg; whatever a model may raise
        error, status = explain(reason), "failed"
    wall_s = time.monotonic() - began
    batch.folder.log_event(
        status, id=request.id, fingerprint=fingerprint, wall_s=round(wall_s, 3), **({"error": error} if error else {})
    )
    result = ClipResult.of(request, status, wall_s, None if error else str(video), record, error)
    batch.progress.count_clip(result.line(record.get("warning")))
    return result


def _render(batch: Batch, request: ClipRequest, fingerprint: str, options: dict[str, object]) -> dict[str, Any]:
    """Renders, writes and commits one clip; returns its record."""
    state = batch.folder.step_path(request.id, fingerprint)
    keeper = StepKeeper(state, fingerprint, SOLO, batch.checkpoint_s, batch.is_stop_requested)
    adapter = batch.model.adapter
    warnings = [*clip_warnings(request), *adapter.unused(request), *adapter.cut_prompts(batch.model.pipe, request)]
    batch.progress.warn(request.id, warnings)
    device = batch.model.options.device
    begin_peak(device)
    clip = render_clip(batch.model, request, batch.progress.step, keeper)
    record = clip_record(
        request, fingerprint, batch.model, options, clip, resumed_at=keeper.resumed_at, warnings=warnings
    )
    batch.lease.check()
    commit_clip(batch.folder, request, fingerprint, clip, record, batch.lossless, hardware(device))
    with suppress(OSError):  # the clip is committed, whatever lies there
        state.unlink(missing_ok=True)
    return record
