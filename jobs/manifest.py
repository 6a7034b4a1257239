"""JSON lines to clip requests, checked as a stream: a million lines need no more memory than 64 bits for each id."""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError

from cineray.caching.spec import AnyPlan, LayerPlan
from cineray.pipeline.checkpoint import Checkpoint
from cineray.pipeline.picture import PictureError, Pictures
from cineray.pipeline.request import ClipRequest, InputError, is_plain, problems
from cineray.text import shorten

MAX_LINE_BYTES = 1_000_000  # a prompt may have 20,000 characters of up to 12 bytes each when escaped
MAX_REPORTED = 20  # bad lines shown; the rest is counted
MAX_REMEMBERED = 1000  # combinations of sizes and the like that were found good


class ManifestLine(BaseModel):
    """One row as written; None means the run's default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str
    id: str | StrictInt | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: StrictFloat | StrictInt | None = Field(default=None, allow_inf_nan=False)
    fps: int | None = None
    cache: str | None = None
    image: str | None = None
    image_fit: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDefaults:
    """What a row gets where it is silent: the command line's options, else the model's own values."""

    negative_prompt: str | None
    seed: int
    width: int
    height: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    fps: int
    cache: str
    image: str | None
    image_fit: str = "stretch"


def to_request(line: ManifestLine, number: int, defaults: RunDefaults, folder: Path) -> ClipRequest:
    """Fills in the defaults; a relative `image` is meant from the manifest's `folder`."""

    def given(value, default):
        return default if value is None else value

    image = given(line.image, defaults.image)
    return ClipRequest(
        id=clip_id(line, number),
        prompt=line.prompt,
        negative_prompt=given(line.negative_prompt, defaults.negative_prompt),
        seed=given(line.seed, defaults.seed),
        width=given(line.width, defaults.width),
        height=given(line.height, defaults.height),
        num_frames=given(line.frames, defaults.num_frames),
        num_inference_steps=given(line.steps, defaults.num_inference_steps),
        guidance_scale=float(given(line.guidance, defaults.guidance_scale)),
        fps=given(line.fps, defaults.fps),
        cache=given(line.cache, defaults.cache),
        image=None if image is None else str(folder / image),
        image_fit=given(line.image_fit, defaults.image_fit),
    )


