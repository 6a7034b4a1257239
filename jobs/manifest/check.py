"""A manifest to clip requests: every row is checked, and what was checked is what is rendered.

The rows go through a temporary file, so a million of them need no more memory than 64 bits for each id, and a manifest
that is changed, or that was a pipe, is not read again.
"""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np

from cineray.caching.plan import AnyPlan
from cineray.caching.policies.smoothcache import LayerPlan
from cineray.jobs.manifest.forms import EXAMPLE, Numbered, read_rows
from cineray.jobs.manifest.row import REQUEST_NAMES, Row
from cineray.jobs.manifest.row_file import RowFile
from cineray.jobs.manifest.source import opened
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.media.inputs import Pictures
from cineray.pipeline.media.picture import PictureError
from cineray.pipeline.request import ClipRequest, InputError, is_plain, problems
from cineray.text import printable, shorten

MAX_REPORTED = 20  # bad rows shown; the rest is counted
MAX_BAD = 1_000_000  # then the rest is not read: a pipe of nonsense may have no end
MAX_REASON = 400  # characters of what is wrong with one row
MoreCheck = Callable[[ClipRequest], str | None]
MAX_REMEMBERED = 1000  # combinations of sizes and the like that were found good


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDefaults:
    """What a row gets where it is silent: the command line's options, else the model's own values."""

    negative_prompt: str | None = None
    seed: int
    width: int
    height: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    fps: int
    cache: str
    image: str | None = None
    image_fit: str = "stretch"
    flow_shift: float | None = None
    guidance_scale_2: float | None = None
    seconds: float | None = None
    reference_images: tuple[str, ...] = ()
    control_video: str | None = None
    control_mask: str | None = None
    conditioning_scale: float | None = None


def to_request(row: Row, defaults: RunDefaults, folder: Path) -> ClipRequest:
    """Fills in the defaults; relative paths of files are meant from the manifest's `folder`."""
    values = {}
    for field, name in REQUEST_NAMES.items():
        value = getattr(row, field)
        values[name] = getattr(defaults, name) if value is None else value
    for name in ("image", "control_video", "control_mask"):
        if values[name] is not None:
            values[name] = str(folder / values[name])
    values["reference_images"] = tuple(str(folder / path) for path in values["reference_images"])
    for name in ("guidance_scale", "guidance_scale_2", "seconds", "conditioning_scale"):
        values[name] = None if values[name] is None else float(values[name])
    return ClipRequest(id=row.clip_id, prompt=row.prompt, **values)


class RequestCheck:
    """Says all that keeps a request from being rendered by a model, each in one phrase.

    A manifest names the same few policies and pictures a million times; each is read once.

    Args:
        num_ranks: that share a clip's tokens.
        more: what else is asked about a request that the model can render; gives a phrase, or None.
    """

    def __init__(self, checkpoint: Checkpoint, num_ranks: int = 1, more: MoreCheck | None = None) -> None:
        self._checkpoint = checkpoint
        self._num_ranks = num_ranks
        self._more = more
        self._rule = checkpoint.size_rule
        self._policies: dict[str, AnyPlan | str | None] = {}  # a text says what is wrong
        self._pictures = Pictures()

    def __call__(self, request: ClipRequest) -> list[str]:
        found = problems(request, self._rule)
        found += self.prompt_problems(request.prompt)
        found += self._policy_problems(request)
        num_tokens = self._checkpoint.num_shared_tokens(request)
        if not found and num_tokens < self._num_ranks:
            tokens = "tokens" if self._checkpoint.model.sharded.num_frames is None else "tokens a frame"
            found.append(f"a clip of {num_tokens} {tokens} cannot be shared by {self._num_ranks} ranks; each needs one")
        if request.image is not None and self._rule.takes_image:
            try:
                self._pictures.facts(request.image)
            except PictureError as error:
                found.append(str(error))
        if self._rule.control_fields and not found:
            found += self._pictures.control_problems(request, self._rule.num_control_frames(request))
        if not found and self._more is not None and (reason := self._more(request)):
            found.append(reason)
        return found

    def prompt_problems(self, prompt: str) -> list[str]:
        """What the model has against a prompt."""
        problem = self._checkpoint.adapter.prompt_problem(prompt)
        return [] if problem is None else [problem]

    def _policy_problems(self, request: ClipRequest) -> list[str]:
        if request.cache not in self._policies:
            if len(self._policies) >= MAX_REMEMBERED:
                self._policies.clear()
            try:
                self._policies[request.cache] = self._checkpoint.plan_cache(request.cache)
            except (ValueError, OSError) as error:  # OSError: a file's name that is too long
                self._policies[request.cache] = str(error)
        plan = self._policies[request.cache]
        if isinstance(plan, str):
            return [plan]
        if isinstance(plan, LayerPlan) and plan.schedule.num_steps != request.num_inference_steps:
            return [f"cache: the schedule is for {plan.schedule.num_steps} steps, got {request.num_inference_steps}"]
        return []


