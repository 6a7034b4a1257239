"""What is simulated, as streams of planned clips: equal ones, a manifest's rows, checked requests."""

from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

from cineray.jobs.manifest.check import BadRows, spool
from cineray.jobs.manifest.forms import EXAMPLE, read_rows
from cineray.jobs.manifest.row import Row
from cineray.jobs.manifest.row_file import RowFile
from cineray.jobs.manifest.source import opened
from cineray.jobs.simulate.assumptions import ClipSeconds, PlannedClip
from cineray.pipeline.request import MAX_STEPS, ClipRequest, InputError


def equal_clips(number: int, seconds: ClipSeconds) -> Iterator[PlannedClip]:
    """So many clips that take the same time, each with a prompt of its own."""
    for index in range(1, number + 1):
        yield PlannedClip(id=str(index), prompt_key=str(index), seconds=seconds)


def planned_rows(rows: Iterable[Row], seconds: Callable[[Row], ClipSeconds]) -> Iterator[PlannedClip]:
    """Rows of a manifest; `seconds` says what each takes."""
    for row in rows:
        yield PlannedClip(id=row.clip_id, prompt_key=_key(row.prompt, row.negative_prompt), seconds=seconds(row))


def planned_requests(
    requests: Iterable[ClipRequest], seconds: Callable[[ClipRequest], ClipSeconds]
) -> Iterator[PlannedClip]:
    """Requests with every size known, for a cost model that needs them."""
    for request in requests:
        key = _key(request.prompt, request.negative_prompt)
        yield PlannedClip(id=request.id, prompt_key=key, seconds=seconds(request))


def read_manifest(path: Path, say: Callable[[str], None]) -> tuple[int, Iterator[Row]]:
    """(number of clips, the rows as a stream) of a manifest, which is read once; `-` is standard input.

    Args:
        say: told what was left out on purpose.

    Raises:
        InputError: it cannot be read, has no clips, or bad rows, each with its number and reason.
    """
    with opened(path) as source:
        unit, numbered = read_rows(source, say)
        bad = BadRows(source.name, unit)
        rows, _ = spool(numbered, _problems, bad, lambda _: None)
        bad.raise_any()
        if not rows:
            raise InputError(f"{source.name} has no clips; write one JSON object per line, such as {EXAMPLE}")
    return len(rows), _rows(rows)


def _rows(rows: RowFile) -> Iterator[Row]:
    for _, *values in rows:
        yield Row(*values)


def _problems(row: Row) -> list[str]:
    if row.steps is None or 1 <= row.steps <= MAX_STEPS:
        return []
    return [f"steps must be 1 to {MAX_STEPS}, got {row.steps}"]


def _key(prompt: str, negative_prompt: str | None) -> str:
    """One text for what is encoded together; short, since prompts may have 20,000 characters."""
    digest = blake2b(digest_size=16)
    for text in (prompt, negative_prompt):
        digest.update(b"\0" if text is None else b"\1" + text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
