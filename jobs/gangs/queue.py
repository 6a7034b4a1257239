"""The manifest as a driver reads it: a few clips ahead, with what the output folder knows of each."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from cineray.jobs.gangs.events import NewClip
from cineray.jobs.gangs.messages import RunSpec, Task
from cineray.jobs.gangs.retry import is_quarantined
from cineray.jobs.output.commit import Doubt, EntryError, find_clip
from cineray.jobs.output.failure_record import MAX_REASON_CHARS, MAX_REASONS, FailureRecord, read_failure_record
from cineray.jobs.output.folder import OutputError, OutputFolder
from cineray.jobs.output.record import clip_warnings, fingerprint_of, render_options
from cineray.jobs.output.results import ClipResult
from cineray.pipeline.footprint.fit import Demand
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.loading.weights import Identity
from cineray.pipeline.media.inputs import Pictures
from cineray.pipeline.request import ClipRequest, explain, prompt_key
from cineray.text import printable

MAX_SCANNED = 200  # lines looked up at once: the driver has other things to do
MAX_LOOK_S = 1.0  # and for so long: a picture, or a video that no sidecar knows, takes a tenth of a second


class ClipQueue:
    """Reads clips and keeps the tasks of those that are in hand; where each stands is `BatchState`'s to know.

    Args:
        requests: a stream; read only as far as it is asked for.
        demands_of: what a clip takes of GPUs, for the actors to compare; None where they know already.

    Attributes:
        tasks: of the clips in hand, by name.
        doubted: lines about videos that are rendered again, until they are reported.
    """

    def __init__(
        self,
        requests: Iterator[ClipRequest],
        folder: OutputFolder,
        checkpoint: Checkpoint,
        identity: Identity,
        spec: RunSpec,
        demands_of: Callable[[ClipRequest], tuple[Demand, ...]] | None = None,
    ) -> None:
        self._requests = requests
        self._demands_of = demands_of
        self._folder = folder
        self._checkpoint = checkpoint
        self._identity = identity
        self._spec = spec
        self._options = render_options(spec.options, spec.lossless)
        self._pictures = Pictures()
        self.tasks: dict[str, Task] = {}
        self.is_exhausted = False
        self.doubted: list[str] = []

    def read(self, num_clips: int) -> tuple[list[NewClip], list[ClipResult]]:
        """Reads until there are so many new clips, or for a moment.

        Returns:
            Clips to render; clips that an earlier run has committed, and those that cannot even be looked up.
        """
        new: list[NewClip] = []
        known: list[ClipResult] = []
        began_s = time.monotonic()
        for _ in range(MAX_SCANNED):
            if len(new) >= num_clips or time.monotonic() - began_s > MAX_LOOK_S:
                break
            request = next(self._requests, None)
            if request is None:
                self.is_exhausted = True
                break
            try:
                found = self._look_up(request)
            except OutputError:
                raise
            except Exception as reason:  # noqa: BLE001  # its image is gone, its video cannot be read
                found = ClipResult.of(request, "failed", 0.0, error=explain(reason))
            if isinstance(found, NewClip):
                new.append(found)
            else:
                known.append(found)
        return new, known

    def _look_up(self, request: ClipRequest) -> NewClip | ClipResult:
        task = self._task(self._pictures.pinned(request))
        video = self._folder.video_path(request, task.fingerprint)
        try:
            stands = find_clip(self._folder, request, task.fingerprint)
        except EntryError as reason:
            self._write_failure_record(task, "failed", [str(reason)])
            return ClipResult.of(request, "failed", 0.0, error=str(reason))
        if isinstance(stands, dict):
            return ClipResult.of(request, "existing", 0.0, str(video), stands)
        if isinstance(stands, Doubt):
            self.doubted.append(f"{request.id}: {video} is rendered again: {stands.reason}")
        self.tasks[task.name] = task
        return NewClip(
            task.name, request.id, task.prompt_key, tuple(self._earlier_strikes(task)), request.num_inference_steps
        )

    def warned(self, name: str, unread: Sequence[str]) -> Task:
        """The task of a clip that is assigned, with all that it must be warned of.

        Args:
            unread: what the text encoder did not read of its prompts.
        """
        task = self.tasks[name]
        unused = self._checkpoint.adapter.unused(task.request)
        self.tasks[name] = replace(task, warnings=(*clip_warnings(task.request), *unused, *unread))
        return self.tasks[name]

    def record_failure(
        self, name: str, status: Literal["failed", "quarantined", "retrying"], reasons: Sequence[str]
    ) -> None:
        """Writes down what a clip went through."""
        self._write_failure_record(self.tasks[name], status, reasons)

    def end(self, name: str, is_done: bool) -> Task:
        """The clip is out of hand."""
        task = self.tasks.pop(name)
        if is_done:
            self._folder.delete(self._folder.failure_path(task.request.id, task.fingerprint))
        return task

    def _write_failure_record(
        self, task: Task, status: Literal["failed", "quarantined", "retrying"], reasons: Sequence[str]
    ) -> None:
        path = self._folder.failure_path(task.request.id, task.fingerprint)
        shown = [printable(reason)[:MAX_REASON_CHARS] for reason in reasons[-MAX_REASONS:]]
        record = FailureRecord(id=task.request.id, fingerprint=task.fingerprint, status=status, reasons=shown)
        self._folder.write_json(str(path.relative_to(self._folder.path)), record.model_dump())

    def _task(self, request: ClipRequest) -> Task:
        digest = self._identity.digest
        fingerprint = fingerprint_of(request, self._checkpoint, digest, self._options)
        key = prompt_key(self._checkpoint.adapter.encode_inputs(request), digest, self._spec.options.dtype_name)
        demands = self._demands_of(request) if self._demands_of else ()
        return Task(request=request, fingerprint=fingerprint, prompt_key=key, demands=demands)

    def _earlier_strikes(self, task: Task) -> list[str]:
        """The strikes from a run that was cut short; one that ended by quarantining the clip leaves none."""
        try:
            record = read_failure_record(self._folder.failure_path(task.request.id, task.fingerprint))
        except (OSError, ValueError):
            return []  # what is not surely the clip's is not held against it
        began_anew = record.status != "retrying" or is_quarantined(len(record.reasons))
        return [] if began_anew else list(record.reasons)