_all_but_seed_and_image = attrgetter(*(field for field in REQUEST_NAMES if field not in ("seed", "image")))


class RowCheck:
    """Says what keeps a row from being rendered.

    Rows of a large manifest differ in id, prompt and seed, and are alike in all else: that is checked once.
    """

    def __init__(self, defaults: RunDefaults, check: RequestCheck, folder: Path) -> None:
        self._defaults = defaults
        self._folder = folder
        self._check = check
        self._good: set[tuple[object, ...]] = set()

    def __call__(self, row: Row) -> list[str]:
        rest = _all_but_seed_and_image(row)
        seed = self._defaults.seed if row.seed is None else row.seed
        if row.image is None and rest in self._good and is_plain(row.clip_id, row.prompt, seed):
            return self._check.prompt_problems(row.prompt)
        found = self._check(to_request(row, self._defaults, self._folder))
        if not found and row.image is None and len(self._good) < MAX_REMEMBERED:
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


class BadRows:
    """What is wrong with which rows: the first MAX_REPORTED, and how many there are."""

    def __init__(self, name: str, unit: str) -> None:
        self._name = name
        self.unit = unit
        self.num_rows = 0
        self._reasons: dict[int, list[str]] = {}

    def add(self, number: int, reasons: list[str], is_known: bool = False) -> None:
        """Args: is_known: the row is bad for another reason, and was added for it."""
        self.num_rows += not is_known
        if number in self._reasons:
            self._reasons[number] += reasons
        elif not is_known and (len(self._reasons) < MAX_REPORTED or number < max(self._reasons)):
            self._reasons[number] = reasons
            if len(self._reasons) > MAX_REPORTED:
                del self._reasons[max(self._reasons)]

    def raise_any(self) -> None:
        """Raises InputError if there are any."""
        if self.num_rows:
            raise InputError(*self.lines())

    def lines(self) -> list[str]:
        """A line for each of the first MAX_REPORTED, and one for the rest."""
        lines = [
            f"{self._name} {self.unit} {number}: {printable('; '.join(reasons), MAX_REASON)}"
            for number, reasons in sorted(self._reasons.items())
        ]
        more = self.num_rows - len(lines)
        if more:
            unread = "; the rest was not read" if self.num_rows >= MAX_BAD else ""
            lines.append(f"{self._name}: {more} more bad {self.unit}s{unread}")
        return lines


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedManifest:
    """The clips of a manifest, all of which have been checked; it is not looked at any more.

    Args:
        repeated: numbers of the rows whose id an earlier row has; not among the clips.
        notes: what was left out on purpose, for the user.
    """

    rows: RowFile
    defaults: RunDefaults
    folder: Path
    repeated: frozenset[int]
    notes: tuple[str, ...]

    @property
    def num_clips(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ClipRequest]:
        """As `requests`, each time from the first one on."""
        return self.requests()

    def requests(self) -> Iterator[ClipRequest]:
        """One at a time, in their order.

        Raises:
            InputError: the temporary file cannot be read any more.
        """
        for is_bad, number, *values in self.rows:
            if not is_bad and number not in self.repeated:
                yield to_request(Row(number, *values), self.defaults, self.folder)


def check_manifest(
    path: Path,
    defaults: RunDefaults,
    checkpoint: Checkpoint,
    on_row: Callable[[int], None] = lambda _: None,
    num_ranks: int = 1,
    more: MoreCheck | None = None,
) -> CheckedManifest:
    """Reads the whole manifest, once; `-` is standard input.

    Args:
        on_row: called with each row's number, for a progress display.
        num_ranks, more: as `RequestCheck` takes them.

    Raises:
        InputError: it cannot be read, has no clips, or bad rows; one line of message per bad row with its number and
            reason.
    """
    checked, bad = survey_manifest(path, defaults, checkpoint, on_row, num_ranks, more)
    bad.raise_any()
    return checked