class RequestCheck:
    """Says all that keeps a request from being rendered by a model, each in one phrase.

    A manifest names the same few policies and pictures a million times; each is read once.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._rule = checkpoint.size_rule
        self._policies: dict[str, AnyPlan | str | None] = {}  # a text says what is wrong
        self._pictures = Pictures()

    def __call__(self, request: ClipRequest) -> list[str]:
        found = problems(request, self._rule)
        found += self._policy_problems(request)
        if request.image is not None and self._rule.takes_image:
            try:
                self._pictures.facts(request.image)
            except PictureError as error:
                found.append(str(error))
        return found

    def _policy_problems(self, request: ClipRequest) -> list[str]:
        if request.cache not in self._policies:
            try:
                self._policies[request.cache] = self._checkpoint.plan_cache(request.cache)
            except ValueError as error:
                self._policies[request.cache] = str(error)
        plan = self._policies[request.cache]
        if isinstance(plan, str):
            return [plan]
        if isinstance(plan, LayerPlan) and plan.schedule.num_steps != request.num_inference_steps:
            return [f"cache: the schedule is for {plan.schedule.num_steps} steps, got {request.num_inference_steps}"]
        return []


class LineCheck:
    """Says what keeps a line from being rendered.

    Lines of a large manifest differ in id, prompt and seed, and are alike in all else: that is checked once.
    """

    def __init__(self, defaults: RunDefaults, checkpoint: Checkpoint, folder: Path) -> None:
        self._defaults = defaults
        self._folder = folder
        self._check = RequestCheck(checkpoint)
        self._good: set[tuple[object, ...]] = set()

    def __call__(self, line: ManifestLine, number: int) -> list[str]:
        rest = (line.negative_prompt, line.width, line.height, line.frames, line.steps, line.guidance, line.fps)
        rest = (*rest, line.cache, line.image_fit)
        seed = self._defaults.seed if line.seed is None else line.seed
        if line.image is None and rest in self._good and is_plain(clip_id(line, number), line.prompt, seed):
            return []
        found = self._check(to_request(line, number, self._defaults, self._folder))
        if not found and line.image is None and len(self._good) < MAX_REMEMBERED:
            self._good.add(rest)
        return found


class _Ids:
    """Finds ids that are used twice, in 8 bytes for each: first the hashes that repeat, then who has them."""

    def __init__(self) -> None:
        self._hashes = array("q")

    def add(self, clip_id: str) -> None:
        self._hashes.append(hash(clip_id))

    def repeated(self) -> set[int]:
        """Hashes of two ids or more: nearly always of one that stands there twice."""
        ordered = np.sort(np.frombuffer(self._hashes, dtype=np.int64)) if self._hashes else np.empty(0, np.int64)
        return set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())


def clip_id(line: ManifestLine, number: int) -> str:
    """What the line says, else its number."""
    return str(number if line.id is None else line.id)


def read_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(line number from 1, line) of every line that is not blank; None for one above MAX_LINE_BYTES."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                yield number, None
            elif line.strip():
                yield number, line


def _parse(line: bytes | None) -> ManifestLine | list[str]:
    if line is None:
        return [f"the line must have at most {MAX_LINE_BYTES} bytes"]
    try:
        return ManifestLine.model_validate_json(line)
    except ValidationError as error:
        return list(dict.fromkeys(_phrase(e) for e in error.errors(include_url=False)))


def _phrase(error) -> str:
    field = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "json_invalid":
        return f"not JSON: {error['msg'].removeprefix('Invalid JSON: ')}"
    if error["type"] == "extra_forbidden":
        return f"unknown field {shorten(field)}; allowed: {', '.join(ManifestLine.model_fields)}"
    if error["type"] == "missing":
        return f"{field} is required"
    if not field:
        return 'each line must be a JSON object such as {"prompt": "..."}'
    kinds = {"str": "a text", "int": "a whole number"}
    kind = "a number" if field == "guidance" else kinds["str" if field in _TEXT_FIELDS else "int"]
    return f"{field} must be {kind}, got {shorten(repr(error['input']))}"


_TEXT_FIELDS = {"prompt", "id", "negative_prompt", "cache", "image", "image_fit"}


def check_manifest(
    path: Path, defaults: RunDefaults, checkpoint: Checkpoint, on_line: Callable[[int], None] = lambda number: None
) -> int:
    """Reads the whole manifest once and keeps nothing of it.

    Args:
        on_line: called with each line number, for a progress display.

    Returns:
        The number of clips.

    Raises:
        InputError: no file, no clips, or bad lines; one line of message per bad line with its number and reason.
    """
    _check_readable(path)
    ids = _Ids()
    bad, num_clips = _check_lines(path, LineCheck(defaults, checkpoint, path.parent), ids.add, on_line)
    if repeated := ids.repeated():
        # once more, to say which lines; one that was changed meanwhile is found out when it is rendered
        bad, num_clips = _check_lines(path, LineCheck(defaults, checkpoint, path.parent), _SeenIds(repeated), on_line)
    if bad:
        raise InputError(*bad)
    if num_clips == 0:
        raise InputError(f'{path} has no clips; write one JSON object per line, such as {{"prompt": "..."}}')
    return num_clips


class _SeenIds:
    """Says which ids were there before; remembers those alone whose hash is known to repeat."""

    def __init__(self, repeated: set[int]) -> None:
        self._repeated = repeated
        self._seen: set[str] = set()

    def __call__(self, clip_id: str) -> str | None:
        if hash(clip_id) not in self._repeated:
            return None
        if clip_id in self._seen:
            return f"id {shorten(clip_id)} is used by an earlier line; ids must be unique"
        self._seen.add(clip_id)
        return None


def _check_lines(
    path: Path, check: LineCheck, check_id: Callable[[str], str | None], on_line: Callable[[int], None]
) -> tuple[list[str], int]:
    """(a message for each bad line, and at last one for those above MAX_REPORTED; number of clips)."""
    bad, num_bad, num_clips = [], 0, 0
    for number, line in read_lines(path):
        on_line(number)
        num_clips += 1
        parsed = _parse(line)
        if isinstance(parsed, list):
            reasons = parsed
        else:
            reasons = check(parsed, number)
            repeats = check_id(clip_id(parsed, number))
            if repeats is not None:
                reasons.append(repeats)
        if reasons:
            num_bad += 1
            if num_bad <= MAX_REPORTED:
                bad.append(f"{path} line {number}: {'; '.join(reasons)}")
    if num_bad > MAX_REPORTED:
        bad.append(f"{path}: {num_bad - MAX_REPORTED} more bad lines")
    return bad, num_clips


def stream_requests(path: Path, defaults: RunDefaults) -> Iterator[ClipRequest]:
    """The requests of a manifest that `check_manifest` has passed, one at a time.

    Raises:
        InputError: a line has become unreadable since it was checked.
    """
    for number, line in read_lines(path):
        parsed = _parse(line)
        if isinstance(parsed, list):
            raise InputError(f"{path} line {number} was changed while it was being rendered: {'; '.join(parsed)}")
        yield to_request(parsed, number, defaults, path.parent)


def check_prompts(prompts: list[str], defaults: RunDefaults, checkpoint: Checkpoint) -> list[ClipRequest]:
    """Requests of prompts typed on the command line; ids count from 1.

    Raises:
        InputError: no prompt, or a prompt or option that cannot be rendered.
    """
    if not prompts:
        raise InputError("nothing to render: give prompts or --manifest FILE.jsonl")
    requests = [
        to_request(ManifestLine(prompt=prompt), number, defaults, Path()) for number, prompt in enumerate(prompts, 1)
    ]
    check = RequestCheck(checkpoint)
    bad = [f"prompt {request.id}: {'; '.join(reasons)}" for request in requests if (reasons := check(request))]
    if bad:
        raise InputError(*bad[:MAX_REPORTED])
    return requests


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise InputError(f"manifest {path} cannot be read: {error.strerror}") from None
