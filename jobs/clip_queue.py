"""The clips that a driver has in hand: a few, pulled from the manifest as they are needed."""

import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cineray.jobs.commit import Doubt, EntryError, find_clip
from cineray.jobs.output_folder import OutputError, OutputFolder
from cineray.jobs.record import clip_warnings, mark_of, render_options
from cineray.jobs.results import ClipResult
from cineray.jobs.retry import is_quarantined
from cineray.jobs.stages import RunSpec, Task
from cineray.jobs.trouble import MAX_REASON_CHARS, MAX_REASONS, Trouble, read_trouble
from cineray.pipeline.checkpoint import Checkpoint
from cineray.pipeline.picture import Pictures
from cineray.pipeline.request import ClipRequest, explain, prompt_key
from cineray.pipeline.weights import Identity
from cineray.text import printable

MAX_SCANNED = 200  # lines looked up at once: the driver has other things to do
MAX_LOOK_S = 1.0  # and for so long: a picture, or a video that no sidecar knows, takes a tenth of a second
MAX_PROMPTS = 256  # encoded prompts kept on disk, 4 MB each for the largest text encoders


@dataclass(slots=True)
class Clip:
    """One clip in hand, and what it went through."""

    task: Task
    began_s: float | None = None
    strikes: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.task.request.id


class ClipQueue:
    """Clips that wait for a gang, in the manifest's order, those that must try again first.

    Args:
        requests: a stream; read only as far as `depth` clips ahead.
    """

    def __init__(
        self,
        requests: Iterator[ClipRequest],
        folder: OutputFolder,
        checkpoint: Checkpoint,
        identity: Identity,
        spec: RunSpec,
        depth: int,
    ) -> None:
        self._requests = requests
        self._folder = folder
        self._checkpoint = checkpoint
        self._identity = identity
        self._spec = spec
        self._options = render_options(spec.options, spec.lossless)
        self._depth = depth
        self._pictures = Pictures()
        self._in_use: dict[str, int] = {}
        self._encoded: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self.waiting: deque[Clip] = deque()
        self.is_exhausted = False
        self.doubted: list[str] = []  # lines about videos that are rendered again, until they are told

    def fill(self) -> list[ClipResult]:
        """Reads ahead; returns clips that an earlier run has committed, and those that cannot even be looked up."""
        known, began_s = [], time.monotonic()
        for _ in range(MAX_SCANNED):
            full = len(self.waiting) >= self._depth
            if self.is_exhausted or full or time.monotonic() - began_s > MAX_LOOK_S:
                break
            request = next(self._requests, None)
            if request is None:
                self.is_exhausted = True
                break
            try:
                result = self._existing_or_queued(request)
            except OutputError:
                raise
            except Exception as reason:  # its image is gone, its video cannot be read
                result = ClipResult.of(request, "failed", 0.0, error=explain(reason))
            if result is not None:
                known.append(result)
        return known

    def _existing_or_queued(self, request: ClipRequest) -> ClipResult | None:
        task = self._task(self._pictures.pinned(request))
        video = self._folder.video_path(request, task.mark)
        try:
            stands = find_clip(self._folder, request, task.mark)
        except EntryError as reason:
            self.write_trouble(Clip(task=task, strikes=[str(reason)]), "failed")
            return ClipResult.of(request, "failed", 0.0, error=str(reason))
        if isinstance(stands, dict):
            return ClipResult.of(request, "existing", 0.0, str(video), stands)
        if isinstance(stands, Doubt):
            self.doubted.append(f"{request.id}: {video} is rendered again: {stands.reason}")
        key = task.prompt_key
        self._in_use[key] = self._in_use.get(key, 0) + 1
        self.waiting.append(Clip(task=task, strikes=self._earlier_strikes(task)))
        return None

    def prompts_wanted(self) -> list[Task]:
        """Clips in hand whose prompt is not encoded yet, one for each prompt."""
        wanted = {clip.task.prompt_key: clip.task for clip in self.waiting}
        return [task for key, task in wanted.items() if key not in self._encoded]

    def add_prompt(self, key: str, warnings: Sequence[str] = ()) -> None:
        """A prompt has been encoded, with these warnings; forgets the oldest that no clip in hand needs."""
        self._encoded[key] = tuple(warnings)
        self._encoded.move_to_end(key)
        for old in list(self._encoded):
            if len(self._encoded) <= MAX_PROMPTS:
                break
            if not self._in_use.get(old):
                del self._encoded[old]
                self._folder.forget_prompt(old)

    def forget_prompt(self, key: str) -> None:
        """It cannot be read: `prompts_wanted` asks for it again."""
        self._encoded.pop(key, None)

    def take_ready(self) -> Clip | None:
        """The first clip whose prompt is encoded."""
        for position, clip in enumerate(self.waiting):
            if clip.task.prompt_key in self._encoded:
                del self.waiting[position]
                request, cut = clip.task.request, self._encoded[clip.task.prompt_key]
                unused = self._checkpoint.adapter.unused(request)
                clip.task = replace(clip.task, warnings=(*clip_warnings(request), *unused, *cut))
                clip.began_s = clip.began_s or time.monotonic()
                return clip
        return None

    def put_back(self, clip: Clip) -> None:
        self.waiting.appendleft(clip)

    def strike(self, clip: Clip, reason: str) -> bool:
        """Notes a lost attempt on disk; whether the clip is quarantined for it."""
        clip.strikes.append(reason)
        done = is_quarantined(len(clip.strikes))
        self.write_trouble(clip, "quarantined" if done else "retrying")
        return done

    def write_trouble(self, clip: Clip, status: Literal["failed", "quarantined", "retrying"]) -> None:
        path = self._folder.trouble_path(clip.id, clip.task.mark)
        reasons = [printable(reason)[:MAX_REASON_CHARS] for reason in clip.strikes[-MAX_REASONS:]]
        trouble = Trouble(id=clip.id, fingerprint=clip.task.mark, status=status, reasons=reasons)
        self._folder.write_json(str(path.relative_to(self._folder.path)), trouble.model_dump())

    def end(self, clip: Clip, is_done: bool) -> None:
        """The clip is out of hand."""
        key = clip.task.prompt_key
        self._in_use[key] -= 1
        if not self._in_use[key]:
            del self._in_use[key]
        if is_done:
            self._folder.forget(self._folder.trouble_path(clip.id, clip.task.mark))

    def close(self) -> None:
        """Removes the encoded prompts."""
        for key in self._encoded:
            self._folder.forget_prompt(key)

    def _task(self, request: ClipRequest) -> Task:
        digest = self._identity.digest
        mark = mark_of(request, self._checkpoint, digest, self._options)
        key = prompt_key(self._checkpoint.adapter.prompt_inputs(request), digest, self._spec.options.dtype_name)
        return Task(request=request, mark=mark, prompt_key=key)

    def _earlier_strikes(self, task: Task) -> list[str]:
        """Those of a run that was cut short; one that ended by quarantining the clip is forgotten: try again."""
        try:
            trouble = read_trouble(self._folder.trouble_path(task.request.id, task.mark))
        except (OSError, ValueError):
            return []  # what is not surely the clip's is not held against it
        began_anew = trouble.status != "retrying" or is_quarantined(len(trouble.reasons))
        return [] if began_anew else list(trouble.reasons)