def survey_manifest(
    path: Path,
    defaults: RunDefaults,
    checkpoint: Checkpoint,
    on_row: Callable[[int], None] = lambda _: None,
    num_ranks: int = 1,
    more: MoreCheck | None = None,
) -> tuple[CheckedManifest, BadRows]:
    """Reads the whole manifest as `check_manifest` does, and gives what is wrong with it beside what is good.

    Raises:
        InputError: it cannot be read, or has no clips.
    """
    notes: list[str] = []
    with opened(path) as source:
        unit, numbered = read_rows(source, notes.append)
        bad = BadRows(source.name, unit)
        check = RowCheck(defaults, RequestCheck(checkpoint, num_ranks, more), source.folder)
        rows, ids = spool(numbered, check, bad, on_row)
        repeated = _find_repeated(rows, hashes, bad) if (hashes := ids.repeated()) else frozenset()
        if not rows and not bad.num_rows:
            raise InputError(f"{source.name} has no clips; write one JSON object per line, such as {EXAMPLE}")
        return CheckedManifest(
            rows=rows, defaults=defaults, folder=source.folder, repeated=repeated, notes=tuple(notes)
        ), bad


def spool(
    numbered: Numbered, check: Callable[[Row], list[str]], bad: BadRows, on_row: Callable[[int], None]
) -> tuple[RowFile, _Ids]:
    """Puts all rows that can be read into a file of their own, each behind a flag that says whether it is bad."""
    rows, ids = RowFile("the clips of the manifest"), _Ids()
    for number, row in numbered:
        on_row(number)
        reasons = row if isinstance(row, list) else check(row)
        if reasons:
            bad.add(number, reasons)
            if bad.num_rows >= MAX_BAD:
                break
        if isinstance(row, Row):
            ids.add(row.clip_id)
            rows.add((True, number, "", row.id) if reasons else (False, *row))  # a bad one may be a megabyte
    return rows, ids


def _find_repeated(rows: RowFile, repeated: set[int], bad: BadRows) -> frozenset[int]:
    """Adds the rows whose id an earlier one has, and returns their numbers; remembers no id but where hashes repeat."""
    seen: set[str] = set()
    numbers: set[int] = set()
    for is_bad, *values in rows:
        row = Row(*values)
        if hash(row.clip_id) not in repeated:
            continue
        if row.clip_id in seen:
            reason = f"id {shorten(row.clip_id)} is used by an earlier {bad.unit}; ids must be unique"
            bad.add(row.number, [reason], is_known=is_bad)
            numbers.add(row.number)
        seen.add(row.clip_id)
    return frozenset(numbers)


def check_prompts(
    prompts: list[str],
    defaults: RunDefaults,
    checkpoint: Checkpoint,
    num_ranks: int = 1,
    more: MoreCheck | None = None,
) -> list[ClipRequest]:
    """Requests of prompts typed on the command line; ids count from 1.

    Raises:
        InputError: no prompt, or a prompt or option that cannot be rendered.
    """
    if not prompts:
        raise InputError("nothing to render: give prompts or --manifest FILE")
    requests, bad = survey_prompts(prompts, defaults, checkpoint, num_ranks, more)
    if bad:
        raise InputError(*bad[:MAX_REPORTED])
    return requests


def survey_prompts(
    prompts: list[str],
    defaults: RunDefaults,
    checkpoint: Checkpoint,
    num_ranks: int = 1,
    more: MoreCheck | None = None,
) -> tuple[list[ClipRequest], list[str]]:
    """(requests of the prompts that can be rendered, a line of what is wrong with each of the others)."""
    check = RequestCheck(checkpoint, num_ranks, more)
    good, bad = [], []
    for number, prompt in enumerate(prompts, 1):
        request = to_request(Row(number, prompt), defaults, Path())
        if reasons := check(request):
            bad.append(f"prompt {request.id}: {'; '.join(reasons)}")
        else:
            good.append(request)
    return good, bad
